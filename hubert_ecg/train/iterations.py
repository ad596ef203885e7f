"""The pretrain command: one iteration, or several, each of which clusters the hidden states of the model before it."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from hubert_ecg import clustering
from hubert_ecg.config import PretrainConfig, UserError, to_json
from hubert_ecg.features import default_layer
from hubert_ecg.files import replacing
from hubert_ecg.models.pretrained import load_file, read_weights
from hubert_ecg.models.shape import num_tokens
from hubert_ecg.signal import LEADS
from hubert_ecg.train import distributed, machine, parallel, sharded_checkpoint
from hubert_ecg.train.clusters import kmeans_hash
from hubert_ecg.train.logs import check_wandb
from hubert_ecg.train.pretrain import train
from hubert_ecg.train.pseudo_labels import StoredLabels
from hubert_ecg.train.records import data_key
from hubert_ecg.train.resuming import MAY_DIFFER
from hubert_ecg.train.run import NAME, Run, files_of, kmeans_file, model_config, open_run
from hubert_ecg.train.stages import Stage
from hubert_ecg.train.targets import check_num_clusters, find_targets, saved_kmeans
from hubert_ecg.train.teacher import check_flags, weights_hash

_T = TypeVar("_T", int, float)
# Clusters of the second iteration, and of those after it.
_LATER_CLUSTERS = "500,1000"
# Settings that decide over clusters alone, or over iterations: a training stage looks at what came of them instead.
_NOT_OF_TRAINING = {
    *("preset", "feature_type", "teacher", "teacher_layer", "kmeans_path", "kmeans_records", "keep_features"),
    *("num_clusters", "start_from", "iterations", "later_num_clusters", "later_max_steps", "later_learning_rate"),
    *("later_teacher_layer", "later_start"),
}
# Facts of a training stage that are no settings.
_INPUTS = ("records", "clusters", "teacher", "start_from")


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Run the pretrain command.

    In ``config.output_dir``: ``hubert_ecg.pt`` (the best model, one file) and the folder ``hubert_ecg`` with the same
    for ``from_pretrained``, ``last/``, ``checkpoint.safetensors``, ``kmeans.safetensors``, ``clusters.json``
    and ``clusters.html``, ``metrics.csv``, ``settings.json`` and TensorBoard events. With several iterations, each has
    such files in ``iteration_1``, ``iteration_2``, ..., beside ``clusters.stage.json`` and ``train.stage.json``, which
    say what they were made from; the last one's model is in ``config.output_dir``. A stage that is done and whose
    settings and inputs are the same is skipped.

    Under torchrun, batches are ``batch_size`` records on each rank, and rank 0 writes the files.

    Returns:
        ``model`` (the .pt file), ``folder``, ``metrics_csv``, ``kmeans``, ``clusters``, ``step``, ``finished``,
        ``best_step`` and ``metrics`` of the best validation, of the last iteration.

    Raises:
        UserError: If the data, the settings or the checkpoint to resume from do not allow it.
        RunError: If the loss is not finite.
    """
    check_settings(config)
    same_bits = machine.same_bits(config.deterministic)
    with same_bits, distributed.ranks(config.device, config.tensor_ranks) as (device, _, _):
        parallel.check(config)
        if config.iterations == 1:
            return _single(open_run(config, "pretrain", device))
        return _several(config, device)


def check_settings(config: PretrainConfig) -> None:
    """Raises UserError where settings do not go together, before any work is done."""
    check_wandb(config.wandb)
    if config.compat == "published" and config.crop_s != 5:
        raise UserError(f"pretrain: crop_s must be 5 with compat published, got {config.crop_s:g}")
    if config.labels is None:
        check_flags(config)
    else:
        for flag in ("kmeans_path", "teacher", "teacher_layer"):
            if getattr(config, flag) is not None:
                raise UserError(f"--labels are clusters already: leave out --{flag}, got {getattr(config, flag)}")
    given = [
        flag for flag in vars(config) if flag.startswith("later_") and getattr(config, flag) not in (None, "fresh")
    ]
    if config.iterations == 1:
        if given and config.preset is None:
            raise UserError(f"--{given[0]} is for later iterations, of which there are none: give --iterations 3")
        return
    later_configs(config)


