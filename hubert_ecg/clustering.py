"""k-means with its normalisation inside, and how good its clusters are."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubert_ecg import ops
from hubert_ecg.config import UserError
from hubert_ecg.data import plain_pickle
from hubert_ecg.files import replacing
from hubert_ecg.ops._op import to_tensor

#: A NumPy array, a torch tensor, or (as scikit-learn takes them) nested lists.
ArrayLike = Any

_FORMAT = "hubert_ecg.KMeans"
_PARAMETERS = ("n_clusters", "init", "n_init", "max_iter", "tol", "normalize", "batch_size", "random_state")
# Rows at a time where a pass over the points needs float64 copies of them.
_ROWS = 1 << 16


class KMeans:
    """Lloyd's k-means with scikit-learn's conventions; the normalisation of the rows belongs to the model.

    Points are clustered in the dtype they come in, float32 or float64, on the device where they are (a tensor on a
    GPU stays there); sums are float64. A cluster that runs empty is moved to the point farthest from its centre.
    From the same start, the centres are those of scikit-learn's Lloyd, as long as no point is equally near to two of
    them within the rounding of its dtype: then the first of the two wins here, and rounding decides there.

    >>> x = np.array([[0.0, 1.0], [0.1, 1.0], [5.0, 0.0], [9.0, 0.1]])
    >>> KMeans(2, random_state=0).fit(x).cluster_centers_.round(3)
    array([[1.   , 0.006],
           [0.05 , 0.998]])

    Args:
        n_clusters: K.
        init: "k-means++" (greedy, as in scikit-learn; on a sample where there are more than 256 points to a cluster and
            more than 65,536), or centres ``[K, D]``, which are taken as they are.
        n_init: Starts; the one with the least inertia is kept.
        max_iter: Lloyd iterations of a start at most; with ``batch_size``, passes over the points.
        tol: Stop when the centres move less than this, squared and relative to the mean variance of the features.
        normalize: Scale rows to Euclidean length 1, in ``fit`` and ``predict`` alike. A row of zeros stays.
        batch_size: Fit on mini-batches of this many points instead of on all of them at a time.
        random_state: Seed, ``numpy.random.Generator``, or None.

    Attributes:
        cluster_centers_: ``[K, D]``, in the space of the normalised rows.
        labels_: ``[N] int64``, the cluster of each row that was fitted.
        inertia_: Sum of squared distances of the (normalised, weighted) rows to their centres.
        n_iter_: Iterations of the start that was kept.
        empty_clusters_: How often a cluster ran empty and was moved, in that start.
    """

    cluster_centers_: np.ndarray
    labels_: np.ndarray
    inertia_: float
    n_iter_: int
    empty_clusters_: int

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
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.normalize = normalize
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(
        self,
        x: ArrayLike,
        y: None = None,
        sample_weight: ArrayLike | None = None,
        *,
        progress: Callable[[int, float], None] | None = None,
    ) -> KMeans:
        """Clusters the points.

        Args:
            x: Points, ``[N, D]``.
            y: Ignored, as in scikit-learn.
            sample_weight: ``[N]``, not negative. Default: all 1.
            progress: Called after every iteration with its number and the inertia at its beginning.

        Raises:
            ValueError: An argument is out of range, there are fewer points than clusters, or a point is not finite.
        """
        self._check_parameters()
        points = self._points("fit", x)
        weight = _weights(sample_weight, points)
        random = np.random.default_rng(self.random_state)
        tol = self.tol * _mean_variance(points)
        run = self._lloyd if self.batch_size is None else self._mini_batches
        best: _Run | None = None
        for _ in range(self.n_init):
            start = self._start("fit", points, weight, random)
            done = run(points, weight, start, tol, random, progress)
            if best is None or done.inertia < best.inertia:
                best = done
        assert best is not None
        self._take(best)
        return self

    def fit_predict(self, x: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> ArrayLike:
        """``fit(x).labels_``, in the kind of array that was given."""
        return _as_given(torch.from_numpy(self.fit(x, sample_weight=sample_weight).labels_), x)

    def partial_fit(self, x: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> KMeans:
        """Moves the centres by one mini-batch; each centre is the mean of all points it was ever given.

        The first batch chooses the centres and must have at least K points.

        Raises:
            ValueError: As ``fit``; or other features than before.
        """
        self._check_parameters()
        fitted = hasattr(self, "cluster_centers_")
        points = self._points("partial_fit", x, width=self.cluster_centers_.shape[1] if fitted else None)
        weight = _weights(sample_weight, points)
        if not fitted:
            start = self._start("partial_fit", points, weight, np.random.default_rng(self.random_state))
            self.cluster_centers_ = start.cpu().numpy()
            self.cluster_weights_ = np.zeros(self.n_clusters)
            self.n_iter_ = self.empty_clusters_ = 0
        centers = self._centers(points)
        totals = torch.from_numpy(self.cluster_weights_).to(points.device)
        labels, centers, totals, moved = _mini_batch_step(points, weight, centers, totals)
        self.cluster_centers_, self.cluster_weights_ = centers.cpu().numpy(), totals.cpu().numpy()
        self.labels_ = labels.cpu().numpy()
        self.inertia_ = float(_inertia(points, centers, labels, weight))
        self.n_iter_ += 1
        self.empty_clusters_ += moved
        return self

    def predict(self, x: ArrayLike) -> ArrayLike:
        """The nearest centre of each row: ``[N] int64``, in the kind of array that was given."""
        points = self._points("predict", x, width=self._fitted("predict").shape[1])
        return _as_given(ops.kmeans_assign(points, self._centers(points)), x)

    def transform(self, x: ArrayLike) -> ArrayLike:
        """Distances of the (normalised) rows to all centres: ``[N, K]``, in the kind of array that was given."""
        points = self._points("transform", x, width=self._fitted("transform").shape[1])
        centers = self._centers(points)
        return _as_given(torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist"), x)

    def score(self, x: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> float:
        """Minus the inertia of these rows."""
        points = self._points("score", x, width=self._fitted("score").shape[1])
        centers = self._centers(points)
        labels = ops.kmeans_assign(points, centers)
        return -float(_inertia(points, centers, labels, _weights(sample_weight, points)))

    def normalized(self, x: ArrayLike) -> ArrayLike:
        """The rows as they are clustered: of length 1 with ``normalize=True``, else as given."""
        return _as_given(self._points("normalized", x), x)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments that made this object."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> KMeans:
        """Changes arguments; takes effect at the next ``fit``."""
        for name, value in params.items():
            if name not in _PARAMETERS:
                raise ValueError(f"set_params: name must be one of {', '.join(_PARAMETERS)}, got {name}")
            setattr(self, name, value)
        return self

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
            params["init"] = np.asarray(_cpu(params["init"]))
        if not isinstance(params["random_state"], int | np.integer | None):
            params["random_state"] = None
        params = {name: v.item() if isinstance(v, np.generic) else v for name, v in params.items()}
        state: dict[str, Any] = {"format": _FORMAT, **params, "cluster_centers": centers.copy()}
        if hasattr(self, "cluster_weights_"):
            state["cluster_weights"] = self.cluster_weights_.copy()
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
        missing = [name for name in (*_PARAMETERS, "cluster_centers") if name not in state]
        if missing:
            raise ValueError(f"from_state: state must have {', '.join(missing)}, got {', '.join(map(str, state))}")
        model = cls(**{name: state[name] for name in _PARAMETERS})
        centers = np.array(_cpu(state["cluster_centers"]))
        if centers.ndim != 2 or centers.dtype not in (np.float32, np.float64) or not np.isfinite(centers).all():
            want = "finite float32 or float64 [K, D]"
            raise ValueError(f"from_state: cluster_centers must be {want}, got {centers.dtype}{list(centers.shape)}")
        model.n_clusters = len(centers)
        model.cluster_centers_ = centers
        if state.get("cluster_weights") is not None:
            model.cluster_weights_ = np.array(_cpu(state["cluster_weights"]), np.float64)
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

    def _check_parameters(self) -> None:
        for name in ("n_clusters", "n_init", "max_iter"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"KMeans: {name} must be a whole number of at least 1, got {value!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"KMeans: batch_size must be at least 1 or None, got {self.batch_size!r}")
        if not self.tol >= 0:
            raise ValueError(f"KMeans: tol must be at least 0, got {self.tol!r}")
        if isinstance(self.init, str) and self.init != "k-means++":
            raise ValueError(f"KMeans: init must be 'k-means++' or an array [K, D], got {self.init!r}")

    def _points(self, op: str, x: ArrayLike, width: int | None = None) -> Tensor:
        """``x`` as a finite float32 or float64 tensor, normalised where the model says so."""
        points = x.detach() if isinstance(x, Tensor) else to_tensor(np.asarray(x), f"{op}: x")
        if points.is_complex():
            raise ValueError(f"{op}: x must hold numbers, got dtype {points.dtype}")
        if points.ndim != 2 or (width is not None and points.shape[1] != width):
            raise ValueError(f"{op}: x must be [N, {width or 'D'}], got shape {list(points.shape)}")
        if points.dtype not in (torch.float32, torch.float64):
            points = points.float() if points.is_floating_point() else points.double()
        for first in range(0, len(points), _ROWS):
            row_is_finite = torch.isfinite(points[first : first + _ROWS]).all(1)
            if not row_is_finite.all():
                row = first + int((~row_is_finite).nonzero()[0])
                raise ValueError(f"{op}: x must be finite, got NaN or infinity in row {row}; drop or fill such rows")
        if self.normalize:
            points = _unit_rows(points)
        return points.contiguous()

    def _fitted(self, op: str) -> np.ndarray:
        if not hasattr(self, "cluster_centers_"):
            raise ValueError(f"{op}: the model must be fitted first; call fit or partial_fit, or load one")
        return self.cluster_centers_

    def _centers(self, points: Tensor) -> Tensor:
        return torch.as_tensor(self.cluster_centers_, dtype=points.dtype, device=points.device)

    def _start(self, op: str, points: Tensor, weight: Tensor | None, random: np.random.Generator) -> Tensor:
        n, k = len(points), self.n_clusters
        if n < k:
            raise ValueError(f"{op}: x must have at least n_clusters = {k} rows, got {n}; ask for fewer clusters")
        if isinstance(self.init, str):
            return _kmeans_plus_plus(points, weight, k, random)
        centers = torch.as_tensor(_cpu(self.init)).to(points)
        if tuple(centers.shape) != (k, points.shape[1]) or not torch.isfinite(centers).all():
            want = f"finite centres [{k}, {points.shape[1]}]"
            raise ValueError(f"{op}: init must be 'k-means++' or {want}, got shape {list(centers.shape)}")
        return centers.contiguous()

    def _lloyd(
        self,
        points: Tensor,
        weight: Tensor | None,
        centers: Tensor,
        tol: float,
        random: np.random.Generator,
        progress: Callable[[int, float], None] | None,
    ) -> _Run:
        labels, empty, iteration = None, 0, 0
        while iteration < self.max_iter:
            iteration += 1
            old = labels
            labels = ops.kmeans_assign(points, centers)
            if progress is not None:
                progress(iteration, float(_inertia(points, centers, labels, weight)))
            sums, totals = _accumulate(points, weight, labels, len(centers))
            found_empty, moved = _move_empty_clusters(points, weight, centers, labels, sums, totals)
            empty += found_empty
            new = _means(sums, totals, centers)
            shift = float((new.double() - centers.double()).square().sum())
            centers = new
            # A cluster that was moved onto another one gets no points: the next move can do better.
            if shift <= tol or (old is not None and torch.equal(labels, old) and not moved):
                break
        # The centres may have moved after the last assignment.
        return _Run(centers, ops.kmeans_assign(points, centers), weight, points, iteration, empty)

    def _mini_batches(
        self,
        points: Tensor,
        weight: Tensor | None,
        centers: Tensor,
        tol: float,
        random: np.random.Generator,
        progress: Callable[[int, float], None] | None,
    ) -> _Run:
        totals = torch.zeros(len(centers), dtype=torch.float64, device=points.device)
        empty, iteration, batch = 0, 0, min(self.batch_size or len(points), len(points))
        while iteration < self.max_iter:
            iteration += 1
            before, inertia = centers, 0.0
            order = torch.from_numpy(random.permutation(len(points))).to(points.device)
            for chosen in order.split(batch):
                part, part_weight = points[chosen], None if weight is None else weight[chosen]
                labels, new, totals, moved = _mini_batch_step(part, part_weight, centers, totals)
                if progress is not None:
                    inertia += float(_inertia(part, centers, labels, part_weight))
                centers, empty = new, empty + moved
            if progress is not None:
                progress(iteration, inertia)
            if float((centers.double() - before.double()).square().sum()) <= tol:
                break
        run = _Run(centers, ops.kmeans_assign(points, centers), weight, points, iteration, empty)
        run.totals = totals
        return run

    def _take(self, run: _Run) -> None:
        self.cluster_centers_ = run.centers.cpu().numpy()
        self.labels_ = run.labels.cpu().numpy()
        self.inertia_, self.n_iter_, self.empty_clusters_ = run.inertia, run.iterations, run.empty
        self.cluster_weights_ = run.totals.cpu().numpy()


class _Run:
    """What one start ended with."""

    def __init__(
        self, centers: Tensor, labels: Tensor, weight: Tensor | None, points: Tensor, iterations: int, empty: int
    ) -> None:
        self.centers, self.labels, self.iterations, self.empty = centers, labels, iterations, empty
        self.inertia = float(_inertia(points, centers, labels, weight))
        counts = torch.bincount(labels, weight, minlength=len(centers))
        self.totals = counts.double()


def scores(
    x: ArrayLike, labels: ArrayLike, centers: ArrayLike, *, max_points: int = 20_000, seed: int = 0
) -> dict[str, float]:
    """How good clusters are.

    Args:
        x: The points as they were clustered (``KMeans.normalized``), ``[N, D]``.
        labels: ``[N]``, cluster of each point.
        centers: ``[K, D]``.
        max_points: Davies-Bouldin and Calinski-Harabasz look at this many points at most, drawn by ``seed``.
        seed: Seed of that draw.

    Returns:
        ``inertia`` (sum of squared distances to the own centre), ``davies_bouldin`` (lower is better),
        ``calinski_harabasz`` (higher is better), both NaN where fewer than two clusters are used;
        ``cluster_use_entropy`` (entropy of the cluster frequencies over its maximum ln K: 1 is even use),
        ``cluster_use_perplexity`` (clusters in even use that would have that entropy) and ``num_empty``.

    Raises:
        ValueError: Shapes do not fit, or a label is not in ``0 .. K - 1``.
    """
    points = torch.as_tensor(_cpu(x))
    means = torch.as_tensor(_cpu(centers))
    cluster = torch.as_tensor(_cpu(labels)).long()
    if points.ndim != 2 or means.ndim != 2 or points.shape[1] != means.shape[1] or not len(points):
        want = "[N, D] with N > 0 and centers [K, D]"
        raise ValueError(f"scores: x must be {want}, got {list(points.shape)} and {list(means.shape)}")
    if cluster.shape != points.shape[:1] or int(cluster.min()) < 0 or int(cluster.max()) >= len(means):
        want = f"[{len(points)}] in 0 .. {len(means) - 1}"
        raise ValueError(f"scores: labels must be {want}, got shape {list(cluster.shape)}")
    counts = torch.bincount(cluster, minlength=len(means)).double().numpy()
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * np.log(share)).sum()) + 0.0

    chosen = np.arange(len(points))
    if len(points) > max_points:
        chosen = np.sort(np.random.default_rng(seed).choice(len(points), max_points, replace=False))
    sample, sample_labels = points.numpy()[chosen], cluster.numpy()[chosen]
    davies_bouldin = calinski_harabasz = math.nan
    if 1 < len(np.unique(sample_labels)) < len(sample):
        from sklearn import metrics

        davies_bouldin = float(metrics.davies_bouldin_score(sample, sample_labels))
        calinski_harabasz = float(metrics.calinski_harabasz_score(sample, sample_labels))
    return {
        "inertia": float(_inertia(points, means, cluster, None)),
        "davies_bouldin": davies_bouldin,
        "calinski_harabasz": calinski_harabasz,
        "cluster_use_entropy": entropy / math.log(len(means)) if len(means) > 1 else 1.0,
        "cluster_use_perplexity": math.exp(entropy),
        "num_empty": float((counts == 0).sum()),
    }


def _unit_rows(points: Tensor) -> Tensor:
    """Rows scaled to length 1, however short or long they are; a row of zeros stays."""
    unit = torch.empty_like(points)
    for first in range(0, len(points) if points.shape[1] else 0, _ROWS):
        rows = points[first : first + _ROWS].double()
        largest = rows.abs().amax(1, keepdim=True)
        rows = rows / largest.where(largest > 0, 1)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        unit[first : first + _ROWS] = rows / length.where(length > 0, 1)
    return unit


def _accumulate(points: Tensor, weight: Tensor | None, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted sums ``[K, D]`` and total weights ``[K]``, float64."""
    if weight is None:
        sums, counts = ops.kmeans_accumulate(points, labels, k)
        return sums, counts.double()
    sums = torch.zeros(k, points.shape[1], dtype=torch.float64, device=points.device)
    for first in range(0, len(points), _ROWS):
        rows = slice(first, first + _ROWS)
        sums += ops.kmeans_accumulate(points[rows].double() * weight[rows, None], labels[rows], k)[0]
    return sums, torch.bincount(labels, weight, minlength=k)


