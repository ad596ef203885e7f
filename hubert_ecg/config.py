"""One frozen dataclass per command: its fields are its flags, and its entry in the checkpoint.

Defaults are those of the training guide. The docstrings are what ``--help`` prints.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal


class UserError(ValueError):
    """Something the user can mend: printed as one line by the commands, with exit code 2."""


class RunError(RuntimeError):
    """What stops a run on its way, such as a loss that is not finite: printed as one line, with exit code 1."""


Compat = Literal["corrected", "published"]
FeatureType = Literal["mfcc", "time_freq", "mixed", "latent"]
MaskStrategy = Literal["tokens", "spans", "lead", "block"]
Size = Literal["tiny", "small", "base", "large"]
Parallel = Literal["ddp", "fsdp", "tensor"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


# field -> (what it must be, whether a value is)
_LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("sampling_rate", "learning_rate", "adam_eps"), ("greater than 0", lambda x: 0 < x < math.inf)),
    # Twelve leads of it hold a token at each sampling rate.
    "crop_s": ("at least 0.1 seconds", lambda x: 0.1 <= x < math.inf),
    **dict.fromkeys(
        (
            *("downsampling_factor", "num_clusters", "num_init", "max_iter", "accumulate_steps", "checkpoint_every"),
            *("log_every", "num_epochs", "batch_size", "mask_length", "kmeans_records", "num_crops", "max_steps"),
            *("num_bootstrap", "num_records", "max_clusters", "teacher_layer", "iterations", "tensor_ranks"),
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        ),
        ("at least 1", lambda x: x >= 1),
    ),
    **dict.fromkeys(
        ("num_workers", "seed", "weight_decay", "clip_norm", "validate_every", "patience", "tol"),
        ("at least 0", lambda x: 0 <= x < math.inf),
    ),
    **dict.fromkeys(
        ("warmup", "layerdrop", "dropout", "encoder_dropout", "validation_share", "beta2"),
        ("at least 0 and less than 1", lambda x: 0 <= x < 1),
    ),
    **dict.fromkeys(("confidence", "threshold"), ("between 0 and 1", lambda x: 0 < x < 1)),
    "mask_prob": ("greater than 0 and at most 1", lambda x: 0 < x <= 1),
    "label_share": ("greater than 0 and at most 1", lambda x: 0 < x <= 1),
    "alpha": ("from 0 to 1", lambda x: 0 <= x <= 1),
}


class _Checked:
    """Refuses values outside their limits as soon as a config is made, before any work is done."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is None or field.name not in _LIMITS:
                continue
            want, holds = _LIMITS[field.name]
            if not holds(value):
                raise UserError(f"--{field.name} must be {want}, got {value}")


@dataclasses.dataclass(frozen=True)
class DataConfig(_Checked):
    """Where recordings come from and how they become model input.

    Args:
        data_path: A folder of recordings (WFDB, .npy, ...), a data set's own folder, or a packed store; several folders
            with commas between them are several data sets.
        sampling_rate: Sampling rate in Hz of files that do not carry one (.npy). WFDB files know theirs.
        lead_names: The rows of files that do not name their leads (.npy), such as I,II,V2; - leaves a row out.
            Default: the twelve leads in standard order.
        downsampling_factor: The model runs at 500 Hz divided by this: 5 is 100 Hz.
        compat: "published" reproduces the preprocessing of the published weights, faults included.
        cache_dir: Where packed stores are kept. Default: $HUBERT_ECG_CACHE, or ~/.cache/hubert-ecg.
        num_workers: Processes that pack records, and threads that read ahead of the model.
        seed: Seed of everything random.
    """

    data_path: Path
    sampling_rate: float = 500.0
    lead_names: str | None = None
    downsampling_factor: int = 5
    compat: Compat = "corrected"
    cache_dir: Path | None = None
    num_workers: int = 2
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class PrepareConfig(DataConfig):
    """Pack recordings into a store: read once, memory-mapped ever after.

    Args:
        data_path: A folder of recordings (WFDB, .npy, ...), or a data set's own folder; several with commas between
            them, one for each data set. Default: $HUBERT_ECG_DATA/DATASET, or ./data/DATASET.
        output_dir: Folder of the store.
        dataset: Name of the data set, which knows labels and folds; several with commas between them. "auto" looks at
            the folder, and takes all data sets in it.
        signal_dtype: How samples are kept on disk.
        splits_from: CSV file of splits to use: record_id (or filename), and fold (1 to 10) or split (train, validation,
            test). Default: the data set's own folds, or folds by patient.
    """

    data_path: Path | None = None  # type: ignore[assignment]
    output_dir: Path = dataclasses.field(kw_only=True)
    dataset: str = "auto"
    signal_dtype: Literal["int16", "float16"] = "int16"
    splits_from: Path | None = None


