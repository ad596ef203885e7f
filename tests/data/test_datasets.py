from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest

from hubert_ecg.config import UserError
from hubert_ecg.data import DATASETS, ReadError, default_data_path, open_dataset
from hubert_ecg.data.dataset import learnable
from hubert_ecg.data.datasets.challenge import snomed
from hubert_ecg.data.datasets.hefei import finding_labels
from hubert_ecg.signal import LEADS

HEADER = "{name} 12 500 10 {date}\n" + "".join(f"{{name}}.mat 16+24 1000/mV 16 0 0 0 0 {lead}\n" for lead in LEADS)


def write_header(path, dx, prefix="#"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        HEADER.format(name=path.stem, date="") + f"{prefix}Age: 50\n{prefix}Sex: Male\n{prefix}Dx: {','.join(dx)}\n"
    )


def labels_of(dataset, task):
    return {entry.record_id: entry.labels[task] for entry in dataset.entries()}


@pytest.fixture
def ptbxl(tmp_path, shared_data):
    statements = (shared_data / "ptbxl/scp_statements.csv").read_text()
    (tmp_path / "scp_statements.csv").write_text(statements)
    rows = [
        (1, 15709.0, 56.0, 1, "{'NORM': 100.0, 'LVOLT': 0.0, 'SR': 0.0}", 3),
        (2, 13243.0, 300.0, 0, "{'ASMI': 15.0, 'AMI': 35.0, 'SR': 0.0}", 9),
        (3, "", "", 1, "{'NDT': 100.0}", 10),
        (4, 7.0, 40.0, 1, "{}", 1),
    ]
    table = pd.DataFrame(rows, columns=["ecg_id", "patient_id", "age", "sex", "scp_codes", "strat_fold"])
    table["filename_lr"] = [f"records100/00000/0000{k}_lr" for k in table["ecg_id"]]
    table["filename_hr"] = [f"records500/00000/0000{k}_hr" for k in table["ecg_id"]]
    table.to_csv(tmp_path / "ptbxl_database.csv", index=False)
    return tmp_path


def test_ptbxl_tasks(ptbxl):
    dataset = open_dataset("auto", ptbxl)
    assert dataset.name == "ptbxl"
    assert labels_of(dataset, "all") == {
        "1": ("LVOLT", "NORM", "SR"),
        # 15 % likely is likely enough, as in the published benchmark.
        "2": ("AMI", "ASMI", "SR"),
        "3": ("NDT",),
        "4": (),
    }
    assert labels_of(dataset, "diag") == {"1": ("NORM",), "2": ("AMI", "ASMI"), "3": ("NDT",), "4": ()}
    assert labels_of(dataset, "diag_subclass") == {"1": ("NORM",), "2": ("AMI",), "3": ("STTC",), "4": ()}
    assert labels_of(dataset, "diag_superclass") == {"1": ("NORM",), "2": ("MI",), "3": ("STTC",), "4": ()}
    assert labels_of(dataset, "form") == {"1": ("LVOLT",), "2": (), "3": ("NDT",), "4": ()}
    assert labels_of(dataset, "rhythm") == {"1": ("SR",), "2": ("SR",), "3": (), "4": ()}
    assert dataset.label_names("diag_superclass") == ("MI", "NORM", "STTC")
    entries = dataset.entries()
    assert [entry.fold for entry in entries] == [3, 9, 10, 1]
    assert [entry.patient_id for entry in entries] == ["15709", "13243", None, "7"]
    assert [entry.age for entry in entries] == [56, 90, None, 40]
    assert [entry.sex for entry in entries] == ["female", "male", "female", "female"]


def test_ptbxl_counts_of_a_complete_download(ptbxl):
    statements = pd.read_csv(ptbxl / "scp_statements.csv", index_col=0).index
    table = pd.read_csv(ptbxl / "ptbxl_database.csv").iloc[:1]
    table["scp_codes"] = repr(dict.fromkeys(statements, 0.0))
    table.to_csv(ptbxl / "ptbxl_database.csv", index=False)
    dataset = open_dataset("ptbxl", ptbxl)
    counts = {task: len(dataset.label_names(task)) for task in dataset.tasks}
    assert counts == {"all": 71, "diag": 44, "diag_subclass": 23, "diag_superclass": 5, "form": 19, "rhythm": 12}


