"""Weights in and out: model folders, single files, published weights, the Hugging Face hub.

No file runs code here: tensors come from safetensors, or from ``torch.load(weights_only=True)``, where objects of other
software turn into inert records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hubert_ecg.config import UserError
from hubert_ecg.files import replacing, write_json
from hubert_ecg.models.shape import HubertECGConfig

_log = logging.getLogger(__name__)

FORMAT = "hubert-ecg model, version 1"
PUBLISHED = {f"hubert_ecg_{size}": f"Edoardo-BS/hubert-ecg-{size}" for size in ("small", "base", "large")}
_ACCEPTED = (
    "give a .pt file of pretrain or finetune, a folder of config.json and model.safetensors or pytorch_model.bin, "
    f"a hub id (org/name), or one of {', '.join(PUBLISHED)}"
)
_NO_MODEL = f"holds no model, which is a config and a dict of tensors: {_ACCEPTED}"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Parts that one class has and another has not: they are drawn afresh, or left out, and the log says so.
_HEADS = ("final_proj", "label_embedding", "classifier", "projector", "lm_head", "layer_weights", "masked_spec_embed")
# What wrappers and other classes put before the names of the encoder.
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.|hubert\.|hubert_ecg\.)+")
_FIELDS = {field.name for field in dataclasses.fields(HubertECGConfig)}
_PROBLEMS = {
    "multi_label_classification": "multilabel",
    "single_label_classification": "multiclass",
    "regression": "regression",
}
_CLASSES: dict[str, type[Pretrained]] = {}
_Model = TypeVar("_Model", bound="Pretrained")


class Pretrained:
    """Gives a model class its folder format."""

    # What stands before the encoder's names in the state dict of the class.
    base_prefix: ClassVar[str] = ""
    config: HubertECGConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASSES[cls.__name__] = cls

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder; each file appears whole or not at all."""
        from safetensors.torch import save

        assert isinstance(self, nn.Module)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        config = {**self.config.to_dict(), "architectures": [type(self).__name__]}
        with replacing(folder / "model.safetensors") as temporary:
            temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
        write_json(folder / "config.json", dict(sorted(config.items())))

    @classmethod
    def from_pretrained(cls: type[_Model], name_or_path: str | os.PathLike[str], **overrides: Any) -> _Model:
        """A model with weights from a folder, a file or the hub, in evaluation mode.

        Takes folders of this package, of published HuBERT-ECG and of transformers' Hubert, single ``.pt`` files of
        :func:`save_file`, the names in :data:`PUBLISHED` and hub ids ``org/name``. The encoder must be there whole.
        Heads that the weights do not have, or have for other labels or clusters, are drawn afresh; heads that the class
        does not have are left out; the log says which.

        Args:
            name_or_path: Where the weights are. What exists on disk wins over a hub name.
            overrides: Fields of the config to change (``layerdrop=0.0``, ...), and other arguments of the class
                (``label_names=...``, ...).

        Raises:
            UserError: If there are no weights there, they cannot be read, or they do not fit.
        """
        fields, tensors = read_weights(locate(name_or_path))
        changes = {name: overrides.pop(name) for name in _FIELDS & overrides.keys()}
        old = config_of(fields, source=str(name_or_path))
        try:
            model: Any = cls(dataclasses.replace(old, **changes), **overrides)  # type: ignore[call-arg]
        except ValueError as error:
            raise UserError(f"{name_or_path}: {error}") from error
        load_weights(model, tensors, source=str(name_or_path), fresh=_changed_heads(old, model.config))
        return model.eval()


def _changed_heads(old: HubertECGConfig, new: HubertECGConfig) -> tuple[str, ...]:
    """Heads whose outputs mean something else under the new config."""
    fresh: list[str] = []
    if old.vocab_sizes != new.vocab_sizes:
        fresh.append("label_embedding.")
    if old.id2label != new.id2label or old.head != new.head:
        fresh += ["classifier.", "label_embedding.weight"]
    return tuple(fresh)


