from __future__ import annotations

import math

import pytest
from rich.console import Console

from hubert_ecg.data import build, progress


@pytest.fixture
def now(monkeypatch):
    class Clock:
        seconds = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.seconds)
    return Clock


def test_what_an_earlier_run_did_is_no_speed(now):
    with progress.Progress("packing", 1000, done=900, shown=False) as bar:
        assert math.isnan(bar.seconds_left())
        now.seconds += 10
        bar.advance(20)
        # Two a second, 80 to go.
        assert bar.seconds_left() == 40
        now.seconds += 40
        bar.advance(80)
        assert bar.seconds_left() == 0


def test_lines_now_and_then_without_a_terminal(now, capsys):
    with progress.Progress("packing [x]", 100, done=40) as bar:
        for _ in range(6):
            now.seconds += 2
            bar.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["packing [x]: 70/100  0:00:06  left 0:00:06", "packing [x]: 100/100  0:00:12"]


def test_nothing_is_said_where_it_shall_not(now, capsys):
    with progress.Progress("packing", 10, shown=False) as bar:
        now.seconds += 100
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        monkeypatch.setattr(progress, "console", lambda: Console(file=file, force_terminal=True, width=120))
        with progress.Progress("packing [beats]", 10, done=5) as bar:
            bar.advance(2)
            bar.advance(3)
    said = (tmp_path / "out").read_text(encoding="utf-8")
    assert "packing [beats]" in said
    assert "10/10" in said


def test_packing_goes_on_where_it_was_and_says_so(tmp_path, beats, now, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    read = beats.read

    def dying(self, entry):
        if entry.record_id == "r4":
            raise Killed
        return read(self, entry)

    with monkeypatch.context() as killing:
        killing.setattr(beats, "read", dying)
        with pytest.raises(Killed):
            build.build(beats(), tmp_path / "s", shard_records=2)

    def slow(self, entry):
        now.seconds += 3
        return read(self, entry)

    monkeypatch.setattr(beats, "read", slow)
    monkeypatch.setattr(build, "_CHUNK_RECORDS", 1)
    build.build(beats(), tmp_path / "s", shard_records=2, progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("packing")]
    assert lines == ["packing beats: 6/6  0:00:06"]
