"""WFDB records (.hea with .dat or .mat) of one or several segments, read by the wfdb library, in physical units."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubert_ecg.data.npy import check_claim
from hubert_ecg.data.record import Record, age_of, sex_of, voltages

# "1000.0(-16)/mV": gain, then baseline and unit where they are given.
_GAIN = re.compile(r"(?P<gain>[-+.\deE]+)(?:\((?P<baseline>-?\d+)\))?(?:/(?P<unit>\S+))?")

# Bits of a sample in the formats of a fixed size, and bytes that may follow the last one.
_BITS = {"80": 8, "8": 8, "160": 16, "16": 16, "61": 16, "212": 12, "24": 24, "32": 32}
_LARGEST_REST = 512


@dataclasses.dataclass(frozen=True)
class Header:
    """What a header says beside the signal specification: facts about the patient and diagnoses."""

    lines: tuple[tuple[str, ...], ...]
    comments: dict[str, str]

    @property
    def age(self) -> float | None:
        return age_of(self.comments.get("age"))

    @property
    def sex(self) -> str | None:
        return sex_of(self.comments.get("sex"))

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


def segments_of(path: Path) -> list[Path]:
    """The headers of a multi-segment record's segments; none for any other record."""
    lines = read_header(path).lines
    if not lines or "/" not in lines[0][0]:
        return []
    return [path.with_name(line[0] + path.suffix) for line in lines[1:] if not re.search(r"[/\\]", line[0])]


def read(path: Path, sampling_rate_hz: float, lead_names: Sequence[str] = ()) -> Record:
    """Read a WFDB record by its header; its own rate, lead names, gains, baselines and units hold.

    The segments of a multi-segment record (fixed or variable layout) are put together by the names of their signals;
    what no segment holds is missing. Channels that are neither a standard lead nor a voltage are left out.

    Raises:
        ValueError: The leads are sampled at different rates, samples do not have the checksum that the header states,
            the header names files in other folders, or no lead is there.
        wfdb.io.header.HeaderSyntaxError: The header is damaged.
    """
    header = read_header(path)
    if header.lines and "/" in header.lines[0][0]:
        signal, names, rate_hz = _read_segments(path, header)
    else:
        signal, names, rate_hz = _read_one(path, header)
    return Record(signal, rate_hz, names, record_id=path.stem, source=path.name, age=header.age, sex=header.sex)


def _read_segments(path: Path, header: Header) -> tuple[np.ndarray, tuple[str, ...], float]:
    """Source: WFDB's header(5), "Multi-segment records": a line per segment with its name and number of samples."""
    _, num_segments = header.lines[0][0].split("/")
    segments = [(name, int(num_samples)) for name, num_samples, *_ in header.lines[1:]]
    if len(segments) != int(num_segments):
        raise ValueError(f"wfdb_files.read: header must list {num_segments} segments, got {len(segments)}")
    total = sum(num_samples for _, num_samples in segments)
    if len(header.lines[0]) > 3 and int(header.lines[0][3]) != total:
        raise ValueError(f"wfdb_files.read: segments must have {header.lines[0][3]} samples, got {total}")

    start, held, parts = 0, 0, []
    for name, num_samples in segments:
        # "~" is a gap, and a segment without samples describes the layout alone.
        if name != "~" and num_samples:
            segment = path.with_name(_in_folder(name) + path.suffix)
            signal, names, rate_hz = _read_one(segment, read_header(segment))
            if signal.shape[1] != num_samples:
                raise ValueError(f"wfdb_files.read: {name} must have {num_samples} samples, got {signal.shape[1]}")
            if len(set(names)) < len(names):
                raise ValueError(f"wfdb_files.read: {name} must name each signal once, got {names}")
            parts.append((start, signal, names, rate_hz))
            held += signal.nbytes
        start += num_samples
    if len(rates := {rate_hz for *_, rate_hz in parts}) != 1:
        raise ValueError(f"wfdb_files.read: segments must be sampled at one rate, got {sorted(rates)}")
    rows = {name: row for row, name in enumerate(dict.fromkeys(name for _, _, names, _ in parts for name in names))}
    check_claim(4 * len(rows) * total, held)
    whole = np.full((len(rows), total), np.nan, dtype=np.float32)
    for start, signal, names, _ in parts:
        whole[[rows[name] for name in names], start : start + signal.shape[1]] = signal
    return whole, tuple(rows), rates.pop()