def test_ptbxl_takes_the_low_rate_where_the_high_one_is_missing(ptbxl):
    for kind, record in (("lr", 1), ("lr", 2), ("hr", 2)):
        path = ptbxl / ("records100" if kind == "lr" else "records500") / f"00000/0000{record}_{kind}.hea"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    sources = [entry.source for entry in open_dataset("ptbxl", ptbxl).entries()]
    names = ("100/00000/00001_lr", "500/00000/00002_hr", "500/00000/00003_hr", "500/00000/00004_hr")
    assert sources == [f"records{name}" for name in names]


@pytest.mark.parametrize("codes", ["__import__('os').getcwd()", "['NORM']", "{'NORM': ", "", "{'NORM': open('x')}"])
def test_ptbxl_runs_no_code_from_its_table(ptbxl, codes):
    table = pd.read_csv(ptbxl / "ptbxl_database.csv")
    table.loc[1, "scp_codes"] = codes
    table.to_csv(ptbxl / "ptbxl_database.csv", index=False)
    with pytest.raises(UserError, match=r"database\.csv, line 3: scp_codes of ecg_id 2 must be a dictionary"):
        open_dataset("ptbxl", ptbxl).entries()


def test_ptbxl_without_its_tables(ptbxl):
    (ptbxl / "scp_statements.csv").unlink()
    with pytest.raises(UserError, match=r"no scp_statements\.csv"):
        open_dataset("ptbxl", ptbxl).entries()
    (ptbxl / "ptbxl_database.csv").unlink()
    with pytest.raises(UserError, match=r"neither ptbxl_database\.csv nor ptbxl_labels\.csv"):
        open_dataset("ptbxl", ptbxl)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        *(
            ("strat_fold", x, rf"strat_fold of ecg_id 2 must be 1 to 10, got '{x}'")
            for x in ("11", "300", "0", "x", "")
        ),
        ("scp_codes", "{'NORM': 100.0, 'XYZ': 0.0}", r"scp_codes of ecg_id 2 must be statements of .*\.csv, got XYZ"),
        ("scp_codes", "(" * 9999, r"scp_codes of ecg_id 2 must be a dictionary of statements, got '\(+\.\.\.\(+'$"),
        ("ecg_id", "1", r"record 1 occurs twice, first in .*ptbxl_database\.csv, line 2"),
        ("ecg_id", "", r"ecg_id must not be blank"),
        ("filename_hr", "", r"filename_hr must not be blank"),
    ],
)
def test_ptbxl_cells_that_say_nothing_right(ptbxl, column, value, message):
    table = pd.read_csv(ptbxl / "ptbxl_database.csv", dtype=str)
    table.loc[1, column] = value
    table.to_csv(ptbxl / "ptbxl_database.csv", index=False)
    with pytest.raises(UserError, match=rf"^ptbxl: .*ptbxl_database\.csv, line 3: {message}"):
        open_dataset("ptbxl", ptbxl).entries()


@pytest.mark.parametrize(
    ("file", "column"),
    [
        *(("ptbxl_database.csv", name) for name in ("ecg_id", "patient_id", "strat_fold", "filename_hr", "scp_codes")),
        *(("scp_statements.csv", name) for name in ("diagnostic", "form", "rhythm", "diagnostic_class")),
        *(("ptbxl_labels.csv", name) for name in ("super_class", "sub_class", "form", "rhythm")),
    ],
)
def test_ptbxl_tables_without_a_column(ptbxl, shared_data, file, column):
    if file == "ptbxl_labels.csv":
        (ptbxl / "ptbxl_database.csv").unlink()
        (ptbxl / file).write_text((shared_data / "ptbxl" / file).read_text())
    pd.read_csv(ptbxl / file, dtype=str).rename(columns={column: "other"}).to_csv(ptbxl / file, index=False)
    with pytest.raises(UserError, match=rf"^ptbxl: .*{file} has no column {column}$"):
        open_dataset("ptbxl", ptbxl).entries()


