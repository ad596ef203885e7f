"""The k-means models whose clusters an iteration of pretraining predicts."""

from __future__ import annotations

import math
import shutil

import torch

from hubert_ecg import clustering, evaluation
from hubert_ecg.clustering.ranks import Ranks
from hubert_ecg.config import UserError, to_json
from hubert_ecg.files import write_json
from hubert_ecg.train import distributed, sharded_checkpoint
from hubert_ecg.train.clusters import IN_MEMORY_BYTES, find_clusters, load_kmeans
from hubert_ecg.train.run import Run, ensemble_name, kmeans_file
from hubert_ecg.train.token_features import FeatureWork, TokenFeatures, ValidTokens


def find_targets(run: Run, stage: str = "") -> list[clustering.KMeans]:
    """The k-means models of a run: those of ``config.kmeans_path``, else one fitted on at most ``kmeans_records``.

    Each goes into ``kmeans.safetensors`` in the run's folder, and how good its clusters are into ``clusters.json`` and
    ``clusters.html``; those of an ensemble have a number before the dot. Features of more than a GiB are kept in a
    folder while they are clustered. Ranks share the records.

    Raises:
        UserError: If there are fewer tokens than clusters, or a given model is for other features.
    """
    config = run.config
    work = FeatureWork(run.store, run.clustered, run.featuriser, run.shape, config.crop_s, config.num_workers)
    given = config.kmeans_path is not None
    if given:
        models = load_kmeans(str(config.kmeans_path), work.shape[2], config.feature_type)
    else:
        models = [clustering.KMeans(config.num_clusters, normalize=True, max_iter=100, random_state=config.seed)]
        check_num_clusters(run, config.num_clusters, math.prod(work.shape[:2]))

    rank, num_ranks = distributed.rank(), distributed.num_ranks()
    share = work.share(rank, num_ranks)
    place = run.folder / (f"features_{rank}" if rank else "features")
    in_folder = config.keep_features or work.num_bytes > num_ranks * IN_MEMORY_BYTES
    try:
        count = share.stop - share.start
        values, valid = TokenFeatures.allocate(place if in_folder else None, (count, *work.shape[1:]), work.dtype)
        work.fill(values, valid, share)
        made = TokenFeatures(values, valid, work.record_ids(share), to_json(config))
        if config.keep_features:
            made.save(place)
        tokens = ValidTokens(made, 0, count, run.device)
        total = torch.tensor([tokens.shape[0]])
        Ranks("pretrain", num_ranks > 1).sum(total)
        num_tokens = int(total)
        if not given:
            check_num_clusters(run, config.num_clusters, num_tokens)
        try:
            found = find_clusters(tokens, models, config.seed, num_ranks)
        except ValueError as error:
            raise UserError(f"{run.title}: the {config.feature_type} features cannot be clustered ({error})") from error
    finally:
        if in_folder and not config.keep_features:
            shutil.rmtree(place, ignore_errors=True)

    if rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(found):
        quality = {
            "feature_type": config.feature_type,
            "num_clusters": len(one.counts),
            "num_records": len(work.records),
            "num_tokens": num_tokens,
            "scores": {name: value if math.isfinite(value) else None for name, value in one.scores.items()},
            "counts": one.counts.tolist(),
        }
        if rank == 0:
            one.kmeans.save(kmeans_file(run.folder, number, len(found)))
            end = ensemble_name(number, len(found))
            write_json(run.folder / f"clusters{end}.json", quality)
            evaluation.write_report(
                run.folder / f"clusters{end}.html",
                title="Clusters of pretraining",
                cluster_counts=one.counts,
                cluster_scores=quality["scores"],
                facts={name: quality[name] for name in ("feature_type", "num_clusters", "num_records", "num_tokens")},
            )
        scores = "  ".join(f"{name} {value:.4g}" for name, value in quality["scores"].items() if value is not None)
        run.tell(f"{len(one.counts)} clusters of {num_tokens} tokens  {scores}", stage)
    distributed.gather(None)
    # Copies, which hold no features.
    return [clustering.KMeans.from_state(kmeans.state()) for kmeans in models]


def check_num_clusters(run: Run, num_clusters: int, num_tokens: int) -> None:
    """Raises UserError where there are more clusters than tokens."""
    if num_tokens < num_clusters:
        raise UserError(
            f"{run.title}: num_clusters must be at most the number of tokens, got {num_clusters} for {num_tokens} "
            f"tokens of {len(run.clustered)} records; use fewer clusters or more records"
        )


def saved_kmeans(run: Run) -> list[clustering.KMeans]:
    """The k-means models of the checkpoint that a run continues from.

    Raises:
        UserError: If the teacher has other weights than then.
    """
    path = distributed.agreed(sharded_checkpoint.find(run.folder))
    assert path is not None
    state = sharded_checkpoint.load(path, only="objective")
    if state["teacher"] != run.featuriser.teacher_hash:
        raise UserError(f"resume: --teacher {run.config.teacher} has other weights than in the run of {path}")
    return [clustering.KMeans.from_state(one) for one in state["kmeans"]]
