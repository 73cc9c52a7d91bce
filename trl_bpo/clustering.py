# Copyright 2026 The trl_bpo authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""K-means and nearest-to-centre ranking: the one mechanism that breadth and depth selection share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from .ids import Ids, dense_ranks
from .rows import Rows


SCOPES = ("per_cluster", "overall")
METRICS = ("euclidean", "cosine")
# More rows than these are clustered by what a sample of them teaches.
_MAX_ROWS_AT_ONCE = 32_768
_ROWS_AT_A_TIME = 4096
# After ten, variances of real and of random features are met to within a percent.
_CALIBRATION_STEPS = 10


@dataclass(frozen=True)
class Clustering:
    """
    A K-means clustering of `n` rows and where each row stands in it.

    Attributes:
        labels (`np.ndarray` of shape `(n,)`, int64):
            Cluster of each row.
        distances (`np.ndarray` of shape `(n,)`, float64):
            Euclidean distance of each row to the centre of its own cluster, in the units of the features.
        ranks (`np.ndarray` of shape `(n,)`, int64):
            Rank of each row by distance within its own cluster; 0 is the nearest. Ties go by id.
        variance_explained (`float`):
            `1 - inertia / total sum of squares` over the rows; 0.0 if all rows coincide.
    """

    labels: np.ndarray
    distances: np.ndarray
    ranks: np.ndarray
    variance_explained: float

    @property
    def n_clusters(self) -> int:
        """Number of clusters that hold at least one row."""
        return len(np.unique(self.labels))


