"""The extract and cluster commands: the stages of pretraining's targets, each by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from hubert_ecg import clustering, evaluation
from hubert_ecg.config import AuditConfig, ClusterConfig, ExtractConfig, LabelConfig, UserError, to_json
from hubert_ecg.models import HubertECGConfig
from hubert_ecg.train import distributed
from hubert_ecg.train.clusters import Clusters, find_clusters
from hubert_ecg.train.logs import say
from hubert_ecg.train.pseudo_labels import Featuriser
from hubert_ecg.train.records import open_records
from hubert_ecg.train.teacher import check_flags, load_teacher
from hubert_ecg.train.token_features import FeatureWork, TokenFeatures, ValidTokens, check_path


def extract_features(config: ExtractConfig) -> TokenFeatures:
    """Run the extract command: the features of each token of the first ``crop_s`` seconds of each record.

    Under torchrun, each process computes a share of the records of a folder, and the first one finishes it.

    Raises:
        UserError: the data cannot be read, or the settings do not fit together.
    """
    path = Path(config.output_path)
    check_path(path)
    with distributed.ranks(config.device) as (device, rank, num_ranks):
        if num_ranks > 1 and path.suffix:
            raise UserError(f"several processes write a folder together, not one file: --output_path {path} has a dot")
        work = open_work(config, device)
        teacher = work.featuriser.teacher
        if rank == 0:
            values, valid = TokenFeatures.allocate(path, work.shape, work.dtype)
        distributed.gather(None)
        if rank > 0:
            values, valid = TokenFeatures.allocated(path)
        share = work.share(rank, num_ranks)
        work.fill(values[share], valid[share], share, f"{config.feature_type} features" if rank == 0 else None)
        distributed.gather(None)
        rate = work.store.sampling_rate_hz
        settings = {**to_json(config), "sampling_rate_hz": rate, "teacher_layer": teacher and teacher.layer}
        result = TokenFeatures(values, valid, work.record_ids(slice(None)), settings)
        if rank == 0:
            result.save(path)
            num_records, num_tokens, width = work.shape
            kind = f"{width} {config.feature_type} features"
            say(f"extract: {num_records} records x {num_tokens} tokens x {kind} in {path}")
        distributed.gather(None)
    return result


def open_work(config: ExtractConfig | LabelConfig | AuditConfig, device: torch.device) -> FeatureWork:
    """The records of a command and how features of all of them are computed.

    Raises:
        UserError: the data or the teacher cannot be read, or the settings do not fit together.
    """
    check_flags(config)
    if config.compat == "published" and config.crop_s != 5:
        raise UserError(f"crop_s must be 5 with compat published, got {config.crop_s:g}")
    rate = 500 / config.downsampling_factor
    try:
        shape = HubertECGConfig.preset("tiny", sampling_rate_hz=rate, compat=config.compat)
    except ValueError as error:
        raise UserError(
            f"no model has tokens at downsampling_factor {config.downsampling_factor} (500 Hz divided by it): {error}"
        ) from error
    with distributed.rank_0_first():
        store = open_records(config, config.downsampling_factor, config.compat)
    teacher = load_teacher(config, shape, device)
    featuriser = Featuriser(config.feature_type, config.compat, rate, device, teacher)
    return FeatureWork(store, store.split("all"), featuriser, shape, config.crop_s, config.num_workers)


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
        first, last = rank * num_records // num_ranks, (rank + 1) * num_records // num_ranks
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
            (found,) = find_clusters(ValidTokens(given, first, last, device), [kmeans], config.seed, num_ranks)
        except ValueError as error:
            raise UserError(f"cluster: {config.features_path} cannot be clustered ({error})") from error
        if rank == 0:
            _write(config, given, found, num_tokens)
    return kmeans


def _write(config: ClusterConfig, given: TokenFeatures, found: Clusters, num_tokens: int) -> None:
    path = Path(config.output_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.kmeans.save(path)
    facts = {"Features": given.settings, "Clustering": to_json(config) | {"iterations": found.kmeans.n_iter_}}
    page = {
        "cluster_counts": found.counts,
        "cluster_scores": found.scores,
        "facts": facts,
        "title": f"Clusters in {path.name}",
    }
    evaluation.write_report(path.with_suffix(".html"), **page)
    evaluation.write_json(path.with_suffix(".json"), **page)
    say(f"cluster: {config.num_clusters} clusters of {num_tokens} tokens in {path}, their quality in {path.stem}.html")
    say("cluster: " + "  ".join(f"{name} {value:.4g}" for name, value in found.scores.items()))