def save_file(model: Pretrained, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
    """Write a model into one file of tensors and plain values, which ``torch.load(weights_only=True)`` opens.

    Args:
        model: The model.
        path: The file, by custom ``.pt``; it appears whole or not at all.
        extra: More to keep beside it: dicts, lists, strings, numbers, None and tensors.

    Raises:
        ValueError: If ``extra`` holds something else.
    """
    assert isinstance(model, nn.Module)
    _check_plain(dict(extra or {}), "extra")
    content = {
        "format": FORMAT,
        "class": type(model).__name__,
        "config": model.config.to_dict(),
        "state_dict": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        "extra": dict(extra or {}),
    }
    # By a file of Python's: torch's own keeps for itself what the system says.
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def load_file(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """The model that :func:`save_file` wrote, in evaluation mode, and what was kept beside it.

    Raises:
        UserError: If the file is missing or is no such file.
    """
    content = _torch_load(Path(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("class") not in _CLASSES:
        raise UserError(f"{path} is not a model file of this package; load it with from_pretrained")
    model: Any = _CLASSES[content["class"]](config_of(content["config"], source=str(path)))  # type: ignore[call-arg]
    load_weights(model, content["state_dict"], source=str(path))
    return model.eval(), content["extra"]


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The local file or folder behind a path, one of the :data:`PUBLISHED` names, or a hub id (downloaded).

    Raises:
        UserError: If there is none.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.exists():
        return path
    repository = PUBLISHED.get(text, text)
    looks_local = path.suffix in (".pt", ".pth", ".bin", ".safetensors") or (path.parent.is_dir() and "/" in text)
    if looks_local or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repository):
        raise UserError(f"no model at {text}: {_ACCEPTED}")
    return _download(repository)


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"no folder {repository} here, and downloading needs huggingface_hub: pip install hubert-ecg[hub]"
        ) from error
    # It tells of each of its attempts; one line at the end is enough.
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        config = hf_hub_download(repository, "config.json")
        for name in ("model.safetensors", "pytorch_model.bin"):
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(repository, name)
                break
    except Exception as error:  # the hub raises its own, its HTTP library's and the system's errors
        raise UserError(
            f"{repository} is no folder here and cannot be had from the Hugging Face hub: {_first_line(error)}"
        ) from error
    finally:
        hub.setLevel(level)
    return Path(config).parent


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config fields and tensors of a model folder or file; names of tensors are as they are there.

    Raises:
        UserError: If something is missing or cannot be read safely.
    """
    fields, tensors = _read_folder(path) if path.is_dir() else _read_file(path)
    if not isinstance(fields, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} {_NO_MODEL}")
    return _with_heads(fields, _canonical(tensors)), tensors


def config_of(fields: Mapping[str, Any], *, source: str) -> HubertECGConfig:
    """The config of a model that :func:`read_weights` has read.

    Raises:
        UserError: It is of a model that this package does not have.
    """
    try:
        return HubertECGConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} is no model that this package has: {error}") from error


def _with_heads(fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What other software's configs leave unsaid about the heads, read off their tensors."""
    fields = dict(fields)
    if "vocab_sizes" not in fields:
        sizes = [len(tensors[name]) for name in sorted(tensors) if re.fullmatch(r"label_embedding\.\d+\.weight", name)]
        fields |= {"vocab_sizes": sizes} if sizes else {}
    if "head" in fields:
        return fields
    fields.setdefault("problem", _PROBLEMS.get(fields.get("problem_type") or "", "multilabel"))
    outputs = 0
    for head, last in (("linear", "classifier"), ("mlp", "classifier.2"), ("label_embedding", "label_embedding")):
        if f"{last}.weight" in tensors:
            fields["head"], outputs = head, len(tensors[f"{last}.weight"])
            if head == "mlp":
                fields["classifier_hidden_size"] = len(tensors["classifier.0.weight"])
    # transformers gives every config two labels, classifier or not.
    if len(fields.get("id2label") or ()) != outputs or not outputs:
        fields["id2label"] = {index: f"LABEL_{index}" for index in range(outputs)}
    return fields


def _read_config(folder: Path) -> Any:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inside = ", ".join(str(path.parent) for path in sorted(folder.glob("*/config.json")))
        hint = f"did you mean {inside}?" if inside else _ACCEPTED
        raise UserError(f"{folder} is no model folder: it has no config.json; {hint}") from error
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from error


def _read_folder(folder: Path) -> tuple[Any, dict[str, Any]]:
    inside = list(folder.glob("*/config.json"))
    if not (folder / "config.json").exists() and len(inside) == 1:
        # The output folder of a run, which holds one model.
        folder = inside[0].parent
    fields = _read_config(folder)
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"{folder} is no model folder: it has neither model.safetensors nor pytorch_model.bin")
    if weights.suffix != ".json":
        return fields, _read_tensors(weights)
    tensors: dict[str, Any] = {}
    try:
        names = sorted(set(json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{weights} must say in which file each tensor is (weight_map): {error!r}") from error
    for name in names:
        tensors.update(_read_tensors(folder / Path(name).name))
    return fields, tensors


def _read_tensors(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file as load_safetensors

        try:
            return load_safetensors(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {_first_line(error)}") from error
    tensors = _torch_load(path)
    if not isinstance(tensors, dict):
        raise UserError(f"{path} holds no dict of tensors")
    return tensors


def _read_file(path: Path) -> tuple[Any, dict[str, Any]]:
    if path.suffix == ".safetensors":
        if not (path.parent / "config.json").is_file():
            raise UserError(f"{path} needs the config.json of its model beside it")
        return _read_config(path.parent), _read_tensors(path)
    content = _torch_load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} {_NO_MODEL}")
    if content.get("format") == FORMAT:
        return content["config"], content["state_dict"]
    config, tensors = content.get("model_config"), content.get("model_state_dict")
    if not isinstance(config, dict | _Inert) or not isinstance(tensors, dict):
        raise UserError(f"{path} {_NO_MODEL}")
    return config if isinstance(config, dict) else vars(config), tensors


class _Inert:
    """Stands where a file has an object of other software: it keeps the fields, and nothing of that software runs."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def _torch_load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"no model file at {path}")
    try:
        with contextlib.suppress(pickle.UnpicklingError):
            return torch.load(path, map_location="cpu", weights_only=True)
        # Published checkpoints pickle their config object, and whatever their metrics were.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, ValueError) as error:
        raise UserError(
            f"{path} is no model ({_ACCEPTED}), or holds Python objects that cannot be read without running code from "
            "the file. Where you trust it, open it with the software that wrote it and keep plain values: "
            "c = torch.load(FILE, weights_only=False); "
            "torch.save({'model_state_dict': c['model_state_dict'], 'model_config': c['model_config'].to_dict()}, NEW)"
        ) from error
    except Exception as error:  # a damaged file can raise almost anything
        raise UserError(f"{path} cannot be read as a model: {_first_line(error)}; {_ACCEPTED}") from error


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str, fresh: tuple[str, ...] = ()) -> None:
    """Load tensors by name, whatever stands before the encoder's names and however weight norm is spelt.

    Args:
        model: A model of this package; changed in place.
        tensors: The weights.
        source: Where they come from, for messages.
        fresh: Beginnings of names not to be taken.

    Raises:
        UserError: If a tensor of the encoder is missing, unknown, or of another shape.
    """
    given = {name: value for name, value in _canonical(tensors).items() if not name.startswith(fresh or ("\0",))}
    wanted = _canonical(model.state_dict())
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    kind = type(model).__name__
    lost = [name for name in missing if name.split(".")[0] not in _HEADS]
    if lost:
        raise UserError(f"{source} does not fit {kind}: missing {_some(lost)}")
    strange = [name for name in unknown if name.split(".")[0] not in _HEADS]
    if strange:
        raise UserError(f"{source} does not fit {kind}: unexpected {_some(strange)}")
    for name, value in wanted.items():
        if name in given and given[name].shape != value.shape:
            raise UserError(
                f"{source} does not fit {kind}: {name} must be {list(value.shape)}, got {list(given[name].shape)}"
            )
    with torch.no_grad():
        for name, value in wanted.items():
            if name in given:
                value.copy_(given[name])
    if missing:
        _log.warning("%s: not in %s, drawn afresh: %s", kind, source, _some(missing))
    if unknown:
        _log.info("%s: in %s but not in the model, left out: %s", kind, source, _some(unknown))


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        name = _PREFIX.sub("", name)
        for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
            name = re.sub(rf"\.conv\.{old}$", f".conv.parametrizations.weight.{new}", name)
        renamed[name] = value
    return renamed


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise ValueError(f"save_file: keys of {where} must be strings or integers, got {key!r}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool, Tensor):
        raise ValueError(
            f"save_file: {where} must be a plain value (dict, list, str, number, None) or a tensor, "
            f"got {type(value).__name__}"
        )