@dataclasses.dataclass(frozen=True)
class DoctorConfig(DataConfig):
    """Examine recordings: counts, labels, faulty leads, exchanged electrodes, copies, unreadable files.

    Args:
        output_dir: Folder for doctor.html and doctor.json. Default: the folder of the packed store.
        dataset: Name of the data set in data_path, or "auto".
    """

    output_dir: Path | None = None
    dataset: str = "auto"


@dataclasses.dataclass(frozen=True)
class ExtractConfig(DataConfig):
    """Extract the features that are clustered into pseudo-labels, one vector for each token.

    Args:
        output_path: What to write: a folder, which may be larger than memory, or a .pkl (plain containers and arrays)
            or .npz file, which may not.
        feature_type: mfcc (39 numbers a token), time_freq (16), mixed (29), or latent: the hidden states of a teacher.
        teacher: Model of latent features: a .pt file, a model folder, hubert_ecg_base (or _small, _large), or a hub id.
        teacher_layer: Layer of the teacher, from 1. Default: five sixths of its depth, 10 of 12.
        crop_s: Seconds of each record, from its beginning.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
    """

    output_path: Path = dataclasses.field(kw_only=True)
    feature_type: FeatureType = "mfcc"
    teacher: str | None = None
    teacher_layer: int | None = None
    crop_s: float = 5.0
    device: str = "auto"


@dataclasses.dataclass(frozen=True)
class ClusterConfig(_Checked):
    """Cluster features with k-means; the cluster of a token is its pseudo-label.

    Args:
        features_path: Features written by the extract command: a folder, .pkl or .npz.
        output_path: File to write: .pkl (plain containers and arrays) or .safetensors.
        num_clusters: Number of clusters K.
        init: How the first centres are chosen: k-means++ (on a sample), k-means|| (on all tokens) or random tokens.
        num_init: Starts; the one with the least inertia is kept.
        batch_size: Fit on mini-batches of this many tokens. Default: on all of them at a time.
        max_iter: Lloyd iterations of a start at most; with batch_size, passes over the tokens.
        tol: Stop when the centres move less than this, relative to the variance of the features.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
        seed: Seed of the starts.
    """

    features_path: Path
    output_path: Path
    num_clusters: int = 100
    init: Literal["k-means++", "k-means||", "random"] = "k-means++"
    num_init: int = 1
    batch_size: int | None = None
    max_iter: int = 100
    tol: float = 1e-4
    device: str = "auto"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class LabelConfig(DataConfig):
    """Label each token of a packed store with its clusters, as a column beside its records.

    Args:
        kmeans_path: k-means model from the cluster command; several, with commas between them, are an ensemble.
        name: Name of the labels in the store.
        feature_type: What was clustered: mfcc, time_freq, mixed, or latent: the hidden states of a teacher.
        teacher: Model of latent features: a .pt file, a model folder, hubert_ecg_base (or _small, _large), or a hub id.
        teacher_layer: Layer of the teacher, from 1. Default: five sixths of its depth, 10 of 12.
        crop_s: Seconds of each record, from its beginning.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
    """

    kmeans_path: str = dataclasses.field(kw_only=True)
    name: str = dataclasses.field(kw_only=True)
    feature_type: FeatureType = "mfcc"
    teacher: str | None = None
    teacher_layer: int | None = None
    crop_s: float = 5.0
    device: str = "auto"


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Checked):
    """What pretraining and fine-tuning share.

    Args:
        output_dir: Folder for models, checkpoints and logs.
        max_steps: Stop after this many optimiser steps where num_epochs would take more.
        accumulate_steps: Micro-batches in one optimiser step.
        weight_decay: Weight decay of AdamW; biases and norms are exempt.
        warmup: Share of all steps over which the learning rate rises from 0; then it falls linearly to 0.
        clip_norm: Largest norm of the gradient; 0 turns clipping off.
        precision: auto is float32 on a CPU and bfloat16 on a GPU.
        device: Where to train: auto, cpu, cuda, cuda:1, ...
        parallel: What the processes of torchrun share: ddp, gradients alone; fsdp, parameters and the optimiser's
            state too; tensor, the transformer layers too.
        tensor_ranks: Processes that share each layer with parallel tensor.
        compile: Compile each transformer layer with torch.compile.
        deterministic: On a GPU, compute only in ways that give the same bits every time, which is slower, and stop
            where torch has none. A CPU always does.
        activation_checkpointing: Keep no activations of transformer layers, but compute them again in the backward
            pass: slower, for records or batches that memory does not hold.
        dynamic_regularisation: Lower weight decay and dropout after a validation that is better, raise them after
            patience // 4 that are not.
        validate_every: Optimiser steps between validations; 0 validates after each epoch.
        patience: Stop after this many validations without improvement; 0 never stops early.
        checkpoint_every: Optimiser steps between checkpoints.
        log_every: Optimiser steps between log rows.
        resume: Continue from the last checkpoint in output_dir, where there is one.
        wandb: Also log to Weights & Biases (pip install wandb).
    """

    output_dir: Path = Path("./models")
    max_steps: int | None = None
    accumulate_steps: int = 1
    weight_decay: float = 0.01
    warmup: float = 0.08
    clip_norm: float = 1.0
    precision: Precision = "auto"
    device: str = "auto"
    parallel: Parallel = "ddp"
    tensor_ranks: int = 1
    compile: bool = False
    deterministic: bool = False
    activation_checkpointing: bool = False
    dynamic_regularisation: bool = False
    validate_every: int = 0
    patience: int = 10
    checkpoint_every: int = 500
    log_every: int = 10
    resume: bool = False
    wandb: bool = False