def _means(sums: Tensor, totals: Tensor, old: Tensor) -> Tensor:
    """Centres of the clusters that have points; the others stay."""
    return torch.where((totals > 0)[:, None], (sums / totals.clamp_min(1e-300)[:, None]).to(old.dtype), old)


def _move_empty_clusters(
    points: Tensor, weight: Tensor | None, centers: Tensor, labels: Tensor, sums: Tensor, totals: Tensor
) -> tuple[int, int]:
    """Gives each empty cluster one of the points farthest from their centres, out of the sums of its cluster.

    Changes ``sums`` and ``totals``, and says how many clusters were empty and how many of them were moved.
    """
    empty = (totals <= 0).nonzero()[:, 0]
    if not len(empty):
        return 0, 0
    distances = torch.cat([d for d, _ in _squared_distances(points, centers, labels)])
    if weight is not None:
        distances[weight <= 0] = 0
    # A stable sort: among points equally far, the first.
    farthest = distances.sort(descending=True, stable=True).indices[: len(empty)]
    # A mean of N equal points misses them by the rounding of its sum and of its result: such a point is on its centre.
    relative = 2 * torch.finfo(points.dtype).eps + len(points) * torch.finfo(torch.float64).eps
    nearby = (relative * points[farthest].double()).square().sum(1)
    moved = 0
    for cluster, point, rounding in zip(empty.tolist(), farthest.tolist(), nearby.tolist(), strict=True):
        own = int(labels[point])
        one = 1.0 if weight is None else float(weight[point])
        # A cluster keeps its last point, and a point on its centre makes no new cluster.
        if distances[point] > rounding and totals[own] > one:
            moved += 1
            sums[cluster] = points[point].double() * one
            sums[own] -= sums[cluster]
            totals[cluster] = one
            totals[own] -= one
    return len(empty), moved


