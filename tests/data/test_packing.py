"""Chunks of recordings as they are packed: those of one rate and length together, each as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest

from hubert_ecg.data import Dataset, Entry, Record, packing
from hubert_ecg.data.packing import Packed, Settings, Skipped, packed_chunks
from hubert_ecg.data.readers import ReadError
from hubert_ecg.signal import LEADS

RATES_HZ = (500, 400, 500, 1000, 499.97, 500, 400, 500)
SECONDS = (10, 10, 10, 3, 10, 4, 10, 10)


class Mixed(Dataset):
    """Recordings of a few rates and lengths, with gaps; the fourth cannot be read, the sixth is short."""

    name = "mixed"

    def __init__(self) -> None:
        pass

    def entries(self):
        return [Entry(f"r{i}", source=f"r{i}.npy") for i in range(len(RATES_HZ))]

    def fingerprint(self):
        return "mixed"

    def read(self, entry):
        i = int(entry.record_id[1:])
        if i == 3:
            raise ReadError(f"{entry.source}: damaged")
        seconds = 0.8 if i == 5 else SECONDS[i]
        signal = np.random.default_rng(i).standard_normal((12, int(seconds * RATES_HZ[i]))).cumsum(1) * 0.05
        if i == 2:
            signal[4, 100:300] = np.nan
        return Record(signal, RATES_HZ[i], LEADS)


def pack(chunks, settings):
    return [result for _, results in packed_chunks(Mixed(), settings, enumerate(chunks), 0) for result in results]


@pytest.mark.parametrize("waiting_samples", [2**24, 100_000])
@pytest.mark.parametrize("compat", ["corrected", "published"])
def test_a_chunk_holds_what_its_records_hold_alone(monkeypatch, compat, waiting_samples):
    monkeypatch.setattr(packing, "_WAITING_SAMPLES", waiting_samples)
    settings, entries = Settings(compat=compat), Mixed().entries()
    together, alone = pack([entries], settings), pack([[entry] for entry in entries], settings)
    for entry, ours, own in zip(entries, together, alone, strict=True):
        assert type(ours) is type(own)
        if isinstance(own, Packed):
            np.testing.assert_array_equal(ours.samples, own.samples)
            assert ours.row == own.row
            assert ours.row["record_id"] == entry.record_id
            assert ours.prepare_s > 0
        else:
            assert (ours.source, ours.reason) == (own.source, own.reason)
        assert ours.read_s > 0
    reasons = {result.source: result.reason for result in together if isinstance(result, Skipped)}
    assert reasons == {"r3.npy": "damaged", "r5.npy": "only 0.8 s long; at least 1 s are needed"}


def test_what_the_preprocessing_refuses_is_skipped_with_its_reason():
    """Both recordings of one rate and length, and no other."""

    class Slow(Mixed):
        def read(self, entry):
            record = super().read(entry)
            return record.replace(sampling_rate_hz=90.0) if entry.record_id in ("r0", "r2") else record

    ((_, results),) = packed_chunks(Slow(), Settings(compat="published"), [(0, Mixed().entries())], 0)
    refused = {result.source: result.reason for result in results if isinstance(result, Skipped)}
    assert sorted(refused) == ["r0.npy", "r2.npy", "r3.npy", "r5.npy"]
    assert refused["r0.npy"] == refused["r2.npy"]
    assert "sampling_rate must be above 94 Hz" in refused["r0.npy"]