@dataclasses.dataclass(frozen=True)
class PretrainConfig(TrainConfig, DataConfig):
    """Pretrain by masked prediction: features, k-means pseudo-labels, then the model, in one command.

    Args:
        preset: "published" sets the published recipe, "corrected" ours (docs/recipes.md); flags given beside it win.
        size: Size of the model: tiny is for tests and demos, the others are the published sizes.
        hidden_size: Width of the transformer. Default of this and the next three: the model size's own.
        num_hidden_layers: Number of transformer layers of the model.
        num_attention_heads: Attention heads of each transformer layer.
        intermediate_size: Width of the feed-forward layers.
        num_epochs: Passes over the training records.
        batch_size: Records in a micro-batch.
        learning_rate: Peak learning rate.
        mask_prob: Share of the tokens that are masked.
        mask_strategy: What is masked together. tokens: each token by itself; spans: mask_length tokens in a row, with
            the default of 1 the same as tokens; lead: all tokens of a lead, and some of one more lead for the exact
            number; block: the same time in all leads, as long as mask_length tokens of a lead (0.64 s each).
        mask_length: Tokens in one masked span, or of a lead in one masked block.
        num_clusters: Number of k-means clusters K.
        feature_type: mfcc, time_freq, mixed, or latent: the hidden states of a teacher.
        teacher: Model of latent features: a .pt file, a model folder, hubert_ecg_base (or _small, _large), or a hub id.
        teacher_layer: Layer of the teacher, from 1. Default: five sixths of its depth, 10 of 12.
        kmeans_path: Use this k-means model (from the cluster command) instead of fitting one; several, with commas
            between them, are an ensemble, each with a head and a codebook of its own.
        labels: Train on precomputed labels of the store (from the label command) instead: its name, or several with
            commas between them; crops are then the beginnings of the records.
        kmeans_records: Fit k-means on at most this many records, drawn at random.
        keep_features: Keep the features that k-means was fitted on, as the extract command writes them.
        start_from: Start from the weights of this model instead of random ones, with fresh codebooks.
        iterations: Rounds of features, k-means and training; from the second on, features are of the model before.
        later_num_clusters: Clusters of the iterations after the first, such as 500,1000; the last number holds for all
            that follow. Default: 500,1000.
        later_max_steps: Likewise, optimiser steps. Default: as in the first iteration.
        later_learning_rate: Likewise, peak learning rates. Default: as in the first iteration.
        later_teacher_layer: Likewise, layers whose features are clustered. Default: five sixths of the depth.
        later_start: Start later iterations from fresh weights, or from those of the previous iteration.
        alpha: Loss is alpha * masked + (1 - alpha) * unmasked.
        layerdrop: Chance of skipping a layer in a step. Default: the model size's own.
        dropout: Dropout of the encoder. Default: the model size's own.
        beta2: Second AdamW decay rate.
        adam_eps: What AdamW adds to its denominator.
        dataset: Name of the data set in data_path, or "auto".
        crop_s: Seconds of each record that the model sees at a time.
        validation_share: Share of the records held out for masked validation, where the data has no folds.
        splits_from: CSV file of splits to use: record_id (or filename), and fold (1 to 10) or split (train, validation,
            test). Default: the store's own.
    """

    preset: Literal["published", "corrected"] | None = None
    size: Size = "base"
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    num_epochs: int = 100
    batch_size: int = 32
    learning_rate: float = 1e-4
    mask_prob: float = 0.15
    mask_strategy: MaskStrategy = "spans"
    mask_length: int = 1
    num_clusters: int = 100
    feature_type: FeatureType = "mfcc"
    teacher: str | None = None
    teacher_layer: int | None = None
    kmeans_path: str | None = None
    labels: str | None = None
    kmeans_records: int = 20_000
    keep_features: bool = False
    start_from: str | None = None
    iterations: int = 1
    later_num_clusters: str | None = None
    later_max_steps: str | None = None
    later_learning_rate: str | None = None
    later_teacher_layer: str | None = None
    later_start: Literal["fresh", "previous"] = "fresh"
    alpha: float = 1.0
    layerdrop: float | None = None
    dropout: float | None = None
    beta2: float = 0.98
    adam_eps: float = 1e-9
    dataset: str = "auto"
    crop_s: float = 5.0
    validation_share: float = 0.05
    splits_from: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_length != 1 and self.mask_strategy in ("tokens", "lead"):
            raise UserError(
                f"--mask_length must be 1 with --mask_strategy {self.mask_strategy}, got {self.mask_length}; "
                "it is for spans and block"
            )