def _mini_batch_step(
    points: Tensor, weight: Tensor | None, centers: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Labels of the batch, the centres after it, the weight that each stands for, and how many clusters were empty."""
    labels = ops.kmeans_assign(points, centers)
    sums, added = _accumulate(points, weight, labels, len(centers))
    sums += centers.double() * totals[:, None]
    totals = totals + added
    empty, _ = _move_empty_clusters(points, weight, centers, labels, sums, totals)
    return labels, _means(sums, totals, centers), totals, empty


def _squared_distances(points: Tensor, centers: Tensor, labels: Tensor) -> Any:
    """Squared distances to the own centre in float64, some rows at a time, each with its slice."""
    exact = centers.double()
    for first in range(0, max(len(points), 1), _ROWS):
        rows = slice(first, first + _ROWS)
        yield (points[rows].double() - exact[labels[rows]]).square().sum(1), rows


def _inertia(points: Tensor, centers: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    parts = _squared_distances(points, centers, labels)
    return sum((d if weight is None else d * weight[rows]).sum() for d, rows in parts)


def _mean_variance(points: Tensor) -> float:
    """Mean over the features of their variances, in float64."""
    shift = points[:1].double()
    total = squares = torch.zeros(points.shape[1], dtype=torch.float64, device=points.device)
    for first in range(0, len(points), _ROWS):
        part = points[first : first + _ROWS].double() - shift
        total, squares = total + part.sum(0), squares + part.square().sum(0)
    n = max(len(points), 1)
    return float((squares / n - (total / n).square()).clamp_min(0).mean()) if points.shape[1] else 0.0


def _kmeans_plus_plus(points: Tensor, weight: Tensor | None, k: int, random: np.random.Generator) -> Tensor:
    """Centres by greedy k-means++ (Arthur and Vassilvitskii 2007, section 5): each is the best of a few candidates.

    Candidates are drawn with chances in proportion to the squared distance to the nearest centre so far.
    """
    most = max(256 * k, 1 << 16)
    if len(points) > most:
        chosen = torch.from_numpy(np.sort(random.choice(len(points), most, replace=False))).to(points.device)
        points, weight = points[chosen], None if weight is None else weight[chosen]
    n, device = len(points), points.device
    w = torch.ones(n, dtype=torch.float64, device=device) if weight is None else weight
    # Distances by products lose the least around the mean.
    centered = points - points.double().mean(0).to(points.dtype)
    squares = centered.square().sum(1)

    def distances(rows: Tensor) -> Tensor:
        products = centered @ centered[rows].T
        found = (squares[:, None] + squares[rows] - 2 * products).clamp_min_(0).double()
        found[rows, torch.arange(len(rows), device=device)] = 0
        return found * w[:, None]

    def draw(chances: Tensor, how_many: int) -> Tensor:
        ends = chances.cumsum(0)
        where = torch.from_numpy(random.uniform(size=how_many)).to(device) * ends[-1]
        return torch.searchsorted(ends, where, right=True).clamp_max(n - 1)

    trials = 2 + int(math.log(k))
    picked = draw(w, 1)
    nearest = distances(picked)[:, 0]
    for _ in range(1, k):
        if not float(nearest.sum()) > 0:
            # Fewer different points than clusters: what is left are points that are centres already.
            rest = np.setdiff1d(np.arange(n), picked.cpu().numpy())[: k - len(picked)]
            picked = torch.cat([picked, torch.from_numpy(rest).to(picked)])
            break
        candidates = draw(nearest, trials)
        found = torch.minimum(nearest[:, None], distances(candidates))
        best = int(found.sum(0).argmin())
        picked, nearest = torch.cat([picked, candidates[best : best + 1]]), found[:, best].contiguous()
    return points[picked].contiguous()


def _weights(sample_weight: ArrayLike | None, points: Tensor) -> Tensor | None:
    if sample_weight is None:
        return None
    weight = torch.as_tensor(sample_weight, dtype=torch.float64, device=points.device)
    if (
        weight.shape != points.shape[:1]
        or not bool((weight >= 0).all())
        or not math.isfinite(total := float(weight.sum()))
    ):
        want = f"finite and not negative, [{len(points)}]"
        raise ValueError(f"KMeans: sample_weight must be {want}, got shape {list(weight.shape)}")
    if len(points) and total <= 0:
        raise ValueError("KMeans: sample_weight must be above 0 somewhere, got only zeros")
    return weight


def _cpu(x: ArrayLike) -> ArrayLike:
    return x.detach().cpu() if isinstance(x, Tensor) else np.asarray(x)


def _as_given(result: Tensor, x: ArrayLike) -> ArrayLike:
    return result.to(x.device) if isinstance(x, Tensor) else result.cpu().numpy()
