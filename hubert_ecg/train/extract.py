"""The extract and cluster commands: the stages of pretraining's targets, each by itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from hubert_ecg import clustering, data, evaluation, features
from hubert_ecg.config import ClusterConfig, ExtractConfig, UserError, to_json
from hubert_ecg.data import plain_pickle
from hubert_ecg.files import replacing
from hubert_ecg.models import HubertECGConfig, token_mask
from hubert_ecg.train import machine
from hubert_ecg.train.logs import say
from hubert_ecg.train.records import lead_lengths, open_records

_BATCH = 256
_FEATURE_SUFFIXES = (".pkl", ".npz")


@dataclasses.dataclass(frozen=True)
class TokenFeatures:
    """Features of the tokens of many records, as the extract command writes them.

    Args:
        features: ``[N, tokens, D] float32``.
        valid: ``[N, tokens] bool``: False where a token sees padding.
        record_ids: N names.
        settings: How they were made.
    """

    features: np.ndarray
    valid: np.ndarray
    record_ids: list[str]
    settings: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes a .pkl of plain containers and arrays, or an .npz; the file appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pkl":
            plain_pickle.dump(vars(self), path)
            return
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                features=self.features,
                valid=self.valid,
                record_ids=np.array(self.record_ids),
                settings=np.array(json.dumps(self.settings)),
            )

    @classmethod
    def load(cls, path: Path) -> TokenFeatures:
        """Reads what :meth:`save` wrote, without running anything that the file may hold.

        Raises:
            UserError: no such file, or not one of features.
        """
        _check_suffix(path, _FEATURE_SUFFIXES)
        if not path.is_file():
            raise UserError(f"no features at {path}; make them with hubert-ecg extract")
        try:
            if path.suffix == ".pkl":
                return cls(**plain_pickle.load(path))
            with np.load(path, allow_pickle=False) as file:
                settings = json.loads(str(file["settings"]))
                return cls(file["features"], file["valid"], file["record_ids"].tolist(), settings)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{path} does not hold features of hubert-ecg extract ({error})") from error


def extract_features(config: ExtractConfig) -> TokenFeatures:
    """Run the extract command: the features of each token of the first ``crop_s`` seconds of each record.

    Raises:
        UserError: the data cannot be read, or the settings do not fit together.
    """
    path = Path(config.output_path)
    _check_suffix(path, _FEATURE_SUFFIXES)
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
    values, valid = [], []
    batches = track(
        loader.batches(), f"{config.feature_type} features", len(loader), console=Console(stderr=True), transient=True
    )
    for batch in batches:
        x = features.extract(batch.leads.to(device), config.feature_type, compat=config.compat, sample_rate_hz=rate)
        values.append(x.cpu().numpy())
        valid.append(token_mask(shape, lead_lengths(batch), batch.ecg.shape[-1]).numpy())
    result = TokenFeatures(
        np.concatenate(values),
        np.concatenate(valid),
        store.index["record_id"].tolist(),
        {**to_json(config), "sampling_rate_hz": rate},
    )
    result.save(path)
    num_records, num_tokens, width = result.features.shape
    say(f"extract: {num_records} records x {num_tokens} tokens x {width} {config.feature_type} features in {path}")
    return result


def cluster_features(config: ClusterConfig) -> clustering.KMeans:
    """Run the cluster command: k-means on the features of valid tokens.

    Beside the model, ``<output>.html`` and ``<output>.json`` say how good the clusters are and how much each is used.

    Raises:
        UserError: the features cannot be read, or there are fewer tokens than clusters.
    """
    path = Path(config.output_path)
    _check_suffix(path, (".pkl", ".safetensors"))
    given = TokenFeatures.load(Path(config.features_path))
    x = torch.from_numpy(given.features[given.valid]).to(machine.device(config.device))
    if len(x) < config.num_clusters:
        raise UserError(f"--num_clusters must be at most the number of tokens {len(x)}, got {config.num_clusters}")
    kmeans = clustering.KMeans(
        config.num_clusters,
        n_init=config.num_init,
        max_iter=config.max_iter,
        tol=config.tol,
        normalize=True,
        random_state=config.seed,
    )
    with Console(stderr=True).status(f"k-means of {len(x)} tokens, {config.num_clusters} clusters"):
        labels = kmeans.fit(x).predict(x)
    scores = clustering.scores(kmeans.normalized(x), labels, kmeans.cluster_centers_)
    counts = np.bincount(labels.cpu().numpy(), minlength=config.num_clusters)
    path.parent.mkdir(parents=True, exist_ok=True)
    kmeans.save(path)
    facts = {"Features": given.settings, "Clustering": to_json(config) | {"iterations": kmeans.n_iter_}}
    page = {"cluster_counts": counts, "cluster_scores": scores, "facts": facts, "title": f"Clusters in {path.name}"}
    evaluation.write_report(path.with_suffix(".html"), **page)
    evaluation.write_json(path.with_suffix(".json"), **page)
    say(f"cluster: {config.num_clusters} clusters of {len(x)} tokens in {path}, their quality in {path.stem}.html")
    say("cluster: " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    return kmeans


def _check_suffix(path: Path, known: tuple[str, ...]) -> None:
    if path.suffix not in known:
        raise UserError(f"{path} must end in {' or '.join(known)}")
