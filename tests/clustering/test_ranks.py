"""Several processes with a shard each against one with all points."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hubert_ecg import KMeans, clustering
from hubert_ecg.clustering import points

from .toy import blobs

X = blobs(1501, 7, 9)
X[:400] = X[0]
WEIGHT = np.random.default_rng(1).uniform(0, 2, size=len(X))
# The clusters of "first rows" start on one point, so that all but one are empty.
MODELS = [
    {"init": init, "batch_size": batch_size, "weighted": weighted}
    for init in ("k-means++", "k-means||", "random", "first rows")
    for batch_size, weighted in ((None, False), (None, True), (256, True))
]
MODELS += [{"give": give} for give in ("memory map", "source", "torch")]
MODELS += [{"give": "memory map", "batch_size": 256}, {"init": "random", "n_init": 3, "normalize": False}]
MODELS = [{"n_clusters": 12, "random_state": 5, "max_iter": 15} | options for options in MODELS]
SHARDS = {"uneven": [0, 5, 1501], "empty": [0, 0, 600, 1501]}


def run(folder, cuts, cases):
    """What each rank found in each case."""
    (folder / "plan.json").write_text(json.dumps({"cuts": cuts, "cases": cases}))
    np.save(folder / "x.npy", X)
    np.save(folder / "weight.npy", WEIGHT)
    script = Path(__file__).with_name("shards.py")
    ranks = range(len(cuts) - 1)
    started = [
        subprocess.Popen([sys.executable, str(script), str(folder), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0 for _ in ranks], "".join(said)
    return [[dict(np.load(folder / f"{case}-{rank}.npz")) for rank in ranks] for case in range(len(cases))]


@pytest.fixture(scope="module", params=SHARDS)
def found(request, tmp_path_factory):
    return run(tmp_path_factory.mktemp(request.param), SHARDS[request.param], MODELS)


@pytest.mark.parametrize("case", range(len(MODELS)), ids=[str(options) for options in MODELS])
def test_shards_give_what_one_process_gives(case, found, monkeypatch):
    monkeypatch.setitem(points._BLOCK, "cpu", 4000)
    options = {**MODELS[case]}
    options.pop("give", None)
    weight = WEIGHT if options.pop("weighted", False) else None
    if options.get("init") == "first rows":
        options["init"] = X[: options["n_clusters"]]
    alone = KMeans(**options).fit(X, sample_weight=weight)
    first, *others = found[case]
    assert "error" not in first, first["error"]
    for name in ("cluster_centers_", "inertia_", "n_iter_", "empty_clusters_", "cluster_sizes_", "cluster_weights_"):
        for other in others:
            np.testing.assert_array_equal(other[name], first[name], err_msg=name)
        np.testing.assert_allclose(first[name], getattr(alone, name), rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(np.concatenate([rank["labels_"] for rank in found[case]]), alone.labels_)
    assert first["score"] == pytest.approx(alone.score(X, sample_weight=weight), rel=1e-6)
    scores = clustering.scores(X, None, alone.cluster_centers_, normalize=True, max_points=500)
    np.testing.assert_allclose(first["scores"], list(scores.values()), rtol=1e-6)
    if "init" in options and not isinstance(options["init"], str):
        assert alone.empty_clusters_ > 0


def test_the_same_ranks_give_the_same_bits(found, tmp_path, request):
    cuts = SHARDS[request.node.callspec.params["found"]]
    some = range(0, len(MODELS), 5)
    for before, again in zip(
        [found[case] for case in some], run(tmp_path, cuts, [MODELS[case] for case in some]), strict=True
    ):
        for one, other in zip(before, again, strict=True):
            assert {name: value.tobytes() for name, value in one.items()} == {n: v.tobytes() for n, v in other.items()}


def test_what_one_rank_refuses_stops_all(tmp_path):
    bad_row = (
        "ValueError: KMeans.fit: x must be finite, got NaN or infinity in row 0 of rank {}; drop or fill such rows"
    )
    stopped = "RuntimeError: KMeans.fit: rank {} could not go on; its error says why"
    few = "ValueError: KMeans.fit: x must have at least n_clusters = 1502 rows, got 1501; ask for fewer clusters"
    kinds = "ValueError: KMeans.fit: x must have one D, one dtype and weights or none on all ranks, got D 7, float32, "
    kinds += "weights False; D 7, float64, weights False"
    order = "ValueError: KMeans.fit: x must be an array, a memory map or a source with take(indices), where batch_size "
    order += "and distributed are given, got a source of blocks in order"
    other = (
        "ValueError: KMeans.fit: n_clusters, init, n_init, max_iter, tol, normalize and batch_size must be the same "
    )
    other += "on all ranks, got others on rank 1"
    cases = {
        "array": ({"spoil": 1}, [stopped.format(1), bad_row.format(1)]),
        "source": ({"spoil": 0, "give": "source"}, [bad_row.format(0), stopped.format(0)]),
        "few": ({"n_clusters": 1502}, [few, few]),
        "dtype": ({"mine": {"1": {"dtype": "float64"}}}, [kinds, kinds]),
        "order": ({"give": "source", "batch_size": 100}, [order, order]),
        "other": ({"mine": {"1": {"n_clusters": 5}}}, [other, other]),
    }
    found = run(tmp_path, [0, 700, 1501], [{"n_clusters": 4} | options for options, _ in cases.values()])
    assert {name: [str(rank["error"]) for rank in ranks] for name, ranks in zip(cases, found, strict=True)} == {
        name: errors for name, (_, errors) in cases.items()
    }


def test_rank_0_draws_for_all(tmp_path):
    mine = {"0": {"random_state": 1}, "1": {"random_state": None}}
    ((first, other),) = run(tmp_path, [0, 700, 1501], [{"n_clusters": 6, "mine": mine}])
    alone = KMeans(6, random_state=1).fit(X)
    np.testing.assert_array_equal(first["cluster_centers_"], other["cluster_centers_"])
    np.testing.assert_array_equal(np.concatenate([first["labels_"], other["labels_"]]), alone.labels_)


@pytest.mark.parametrize("distributed", [True, "all", 3])
def test_a_group_must_be_there(distributed):
    with pytest.raises(ValueError, match=r"KMeans.fit: distributed must be False, or True or a process group after"):
        KMeans(3).fit(X, distributed=distributed)