def later_configs(config: PretrainConfig) -> list[dict[str, Any]]:
    """Settings of the iterations after the first, but for the teacher.

    Raises:
        UserError: If a list of them is none, or a value is out of range.
    """
    count = config.iterations - 1
    num_layers = model_config(config).num_hidden_layers
    clusters = _each("later_num_clusters", config.later_num_clusters or _LATER_CLUSTERS, count, int)
    steps = _each("later_max_steps", config.later_max_steps, count, int, config.max_steps)
    rates = _each("later_learning_rate", config.later_learning_rate, count, float, config.learning_rate)
    layers = _each("later_teacher_layer", config.later_teacher_layer, count, int, default_layer(num_layers))
    if max(layers) > num_layers:
        raise UserError(f"--later_teacher_layer must be from 1 to {num_layers} for --size {config.size}, got {layers}")
    names = "num_clusters", "max_steps", "learning_rate", "teacher_layer"
    return [dict(zip(names, values, strict=True)) for values in zip(clusters, steps, rates, layers, strict=True)]


def _each(flag: str, text: str | None, count: int, kind: Callable[[str], _T], default: Any = None) -> list[Any]:
    """The values of a flag for all later iterations; the last one given holds for all that follow."""
    if text is None:
        return [default] * count
    try:
        values = [kind(part) for part in str(text).split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise UserError(f"--{flag} must be numbers above 0 with commas between them, got {text}")
    return (values + values[-1:] * count)[:count]


def _single(run: Run) -> dict[str, Any]:
    kmeans: list[clustering.KMeans] = []
    if run.config.labels is None:
        resumed = run.config.resume and distributed.agreed(sharded_checkpoint.find(run.folder) is not None)
        kmeans = saved_kmeans(run) if resumed else find_targets(run)
    return train(run, kmeans)


def _several(config: PretrainConfig, device: torch.device) -> dict[str, Any]:
    output_dir = Path(config.output_dir)
    settings: list[dict[str, Any]] = [{}, *later_configs(config)]
    previous: dict[str, Any] = {}
    anew = False
    for number, changes in enumerate(settings, 1):
        folder = output_dir / f"iteration_{number}"
        if number > 1:
            model = str(previous["model"])
            start = model if config.later_start == "previous" else None
            changes |= {"feature_type": "latent", "teacher": model, "start_from": start}
            changes |= {"kmeans_path": None, "labels": None}
        title = f"iteration {number}/{len(settings)}"
        run = open_run(dataclasses.replace(config, output_dir=folder, iterations=1, **changes), title, device)
        if number == 1:
            for later in settings[1:]:
                tokens = num_tokens(run.shape, len(LEADS) * round(config.crop_s * run.store.sampling_rate_hz))
                check_num_clusters(run, later["num_clusters"], tokens * len(run.clustered))
        previous, anew = _iteration(run, anew)
    if distributed.rank() == 0:
        _publish(previous, output_dir)
    distributed.gather(None)
    return previous | {"model": output_dir / f"{NAME}.pt", "folder": output_dir / NAME}


def _iteration(run: Run, anew: bool) -> tuple[dict[str, Any], bool]:
    """Both stages of an iteration, each unless it is done.

    Args:
        run: The iteration.
        anew: A stage before was done again, so results of these are worth nothing.

    Returns:
        What :func:`train` returns, and whether anything was done again.
    """
    config, folder, kmeans = run.config, run.folder, list[clustering.KMeans]()
    given = config.kmeans_path and [
        kmeans_hash(clustering.KMeans.load(path.strip())) for path in str(config.kmeans_path).split(",")
    ]
    of_clusters = {
        "records": data_key(run.store, run.clustered),
        "feature_type": config.feature_type,
        "teacher": run.featuriser.teacher_hash,
        "teacher_layer": run.teacher and run.teacher.layer,
        "crop_s": config.crop_s,
        "num_clusters": None if given else config.num_clusters,
        "kmeans_path": given,
        "seed": config.seed,
    }
    if config.labels is None:
        stage = Stage(folder / "clusters.stage.json", of_clusters)
        number = len(given) if given else 1
        path = kmeans_file(folder, 0, number)
        if _may_skip(run, stage, " clusters", anew, path, lambda: _has_kmeans(folder, number, stage.result)):
            kmeans = _load_kmeans(folder, number)
        else:
            anew = anew or stage.done
            _begin(stage)
            kmeans = find_targets(run, " clusters")
            _finish(stage, [kmeans_hash(one) for one in kmeans])

    own = {key: value for key, value in to_json(config).items() if key not in _NOT_OF_TRAINING | MAY_DIFFER}
    of_training = {
        "records": data_key(run.store, run.train, run.validation),
        "clusters": [kmeans_hash(one) for one in kmeans] if config.labels is None else _facts_of_labels(run),
        "teacher": run.featuriser.teacher_hash,
        "start_from": None if run.start is None else weights_hash(run.start),
        "batch_size": config.batch_size * distributed.num_data_ranks(),
        **own,
    }
    stage = Stage(folder / "train.stage.json", of_training)
    files = files_of(run, len(kmeans))
    if _may_skip(run, stage, " train", anew, files["model"], lambda: _has_model(files, stage.result["model"])):
        kept = {name: value for name, value in stage.result.items() if name != "model"}
        return files | kept, anew
    changed = stage.changed()
    inputs_changed = changed is not None and changed[0] in _INPUTS
    if config.resume and inputs_changed and not stage.done:
        run.tell(f"started anew: {changed[1]}", " train")  # type: ignore[index]
    # What is done is never continued: it is done again because something changed. Of what is not, other settings are
    # refused by the loop.
    resume = config.resume and not (anew or stage.done or inputs_changed)
    resume, anew = distributed.agreed((resume, anew or (stage.begun and not resume)))
    _begin(stage)
    result = train(dataclasses.replace(run, config=dataclasses.replace(config, resume=resume)), kmeans, " train")
    told = {name: result[name] for name in ("step", "finished", "best_step", "metrics")}
    _finish(stage, {"model": _model_hash(files["model"]), **told})
    return result, anew


def _facts_of_labels(run: Run) -> list[dict[str, Any]]:
    return StoredLabels(run.store, str(run.config.labels).split(","), run.device).facts


def _may_skip(run: Run, stage: Stage, name: str, anew: bool, path: Path, has_result: Callable[[], bool]) -> bool:
    """Whether a stage is done, nothing has changed and its result is still there; tells the user in either case."""
    why = None
    if distributed.rank() == 0 and stage.done:
        changed = stage.changed()
        if changed or anew:
            why = changed[1] if changed else "an earlier stage was"
        elif not has_result():
            why = f"{path} is not what it was"
    done, why = distributed.agreed((stage.done, why))
    if done:
        run.tell(f"done again: {why}" if why else "done before with the same settings and inputs", name)
    return done and not why


def _begin(stage: Stage) -> None:
    # No rank may look at the file once it says something else.
    distributed.gather(None)
    if distributed.rank() == 0:
        stage.begin()


def _finish(stage: Stage, result: Any) -> None:
    if distributed.rank() == 0:
        stage.finish(result)
    distributed.gather(None)


def _load_kmeans(folder: Path, number: int) -> list[clustering.KMeans]:
    return [clustering.KMeans.load(kmeans_file(folder, i, number)) for i in range(number)]


def _has_kmeans(folder: Path, number: int, hashes: Sequence[str]) -> bool:
    """Whether the k-means models that a stage has left are there as they were."""
    try:
        return [kmeans_hash(one) for one in _load_kmeans(folder, number)] == list(hashes)
    except UserError:
        return False


def _model_hash(path: Path) -> str:
    return weights_hash(read_weights(path)[1])


def _has_model(files: dict[str, Any], digest: str) -> bool:
    """Whether the model that a stage has left is there as it was; its folder is made of the file where it is not."""
    try:
        fields, tensors = read_weights(files["model"])
        if weights_hash(tensors) != digest:
            return False
    except UserError:
        return False
    try:
        of_folder, tensors = read_weights(files["folder"] / "model.safetensors")
        if of_folder.items() >= fields.items() and weights_hash(tensors) == digest:
            return True
    except UserError:
        pass
    load_file(files["model"])[0].save_pretrained(files["folder"])
    return True


def _publish(result: dict[str, Any], output_dir: Path) -> None:
    """Put the last iteration's model where that of a single one is."""
    places = {result["model"]: output_dir / f"{NAME}.pt"}
    places |= {result["folder"] / name: output_dir / NAME / name for name in ("model.safetensors", "config.json")}
    for source, place in places.items():
        with replacing(place) as temporary:
            shutil.copyfile(source, temporary)
