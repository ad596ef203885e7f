"""Tables beside recordings, of labels, facts or splits: text whose first line names the columns."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from hubert_ecg.config import UserError

SUFFIXES = (".csv", ".tsv")
# What software writes where it has nothing.
_BLANK = {"", "na", "n/a", "#n/a", "<na>", "nan", "null", "none"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as text.

    Args:
        path: Its file.
        columns: Their names.
        rows: The cells of each row by their columns, and each row by its line in the file.
    """

    path: Path
    columns: tuple[str, ...]
    rows: dict[int, dict[str, str]]

    def column(self, names: Iterable[str]) -> str | None:
        """The first of these columns (lower case) that the table has, in any case."""
        own = {name.lower(): name for name in reversed(self.columns)}
        return next((own[name] for name in names if name in own), None)

    def where(self, line: int) -> str:
        """A row as messages name it."""
        return f"{self.path}, line {line}"


def read_table(reader: str, path: str | Path, columns: Collection[str] = ()) -> Table:
    """A table whose columns are split by commas, semicolons or tabs.

    Names and cells are without the blanks around them. A column without a name is called ``Unnamed: `` and its number,
    as pandas does.

    Args:
        reader: Who reads it, for messages.
        path: The file, in UTF-8.
        columns: What it must have.

    Raises:
        UserError: It cannot be read, lacks a column, or has a row of more or fewer cells than columns.
    """
    text = read_text(reader, path)
    mark = _separator(path, text)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True, strict=True)
    try:
        rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if any(map(str.strip, row))]
    except csv.Error as error:
        raise UserError(f"{reader}: {path}, line {lines.line_num}: {error}: are its quotes in pairs?") from error
    if not rows:
        raise UserError(f"{reader}: {path} cannot be read: it is empty, and its first line must name the columns")
    names = tuple(name or f"Unnamed: {position}" for position, name in enumerate(rows[0][1]))
    if twice := [name for position, name in enumerate(names) if name in names[:position]]:
        raise UserError(f"{reader}: {path} has the column {twice[0]} twice: rename one")
    if missing := sorted(set(columns) - set(names)):
        raise UserError(f"{reader}: {path} has no column {', '.join(missing)}")
    for line, cells in rows[1:]:
        # Commas at the end of a line say nothing; fewer cells may be a line that was cut off.
        if len(cells) < len(names) or any(cells[len(names) :]):
            raise UserError(f"{reader}: {path}, line {line}: must have {len(names)} cells, got {len(cells)}")
    return Table(Path(path), names, {line: dict(zip(names, cells, strict=False)) for line, cells in rows[1:]})


def read_text(reader: str, path: str | Path, *other_encodings: str) -> str:
    """A file of text in UTF-8, or else in another encoding.

    Raises:
        UserError: It cannot be read, or is in none of them; the message names the line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{reader}: {path} cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        for encoding in other_encodings:
            with contextlib.suppress(UnicodeDecodeError):
                return content.decode(encoding)
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise UserError(
            f"{reader}: {path}, line {line}: must be text in UTF-8, got the byte 0x{byte:02x}: save it as UTF-8"
        ) from error


def check_unique(reader: str, records: Iterable[tuple[str, str]]) -> None:
    """Raises UserError where a record, given with its row, has several rows."""
    rows: dict[str, str] = {}
    for record, where in records:
        if record in rows:
            raise UserError(f"{reader}: {where}: record {record} occurs twice, first in {rows[record]}")
        rows[record] = where


def is_blank(cell: str) -> bool:
    """Whether a cell says nothing.

    >>> is_blank(""), is_blank("NaN"), is_blank("0")
    (True, True, False)
    """
    return cell.lower() in _BLANK


def whole(cell: str) -> str:
    """A number that names something: 123 also where a column with gaps was written as 123.0.

    >>> whole("123.0"), whole("007"), whole("a.0")
    ('123', '007', 'a.0')
    """
    digits = cell.removesuffix(".0")
    return digits if digits.isdigit() else cell


def _separator(path: str | Path, text: str) -> str:
    """What splits the columns of the first line, outside of quotes."""
    if Path(path).suffix.lower() == ".tsv":
        return "\t"
    names = re.sub(r'"[^"]*"', "", text.lstrip("\r\n").partition("\n")[0])
    return max(",;\t", key=names.count)
