"""Stages of a long run: each says in a small file what it was made from, and is skipped where that is still so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubert_ecg.files import write_json


class Stage:
    """A part of a run and the JSON file that vouches for its result.

    The file holds a hash of ``facts``, the facts themselves, whether the stage is done, and what its result was.

    Args:
        path: The file.
        facts: All that decides the result, as JSON values.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        # As they come back from the file.
        self._path, self._facts = path, json.loads(json.dumps(facts))
        self._hash = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()
        try:
            self._before = json.loads(path.read_text(encoding="utf-8"))
            self.done = bool(self._before["done"])
        except (OSError, ValueError, KeyError, TypeError):
            self._before, self.done = {}, False

    @property
    def begun(self) -> bool:
        """The stage was begun by an earlier run, whatever from."""
        return bool(self._before)

    @property
    def result(self) -> Any:
        """What :meth:`finish` was told."""
        return self._before["result"]

    def changed(self) -> tuple[str, str] | None:
        """The first fact that differs from when the stage was begun before, and how in words; None where all hold."""
        if not self._before or self._before.get("hash") == self._hash:
            return None
        old = self._before.get("facts", {})
        for name in (*self._facts, *old):
            if name not in old or name not in self._facts or old[name] != self._facts[name]:
                return name, f"{name} was {_short(old.get(name))} and is {_short(self._facts.get(name))}"
        return "", "its record is damaged"

    def begin(self) -> None:
        """Whatever result there is, it is not to be relied on any more."""
        self._write(done=False, result=None)

    def finish(self, result: Any) -> None:
        """The result is there, whole."""
        self._write(done=True, result=result)

    def _write(self, done: bool, result: Any) -> None:
        write_json(self._path, {"hash": self._hash, "done": done, "result": result, "facts": self._facts})


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_short, value))
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
