from __future__ import annotations

import re

import pytest

from hubert_ecg.config import UserError
from hubert_ecg.data.tables import read_table, read_text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", ' filename,"AF, paroxysmal",note \nr1,1,"a ""b"""\n\nr2, "0",\n'),
        ("t.csv", 'filename;"AF, paroxysmal";note\nr1 ;1;"a ""b"""\nr2;0;;;\n'),
        ("t.csv", '\ufefffilename;AF, paroxysmal;note\r\nr1;1;"a ""b"""\r\n\r\nr2;0;\r\n'),
        ("t.csv", 'filename\tAF, paroxysmal\tnote\nr1\t1\t"a ""b"""\nr2\t0\t\n'),
        ("T.TSV", 'filename\tAF, paroxysmal\tnote\nr1\t1\t"a ""b"""\nr2\t0\t\n'),
    ],
)
def test_columns_are_split_by_what_splits_their_names(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    table = read_table("csv", tmp_path / name)
    assert table.columns == ("filename", "AF, paroxysmal", "note")
    assert [list(row.values()) for row in table.rows.values()] == [["r1", "1", 'a "b"'], ["r2", "0", ""]]
    lines = text.splitlines()
    assert [table.where(line) for line in table.rows] == [
        f"{tmp_path / name}, line {lines.index(next(x for x in lines if x.startswith(record))) + 1}"
        for record in ("r1", "r2")
    ]


def test_a_tsv_file_is_split_by_tabs_alone(tmp_path):
    (tmp_path / "t.tsv").write_text("filename\tAF, SR, or PVC\n")
    assert read_table("csv", tmp_path / "t.tsv").columns == ("filename", "AF, SR, or PVC")


def test_columns_are_found_in_any_case_and_may_have_no_name(tmp_path):
    (tmp_path / "t.csv").write_text(",File,FILE,Path,\n0,a,b,c,\n")
    table = read_table("csv", tmp_path / "t.csv")
    assert table.columns == ("Unnamed: 0", "File", "FILE", "Path", "Unnamed: 4")
    assert (table.column(("name", "file", "path")), table.column(("name",))) == ("File", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r" cannot be read: it is empty, and its first line must name the columns"),
        (b"\n \n", r" cannot be read: it is empty, and its first line must name the columns"),
        (b"a,b\n1,2\n3\n", r", line 3: must have 2 cells, got 1"),
        (b"a,b\n1,2,3\n", r", line 2: must have 2 cells, got 3"),
        (b'a,b\n1,"2\n3,4\n', r", line 3: unexpected end of data: are its quotes in pairs\?"),
        (b"a,b, a\n", r" has the column a twice: rename one"),
        (b"a,c\n", r" has no column b"),
        (b"\xef\xbb\xbfa,b\n1,2\ncaf\xe9,2\n", r", line 3: must be text in UTF-8, got the byte 0xe9: save it as UTF-8"),
        ("a,b\n".encode("utf-16"), r", line 1: must be text in UTF-8, got the byte 0xff: save it as UTF-8"),
    ],
)
def test_damaged_tables(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"^csv: {re.escape(str(tmp_path / 't.csv'))}{message}$"):
        read_table("csv", tmp_path / "t.csv", {"a", "b"})


def test_text_of_other_encodings(tmp_path):
    (tmp_path / "t.txt").write_bytes("窦性心律\n".encode("gb18030"))
    assert read_text("hefei", tmp_path / "t.txt", "gb18030") == "窦性心律\n"
    with pytest.raises(UserError, match=r"hefei: .*none\.txt cannot be read: No such file"):
        read_text("hefei", tmp_path / "none.txt")