def check_fraction(name: str, fraction: float) -> None:
    """
    Refuse a fraction outside (0, 1].

    Args:
        name (`str`):
            Name of the option, for the message.
        fraction (`float`):
            Its value.

    Raises:
        `ValueError`: If the fraction is not in (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"`{name}` must be in (0, 1], got {fraction}. Use 1.0 to keep everything.")


def budget(fraction: float, n: int) -> int:
    """
    Number of rows that a fraction stands for: `round(fraction * n)`, at least one.

    Args:
        fraction (`float`):
            Fraction in (0, 1].
        n (`int`):
            Number of rows.

    Returns:
        `int`: Rows to keep.
    """
    return max(1, round(fraction * n))


def default_n_clusters(n: int) -> int:
    """
    Number of clusters used when none is asked for: `round(sqrt(n / 2))`, at least one (not specified by the paper).

    Args:
        n (`int`):
            Number of rows.

    Returns:
        `int`: Number of clusters.
    """
    return max(1, round((n / 2) ** 0.5))


def _fit(features: np.ndarray, n_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    # Works on `features` in place, and leaves them as they were up to rounding.
    # With several threads the partial sums of the centres are added in the order in which the threads finish, so that
    # two runs may differ in the last bits and, at a tie, in what they keep. One thread gives one answer everywhere.
    with threadpool_limits(limits=1):
        kmeans = KMeans(n_clusters=n_clusters, n_init=1, random_state=seed, copy_x=False).fit(features)
    mean = features.mean(axis=0, dtype=np.float64)
    squares, total = np.empty(len(features)), 0.0
    # A part at a time, since a difference of all rows would be one more copy of them.
    for start in range(0, len(features), _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        residuals = features[part].astype(np.float64) - kmeans.cluster_centers_[kmeans.labels_[part]]
        squares[part] = (residuals**2).sum(axis=1)
        total += float(((features[part] - mean) ** 2).sum())
    # The mean of equal rows is rounded, so that their total is not exactly zero.
    distinct = any((row != features[0]).any() for row in features)
    variance_explained = 1.0 - float(squares.sum()) / total if distinct else 0.0
    return kmeans.labels_.astype(np.int64), np.sqrt(squares), variance_explained


def _sorted_by_id(features: Rows, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(ids, kind="stable")
    # A copy in any case. float32 stays, at half of the memory.
    features = features[order]
    return order, features.astype(np.promote_types(features.dtype, np.float32), copy=False)


def cluster(
    features: Rows, ids: Ids, n_clusters: int | None = None, seed: int = 42, metric: str = "euclidean"
) -> Clustering:
    """
    Cluster rows by K-means (k-means++ start, Lloyd's algorithm) and rank each within its own cluster.

    Up to 32,768 rows are clustered in the order of their ids, in memory and by one thread, so that the result depends
    neither on their order nor on the machine. More are clustered by [`fit_kmeans`], which trains on a sample of them that
    their ids choose and reads all of them twice, in blocks: they may be a file. Memory: one copy of the features, or of the
    sample in float32 (at most 2 GB), and about 100 bytes a row.

    Args:
        features ([`Rows`] of shape `(n, d)`):
            One row a point: an array, a memory-mapped file, or what reads like one. Must be finite.
        ids (`Sequence[str]`, or integers that are ordered alike):
            Content hash of each row, which settles ties.
        n_clusters (`int`, *optional*):
            Number of clusters. If `None`, [`default_n_clusters`] decides.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the k-means++ start, and of the sample.
        metric (`str`, *optional*, defaults to `"euclidean"`):
            `"euclidean"`, or `"cosine"`: spherical K-means, whose centres have unit length as the rows must have.

    Returns:
        [`Clustering`]: Labels, distances and ranks in the order of the input.

    Raises:
        `ValueError`: If there are fewer rows than clusters, or fewer than one cluster.
    """
    n = features.shape[0]
    n_clusters = default_n_clusters(n) if n_clusters is None else n_clusters
    check_n_clusters("n_clusters", n_clusters, n)
    ranks_of_ids = dense_ranks(ids)
    if n > _MAX_ROWS_AT_ONCE or metric == "cosine":
        # Not above: to explain a selection takes the ranks alone, and no torch.
        from .kmeans import fit_kmeans

        order = np.argsort(ranks_of_ids, kind="stable")
        fit = fit_kmeans(features, order, n_clusters, seed, spherical=metric == "cosine")
        labels, distances, variance_explained = fit.labels, fit.distances, fit.variance_explained
    else:
        order, in_order = _sorted_by_id(features, ranks_of_ids)
        sorted_labels, sorted_distances, variance_explained = _fit(in_order, n_clusters, seed)
        labels, distances = np.empty(n, dtype=np.int64), np.empty(n)
        labels[order], distances[order] = sorted_labels, sorted_distances
    return Clustering(labels, distances, rank_in_groups(labels, distances, ranks_of_ids), variance_explained)


def row_norms(features: Rows) -> np.ndarray:
    """
    L2 norm of each row, read a part at a time.

    Args:
        features ([`Rows`] of shape `(n, d)`):
            The rows.

    Returns:
        `np.ndarray` of shape `(n,)`, float64: Their norms.
    """
    norms = np.empty(features.shape[0])
    for start in range(0, len(norms), _ROWS_AT_A_TIME):
        part = features[start : start + _ROWS_AT_A_TIME]
        norms[start : start + _ROWS_AT_A_TIME] = np.sqrt(np.einsum("ij,ij->i", part, part, dtype=np.float64))
    return norms


def rank_in_groups(groups: np.ndarray, measures: np.ndarray, ids: Ids) -> np.ndarray:
    """
    Rank each row within its own group.

    Args:
        groups (`np.ndarray` of shape `(n,)`):
            Group of each row.
        measures (`np.ndarray` of shape `(n,)`):
            What is ranked by, the lowest first.
        ids (`Sequence[str]`, or integers that are ordered alike):
            Content hash of each row, which settles ties.

    Returns:
        `np.ndarray` of shape `(n,)`, int64: Rank of each row, from 0.
    """
    order = np.lexsort((dense_ranks(ids), measures, groups))
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - np.searchsorted(groups[order], groups[order])
    return ranks


def check_n_clusters(option: str, n_clusters: int, n: int) -> None:
    """
    Refuse a number of clusters that `n` rows cannot fill.

    Args:
        option (`str`):
            Name of the option, for the message.
        n_clusters (`int`):
            Its value.
        n (`int`):
            Number of rows.

    Raises:
        `ValueError`: If the number is below one or above `n`.
    """
    if n_clusters < 1:
        raise ValueError(f"`{option}` must be at least 1, got {n_clusters}.")
    if n_clusters > n:
        raise ValueError(
            f"`{option}={n_clusters}` asks for more clusters than there are rows ({n}). Lower it, or leave it unset: "
            "the default adapts to the data."
        )


def nearest_to_centre(
    clustering: Clustering, ids: Ids, n_keep: int, scope: str = "per_cluster", farthest: bool = False
) -> np.ndarray:
    """
    Select exactly `n_keep` rows that lie nearest to the centres of their clusters, or farthest from them.

    Args:
        clustering ([`Clustering`]):
            Result of [`cluster`].
        ids (`Sequence[str]`, or integers that are ordered alike):
            Content hash of each row, which settles ties.
        n_keep (`int`):
            Number of rows to keep.
        scope (`str`, *optional*, defaults to `"per_cluster"`):
            `"per_cluster"` shares `n_keep` out over the clusters in proportion to their sizes (largest remainder) and
            keeps each one's nearest. `"overall"` keeps the nearest of all rows, wherever they lie. Which one the paper
            uses is not specified.
        farthest (`bool`, *optional*, defaults to `False`):
            Whether to keep the farthest instead.

    Returns:
        `np.ndarray` of shape `(n,)`, bool: Whether each row is kept.
    """
    n = len(clustering.labels)
    if scope == "overall":
        selected = np.zeros(n, dtype=bool)
        distances = -clustering.distances if farthest else clustering.distances
        selected[np.lexsort((dense_ranks(ids), distances))[:n_keep]] = True
        return selected
    labels, sizes = np.unique(clustering.labels, return_counts=True)
    # Integers keep the remainders exact: `n_keep * size / n` in floats may tip a tie.
    quotas, remainders = np.divmod(n_keep * sizes, n)
    ranks_of_ids = dense_ranks(ids)
    by_cluster = np.lexsort((ranks_of_ids, clustering.labels))
    first_ids = ranks_of_ids[by_cluster[np.cumsum(sizes) - sizes]]
    for index in np.lexsort((first_ids, -remainders))[: n_keep - quotas.sum()]:
        quotas[index] += 1
    own = np.searchsorted(labels, clustering.labels)
    if farthest:
        return clustering.ranks >= (sizes - quotas)[own]
    return clustering.ranks < quotas[own]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def gaussian_like(features: np.ndarray, normalize: bool) -> Callable[[np.random.Generator], np.ndarray]:
    """
    Draw Gaussian samples that have the sample mean and the sample covariance of some rows.

    Given both, the left singular vectors of a centred Gaussian sample are uniformly distributed over the orthonormal
    ones. So rows that are Gaussian themselves cannot be told from a draw, whatever their covariance and their number. (A
    sample drawn afresh from the covariance would have one of its own, more uneven than that of the features unless there
    are many more rows than dimensions, and K-means would explain more of it.)

    Scaling to unit length takes from the variance along the leading components. Features had that happen to them, so a
    Gaussian with their covariance would have it happen twice, and K-means would explain less of it. So where samples are
    to be scaled, variances and mean of the Gaussian are set such that the scaled sample has those of the rows.

    Args:
        features (`np.ndarray` of shape `(n, d)`, float64):
            The rows, of unit length if `normalize`.
        normalize (`bool`):
            Whether to scale samples to unit length.

    Returns:
        `Callable`: From a random generator to a sample of the same shape.
    """
    centre = features.mean(axis=0)
    values, vectors = np.linalg.eigh((features - centre).T @ (features - centre))
    real = values > 1e-10 * values[-1]
    # In the basis of the principal components.
    centre, scales = centre @ vectors, np.sqrt(np.where(real, values, 0.0))

    def draw(rng: np.random.Generator) -> np.ndarray:
        normal = rng.standard_normal((len(features), real.sum()))
        orthonormal = np.zeros_like(features)
        orthonormal[:, real], _ = np.linalg.qr(normal - normal.mean(axis=0))
        if not normalize:
            return (orthonormal * scales + centre) @ vectors.T
        own_centre, own_scales = centre.copy(), scales.copy()
        for _ in range(_CALIBRATION_STEPS):
            sample = _unit(orthonormal * own_scales + own_centre)
            mean = sample.mean(axis=0)
            found = np.linalg.norm(sample - mean, axis=0)[real]
            # Rows on one line through the origin may all fall on one side of it, with no variance to go by.
            own_scales[real] *= np.clip(scales[real] / np.maximum(found, np.finfo(np.float64).tiny), 0.1, 10.0)
            own_centre += centre - mean
        return _unit(orthonormal * own_scales + own_centre) @ vectors.T

    return draw


def gaussian_sample(features: np.ndarray, seed: int = 42, normalize: bool = True) -> np.ndarray:
    """
    One draw of [`gaussian_like`], for K-means: up to a rotation, of no more dimensions than there are rows.

    Args:
        features (`np.ndarray` of shape `(n, d)`):
            The rows, of unit length if `normalize`.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draw.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to scale the sample to unit length.

    Returns:
        `np.ndarray` of shape `(n, min(n, d))`, float64: The sample; the rows themselves if they all coincide.
    """
    features = np.asarray(features, dtype=np.float64)
    if not (features != features[0]).any():
        return features.copy()
    with threadpool_limits(limits=1):
        if features.shape[1] > len(features):
            # K-means depends on inner products alone.
            features = np.asarray(np.linalg.qr(features.T, mode="r")).T
        return gaussian_like(features, normalize)(np.random.default_rng(seed))


def gaussian_variance_explained(
    features: np.ndarray, ids: Ids, n_clusters: int, seed: int = 42, normalize: bool = True
) -> float:
    """
    Variance that K-means explains of a Gaussian sample with the sample mean and covariance of the features.

    K-means explains some variance of any cloud of points. Clusters are structure beyond the covariance only where the
    variance explained of the features exceeds this one. How the sample is drawn says [`gaussian_like`]. Memory: about
    six copies of the features in float64.

    Args:
        features (`np.ndarray` of shape `(n, d)`):
            The features that were clustered, of unit length if `normalize`.
        ids (`Sequence[str]`, or integers that are ordered alike):
            Content hash of each row: the rows are taken in the order of their ids, as in [`cluster`].
        n_clusters (`int`):
            Number of clusters.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sample and of K-means.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether the sample is L2-normalised as the features were.

    Returns:
        `float`: Variance explained of the sample, 0.0 if all rows coincide.
    """
    _, features = _sorted_by_id(np.asarray(features, dtype=np.float64), dense_ranks(ids))
    return _fit(gaussian_sample(features, seed, normalize), n_clusters, seed)[2]
