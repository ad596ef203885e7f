"""The extract and cluster commands: the stages of pretraining's targets, each by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from hubert_ecg import clustering, data, evaluation, features
from hubert_ecg.config import ClusterConfig, ExtractConfig, UserError, to_json
from hubert_ecg.models import HubertECGConfig, token_mask
from hubert_ecg.train import distributed, machine
from hubert_ecg.train.logs import say
from hubert_ecg.train.records import lead_lengths, open_records
from hubert_ecg.train.token_features import TokenFeatures, ValidTokens, check_path

_BATCH = 256
# Tokens of up to this many bytes are clustered in memory; more of them are read again on every pass.
_IN_MEMORY_BYTES = 1 << 30


def extract_features(config: ExtractConfig) -> TokenFeatures:
    """Run the extract command: the features of each token of the first ``crop_s`` seconds of each record.

    Raises:
        UserError: the data cannot be read, or the settings do not fit together.
    """
    path = Path(config.output_path)
    check_path(path)
    if config.compat == "published" and config.crop_s != 5:
        raise UserError(f"extract: crop_s must be 5 with compat published, got {config.crop_s:g}")
    try:
        shape = HubertECGConfig.preset("tiny", sampling_rate_hz=500 / config.downsampling_factor)
    except ValueError as error:
        raise UserError(
            f"extract: no model has tokens at downsampling_factor {config.downsampling_factor} "
            f"(500 Hz divided by it): {error}"
        ) from error
    device = machine.device(config.device)
    store = open_records(config, config.downsampling_factor, config.compat)
    rate = store.sampling_rate_hz
    loader = data.Loader(
        store, store.split("all"), _BATCH, crop_s=config.crop_s, crop="first", num_workers=config.num_workers
    )
    values = valid = np.empty(0)
    batches = track(
        loader.batches(), f"{config.feature_type} features", len(loader), console=Console(stderr=True), transient=True
    )
    for first, batch in zip(range(0, len(store), _BATCH), batches, strict=True):
        x = features.extract(batch.leads.to(device), config.feature_type, compat=config.compat, sample_rate_hz=rate)
        if not first:
            values, valid = TokenFeatures.allocate(path, (len(store), *x.shape[1:]))
        records = slice(first, first + len(x))
        values[records] = x.cpu().numpy()
        valid[records] = token_mask(shape, lead_lengths(batch), batch.ecg.shape[-1]).numpy()
        clustering.forget_pages(values)
    settings = {**to_json(config), "sampling_rate_hz": rate}
    result = TokenFeatures(values, valid, store.column("record_id").tolist(), settings)
    result.save(path)
    num_records, num_tokens, width = result.features.shape
    say(f"extract: {num_records} records x {num_tokens} tokens x {width} {config.feature_type} features in {path}")
    return result


def cluster_features(config: ClusterConfig) -> clustering.KMeans:
    """Run the cluster command: k-means on the features of valid tokens.

    Beside the model, ``<output>.html`` and ``<output>.json`` say how good the clusters are and how much each is used.
    Under torchrun, each process clusters a share of the records, and the first one writes.

    Raises:
        UserError: the features cannot be read or clustered, or there are fewer tokens than clusters.
    """
    path = Path(config.output_path)
    if path.suffix not in (".pkl", ".safetensors"):
        raise UserError(f"{path} must end in .pkl or .safetensors")
    given = TokenFeatures.load(Path(config.features_path))
    num_records, num_tokens = len(given.valid), int(np.count_nonzero(given.valid))
    if num_tokens < config.num_clusters:
        raise UserError(f"--num_clusters must be at most the number of tokens {num_tokens}, got {config.num_clusters}")
    with distributed.ranks(config.device) as (device, rank, num_ranks):
        # Sums are float64, which Apple's GPUs have not.
        device = torch.device("cpu") if device.type == "mps" else device
        tokens = ValidTokens(given, rank * num_records // num_ranks, (rank + 1) * num_records // num_ranks, device)
        x = tokens if tokens.num_bytes > _IN_MEMORY_BYTES else torch.from_numpy(tokens.read()).to(device)
        kmeans = clustering.KMeans(
            config.num_clusters,
            init=config.init,
            n_init=config.num_init,
            max_iter=config.max_iter,
            tol=config.tol,
            normalize=True,
            batch_size=config.batch_size,
            random_state=config.seed,
            verbose=sys.stderr.isatty(),
        )
        try:
            kmeans.fit(x, distributed=num_ranks > 1)
            scores = clustering.scores(
                x, None, kmeans.cluster_centers_, normalize=True, seed=config.seed, distributed=num_ranks > 1
            )
        except ValueError as error:
            raise UserError(f"cluster: {config.features_path} cannot be clustered ({error})") from error
        if rank == 0:
            _write(config, given, kmeans, scores, num_tokens)
    return kmeans


def _write(
    config: ClusterConfig,
    given: TokenFeatures,
    kmeans: clustering.KMeans,
    scores: dict[str, float],
    num_tokens: int,
) -> None:
    path = Path(config.output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kmeans.save(path)
    facts = {"Features": given.settings, "Clustering": to_json(config) | {"iterations": kmeans.n_iter_}}
    counts = kmeans.cluster_sizes_.astype(np.int64)
    page = {"cluster_counts": counts, "cluster_scores": scores, "facts": facts, "title": f"Clusters in {path.name}"}
    evaluation.write_report(path.with_suffix(".html"), **page)
    evaluation.write_json(path.with_suffix(".json"), **page)
    say(f"cluster: {config.num_clusters} clusters of {num_tokens} tokens in {path}, their quality in {path.stem}.html")
    say("cluster: " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