@dataclasses.dataclass(frozen=True)
class LabelledConfig(_Checked):
    """A labelled data set and where it lies.

    Args:
        dataset: Data set name (ptbxl, chapman, ...); several with commas between them.
        task: Task of the data set (all, rhythm, form, ...).
        data_path: Folder of the data set, or a packed store; several folders with commas between them. Default:
            $HUBERT_ECG_DATA/DATASET, or ./data/DATASET.
        sampling_rate: Sampling rate in Hz of files that do not carry one (.npy). WFDB files know theirs.
        lead_names: The rows of files that do not name their leads (.npy), such as I,II,V2; - leaves a row out.
            Default: the twelve leads in standard order.
        unlabelled: Records that have no label of the task: kept as negatives, or dropped.
        splits_from: CSV file of splits to use: record_id (or filename), and fold (1 to 10) or split (train, validation,
            test). Default: the store's own.
        cache_dir: Where packed stores are kept. Default: $HUBERT_ECG_CACHE, or ~/.cache/hubert-ecg.
        num_workers: Processes that pack records, and threads that read ahead of the model.
        seed: Seed of everything random.
    """

    dataset: str
    task: str
    data_path: Path | None = None
    sampling_rate: float = 500.0
    lead_names: str | None = None
    unlabelled: Literal["keep", "drop"] = "keep"
    splits_from: Path | None = None
    cache_dir: Path | None = None
    num_workers: int = 2
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(TrainConfig, LabelledConfig):
    """Fine-tune a pretrained model for a labelled task.

    Args:
        pretrained_model: A .pt file, a model folder, hubert_ecg_base (or _small, _large), or a hub id;
            "random:SIZE" starts from random weights.
        num_epochs: Passes over the training records.
        batch_size: Records in a micro-batch.
        learning_rate: Peak learning rate.
        freeze_encoder: Train the head alone.
        freeze_extractor: Keep the convolutional feature extractor as pretrained; one of random weights is trained.
        problem: Kind of task. auto takes the data set's.
        class_weights: Weigh positives by (N - n) / n in the loss.
        head: linear, or mlp with one hidden layer.
        dropout: Dropout before the head.
        encoder_dropout: Dropout inside the encoder.
        layerdrop: Chance of skipping a layer in a step.
        label_share: Use this share of the training records, drawn by seed.
        augment: Change training crops at random: some of warp, scale, wander, noise and drop, split by commas, or all.
            Default: random crops alone.
        crop_s: Seconds of each record that the model sees at a time.
        num_crops: Crops of a record whose scores are averaged in validation and test.
    """

    pretrained_model: str = dataclasses.field(kw_only=True)
    num_epochs: int = 50
    batch_size: int = 16
    learning_rate: float = 1e-5
    freeze_encoder: bool = False
    freeze_extractor: bool = True
    problem: Literal["auto", "multilabel", "multiclass", "regression"] = "auto"
    class_weights: bool = True
    head: Literal["linear", "mlp"] = "linear"
    dropout: float = 0.1
    encoder_dropout: float = 0.0
    layerdrop: float = 0.0
    label_share: float = 1.0
    augment: str | None = None
    crop_s: float = 5.0
    num_crops: int = 3


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(LabelledConfig):
    """Evaluate a fine-tuned model: metrics with intervals, predictions, and a report.

    Args:
        model_path: A fine-tuned model: .pt file or model folder.
        test_split: Records to evaluate on.
        output_dir: Folder for report.html, report.json and the predictions. Default: beside the model.
        predictions_format: File type of the predictions.
        batch_size: Records in a batch.
        num_crops: Crops of a record whose scores are averaged. Default: as in fine-tuning.
        num_bootstrap: Bootstrap samples behind the intervals.
        confidence: Level of the intervals.
        threshold: Decision threshold for F1 and accuracy. Default: the one chosen on validation records.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
    """

    model_path: str = dataclasses.field(kw_only=True)
    test_split: Literal["train", "validation", "test", "all"] = "test"
    output_dir: Path | None = None
    predictions_format: Literal["csv", "parquet"] = "csv"
    batch_size: int = 64
    num_crops: int | None = None
    num_bootstrap: int = 1000
    confidence: float = 0.95
    threshold: float | None = None
    device: str = "auto"


