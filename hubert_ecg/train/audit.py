"""The audit command: what the pseudo-labels of a run are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hubert_ecg import data, evaluation, features
from hubert_ecg.config import AuditConfig, UserError, to_json
from hubert_ecg.data.progress import Progress
from hubert_ecg.evaluation import audit as numbers
from hubert_ecg.models import HubertECGConfig, token_mask
from hubert_ecg.train import machine
from hubert_ecg.train.clusters import load_kmeans
from hubert_ecg.train.evaluate import versions
from hubert_ecg.train.extract import open_work
from hubert_ecg.train.logs import say
from hubert_ecg.train.pseudo_labels import PseudoLabels
from hubert_ecg.train.records import lead_lengths
from hubert_ecg.train.run import ensemble_name

if TYPE_CHECKING:
    from torch import Tensor

    from hubert_ecg.data import Batch, Store

# Records whose tokens are labelled once more, shifted and with noise.
_STABILITY_RECORDS = 256
_SHIFTS_S = (0.01, 0.04, 0.16)
_NOISES_DB = (30.0, 20.0, 10.0)
# Settings of a run that say what its pseudo-labels are.
_OF_THE_RUN = ("feature_type", "teacher", "teacher_layer", "downsampling_factor", "compat", "crop_s")
_MAX_PRINTED = 10


def audit(config: AuditConfig) -> list[dict[str, Any]]:
    """Run the audit command: ``audit.html`` and ``audit.json`` in the output folder, and a short table.

    Those of an ensemble have a number before the dot.

    Returns:
        The numbers in ``audit.json``, for each k-means model.

    Raises:
        UserError: The data, the run or the k-means model cannot be read, or do not fit together.
    """
    config = _of_the_run(config)
    assert config.kmeans_path is not None
    work = open_work(config, machine.device(config.device))
    models = load_kmeans(config.kmeans_path, work.featuriser.width, config.feature_type)
    labels, store = PseudoLabels(work.featuriser, models), work.store
    records = np.sort(np.random.default_rng(config.seed).permutation(len(store))[: config.num_records])

    loader = _loader(store, records, config, config.crop_s)
    leads = torch.empty(12, loader.num_samples, device="meta")
    # A teacher's tokens are those of the model, however features of the signal would be cut.
    compat = "corrected" if config.feature_type == "latent" else config.compat
    plan = features.frame_plan("audit", leads, compat, store.sampling_rate_hz)
    tallies = [
        numbers.ClusterAudit(len(kmeans.cluster_centers_), plan, loader.num_samples, config.seed) for kmeans in models
    ]
    with Progress("audit", len(records)) as bar:
        for batch in loader.batches():
            valid = _valid(work.model, batch, loader.num_samples)
            for tally, clusters in zip(tallies, labels(batch), strict=True):
                tally.add(batch.leads.to(clusters.device), clusters, valid)
            bar.advance(len(batch))
    if not tallies[0].counts.any():
        raise UserError(f"audit: there must be a token that is no padding, got none in {len(records)} records")
    tasks = [task for task in store.tasks if store.problem_of(task) != "regression"]
    targets = {task: (store.label_names(task), store.targets(task)[records]) for task in tasks}
    stable = stability(labels, store, records, config, work.model)
    found = [
        {**tally.result(targets, config.seed), "stability": kept} for tally, kept in zip(tallies, stable, strict=True)
    ]
    _write(config, store, found)
    return found


def stability(
    labels: PseudoLabels, store: Store, records: np.ndarray, config: AuditConfig, shape: HubertECGConfig
) -> list[dict[str, float]]:
    """For each k-means model, the share of the tokens that keep their cluster where the crop begins a little later, or
    has white noise added, so many dB below the power of its lead. On the first 256 of the records.
    """
    rate = store.sampling_rate_hz
    loader = _loader(store, records[:_STABILITY_RECORDS], config, config.crop_s + max(_SHIFTS_S))
    num_samples = round(config.crop_s * rate)
    random = torch.Generator().manual_seed(config.seed)
    kept: list[dict[str, list[int]]] = [{} for _ in labels.kmeans]

    def compare(name: str, a: Tensor, b: Tensor, valid: Tensor) -> None:
        for of_model, first, second in zip(kept, a, b, strict=True):
            same, total = of_model.setdefault(name, [0, 0])
            of_model[name] = [same + int(((first == second) & valid).sum()), total + int(valid.sum())]

    for batch in loader.batches():
        first = labels(_cut(batch, 0, num_samples))
        valid = _valid(shape, batch, num_samples).to(first.device)
        for shift_s in _SHIFTS_S:
            shift = max(1, round(shift_s * rate))
            both = valid & _valid(shape, batch, num_samples, shift).to(first.device)
            compare(f"a shift of {1000 * shift / rate:.0f} ms", first, labels(_cut(batch, shift, num_samples)), both)
        noise = torch.randn(batch.ecg.shape, generator=random)
        for decibel in _NOISES_DB:
            noisy = _cut(batch, 0, num_samples, 10 ** (-decibel / 20) * noise)
            compare(f"noise {decibel:.0f} dB down", first, labels(noisy), valid)
    return [{name: same / total for name, (same, total) in of.items() if total} for of in kept]


def _cut(batch: Batch, begin: int, num_samples: int, noise: Tensor | None = None) -> Batch:
    """Crops that begin later, or with noise scaled by the root mean square of each lead."""
    samples = slice(begin, begin + num_samples)

    def cut(x: Tensor) -> Tensor:
        x = x[..., samples]
        if noise is not None:
            x = x + noise[..., samples] * x.square().mean(-1, keepdim=True).sqrt()
        return x.contiguous()

    lengths = (batch.lengths - begin).clamp(0, num_samples)
    return dataclasses.replace(batch, ecg=cut(batch.ecg), leads=cut(batch.leads), lengths=lengths)


def _valid(shape: HubertECGConfig, batch: Batch, num_samples: int, begin: int = 0) -> Tensor:
    """Tokens of the samples from ``begin`` on that are no padding."""
    lengths = (lead_lengths(batch) - begin).clamp(0, num_samples)
    return token_mask(shape, lengths, num_samples)


def _loader(store: Store, records: np.ndarray, config: AuditConfig, crop_s: float) -> data.Loader:
    return data.Loader(store, records, config.batch_size, crop_s=crop_s, crop="first", num_workers=config.num_workers)


def _of_the_run(config: AuditConfig) -> AuditConfig:
    """The settings with those of the run that is audited, and its k-means models.

    Raises:
        UserError: If neither or both of a run and a k-means model are given, or the run has none.
    """
    if (config.model_path is None) == (config.kmeans_path is None):
        given = "none" if config.model_path is None else "both"
        raise UserError(f"audit: one of --model_path and --kmeans_path must be given, got {given}")
    if config.model_path is None:
        return config
    path = Path(config.model_path).expanduser()
    folder = path if path.is_dir() else path.with_suffix("")
    iterations = folder.parent.glob(f"iteration_*/{folder.name}/settings.json")
    folders = [folder, *sorted((of.parent for of in iterations), key=lambda of: (len(str(of)), of), reverse=True)]
    for folder in folders:
        models = sorted(folder.glob("kmeans*.safetensors"), key=lambda of: (len(of.name), of.name))
        if models and (folder / "settings.json").is_file():
            break
    else:
        raise UserError(
            "audit: model_path must be what hubert-ecg pretrain wrote, with settings.json and kmeans.safetensors in "
            f"its folder, got {path}; for a k-means model alone, give --kmeans_path"
        )
    run = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["config"]
    settings = {name: run[name] for name in _OF_THE_RUN}
    return dataclasses.replace(config, **settings, kmeans_path=",".join(map(str, models)))


def _write(config: AuditConfig, store: Store, found: list[dict[str, Any]]) -> None:
    assert config.kmeans_path is not None
    paths = [Path(path.strip()) for path in config.kmeans_path.split(",")]
    folder = Path(config.output_dir) if config.output_dir else paths[0].with_name("audit")
    for number, (path, of) in enumerate(zip(paths, found, strict=True)):
        name = f"audit{ensemble_name(number, len(paths))}"
        evaluation.write_audit(
            folder / name,
            of,
            title=f"Pseudo-labels of {path.parent.name}/{path.name}",
            max_clusters=config.max_clusters,
            facts={
                "Data": {"source": store.dataset, "store": str(store.path), "records in it": len(store)},
                "Settings": to_json(config),
                "Versions": versions(),
            },
        )
        Console().print(_table(of))
        say(f"audit: {name}.html and {name}.json in {folder}")


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
