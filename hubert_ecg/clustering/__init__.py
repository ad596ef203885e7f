"""k-means with its normalisation inside, of points in memory, on disk or on many machines; and how good clusters are.

===========  ========================================================================================================
kmeans       :class:`KMeans`: arguments, what is kept, files.
points       Rows, wherever they lie, block by block: arrays, memory maps, sources of blocks.
ranks        Sums over the processes that hold a shard each.
starts       First centres: k-means++, k-means||, random rows.
lloyd        Iterations on all points or on mini-batches, and clusters that run empty.
telling      What a fit says while it runs.
quality      :func:`scores`.
===========  ========================================================================================================
"""

from hubert_ecg.clustering.kmeans import KMeans
from hubert_ecg.clustering.points import BlockSource
from hubert_ecg.clustering.quality import scores
from hubert_ecg.files import forget_pages

__all__ = ["BlockSource", "KMeans", "forget_pages", "scores"]