@dataclasses.dataclass(frozen=True)
class AuditConfig(DataConfig):
    """Show what the pseudo-labels are: their use, samples, leads, place in the beat, and what they tell of labels.

    Args:
        model_path: A run of the pretrain command: its .pt file or folder. Its clusters are looked at, with its settings
            of features and crops; of several iterations, those of the last.
        kmeans_path: A k-means model of the cluster command, in place of a run; several, with commas between them, are
            an ensemble, and have a page each.
        feature_type: What was clustered: mfcc, time_freq, mixed, or latent: the hidden states of a teacher.
        teacher: Model of latent features: a .pt file, a model folder, hubert_ecg_base (or _small, _large), or a hub id.
        teacher_layer: Layer of the teacher, from 1. Default: five sixths of its depth, 10 of 12.
        output_dir: Folder for audit.html and audit.json. Default: beside the k-means model.
        dataset: Name of the data set in data_path, or "auto".
        num_records: Look at this many records at most, drawn by seed.
        crop_s: Seconds of each record, from its beginning.
        max_clusters: Draw this many clusters, by falling use.
        batch_size: Records in a batch.
        device: Where to compute: auto, cpu, cuda, cuda:1, ...
    """

    model_path: Path | None = None
    kmeans_path: str | None = None
    feature_type: FeatureType = "mfcc"
    teacher: str | None = None
    teacher_layer: int | None = None
    output_dir: Path | None = None
    dataset: str = "auto"
    num_records: int = 2000
    crop_s: float = 5.0
    max_clusters: int = 30
    batch_size: int = 256
    device: str = "auto"


@dataclasses.dataclass(frozen=True)
class DemoConfig(_Checked):
    """Run the main job from a folder of ECGs to a report: pack, cluster, pretrain, fine-tune, evaluate.

    Args:
        data_path: A data set's folder or any folder of recordings. Default: a generated cohort.
        output_dir: Folder of the report and of the models.
        task: Task to fine-tune for. Default: diag_superclass or all, where the data has them.
        sampling_rate: Sampling rate in Hz of files that do not carry one (.npy). WFDB files know theirs.
        lead_names: The rows of files that do not name their leads (.npy), such as I,II,V2; - leaves a row out.
            Default: the twelve leads in standard order.
        seed: Seed of everything random.
    """

    data_path: Path | None = None
    output_dir: Path = Path("./demo_output")
    task: str | None = None
    sampling_rate: float = 500.0
    lead_names: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class InfoConfig:
    """Print versions, devices and the backends of every op, and why one is missing.

    Args:
        json: Print JSON.
    """

    json: bool = False


# What the recipes of docs/recipes.md share.
_RECIPE: dict[str, Any] = {
    "batch_size": 448,
    "learning_rate": 5e-5,
    "mask_prob": 0.33,
    # Counted in steps, however many records an epoch has.
    "num_epochs": 1_000_000,
    "max_steps": 80_000,
    "warmup": 0.08,
    "weight_decay": 0.01,
    "beta2": 0.98,
    "adam_eps": 1e-9,
    "validate_every": 4000,
    "patience": 10,
    "iterations": 3,
}
PRETRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "published": {
        **_RECIPE,
        "compat": "published",
        "later_num_clusters": "500",
        "later_max_steps": "800000",
        "dynamic_regularisation": True,
    },
    "corrected": {
        **_RECIPE,
        "compat": "corrected",
        "later_num_clusters": "500,1000",
        "later_max_steps": "400000",
    },
}


def cache_root(cache_dir: Path | None) -> Path:
    """Folder of the packed stores that commands make on the way."""
    if cache_dir is not None:
        return Path(cache_dir)
    if "HUBERT_ECG_CACHE" in os.environ:
        return Path(os.environ["HUBERT_ECG_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hubert-ecg"


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, for checkpoints and logs."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(config).items()}