@pytest.mark.parametrize("file", ["ptbxl_database.csv", "scp_statements.csv"])
@pytest.mark.parametrize(
    ("content", "message"), [(b"", "cannot be read: it is empty"), (b"a,b\n\xe9,1\n", "line 2: must be text in UTF-8")]
)
def test_ptbxl_tables_that_are_no_tables(ptbxl, file, content, message):
    (ptbxl / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"^ptbxl: .*{file},? {message}"):
        open_dataset("ptbxl", ptbxl).entries()


def test_ptbxl_with_its_label_table_instead(shared_data):
    dataset = open_dataset("auto", shared_data / "ptbxl")
    entries = {entry.record_id: entry for entry in dataset.entries()}
    assert len(entries) == 78
    assert entries["172"].labels == {
        "all": ("CRBBB", "LAFB/LPFB", "SR"),
        "diag": ("CRBBB", "LAFB/LPFB"),
        "diag_subclass": ("CRBBB", "LAFB/LPFB"),
        "diag_superclass": ("CD",),
        "form": (),
        "rhythm": ("SR",),
    }
    assert (entries["43"].patient_id, entries["43"].fold, entries["43"].sex) == ("11315", 8, "female")
    assert dataset.label_names("diag_superclass") == ("CD", "HYP", "MI", "NORM", "STTC")
    assert all(entry.path.is_file() for entry in entries.values())


def test_challenge_labels_are_as_indexed(shared_data):
    with open(shared_data / "index.csv", encoding="utf-8") as file:
        rows = {row["record"]: row for row in csv.DictReader(file) if row["source"].startswith("cinc2021")}
    labels = labels_of(open_dataset("auto", shared_data / "cinc2021"), "all")
    assert labels == {name: tuple(sorted(set(row["labels"].split(";")))) for name, row in rows.items()}


def test_snomed_agrees_with_the_published_mapping(shared_data):
    for table in ("scored", "unscored"):
        rows = pd.read_csv(shared_data / f"cinc2021/dx_mapping_{table}.csv")
        for row in rows.itertuples():
            assert snomed()[str(row.SNOMEDCTCode)].abbreviation == row.Abbreviation


@pytest.mark.parametrize("layout", ["training/{source}/g1/{name}.hea", "WFDBRecords/01/010/{name}.hea", "{name}.hea"])
def test_one_folder_holds_many_sources(tmp_path, layout):
    names = {
        "chapman": ("JS00001", "JS10646"),
        "ningbo": ("JS10647", "JS45551"),
        "cpsc": ("A0001",),
        "cpsc_extra": ("Q0001",),
        "georgia": ("E00001",),
        "ptb": ("S0001",),
    }
    for source, records in names.items():
        for name in (*records, "HR00001"):
            write_header(tmp_path / layout.format(source=source, name=name), ["426783006"], prefix="# ")
    for source, records in names.items():
        dataset = open_dataset(source, tmp_path)
        assert [entry.record_id for entry in dataset.entries()] == list(records)
        assert dataset.entries()[0].age == 50


def test_chapman_rhythms_and_unknown_codes(tmp_path):
    write_header(tmp_path / "JS00001.hea", ["164889003", "59118001", "164934002", "999"])
    write_header(tmp_path / "JS00002.hea", ["Unknown"])
    dataset = open_dataset("chapman", tmp_path)
    assert labels_of(dataset, "all") == {"JS00001": ("999", "AF", "RBBB", "TAb"), "JS00002": ()}
    assert labels_of(dataset, "rhythm") == {"JS00001": ("AF",), "JS00002": ()}


def test_equal_names_in_two_folders(tmp_path):
    for folder in ("a", "b"):
        write_header(tmp_path / folder / "A0001.hea", ["426783006"])
    assert [entry.record_id for entry in open_dataset("auto", tmp_path).entries()] == ["a/A0001", "b/A0001"]


