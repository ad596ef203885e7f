"""The label command: the clusters of every token of a store, found once and kept beside its records."""

from __future__ import annotations

import numpy as np

from hubert_ecg.config import LabelConfig
from hubert_ecg.data import LabelWriter
from hubert_ecg.train import distributed
from hubert_ecg.train.clusters import kmeans_hash, load_kmeans
from hubert_ecg.train.extract import open_work
from hubert_ecg.train.logs import say
from hubert_ecg.train.pseudo_labels import PseudoLabels


def write_labels(config: LabelConfig) -> np.ndarray:
    """Run the label command. Stopped, it goes on where it was; under torchrun, each process labels a share.

    Returns:
        ``[E, N, tokens]`` labels of E k-means models.

    Raises:
        UserError: the data or the models cannot be read, or the settings do not fit together.
    """
    with distributed.ranks(config.device) as (device, rank, num_ranks):
        work = open_work(config, device)
        models = load_kmeans(config.kmeans_path, work.shape[2], config.feature_type)
        labels, teacher = PseudoLabels(work.featuriser, models), work.featuriser.teacher
        sizes = [len(kmeans.cluster_centers_) for kmeans in models]
        facts = {
            "feature_type": config.feature_type,
            "compat": config.compat,
            "vocab_sizes": sizes,
            "kmeans": [kmeans_hash(kmeans) for kmeans in models],
            "teacher": teacher and [work.featuriser.teacher_hash, teacher.layer],
        }
        writer = LabelWriter(
            work.store,
            config.name,
            num_models=len(models),
            num_tokens=work.shape[1],
            num_clusters=max(sizes),
            crop_s=config.crop_s,
            facts=facts,
        )
        share = work.share(rank, num_ranks)
        missing = writer.missing(share.start, share.stop)
        for batch in work.batches(missing, f"labels {config.name}" if rank == 0 else None):
            found, positions = labels(batch).cpu().numpy(), batch.index.numpy()
            # Records that follow one another are written together.
            for run in np.split(np.arange(len(positions)), np.flatnonzero(np.diff(positions) > 1) + 1):
                writer.write(int(positions[run[0]]), found[:, run])
        distributed.gather(None)
        if rank == 0:
            writer.finish()
            say(f"label: {len(work.store)} records x {work.shape[1]} tokens x {sizes} clusters: {config.name}")
        distributed.gather(None)
        return work.store.labels(config.name).values
