"""What an installed wheel must do in an empty folder, without a compiler: run as a script by CI."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

import hubert_ecg
from hubert_ecg import cli, native, ops
from hubert_ecg.data.synthetic import generate_ecg

assert native._C is not None, native.why_missing
assert "site-packages" in hubert_ecg.__file__, hubert_ecg.__file__

frames = np.random.default_rng(0).standard_normal((93, 64)).astype(np.float32)
with ops.use_backend("reference"):
    expected = ops.mfcc(frames)
np.testing.assert_allclose(ops.mfcc(frames), expected, atol=1e-3)

with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "records").mkdir()
    for i in range(12):
        signal, _, _ = generate_ecg(i)
        np.save(Path(folder) / "records" / f"{i}.npy", signal)
    out = f"{folder}/out"
    flags = ["--data_path", f"{folder}/records", "--output_dir", out, "--cache_dir", f"{folder}/cache"]
    small = ["--size", "tiny", "--num_clusters", "8", "--batch_size", "4", "--max_steps", "2"]
    assert cli.main(["pretrain", *flags, *small]) == 0
    model = hubert_ecg.HubertECG.from_pretrained(f"{out}/hubert_ecg.pt").eval()
    ecg = hubert_ecg.prepare_ecg_for_inference(signal, target_length=2500)
    hidden = model(torch.from_numpy(ecg)[None]).last_hidden_state
    assert hidden.shape[:2] == (1, 93)
    assert hidden.isfinite().all()
assert cli.main(["info"]) == 0
print("smoke test: passed")