def test_a_folder_of_another_source(tmp_path):
    write_header(tmp_path / "JS00001.hea", [])
    with pytest.raises(UserError, match=r"georgia: no records \(E00001 onwards\)"):
        open_dataset("georgia", tmp_path).entries()


@pytest.fixture
def hefei(tmp_path):
    signal = np.random.default_rng(0).integers(-500, 500, (5000, 8))
    for number, folder in enumerate(("hf_round1_train/train", "hf_round2_train")):
        (tmp_path / folder).mkdir(parents=True)
        np.savetxt(tmp_path / folder / "1.txt", signal + number, "%d", header="I II V1 V2 V3 V4 V5 V6", comments="")
    (tmp_path / "hf_round1_arrythmia.txt").write_text("窦性心律\nQRS低电压\n", encoding="utf-8")
    table = "1.txt\t83\tFEMALE\tQRS低电压\t窦性心律\t\n2.txt\t\t\t窦性心律\n"
    (tmp_path / "hf_round1_label.txt").write_text(table, encoding="utf-8")
    (tmp_path / "hf_round2_label.txt").write_text("1.txt\t40\tMALE\t窦性心律\n", encoding="utf-8")
    return tmp_path, signal


def test_hefei(hefei):
    folder, signal = hefei
    dataset = open_dataset("auto", folder)
    assert dataset.name == "hefei"
    entries = dataset.entries()
    assert [entry.record_id for entry in entries] == ["hf_round1/1", "hf_round1/2", "hf_round2/1"]
    assert [(entry.age, entry.sex) for entry in entries] == [(83, "female"), (None, None), (40, "male")]
    assert entries[0].labels == {"all": ("LQRSV", "NSR"), "findings": ("QRS低电压", "窦性心律")}
    for entry, shift in ((entries[0], 0), (entries[2], 1)):
        leads, present = dataset.read(entry).standard_leads()
        expected = (signal.T + shift) * 0.00488
        assert present.all()
        np.testing.assert_allclose(leads[[0, 1, *range(6, 12)]], expected, atol=1e-5)
        np.testing.assert_allclose(leads[2], expected[1] - expected[0], atol=1e-5)
        np.testing.assert_allclose(leads[3], -(expected[0] + expected[1]) / 2, atol=1e-5)


ROUND_2 = """
QRS低电压 电轴右偏 起搏心律 T波改变 电轴左偏 心房颤动 非特异性ST段异常 下壁异常Q波 前间壁R波递增不良 ST段改变
一度房室传导阻滞 左束支传导阻滞 右束支传导阻滞 完全性左束支传导阻滞 左前分支传导阻滞 右心房扩大 短PR间期
左心室高电压 窦性心动过缓 早期复极化 窦性心律 融合波 ST-T改变 非特异性ST段与T波异常 快心室率 非特异性T波异常
室性早搏 房性早搏 窦性心律不齐 完全性右束支传导阻滞 窦性心动过速 不完全性右束支传导阻滞 顺钟向转位 逆钟向转位
"""


def test_hefei_round_2_has_27_labels(tmp_path):
    """Two recordings of each of its 34 findings; a finding that is in no table keeps its words."""
    findings = [*ROUND_2.split(), "二联律"]
    lines = "".join(f"{n}.txt\t40\tMALE\t{finding}\n" for n, finding in enumerate(findings * 2))
    (tmp_path / "hf_round2_label.txt").write_text(lines, encoding="utf-8")
    dataset = open_dataset("hefei", tmp_path)
    assert set(dataset.label_names("findings")) == set(findings)
    assert len(findings) == 35
    names = set(dataset.label_names("all")) - {"二联律"}
    assert len(names) == 27
    known = {dx.abbreviation for dx in snomed().values()}
    assert names - known == {"RVR"}
    assert {*finding_labels().values()} - known == {"RVR"}
    merged = {"右束支传导阻滞", "完全性右束支传导阻滞", "不完全性右束支传导阻滞"}
    entries = learnable(dataset.entries(), dataset.synonyms)[0]
    assert all(("RBBB" in entry.labels["all"]) == (entry.labels["findings"][0] in merged) for entry in entries)


