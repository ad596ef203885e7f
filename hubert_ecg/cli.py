"""``hubert-ecg <command>``: flags are the fields of the command's config, letter for letter."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from hubert_ecg import config as configs


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its config class and ``module:function`` that takes the config."""

    config: type
    target: str

    @property
    def help(self) -> str:
        return (self.config.__doc__ or "").split("\n", 1)[0]

    def function(self) -> Callable[[Any], Any]:
        module, name = self.target.split(":")
        return getattr(importlib.import_module(f"hubert_ecg.{module}"), name)


COMMANDS = {
    "prepare": Command(configs.PrepareConfig, "train:prepare"),
    "doctor": Command(configs.DoctorConfig, "train:doctor"),
    "extract": Command(configs.ExtractConfig, "train:extract_features"),
    "cluster": Command(configs.ClusterConfig, "train:cluster_features"),
    "audit": Command(configs.AuditConfig, "train:audit"),
    "label": Command(configs.LabelConfig, "train:write_labels"),
    "pretrain": Command(configs.PretrainConfig, "train:pretrain"),
    "finetune": Command(configs.FinetuneConfig, "train:finetune"),
    "evaluate": Command(configs.EvaluateConfig, "train:evaluate"),
    "demo": Command(configs.DemoConfig, "demo:demo"),
    "info": Command(configs.InfoConfig, "info:info"),
}


def parse(command: str, argv: Sequence[str]) -> Any:
    """The config that ``hubert-ecg <command> <argv>`` runs with.

    Raises:
        UserError: an unknown flag, a missing required flag or a value of the wrong type.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    # On first use: it takes a third of a second, which `import hubert_ecg` should not.
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    cls = COMMANDS[command].config
    parser = ArgumentParser(prog=f"hubert-ecg {command}", description=COMMANDS[command].help, exit_on_error=False)
    parser.allow_abbrev = False
    parser.add_argument("--config", action="config", help="YAML or JSON file with values for any of the flags.")
    parser.add_class_arguments(cls, as_group=False)
    hints = typing.get_type_hints(cls)
    for action in parser._actions:
        # The library shows the choices of a flag only where there is no None beside them.
        choices = [choice for part in typing.get_args(hints.get(action.dest)) for choice in typing.get_args(part)]
        if choices:
            action.metavar = f"{{{','.join(choices)}}}"
    try:
        known = parser.parse_args(_spell_out_switches(cls, argv))
        preset = getattr(known, "preset", None)
        if preset:
            parser.set_defaults(configs.PRETRAIN_PRESETS[preset])
            known = parser.parse_args(_spell_out_switches(cls, argv))
    except ArgumentError as error:
        raise configs.UserError(f"{_explain(error, cls)} (hubert-ecg {command} --help lists the flags)") from None
    values = known.as_dict()
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 when the user can mend what went wrong, or 1 when a run could not go on."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Read when torch loads: threads that wait let the ones that read ahead have the core instead of spinning on it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: hubert-ecg <command> [flags]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10}{command.help}")
        print("\nhubert-ecg <command> --help lists the flags of a command.")
        return 0
    if argv[0] == "--version":
        from hubert_ecg import __version__

        print(f"hubert-ecg {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise configs.UserError(f"unknown command {argv[0]!r}; the commands are {', '.join(COMMANDS)}")
        config = parse(argv[0], argv[1:])
        COMMANDS[argv[0]].function()(config)
    except configs.UserError as error:
        print(f"hubert-ecg: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except configs.RunError as error:
        print(f"hubert-ecg: error: {_one_line(error)}", file=sys.stderr)
        return 1
    except OSError as error:
        from hubert_ecg.files import FULL

        # A file that cannot be read or written is the user's to mend; what has no name is not about a file.
        full = error.errno in FULL
        if error.filename is None and not full:
            raise
        said = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
        hint = "; make room, or name another folder, and run the command again" if full else ""
        print(f"hubert-ecg: error: {said}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hubert-ecg: stopped", file=sys.stderr)
        return 130
    return 0


def _spell_out_switches(cls: type, argv: Sequence[str]) -> list[str]:
    """``--resume`` alone means ``--resume true``."""
    hints = typing.get_type_hints(cls)
    switches = {f"--{field.name}" for field in dataclasses.fields(cls) if hints[field.name] is bool}
    spelled = []
    for position, word in enumerate(argv):
        spelled.append(word)
        if word in switches and (position + 1 == len(argv) or argv[position + 1].startswith("--")):
            spelled.append("true")
    return spelled


def _explain(error: Exception, cls: type) -> str:
    """The parsing library's words, as short as ours."""
    text = re.sub(r"<class '(\w+)'>", r"\1", _one_line(error)).replace("typing.Literal", "one of ")
    # A flag that may be left out: what it must be where it is given.
    text = re.sub(
        r"(Parser key \"\w+\"): Does not validate .* Errors: - (Expected .*) - Expected a NoneType Given value type: "
        r"\w+ Given value: ",
        r"\1: \2. Got value: ",
        text,
    )
    text = re.sub(r"(?:argument --\w+: )?Parser key \"(\w+)\": Expected an? ", r"--\1 must be ", text)
    text = re.sub(r"\.? Got value: ", ", got ", text)
    unknown = re.search(r"unrecognized arguments: (--\w+)", text)
    if unknown:
        flags = [f"--{field.name}" for field in dataclasses.fields(cls)]
        close = difflib.get_close_matches(unknown[1], flags, n=1)
        text = f"unknown flag {unknown[1]}" + (f"; did you mean {close[0]}?" if close else "")
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
