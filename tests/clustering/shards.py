"""One rank of a group that clusters together: ``python shards.py <folder> <rank>``; test_ranks.py starts them.

``plan.json`` in the folder says where shards begin and end and which cases there are; ``x.npy`` and ``weight.npy`` hold
the points.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from hubert_ecg import KMeans, clustering
from hubert_ecg.clustering import points


class Source:
    dtype = np.float32

    def __init__(self, x):
        self.x, self.shape = x, x.shape

    def blocks(self, rows):
        return iter(self.x[first : first + rows] for first in range(0, len(self.x), rows))


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    plan = json.loads((folder / "plan.json").read_text())
    cuts, cases = plan["cuts"], plan["cases"]
    points._BLOCK["cpu"] = 4000
    patience = datetime.timedelta(seconds=60)
    meet = f"file://{folder / 'meet'}"
    distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=len(cuts) - 1, timeout=patience)
    shard = slice(cuts[rank], cuts[rank + 1])
    for case, options in enumerate(cases):
        x, weight = np.load(folder / "x.npy", mmap_mode="r")[shard], np.load(folder / "weight.npy")[shard]
        give, found = options.pop("give", "array"), {}
        spoiled, weighted, mine = options.pop("spoil", None), options.pop("weighted", False), options.pop("mine", {})
        options |= mine.get(str(rank), {})
        if "init" in options and options["init"] == "first rows":
            options["init"] = np.load(folder / "x.npy")[: options["n_clusters"]]
        if spoiled == rank:
            x = np.array(x)
            x[0, 0] = np.nan
        x = {"array": np.array, "memory map": lambda x: x, "source": Source, "torch": lambda x: torch.tensor(x)}[give](
            x
        )
        x = x.astype(options.pop("dtype")) if "dtype" in options else x
        group = distributed.group.WORLD if case % 2 else True
        try:
            model = KMeans(**options).fit(x, sample_weight=weight if weighted else None, distributed=group)
            found = {name: getattr(model, name) for name in vars(model) if name.endswith("_")}
            found["labels_"] = model.labels_
            found["score"] = model.score(x, sample_weight=weight if weighted else None, distributed=group)
            scores = clustering.scores(
                x, None, model.cluster_centers_, normalize=True, max_points=500, distributed=group
            )
            found["scores"] = list(scores.values())
        except (ValueError, RuntimeError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
        np.savez(folder / f"{case}-{rank}.npz", **found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
