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

"""
What a clustering of features is worth: the measures of `gradient_clusters.py`, each beside its null.

Features and what is known of the rows in, one row of the table out, of the columns that `gradient_clusters.py` explains.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from trl_bpo.clustering import Clustering, budget, cluster, gaussian_like, nearest_to_centre, rank_in_groups


LENGTH_BINS = 4
NEIGHBOURS = 5


@dataclass(frozen=True)
class Rows:
    """
    What is known of the rows beside their features.

    Attributes:
        ids (`np.ndarray` of shape `(n,)`):
            Content hash of each row, which settles ties.
        prompt_ids (`np.ndarray` of shape `(n,)`):
            Prompt of each row.
        lengths (`np.ndarray` of shape `(n,)`):
            Tokens of the answers.
        embeddings (`np.ndarray` of shape `(n, d)`):
            Embedding of the text.
        sources (`np.ndarray` of shape `(n,)`, *optional*):
            Planted family of each row.
        rules (`dict[str, np.ndarray]`):
            Scores of plain rules, of which the highest are kept, beside those of length and norm.
    """

    ids: np.ndarray
    prompt_ids: np.ndarray
    lengths: np.ndarray
    embeddings: np.ndarray
    sources: np.ndarray | None = None
    rules: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> "Rows":
        """The same for some of the rows."""
        return Rows(
            self.ids[rows],
            self.prompt_ids[rows],
            self.lengths[rows],
            self.embeddings[rows],
            None if self.sources is None else self.sources[rows],
            {name: scores[rows] for name, scores in self.rules.items()},
        )


@dataclass(frozen=True)
class Variant:
    """
    Features, and how they are clustered.

    Attributes:
        name (`str`):
            Name of the variant.
        features (`np.ndarray` of shape `(n, d)`):
            Feature of each row.
        rows ([`Rows`]):
            What is known of the rows.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether features are scaled to unit length.
        transform (`Callable`, *optional*):
            From scaled features and the number of clusters to what is clustered. It may depend on inner products alone.
        keep_largest (`bool`, *optional*, defaults to `False`):
            Whether the longest features of each cluster are kept instead of those nearest to its centre.
        one_a_prompt (`bool`, *optional*, defaults to `False`):
            Whether one row a prompt is clustered, and the others go to the nearest centre.
    """

    name: str
    features: np.ndarray
    rows: Rows
    normalize: bool = True
    transform: Callable[[np.ndarray, int], np.ndarray] | None = None
    keep_largest: bool = False
    one_a_prompt: bool = False


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def principal_components(number: int) -> Callable[[np.ndarray, int], np.ndarray]:
    def transform(x: np.ndarray, _: int) -> np.ndarray:
        _, vectors = np.linalg.eigh(np.cov(x.T))
        return (x - x.mean(axis=0)) @ vectors[:, -number:]

    return transform


def squared_cosines(x: np.ndarray, _: int) -> np.ndarray:
    # Coordinates whose inner products are the squared cosines: a feature and its negative are the same.
    values, vectors = np.linalg.eigh((x @ x.T) ** 2)
    return vectors * np.sqrt(values.clip(min=0))


def spectral(x: np.ndarray, n_clusters: int) -> np.ndarray:
    # Spectral clustering on |cos|, after which K-means runs on the leading eigenvectors, row by row of unit length.
    affinity = np.abs(x @ x.T)
    np.fill_diagonal(affinity, 0)
    root = 1 / np.sqrt(affinity.sum(axis=1))
    _, vectors = np.linalg.eigh(affinity * np.outer(root, root))
    return unit(vectors[:, -n_clusters:])


def redrawn(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Has the covariance of the rows on average, and around it one of its own.
    mean = x.mean(axis=0)
    return rng.standard_normal((len(x), len(x))) @ (x - mean) / np.sqrt(len(x)) + mean


def ranked(labels: np.ndarray, distances: np.ndarray, ids: np.ndarray, variance_explained: float) -> Clustering:
    return Clustering(labels, distances, rank_in_groups(labels, distances, ids.tolist()), variance_explained)


def fit(variant: Variant, x: np.ndarray, norms: np.ndarray, n_clusters: int, seed: int) -> Clustering:
    ids = variant.rows.ids
    if variant.one_a_prompt:
        _, first = np.unique(variant.rows.prompt_ids, return_index=True)
        few = cluster(x[first], ids[first].tolist(), n_clusters, seed)
        centres = np.stack([x[first][few.labels == label].mean(axis=0) for label in np.unique(few.labels)])
        squares = (x**2).sum(axis=1)[:, None] - 2 * x @ centres.T + (centres**2).sum(axis=1)
        distances = np.sqrt(squares.min(axis=1).clip(min=0))
        return ranked(squares.argmin(axis=1), distances, ids, few.variance_explained)
    clustering = cluster(x, ids.tolist(), n_clusters, seed)
    if variant.keep_largest:
        return ranked(clustering.labels, -norms, ids, clustering.variance_explained)
    return clustering


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


def highest(scores: np.ndarray, number: int) -> np.ndarray:
    selected = np.zeros(len(scores), dtype=bool)
    selected[np.argsort(-scores, kind="stable")[:number]] = True
    return selected


def neighbours_agree(x: np.ndarray, sources: np.ndarray) -> float:
    families, own = np.unique(sources, return_inverse=True)
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(x).kneighbors(return_distance=False)
    votes = np.stack([(own[nearest] == family).sum(axis=1) for family in range(len(families))], axis=1)
    return float((votes.argmax(axis=1) == own).mean())


def prepare(variant: Variant) -> tuple[Variant, np.ndarray, int]:
    # Scaled, of no more dimensions than rows: K-means and the transforms depend on inner products alone. With the norms
    # before, and how many rows were left out.
    norms = np.linalg.norm(variant.features.astype(np.float64), axis=1)
    good = np.isfinite(norms) & (norms > 0)
    x = variant.features[good].astype(np.float64)
    x = unit(x) if variant.normalize else x
    x = np.linalg.qr(x.T, mode="r").T if x.shape[1] > len(x) else x
    return replace(variant, features=x, rows=variant.rows.take(good)), norms[good], int((~good).sum())


@dataclass(frozen=True)
class Fits:
    points: np.ndarray
    clusterings: list[Clustering]
    kept: list[np.ndarray]

    @property
    def variance_explained(self) -> list[float]:
        return [clustering.variance_explained for clustering in self.clusterings]

    @property
    def jaccards(self) -> list[float]:
        return [jaccard(a, b) for a, b in combinations(self.kept, 2)]

    def scores(self, score: Callable[[np.ndarray, np.ndarray], float], labels: np.ndarray) -> list[float]:
        return [score(labels, clustering.labels) for clustering in self.clusterings]


def cluster_and_keep(
    variant: Variant, x: np.ndarray, norms: np.ndarray, n_clusters: int, n_keep: int, seeds: range
) -> Fits:
    points = x if variant.transform is None else variant.transform(x, n_clusters)
    clusterings = [fit(variant, points, norms, n_clusters, seed) for seed in seeds]
    ids = variant.rows.ids.tolist()
    return Fits(points, clusterings, [nearest_to_centre(clustering, ids, n_keep) for clustering in clusterings])


def evaluate(
    variant: Variant, clusters: list[int], *, fraction: float = 0.25, seeds: int = 5, draws: int = 10, seed: int = 42
) -> list[dict[str, Any]]:
    """
    Measure the clusters of a variant, beside a Gaussian with the same mean and covariance through the same steps.

    Rows whose feature is zero or not finite are left out and counted.

    Args:
        variant ([`Variant`]):
            The variant.
        clusters (`list[int]`):
            Numbers of clusters.
        fraction (`float`, *optional*, defaults to `0.25`):
            Fraction of the rows to keep.
        seeds (`int`, *optional*, defaults to `5`):
            Seeds of K-means, at least 3.
        draws (`int`, *optional*, defaults to `10`):
            Draws of the Gaussian, at least 2, each clustered with two seeds.
        seed (`int`, *optional*, defaults to `42`):
            First of the seeds.

    Returns:
        `list[dict[str, Any]]`: One row for each number of clusters: means, and under `*_sd` their standard deviations
        over seeds or draws.
    """
    dim = variant.features.shape[1]
    variant, norms, left_out = prepare(variant)
    x, rows, n = variant.features, variant.rows, len(norms)
    draw = gaussian_like(x, variant.normalize)
    samples = [draw(np.random.default_rng([seed, number])) for number in range(draws)]
    other = redrawn(x, np.random.default_rng(seed))
    samples.append(unit(other) if variant.normalize else other)

    n_keep = budget(fraction, n)
    rules = {"smallest_norm": -norms, "shortest": -rows.lengths, "longest": rows.lengths, **rows.rules}
    edges = np.quantile(rows.lengths, np.arange(1, LENGTH_BINS) / LENGTH_BINS)
    bins = np.searchsorted(edges, rows.lengths)

    table = []
    for k in clusters:
        fits = cluster_and_keep(variant, x, norms, k, n_keep, range(seed, seed + seeds))
        *null, again = [cluster_and_keep(variant, s, norms, k, n_keep, range(seed, seed + 2)) for s in samples]
        by_mean = -np.linalg.norm(fits.points - fits.points.mean(axis=0), axis=1)
        values = {
            "ve": fits.variance_explained,
            "ve_null": [np.mean(sample.variance_explained) for sample in null],
            "ve_redrawn": again.variance_explained,
            "jaccard": fits.jaccards,
            "jaccard_null": [sample.jaccards[0] for sample in null],
            "ami_length": fits.scores(adjusted_mutual_info_score, bins),
        }
        by_text = cluster(rows.embeddings, rows.ids.tolist(), k, seed).labels
        values["ami_embedding"] = fits.scores(adjusted_mutual_info_score, by_text)
        if rows.sources is not None:
            values["ami_source"] = fits.scores(adjusted_mutual_info_score, rows.sources)
            values["ari"] = fits.scores(adjusted_rand_score, rows.sources)
        for name, scores in {**rules, "nearest_to_mean": by_mean}.items():
            values[f"in_{name}"] = [kept[highest(scores, n_keep)].sum() / n_keep for kept in fits.kept]
        row: dict[str, Any] = {"variant": variant.name, "n": n, "left_out": left_out, "dim": dim, "clusters": k}
        for name, measured in values.items():
            row |= {name: float(np.mean(measured)), f"{name}_sd": float(np.std(measured, ddof=1))}
        row["z"] = (row["ve"] - row["ve_null"]) / max(row["ve_null_sd"], 1e-12)
        row["jaccard_chance"] = fraction / (2 - fraction)
        if rows.sources is not None:
            row["knn"] = neighbours_agree(fits.points, rows.sources)
            row["knn_chance"] = float(np.unique(rows.sources, return_counts=True)[1].max() / n)
        table.append(row)
    return table
