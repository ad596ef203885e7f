from __future__ import annotations

import errno
import os
import pickle
import resource

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from hubert_ecg import cli
from hubert_ecg.files import naming, new_array, replacing, write_text
from hubert_ecg.models import HubertECGConfig, HubertECGForPretraining
from hubert_ecg.models.pretrained import save_file
from hubert_ecg.train.logs import MetricsFile

X = np.random.default_rng(0).normal(size=30_000).astype(np.float32)


@pytest.fixture
def no_room():
    """No file grows beyond 64 KiB, as on a disk that is full by then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def by_parquet(path):
    with pq.ParquetWriter(path, pa.schema({"x": pa.float32()})) as writer:
        writer.write_table(pa.table({"x": X}))


def by_torch(path):
    with path.open("wb") as file:
        torch.save({"x": torch.from_numpy(X)}, file)


def by_numpy(path):
    with path.open("wb") as file:
        np.savez(file, x=X)


def by_pickle(path):
    with path.open("wb") as file:
        pickle.dump(X, file)


WRITERS = {
    "text": lambda path: path.write_text("x" * 2**17),
    "csv": lambda path: pd.DataFrame({"x": X}).to_csv(path),
    "safetensors": lambda path: safetensors.numpy.save_file({"x": X}, path),
    "safetensors_torch": lambda path: safetensors.torch.save_file({"x": torch.from_numpy(X)}, path),
    "parquet": by_parquet,
    "torch": by_torch,
    "numpy": by_numpy,
    "pickle": by_pickle,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_a_full_disk_names_the_file_and_leaves_what_it_held(tmp_path, no_room, write):
    path = tmp_path / "new" / "file"
    write_text(path, "before")
    with pytest.raises(OSError, match="File too large") as error, replacing(path) as temporary:
        write(temporary)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "before"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_models_and_logs_name_their_file(tmp_path, no_room):
    with pytest.raises(OSError, match=r"too large: .*model\.pt'$"):
        save_file(HubertECGForPretraining(HubertECGConfig.preset("tiny", vocab_sizes=[5])), tmp_path / "model.pt")
    log = MetricsFile(tmp_path / "metrics.csv", ["note"])

    def fill():
        for _ in range(9):
            log.write({"note": "x" * 2**14})

    for work in (fill, log.close):
        with pytest.raises(OSError, match=r"too large: .*metrics\.csv'$"):
            work()


def test_an_array_that_has_no_room_is_an_error_and_not_the_end_of_the_process(tmp_path, no_room):
    values = new_array(tmp_path / "a.npy", np.int16, (30, 1000))
    assert os.stat(tmp_path / "a.npy").st_blocks * 512 >= values.nbytes
    values[:] = np.arange(1000)
    values.flush()
    assert (np.load(tmp_path / "a.npy") == np.arange(1000)).all()
    with pytest.raises(OSError, match=r"too large: .*b\.npy'$"):
        new_array(tmp_path / "b.npy", np.float32, (1000, 1000))
    assert not (tmp_path / "b.npy").exists()


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "gone", "elsewhere"), ValueError("no (os error 2)"), KeyError(1)):
        with pytest.raises(type(error)) as raised, naming(tmp_path):
            raise error
        assert raised.value is error
    with pytest.raises(OSError, match=r"\[Errno 5\] 3 requested and 2 written: ") as raised, naming(tmp_path / "a"):
        raise OSError("3 requested and 2 written")
    assert raised.value.filename == str(tmp_path / "a")


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, no_room, capsys, monkeypatch):
    def write(config):
        write_text(config.output_dir / "notes", "x" * 2**17)

    monkeypatch.setattr(cli.Command, "function", lambda self: write)
    assert cli.main(["pretrain", "--data_path", "x", "--output_dir", str(tmp_path)]) == 2
    hint = "make room, or name another folder, and run the command again"
    assert capsys.readouterr().err == f"hubert-ecg: error: {tmp_path / 'notes'}: File too large; {hint}\n"