def test_hefei_rounds_and_test_sets_keep_apart(tmp_path):
    for folder in ("hf_round1_testA", "train", "hf_round2_train"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.txt").write_text("I II\n")
    for number in (1, 2):
        (tmp_path / f"hf_round{number}_label.txt").write_text("1.txt\t40\tMALE\tx\n")
    (tmp_path / "hf_round1_testA").rename(tmp_path / "testA")
    sources = [entry.source for entry in open_dataset("hefei", tmp_path).entries()]
    assert sources == ["train/1.txt", "hf_round2_train/1.txt"]
    (tmp_path / "train" / "1.txt").unlink()
    (tmp_path / "testA" / "1.txt").unlink()
    entry = open_dataset("hefei", tmp_path).entries()[0]
    assert (entry.record_id, entry.source) == ("hf_round1/1", "1.txt")


def test_a_hefei_recording_that_is_cut_off(hefei):
    folder, _ = hefei
    path = folder / "hf_round2_train/1.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4001]))
    dataset = open_dataset("hefei", folder)
    with pytest.raises(ReadError, match=r"1\.txt: must hold 5000 lines of samples, got 4000"):
        dataset.read(dataset.entries()[-1])


def test_hefei_findings_outside_of_the_list(hefei):
    folder, _ = hefei
    (folder / "hf_round2_label.txt").write_text("1.txt\t40\tMALE\tx\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"hf_round2_label\.txt, line 1: x is in no list"):
        open_dataset("hefei", folder).entries()


@pytest.mark.parametrize("file", ["hf_round2_label.txt", "hf_round1_arrythmia.txt"])
def test_hefei_tables_that_are_no_text(hefei, file):
    folder, _ = hefei
    (folder / file).write_bytes("1.txt\t40\tMALE\t窦性心律\n\n".encode() + b"2.txt\t40\tMALE\t\xff\n")
    with pytest.raises(UserError, match=rf"^hefei: .*{file}, line 3: must be text in UTF-8, got the byte 0xff"):
        open_dataset("hefei", folder).entries()


def test_hefei_tables_in_its_other_encoding(hefei):
    folder, _ = hefei
    (folder / "hf_round2_label.txt").write_bytes("\n1.txt\t40\tMALE\t窦性心律\n2.txt\t\t\tx\n".encode("gb18030"))
    with pytest.raises(UserError, match=r"hf_round2_label\.txt, line 3: x is in no list"):
        open_dataset("hefei", folder).entries()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_of_other_separators_and_words(tmp_path, separator):
    rows = ["filename", "AF", "SR", "ef"], ["a.npy", "yes", "True", "55.5"], ["b.npy", "No", "", "60"]
    (tmp_path / "labels.csv").write_text(
        "\ufeff" + "".join(separator.join(row) + "\n" for row in rows), encoding="utf-8"
    )
    dataset = open_dataset("csv", tmp_path)
    assert dataset.tasks == ("all", "ef")
    assert [entry.labels["all"] for entry in dataset.entries()] == [("AF", "SR"), ()]


def test_csv(tmp_path):
    (tmp_path / "labels.csv").write_text(
        "filename,patient_id,fold,age,sex,AF,SR,ef,note\n"
        "a.npy,7,1,50,F,1,0,55.5,x\n"
        "sub/b,7,1,,M,,True,,y\n"
        "missing.npy,8,10,40,,0,0,60,z\n"
    )
    (tmp_path / "sub").mkdir()
    np.save(tmp_path / "a.npy", np.zeros((12, 500)))
    np.save(tmp_path / "sub/b.npy", np.zeros((12, 500)))
    dataset = open_dataset("auto", tmp_path)
    assert (dataset.name, dataset.tasks) == ("csv", ("all", "ef"))
    assert [dataset.problem_of(task) for task in dataset.tasks] == ["multilabel", "regression"]
    entries = dataset.entries()
    assert [entry.labels["all"] for entry in entries] == [("AF",), ("SR",), ()]
    assert [entry.values.get("ef") for entry in entries] == [55.5, None, 60]
    assert [entry.path.is_file() for entry in entries] == [True, True, False]
    assert [(entry.patient_id, entry.fold, entry.age, entry.sex) for entry in entries] == [
        ("7", 1, 50, "female"),
        ("7", 1, None, "male"),
        ("8", 10, 40, None),
    ]


@pytest.mark.parametrize("name", ["Labels.CSV", "labels.tsv"])
def test_csv_by_other_names(tmp_path, name):
    np.save(tmp_path / "a.npy", np.zeros((12, 10)))
    (tmp_path / name).write_text("filename\tAF\na\t1\n")
    dataset = open_dataset("auto", tmp_path)
    assert (dataset.name, [entry.labels["all"] for entry in dataset.entries()]) == ("csv", [("AF",)])
    before = dataset.fingerprint()
    (tmp_path / name).write_text("filename\tAF\na\t0\n")
    assert open_dataset("csv", tmp_path).fingerprint() != before
    (tmp_path / "labels.csv").write_text("filename,AF\na,1\n")
    with pytest.raises(UserError, match=rf"a folder must hold one table of labels, got .*{name}.*: keep one"):
        open_dataset("csv", tmp_path)


def test_csv_labels_are_bits_in_any_words_and_other_columns_are_told(tmp_path):
    (tmp_path / "labels.csv").write_text(
        ' filename , AF,"AV block, 1st",SR,PVC,ef,rhythm,both,grade,empty,Unnamed: 0,Path\n'
        "a,y,Yes,TRUE,1.0,,sinus,1,yes,NaN,7,1\n"
        "b,N,no,false,0,55,,unknown,2,,8,2\n"
        "c, Y ,,n/a,0,6e1,AF,2,2,,9,3\n"
    )
    dataset = open_dataset("csv", tmp_path)
    assert dataset.tasks == ("all", "ef")
    labels = [entry.labels["all"] for entry in dataset.entries()]
    assert labels == [("AF", "AV block, 1st", "PVC", "SR"), (), ("AF",)]
    assert [dict(entry.values) for entry in dataset.entries()] == [{}, {"ef": 55}, {"ef": 60}]
    assert dataset.left_out == {
        "rhythm": "'sinus' in labels.csv, line 2",
        "both": "'unknown' in labels.csv, line 3",
        "grade": "'2' in labels.csv, line 3",
        "empty": "blank",
    }


def test_csv_tables_of_splits_have_one_set_of_columns(tmp_path):
    (tmp_path / "x_train.csv").write_text("filename,AF,SR\na,1,1\n")
    (tmp_path / "x_test.csv").write_text("filename,AF\nb,1\n")
    with pytest.raises(UserError, match=r"x_train\.csv must have the columns of .*x_test\.csv, got others: SR"):
        open_dataset("csv", tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (",AF\n", "must have a column filename, got Unnamed: 0, AF"),
        ("filename,AF\na,1\n ,0\n", r"labels\.csv, line 3: filename must name a file, got a blank"),
        ("name,AF\na,1\n", "must have a column filename, got name, AF"),
        ("filename,AF\na,1\na,0\n", r"line 3: record a occurs twice, first in .*labels\.csv, line 2"),
        ("filename,fold\na,11\n", "fold in .*, line 2 must be 1 to 10, got 11"),
        ("", "cannot be read"),
    ],
)
def test_csv_mistakes(tmp_path, table, message):
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        open_dataset("csv", tmp_path).entries()


def test_csv_names_of_digits_keep_their_zeros(tmp_path):
    for name in ("00001", "00002"):
        np.save(tmp_path / f"{name}.npy", np.zeros((12, 10)))
    (tmp_path / "labels.csv").write_text("Filename,record_id,AF\n00001,007,1\n00002,,0\n")
    entries = open_dataset("auto", tmp_path).entries()
    assert [(entry.record_id, entry.path.name) for entry in entries] == [("007", "00001.npy"), ("00002", "00002.npy")]


def test_folder_takes_what_can_be_read(tmp_path):
    for name in (
        "b/x.npy",
        "a.npy",
        "r.hea",
        "r.mat",
        "r.dat",
        "r.npy",
        "lone.mat",
        "0.csv",
        ".hidden.npy",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ecg.txt").write_text("I II\n0 0\n")
    (tmp_path / "LICENSE.txt").write_text("No ECG\n")
    entries = open_dataset("auto", tmp_path).entries()
    sources = ["0.csv", "a.npy", "ecg.txt", "lone.mat", "r.hea", "r.npy", "b/x.npy"]
    assert [entry.source for entry in entries] == [entry.record_id for entry in entries] == sources
    (tmp_path / "r.npy").unlink()
    entries = open_dataset("auto", tmp_path).entries()
    assert [entry.record_id for entry in entries] == ["0", "a", "ecg", "lone", "r", "b/x"]


def test_folder_follows_links_once(tmp_path):
    (tmp_path / "data/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("data/a.npy", "data/sub/b.npy", "elsewhere/c.npy"):
        (tmp_path / name).touch()
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/again").symlink_to(tmp_path / "data/sub")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "data")
    (tmp_path / "all").symlink_to(tmp_path / "data")
    dataset = open_dataset("auto", tmp_path / "all")
    assert [entry.source for entry in dataset.entries()] == ["a.npy", "sub/b.npy", "linked/c.npy"]
    before = dataset.fingerprint()
    (tmp_path / "elsewhere/c.npy").write_bytes(b"more")
    assert dataset.fingerprint() != before


@pytest.mark.parametrize("name", ["folder", "challenge"])
def test_links_that_lead_nowhere_are_records_that_cannot_be_read(tmp_path, name):
    write_header(tmp_path / "A0001.hea", ["426783006"])
    (tmp_path / "A0002.hea").symlink_to(tmp_path / "nowhere")
    if name == "folder":
        for suffix in (".npy", ".txt"):
            (tmp_path / f"gone{suffix}").symlink_to(tmp_path / "nowhere")
    dataset = open_dataset(name, tmp_path)
    assert dataset.fingerprint() == dataset.fingerprint()
    entries = dataset.entries()
    assert len(entries) == (4 if name == "folder" else 2)
    for entry in entries:
        if "A0001" not in entry.source:
            with pytest.raises(ReadError, match="no such file"):
                dataset.read(entry)


def test_unknown_names(tmp_path, shared_data):
    with pytest.raises(UserError, match=r"unknown data set 'ptb-xl'; known: ptbxl, .*georgia"):
        open_dataset("ptb-xl", tmp_path)
    with pytest.raises(UserError, match=r"no folder .*nowhere: .*--data_path"):
        open_dataset("auto", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no recordings in .*looked for \.hea, \.npy"):
        open_dataset("auto", tmp_path).entries()
    with pytest.raises(UserError, match=r"ptbxl has no task 'rythm'; its tasks: all, diag, .*rhythm"):
        open_dataset("ptbxl", shared_data / "ptbxl").label_names("rythm")


def test_default_data_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HUBERT_ECG_DATA", raising=False)
    with pytest.raises(UserError, match=r"not found: looked at .*data/ptbxl; give its folder with --data_path, or"):
        default_data_path("ptbxl")
    (tmp_path / "data/ptbxl").mkdir(parents=True)
    assert default_data_path("ptbxl").samefile(tmp_path / "data/ptbxl")
    monkeypatch.setenv("HUBERT_ECG_DATA", str(tmp_path / "elsewhere"))
    assert default_data_path("ptbxl").samefile(tmp_path / "data/ptbxl")
    (tmp_path / "elsewhere/ptbxl").mkdir(parents=True)
    assert default_data_path("ptbxl") == tmp_path / "elsewhere/ptbxl"


def test_every_data_set_is_described():
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert dataset.__doc__
