"""The audit command: what the pseudo-labels of a run are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hubert_ecg import clustering, data, evaluation, features
from hubert_ecg.config import AuditConfig, UserError, to_json
from hubert_ecg.evaluation import audit as numbers
from hubert_ecg.models import HubertECGConfig, token_mask
from hubert_ecg.train import machine
from hubert_ecg.train.evaluate import versions
from hubert_ecg.train.logs import say
from hubert_ecg.train.pseudo_labels import PseudoLabels
from hubert_ecg.train.records import lead_lengths, open_records

if TYPE_CHECKING:
    from torch import Tensor

    from hubert_ecg.data import Batch, Store

# Records whose tokens are labelled once more, shifted and with noise.
_STABILITY_RECORDS = 256
_SHIFTS_S = (0.01, 0.04, 0.16)
_NOISES_DB = (30.0, 20.0, 10.0)
# Settings of a run that say what its pseudo-labels are.
_OF_THE_RUN = ("feature_type", "downsampling_factor", "compat", "crop_s")
_MAX_PRINTED = 10


def audit(config: AuditConfig) -> dict[str, Any]:
    """Run the audit command: ``audit.html`` and ``audit.json`` in the output folder, and a short table.

    Returns:
        The numbers in ``audit.json``.

    Raises:
        UserError: The data, the run or the k-means model cannot be read, or do not fit together.
    """
    config, kmeans_path = _of_the_run(config)
    kmeans = clustering.KMeans.load(kmeans_path)
    width, wanted = kmeans.cluster_centers_.shape[1], features.num_features(config.feature_type)
    if width != wanted:
        raise UserError(
            f"audit: kmeans_path must be a model for {wanted} features ({config.feature_type}), "
            f"got {width} in {kmeans_path}; give its --feature_type"
        )
    if config.compat == "published" and config.crop_s != 5:
        raise UserError(f"audit: crop_s must be 5 with compat published, got {config.crop_s:g}")
    try:
        shape = HubertECGConfig.preset("tiny", sampling_rate_hz=500 / config.downsampling_factor)
    except ValueError as error:
        raise UserError(
            f"audit: no model has tokens at downsampling_factor {config.downsampling_factor} "
            f"(500 Hz divided by it): {error}"
        ) from error
    device = machine.device(config.device)
    store = open_records(config, config.downsampling_factor, config.compat)
    records = np.sort(np.random.default_rng(config.seed).permutation(len(store))[: config.num_records])
    labels = PseudoLabels(kmeans, config.feature_type, config.compat, store.sampling_rate_hz)

    loader = _loader(store, records, config, config.crop_s)
    leads = torch.empty(12, loader.num_samples, device="meta")
    plan = features.frame_plan("audit", leads, config.compat, store.sampling_rate_hz)
    tally = numbers.ClusterAudit(len(kmeans.cluster_centers_), plan, loader.num_samples, config.seed)
    console = Console(stderr=True)
    for batch in track(loader.batches(), "audit", len(loader), console=console, transient=True):
        ecg = batch.leads.to(device)
        tally.add(ecg, labels(ecg), _valid(shape, batch, loader.num_samples))
    if not tally.counts.any():
        raise UserError(f"audit: there must be a token that is no padding, got none in {len(records)} records")
    tasks = [task for task in store.tasks if store.problem_of(task) != "regression"]
    found = tally.result({task: (store.label_names(task), store.targets(task)[records]) for task in tasks}, config.seed)
    found["stability"] = stability(labels, store, records, config, shape, device)
    _write(config, kmeans_path, store, found)
    return found


def stability(
    labels: PseudoLabels,
    store: Store,
    records: np.ndarray,
    config: AuditConfig,
    shape: HubertECGConfig,
    device: torch.device,
) -> dict[str, float]:
    """Share of the tokens that keep their cluster where the crop begins a little later, or has white noise added.

    Noise is so many dB below the power of its lead. Each on the same records, at most 256 of those given.
    """
    rate = store.sampling_rate_hz
    loader = _loader(store, records[:_STABILITY_RECORDS], config, config.crop_s + max(_SHIFTS_S))
    num_samples = round(config.crop_s * rate)
    random = torch.Generator().manual_seed(config.seed)
    kept: dict[str, list[int]] = {}

    def compare(name: str, a: Tensor, b: Tensor, valid: Tensor) -> None:
        same, total = kept.setdefault(name, [0, 0])
        kept[name] = [same + int(((a == b) & valid).sum()), total + int(valid.sum())]

    for batch in loader.batches():
        signal = batch.leads.to(device)
        ecg = signal[..., :num_samples].contiguous()
        first, valid = labels(ecg), _valid(shape, batch, num_samples).to(device)
        for shift_s in _SHIFTS_S:
            shift = max(1, round(shift_s * rate))
            later = labels(signal[..., shift : shift + num_samples].contiguous())
            both = valid & _valid(shape, batch, num_samples, shift).to(device)
            compare(f"a shift of {1000 * shift / rate:.0f} ms", first, later, both)
        noise = torch.randn(ecg.shape, generator=random).to(device)
        power = ecg.square().mean(-1, keepdim=True)
        for decibel in _NOISES_DB:
            noisy = labels(ecg + noise * (power * 10 ** (-decibel / 10)).sqrt())
            compare(f"noise {decibel:.0f} dB down", first, noisy, valid)
    return {name: same / total for name, (same, total) in kept.items() if total}


def _valid(shape: HubertECGConfig, batch: Batch, num_samples: int, begin: int = 0) -> Tensor:
    """Tokens of the samples from ``begin`` on that are no padding."""
    lengths = (lead_lengths(batch) - begin).clamp(0, num_samples)
    return token_mask(shape, lengths, num_samples)


def _loader(store: Store, records: np.ndarray, config: AuditConfig, crop_s: float) -> data.Loader:
    return data.Loader(store, records, config.batch_size, crop_s=crop_s, crop="first", num_workers=config.num_workers)


def _of_the_run(config: AuditConfig) -> tuple[AuditConfig, Path]:
    """The settings with those of the run that is audited, and the file of its clusters.

    Raises:
        UserError: If neither or both of a run and a k-means model are given, or the run has none.
    """
    if (config.model_path is None) == (config.kmeans_path is None):
        given = "none" if config.model_path is None else "both"
        raise UserError(f"audit: one of --model_path and --kmeans_path must be given, got {given}")
    if config.kmeans_path is not None:
        return config, Path(config.kmeans_path)
    assert config.model_path is not None
    path = Path(config.model_path).expanduser()
    folder = path if path.is_dir() else path.with_suffix("")
    settings, kmeans_path = folder / "settings.json", folder / "kmeans.safetensors"
    if not (settings.is_file() and kmeans_path.is_file()):
        raise UserError(
            f"audit: model_path must be what hubert-ecg pretrain wrote, with settings.json and kmeans.safetensors "
            f"in its folder, got {path}; for a k-means model alone, give --kmeans_path"
        )
    run = json.loads(settings.read_text(encoding="utf-8"))["config"]
    return dataclasses.replace(config, **{name: run[name] for name in _OF_THE_RUN}), kmeans_path


def _write(config: AuditConfig, kmeans_path: Path, store: Store, found: dict[str, Any]) -> None:
    folder = Path(config.output_dir) if config.output_dir else kmeans_path.with_name(f"{kmeans_path.stem}_audit")
    evaluation.write_audit(
        folder,
        found,
        title=f"Pseudo-labels of {kmeans_path.parent.name}/{kmeans_path.name}",
        max_clusters=config.max_clusters,
        facts={
            "Data": {"source": store.dataset, "store": str(store.path), "records in it": len(store)},
            "Settings": to_json(config),
            "Versions": versions(),
        },
    )
    Console().print(_table(found))
    say(f"audit: audit.html and audit.json in {folder}")


def _table(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['num_clusters']} clusters of {found['num_tokens']} tokens", title_justify="left")
    for name in ("Cluster", "Share", "Records", "Lead (bits)", "Beat (bits)"):
        table.add_column(name, justify="left" if name == "Cluster" else "right")
    for cluster in found["clusters"][:_MAX_PRINTED]:
        table.add_row(
            str(cluster["cluster"]),
            f"{cluster['share']:.2%}",
            f"{cluster['share_of_records']:.0%}",
            f"{cluster['lead_bits']:.2f}",
            f"{cluster['phase_bits']:.2f}",
        )
    use, told = found["use"], found["information"]
    table.caption = (
        f"perplexity {use['perplexity']:.1f} of {found['num_clusters']}, {use['num_empty']} empty; told of the lead "
        f"{told['lead'].share:.1%}, of the position in the beat {told['beat'].share:.1%}"
    )
    return table