def _read_one(path: Path, header: Header) -> tuple[np.ndarray, tuple[str, ...], float]:
    import wfdb
    from wfdb.io.header import HeaderSyntaxError

    if not header.lines:
        raise ValueError("wfdb_files.read: header must be in WFDB form, got no line of it: empty, or closed to you?")
    for line in header.lines[1:]:
        _in_folder(line[0])
    # The second word of a signal line is its format; "16x4" is four samples a frame.
    formats = {fields[1] for fields in header.lines[1:] if len(fields) > 1}
    if several := sorted(name for name in formats if re.match(r"\d+x(?!1\b)", name)):
        raise ValueError(f"wfdb_files.read: leads must be sampled at one rate, got several samples a frame {several}")
    try:
        record = wfdb.rdrecord(str(path.with_suffix("")), physical=False, return_res=32)
    except HeaderSyntaxError:
        return _read_challenge_mat(path, header)
    if len(header.lines) - 1 != record.n_sig:
        raise ValueError(f"wfdb_files.read: header must describe {record.n_sig} signals, got {len(header.lines) - 1}")
    _check_sizes(path, record)
    _check_sums(record.d_signal.T, record.sig_name, record.checksum)
    signal, names = voltages(record.dac(return_res=32).T, record.sig_name, record.units)
    return signal, names, float(record.fs)


def _read_challenge_mat(path: Path, header: Header) -> tuple[np.ndarray, tuple[str, ...], float]:
    """A header of the unofficial Challenge phase, whose record name wfdb refuses: ``E07520.mat 12 500 5000 ...``."""
    import scipy.io

    record_line, signal_lines = header.lines[0], header.lines[1:]
    files = {fields[0] for fields in signal_lines}
    if len(record_line) < 4 or len(files) != 1 or not (name := files.pop()).endswith(".mat"):
        raise ValueError("wfdb_files.read: header must be in WFDB form, got a record line that nobody can parse")
    num_leads, num_samples = int(record_line[1]), int(record_line[3])
    val = scipy.io.loadmat(path.with_name(name))["val"]
    if val.shape != (num_leads, num_samples) or len(signal_lines) != num_leads:
        raise ValueError(
            f"wfdb_files.read: header and signal must agree, got {[num_leads, num_samples]} in the header with "
            f"{len(signal_lines)} signal lines, and {list(val.shape)} in {name}"
        )
    fields = [match for line in signal_lines if (match := _GAIN.fullmatch(line[2]))]
    if len(fields) < num_leads:
        raise ValueError(f"wfdb_files.read: gains must be numbers, got {[line[2] for line in signal_lines]}")
    names = [line[8] for line in signal_lines]
    _check_sums(val, names, [int(line[6]) for line in signal_lines])
    gain = np.array([float(f["gain"]) for f in fields])[:, None]
    baseline = np.array([float(f["baseline"] or line[4]) for f, line in zip(fields, signal_lines, strict=True)])
    signal, kept = voltages((val - baseline[:, None]) / gain, names, [f["unit"] for f in fields])
    return signal, kept, float(record_line[2])


def _check_sizes(path: Path, record: Any) -> None:
    """Samples are interleaved: with a lead or some samples too few, a header gives them to other leads and times."""
    for name in dict.fromkeys(record.file_name):
        rows = [row for row, other in enumerate(record.file_name) if other == name]
        bits = _BITS.get(record.fmt[rows[0]])
        wanted = (record.byte_offset[rows[0]] or 0) + (bits or 0) * len(rows) * record.sig_len / 8
        held = path.with_name(name).stat().st_size
        # Some writers end with a whole word or block.
        if bits and held >= wanted + max(_LARGEST_REST, bits * len(rows) / 8):
            raise ValueError(f"wfdb_files.read: {name} must have {wanted:g} bytes, as the header says, got {held}")


def _check_sums(samples: np.ndarray, names: Sequence[str], stated: Sequence[int | None]) -> None:
    """Source: WFDB's header(5): a 16-bit sum of all samples of a signal. Writers that know none leave it out or say 0.

    Args:
        samples: ``[L, n]`` integers, as stored.
        names: The L names.
        stated: The L checksums, signed or not.
    """
    sums = samples.sum(axis=1, dtype=np.int64) % 2**16
    wrong = [name for name, sum_, wanted in zip(names, sums, stated, strict=True) if wanted and wanted % 2**16 != sum_]
    if wrong:
        raise ValueError(f"wfdb_files.read: samples must have the header's checksums, got others in {wrong}")


def _in_folder(name: str) -> str:
    """The name of a file beside the header; WFDB knows no folders, and another folder is another owner's."""
    if re.search(r"[/\\]", name) or name in ("-", ".", ".."):
        raise ValueError(f"wfdb_files.read: header must name files beside it, got {name!r}")
    return name
