"""WFDB records (.hea with .dat or .mat), read by the wfdb library, in physical units."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hubert_ecg.data.record import Record, lead_name

# mV in one unit; "mV" is what a header without a unit means.
_MV_PER_UNIT = {"": 1.0, "mv": 1.0, "millivolt": 1.0, "v": 1e3, "volt": 1e3, "nv": 1e-6}
_MV_PER_UNIT |= dict.fromkeys(("uv", "µv", "μv", "microvolt", "microvolts"), 1e-3)

# "1000.0(-16)/mV": gain, then baseline and unit where they are given.
_GAIN = re.compile(r"(?P<gain>[-+.\deE]+)(?:\((?P<baseline>-?\d+)\))?(?:/(?P<unit>\S+))?")


@dataclasses.dataclass(frozen=True)
class Header:
    """What a header says beside the signal specification: facts about the patient and diagnoses."""

    lines: tuple[tuple[str, ...], ...]
    comments: dict[str, str]

    @property
    def age(self) -> float | None:
        try:
            age = float(self.comments.get("age", ""))
        except ValueError:
            return None
        return age if 0 <= age < 200 else None

    @property
    def sex(self) -> str | None:
        return {"m": "male", "f": "female"}.get(self.comments.get("sex", "")[:1].lower())

    @property
    def diagnoses(self) -> tuple[str, ...]:
        """The codes after ``Dx:``, without repeats, in the header's order."""
        codes = (code.strip() for code in self.comments.get("dx", "").split(","))
        return tuple(dict.fromkeys(code for code in codes if code and code.lower() not in ("unknown", "nan")))


def read_header(path: Path) -> Header:
    """Read a header's fields and its ``# key: value`` comments, in any of the published spellings.

    A header that is gone or closed to the reader says nothing; reading its record tells why.
    """
    lines: list[tuple[str, ...]] = []
    comments: dict[str, str] = {}
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, PermissionError):
        content = ""
    for line in content.splitlines():
        line = line.strip()
        if line.startswith("#"):
            key, colon, value = line.lstrip("# ").partition(":")
            if colon:
                comments.setdefault(key.strip(" <>").lower(), value.strip())
        elif line:
            lines.append(tuple(line.split()))
    return Header(tuple(lines), comments)


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read a WFDB record by its header; its own rate, lead names, gains, baselines and units hold.

    Channels that are neither a standard lead nor a voltage are left out.

    Raises:
        ValueError: The leads are sampled at different rates, or no lead is there.
        wfdb.io.header.HeaderSyntaxError: The header is damaged.
    """
    import wfdb
    from wfdb.io.header import HeaderSyntaxError

    header = read_header(path)
    if not header.lines:
        raise ValueError("wfdb_files.read: header must be in WFDB form, got no line of it: empty, or closed to you?")
    # The second word of a signal line is its format; "16x4" is four samples a frame.
    formats = {fields[1] for fields in header.lines[1:] if len(fields) > 1}
    if several := sorted(name for name in formats if re.match(r"\d+x(?!1\b)", name)):
        raise ValueError(f"wfdb_files.read: leads must be sampled at one rate, got several samples a frame {several}")
    try:
        record = wfdb.rdrecord(str(path.with_suffix("")), return_res=32)
    except HeaderSyntaxError:
        return _read_challenge_mat(path, header)
    signal, names, units = record.p_signal.T, record.sig_name, record.units
    return _record(path, header, signal, float(record.fs), names, units)


def _read_challenge_mat(path: Path, header: Header) -> Record:
    """A header of the unofficial Challenge phase, whose record name wfdb refuses: ``E07520.mat 12 500 5000 ...``."""
    import scipy.io

    record_line, signal_lines = header.lines[0], header.lines[1:]
    files = {fields[0] for fields in signal_lines}
    if len(record_line) < 4 or len(files) != 1 or not (name := files.pop()).endswith(".mat"):
        raise ValueError("wfdb_files.read: header must be in WFDB form, got a record line that nobody can parse")
    num_leads, num_samples = int(record_line[1]), int(record_line[3])
    val = scipy.io.loadmat(path.with_name(Path(name).name))["val"]
    if val.shape != (num_leads, num_samples) or len(signal_lines) != num_leads:
        raise ValueError(
            f"wfdb_files.read: header and signal must agree, got {[num_leads, num_samples]} in the header with "
            f"{len(signal_lines)} signal lines, and {list(val.shape)} in {name}"
        )
    fields = [match for line in signal_lines if (match := _GAIN.fullmatch(line[2]))]
    if len(fields) < num_leads:
        raise ValueError(f"wfdb_files.read: gains must be numbers, got {[line[2] for line in signal_lines]}")
    gain = np.array([float(f["gain"]) for f in fields])[:, None]
    baseline = np.array([float(f["baseline"] or line[4]) for f, line in zip(fields, signal_lines, strict=True)])
    signal = (val - baseline[:, None]) / gain
    units = [f["unit"] or "" for f in fields]
    return _record(path, header, signal, float(record_line[2]), [line[8] for line in signal_lines], units)


def _record(
    path: Path, header: Header, signal: np.ndarray, rate_hz: float, names: list[str], units: list[str]
) -> Record:
    kept, factors = [], []
    for position, (name, unit) in enumerate(zip(names, units, strict=True)):
        factor = _MV_PER_UNIT.get(str(unit or "").strip().lower())
        if factor is None and lead_name(name):
            raise ValueError(f"wfdb_files.read: unit of lead {name} must be a voltage, got {unit}")
        if factor is not None:
            kept.append(position)
            factors.append(factor)
    if not kept:
        raise ValueError(f"wfdb_files.read: record must hold an ECG lead, got {names}")
    signal = signal[kept] * np.array(factors, dtype=signal.dtype)[:, None]
    return Record(
        signal,
        rate_hz,
        tuple(str(names[position]) for position in kept),
        record_id=path.stem,
        source=path.name,
        age=header.age,
        sex=header.sex,
    )
