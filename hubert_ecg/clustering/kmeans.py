"""The model: what it is made with, what it keeps, and how it is fitted, used and filed."""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import ops
from hubert_ecg.clustering.lloyd import Run, Told, assess, batch_step, lloyd, mean_variance, mini_batches
from hubert_ecg.clustering.points import ArrayLike, BlockSource, Points, as_given, as_tensor
from hubert_ecg.clustering.ranks import Ranks
from hubert_ecg.clustering.starts import METHODS, draw_start
from hubert_ecg.clustering.telling import telling
from hubert_ecg.config import UserError
from hubert_ecg.data import plain_pickle
from hubert_ecg.files import replacing
from hubert_ecg.ops._op import check_flag, check_real

_FORMAT = "hubert_ecg.KMeans"
# What the file of a model says, and what besides it the object is made with.
_FILED = ("n_clusters", "init", "n_init", "max_iter", "tol", "normalize", "batch_size", "random_state")
_PARAMETERS = (*_FILED, "verbose")


class KMeans:
    """Lloyd's k-means with scikit-learn's conventions; the normalisation of the rows belongs to the model.

    Points are clustered in the dtype they come in, float32 (half precision too) or float64, on the device where they
    are (a tensor on a GPU stays there); sums are float64. A cluster that runs empty is moved to the point farthest from
    its centre. From the same start, the centres are those of scikit-learn's Lloyd, as long as no point is equally near
    to two of them within the rounding of its dtype: then the first of the two wins here, and rounding decides there. Of
    float32 points, labels here are those of exact distances to centres rounded to float32: but for that rounding, what
    scikit-learn finds for the same numbers in float64.

    Points may be larger than memory: a :class:`numpy.memmap` (or a view of one) and a :class:`BlockSource` are read
    block by block on every pass, the next block while the one before is clustered. And they may be sharded over the
    processes of a ``torch.distributed`` group, rank 0 with the first rows. Neither changes the result by more than the
    order of float64 sums: what is drawn depends on the seed and on the place of a row among all. Mini-batches of a
    source without ``take`` alone come in its order.

    >>> x = np.array([[0.0, 1.0], [0.1, 1.0], [5.0, 0.0], [9.0, 0.1]])
    >>> KMeans(2, random_state=0).fit(x).cluster_centers_.round(3)
    array([[1.   , 0.006],
           [0.05 , 0.998]])

    Args:
        n_clusters: K.
        init: "k-means++" (greedy, as in scikit-learn; on a sample where there are more than 256 points to a cluster and
            more than 65,536, or more than 256 MiB of them), "k-means||" (five passes over all points that draw about K
            each, reduced by k-means++), "random" (points, drawn by weight), or centres ``[K, D]``, which are taken as
            they are.
        n_init: Starts; the one with the least inertia is kept. Given centres make one.
        max_iter: Lloyd iterations of a start at most; with ``batch_size``, passes over the points.
        tol: Stop when the centres move less than this, squared and relative to the mean variance of the features.
        normalize: Scale rows to Euclidean length 1, in ``fit`` and ``predict`` alike. A row of zeros stays.
        batch_size: Fit on mini-batches of this many points instead of on all of them at a time.
        random_state: Seed, ``numpy.random.Generator``, or None.
        verbose: Show a progress bar on a terminal, and a line for each iteration elsewhere.

    Attributes:
        cluster_centers_: ``[K, D]``, in the space of the normalised rows.
        labels_: ``[N] int64``, the cluster of each row that was fitted (of this rank's rows). Those of points that are
            not in memory are found when they are first asked for; until then the points must not change.
        inertia_: Sum of squared distances of the (normalised, weighted) rows to their centres, of all ranks.
        n_iter_: Iterations of the start that was kept.
        empty_clusters_: How often a cluster ran empty, in that start; it is moved where a point is left for it.
        cluster_weights_: ``[K] float64``, the weight of the points that each centre is the mean of: with mini-batches,
            all that it was ever given.
        cluster_sizes_: ``[K] float64``, the weight of the fitted points in each cluster (of all ranks).
    """

    cluster_centers_: np.ndarray
    labels_: np.ndarray
    inertia_: float
    n_iter_: int
    empty_clusters_: int
    cluster_weights_: np.ndarray
    cluster_sizes_: np.ndarray

    # What scikit-learn asked before it had tags.
    _estimator_type = "clusterer"

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: str | ArrayLike = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        normalize: bool = True,
        batch_size: int | None = None,
        random_state: int | np.random.Generator | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.normalize = normalize
        self.batch_size = batch_size
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        x: ArrayLike | BlockSource,
        y: None = None,
        sample_weight: ArrayLike | None = None,
        *,
        progress: Told | None = None,
        distributed: Any = False,
    ) -> KMeans:
        """Clusters the points. Interrupted or failing, it leaves the model as it was.

        Args:
            x: Points, ``[N, D]``: an array, a memory map or a :class:`BlockSource`.
            y: Ignored, as in scikit-learn.
            sample_weight: ``[N]``, not negative. Default: all 1.
            progress: Called after every iteration with its number and the inertia at its beginning.
            distributed: True where each process of the default group of ``torch.distributed`` calls this with its shard
                (which may be empty), or their process group. All of them must have the same arguments.

        Raises:
            ValueError: An argument is out of range, there are fewer points than clusters, or a point is not finite.
            RuntimeError: Another rank cannot go on.
        """
        ranks = Ranks("KMeans.fit", distributed)
        with ranks.together():
            self._check_parameters("fit")
            seed = torch.tensor([int(self._random("fit").integers(1 << 63))])
        self._check_ranks_agree(ranks)
        points = self._points("fit", x, weight=sample_weight, ranks=ranks)
        given = self._given_start("fit", points)
        # Every rank draws alike, whatever its own random_state is.
        random = np.random.default_rng(int(ranks.first(seed)))
        tol = self.tol * mean_variance(points)
        num_starts = self.n_init if given is None else 1
        best: Run | None = None
        with telling(points, self.verbose, num_starts, self.max_iter, progress) as told:
            for _ in range(num_starts):
                start = draw_start(points, self.n_clusters, self.init, random) if given is None else given
                limits: dict[str, Any] = {"tol": tol, "max_iter": self.max_iter, "told": told}
                if self.batch_size is None:
                    run = lloyd(points, start, **limits)
                else:
                    run = mini_batches(points, start, batch_size=self.batch_size, random=random, **limits)
                if best is None or run.inertia < best.inertia:
                    best = run
        assert best is not None
        self._take(best, None if best.labels is not None else x)
        return self

    def fit_predict(
        self,
        x: ArrayLike | BlockSource,
        y: None = None,
        sample_weight: ArrayLike | None = None,
        *,
        distributed: Any = False,
    ) -> ArrayLike:
        """``fit(x).labels_``, in the kind of array that was given."""
        self.fit(x, sample_weight=sample_weight, distributed=distributed)
        return as_given(torch.from_numpy(self.labels_), x)

    def partial_fit(self, x: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> KMeans:
        """Moves the centres by one mini-batch; each centre is the mean of all points it was ever given.

        The first batch chooses the centres and must have at least K points.

        Raises:
            ValueError: As ``fit``; or other features than before.
        """
        self._check_parameters("partial_fit")
        fitted = hasattr(self, "cluster_centers_")
        width = self.cluster_centers_.shape[1] if fitted else None
        points = self._points("partial_fit", x, weight=sample_weight, width=width)
        if fitted:
            centers = self._centers(points)
            weights = torch.as_tensor(getattr(self, "cluster_weights_", np.zeros(len(centers))), device=points.device)
        else:
            given, random = self._given_start("partial_fit", points), self._random("partial_fit")
            centers = draw_start(points, self.n_clusters, self.init, random) if given is None else given
            weights = torch.zeros(self.n_clusters, dtype=torch.float64, device=points.device)
        batch = points.take(np.arange(points.num_rows))
        centers, weights, _, empty = batch_step(batch, points, centers, weights)
        inertia, sizes, labels = assess(points, centers, keep_labels=True)
        iterations, empty_before = (self.n_iter_, self.empty_clusters_) if fitted else (0, 0)
        self._take(Run(centers, weights, sizes, inertia, iterations + 1, empty_before + empty, labels))
        return self

    def predict(self, x: ArrayLike | BlockSource) -> ArrayLike:
        """The nearest centre of each row: ``[N] int64``, in the kind of array that was given."""
        points = self._points("predict", x, width=self._fitted("predict").shape[1])
        centers = self._centers(points)
        labels = torch.empty(points.num_rows, dtype=torch.int64, device=points.device)
        for block in points.blocks():
            labels[block.rows] = ops.kmeans_assign(block.x, centers)
        return as_given(labels, x)

    def transform(self, x: ArrayLike | BlockSource) -> ArrayLike:
        """Distances of the (normalised) rows to all centres: ``[N, K]``, in the kind of array that was given."""
        points = self._points("transform", x, width=self._fitted("transform").shape[1])
        centers = self._centers(points)
        distances = torch.empty(points.num_rows, len(centers), dtype=points.dtype, device=points.device)
        for block in points.blocks():
            distances[block.rows] = torch.cdist(block.x, centers, compute_mode="donot_use_mm_for_euclid_dist")
        return as_given(distances, x)

    def score(
        self,
        x: ArrayLike | BlockSource,
        y: None = None,
        sample_weight: ArrayLike | None = None,
        *,
        distributed: Any = False,
    ) -> float:
        """Minus the inertia of these rows (of all ranks)."""
        width, ranks = self._fitted("score").shape[1], Ranks("KMeans.score", distributed)
        points = self._points("score", x, weight=sample_weight, width=width, ranks=ranks)
        return -assess(points, self._centers(points))[0]

    def normalized(self, x: ArrayLike | BlockSource) -> ArrayLike:
        """The rows as they are clustered: of length 1 with ``normalize=True``, else as given."""
        points = self._points("normalized", x)
        rows = torch.empty(points.num_rows, points.width, dtype=points.dtype, device=points.device)
        for block in points.blocks():
            rows[block.rows] = block.x
        return as_given(rows, x)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments that made this object."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> KMeans:
        """Changes arguments; takes effect at the next ``fit``."""
        for name, value in params.items():
            if name not in _PARAMETERS:
                raise ValueError(f"KMeans.set_params: name must be one of {', '.join(_PARAMETERS)}, got {name}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """What a pipeline of scikit-learn 1.6 or later asks an estimator."""
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        target, transformer = TargetTags(required=False), TransformerTags(preserves_dtype=["float64", "float32"])
        return Tags("clusterer", target, transformer, input_tags=InputTags())

    def __repr__(self) -> str:
        default = KMeans().get_params()
        changed = [
            f"{name}=<array>" if isinstance(value, np.ndarray | Tensor | list) else f"{name}={value!r}"
            for name, value in self.get_params().items()
            if not (isinstance(value, str | int | float | None) and value == default[name])
        ]
        return f"KMeans({', '.join(changed)})"

    def state(self) -> dict[str, Any]:
        """Everything but ``labels_``, as plain values and NumPy arrays; ``KMeans.from_state`` is the way back."""
        centers = self._fitted("state")
        params = self.get_params()
        if not isinstance(params["init"], str):
            params["init"] = as_tensor("KMeans.state: init", params["init"]).cpu().numpy()
        if not isinstance(params["random_state"], int | np.integer | None):
            params["random_state"] = None
        params = {name: v.item() if isinstance(v, np.generic) else v for name, v in params.items()}
        state: dict[str, Any] = {"format": _FORMAT, **params, "cluster_centers": centers.copy()}
        if hasattr(self, "cluster_weights_"):
            state["cluster_weights"] = self.cluster_weights_.copy()
        if hasattr(self, "cluster_sizes_"):
            state["cluster_sizes"] = self.cluster_sizes_.copy()
        return {
            **state,
            "inertia": float(self.inertia_),
            "n_iter": int(self.n_iter_),
            "empty_clusters": int(self.empty_clusters_),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> KMeans:
        """The model that ``state()`` described.

        Raises:
            ValueError: It is no such description.
        """
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            given = state.get("format") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"from_state: state must have the format {_FORMAT}, got {given}")
        missing = [name for name in (*_FILED, "cluster_centers") if name not in state]
        if missing:
            raise ValueError(f"from_state: state must have {', '.join(missing)}, got {', '.join(map(str, state))}")
        model = cls(**{name: state[name] for name in _FILED})
        centers = np.array(state["cluster_centers"])
        if centers.ndim != 2 or centers.dtype not in (np.float32, np.float64) or not np.isfinite(centers).all():
            want = "finite float32 or float64 [K, D]"
            raise ValueError(f"from_state: cluster_centers must be {want}, got {centers.dtype}{list(centers.shape)}")
        model.n_clusters = len(centers)
        model.cluster_centers_ = centers
        if state.get("cluster_weights") is not None:
            model.cluster_weights_ = np.array(state["cluster_weights"], np.float64)
        if state.get("cluster_sizes") is not None:
            model.cluster_sizes_ = np.array(state["cluster_sizes"], np.float64)
        model.inertia_ = float(state.get("inertia", math.nan))
        model.n_iter_ = int(state.get("n_iter", 0))
        model.empty_clusters_ = int(state.get("empty_clusters", 0))
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model, whole or not at all: ``.safetensors`` with JSON metadata, or ``.pkl`` of plain values.

        Raises:
            ValueError: The model is not fitted, or the file name ends in neither.
        """
        path, state = Path(path), self.state()
        if path.suffix == ".pkl":
            plain_pickle.dump(state, path)
        elif path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            arrays = {name: np.ascontiguousarray(v) for name, v in state.items() if isinstance(v, np.ndarray)}
            values = {name: value for name, value in state.items() if name not in arrays}
            with replacing(path) as unfinished:
                save_file(arrays, unfinished, metadata={"hubert_ecg": json.dumps(values)})
        else:
            raise UserError(f"save: path must end in .safetensors or .pkl, got {path}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> KMeans:
        """Reads what ``save`` wrote.

        Raises:
            UserError: No such file, or no k-means model in it.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no k-means model at {path}")
        if path.suffix == ".pkl":
            state = plain_pickle.load(path)
        elif path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="numpy") as file:
                    state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                    state.update(json.loads((file.metadata() or {}).get("hubert_ecg", "{}")))
            except (SafetensorError, json.JSONDecodeError, OSError) as error:
                raise UserError(f"{path} is no readable k-means model: {error}") from error
        else:
            raise UserError(f"load: path must end in .safetensors or .pkl, got {path}")
        try:
            return cls.from_state(state)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is no k-means model ({error})") from error

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # Reached where labels_ is not set: points that are not in memory were fitted.
            if name == "labels_" and "_fitted_points" in self.__dict__:
                source, normalize = self._fitted_points
                self.labels_ = KMeans.from_state({**self.state(), "normalize": normalize}).predict(source)
                return self.labels_
            hint = ""
            if name in KMeans.__annotations__:
                fitted = "cluster_centers_" in self.__dict__
                hint = "; a copy or a file does not keep it: call predict" if fitted else "; call fit first"
            raise AttributeError(f"KMeans has no attribute {name!r}{hint}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_fitted_points"}

    def _check_parameters(self, op: str) -> None:
        for name in ("n_clusters", "n_init", "max_iter", "batch_size"):
            value = getattr(self, name)
            if name == "batch_size" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"KMeans.{op}: {name} must be a whole number of at least 1, got {value!r}")
        check_real(f"KMeans.{op}: tol", self.tol)
        if not self.tol >= 0:
            raise ValueError(f"KMeans.{op}: tol must be at least 0, got {self.tol!r}")
        check_flag(f"KMeans.{op}: normalize", self.normalize)
        if isinstance(self.init, str) and self.init not in METHODS:
            want = f"{', '.join(map(repr, METHODS))} or an array [K, D]"
            raise ValueError(f"KMeans.{op}: init must be {want}, got {self.init!r}")

    def _random(self, op: str) -> np.random.Generator:
        try:
            return np.random.default_rng(self.random_state)
        except (TypeError, ValueError) as error:
            want = "a whole number from 0, a numpy.random.Generator or None"
            raise ValueError(f"KMeans.{op}: random_state must be {want}, got {self.random_state!r}") from error

    def _check_ranks_agree(self, ranks: Ranks) -> None:
        names = [name for name in _FILED if name != "random_state"]
        mine = [
            value if isinstance(value := getattr(self, name), str | int | float | None) else "array" for name in names
        ]
        digests = torch.cat(ranks.gather(torch.tensor([zlib.crc32(repr(mine).encode())])))
        others = (digests != digests[0]).nonzero().flatten().tolist()
        if others:
            want = f"{', '.join(names[:-1])} and {names[-1]} must be the same on all ranks"
            raise ValueError(f"{ranks.op}: {want}, got others on rank {others[0]}")

    def _points(self, op: str, x: ArrayLike | BlockSource, **options: Any) -> Points:
        return Points(f"KMeans.{op}", x, normalize=bool(self.normalize), **options)

    def _fitted(self, op: str) -> np.ndarray:
        if not hasattr(self, "cluster_centers_"):
            raise ValueError(f"KMeans.{op}: the model must be fitted first; call fit or partial_fit, or load one")
        return self.cluster_centers_

    def _centers(self, points: Points) -> Tensor:
        return torch.as_tensor(self.cluster_centers_, dtype=points.dtype, device=points.device)

    def _given_start(self, op: str, points: Points) -> Tensor | None:
        """The centres that were given, the same on all ranks; None where they are to be drawn."""
        n, k = points.total, self.n_clusters
        if n < k:
            want = f"have at least n_clusters = {k} rows"
            raise ValueError(f"KMeans.{op}: x must {want}, got {n}; ask for fewer clusters")
        if isinstance(self.init, str):
            return None
        with points.ranks.together():
            centers = as_tensor(f"KMeans.{op}: init", self.init).to(points.device, points.dtype)
            if tuple(centers.shape) != (k, points.width) or not torch.isfinite(centers).all():
                got = f"shape {list(centers.shape)}" if centers.shape != (k, points.width) else "NaN or infinity"
                want = f"{', '.join(map(repr, METHODS))} or finite centres [{k}, {points.width}]"
                raise ValueError(f"KMeans.{op}: init must be {want}, got {got}")
        return points.ranks.first(centers.contiguous())

    def _take(self, run: Run, source: ArrayLike | BlockSource | None = None) -> None:
        state = {
            "cluster_centers_": run.centers.cpu().numpy(),
            "inertia_": run.inertia,
            "n_iter_": run.iterations,
            "empty_clusters_": run.empty,
            "cluster_weights_": run.weights.cpu().numpy(),
            "cluster_sizes_": run.sizes.cpu().numpy(),
            "labels_": None if run.labels is None else run.labels.cpu().numpy(),
            "_fitted_points": None if source is None else (source, self.normalize),
        }
        new = self.__dict__ | state
        for name in ("labels_", "_fitted_points"):
            if new[name] is None:
                del new[name]
        # In one step: whoever interrupts finds all of it or none.
        self.__dict__ = new
