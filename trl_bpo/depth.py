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
Depth: which pairs to train on (stage 3 of BPO).

Columns in: `pair_id` and `prompt_id`. Columns out, beside all that came in:

| column | type | meaning |
| --- | --- | --- |
| `depth_cluster` | int64 | K-means cluster of the pair's feature; -1 for a pair that was left out |
| `depth_distance` | float64 | Euclidean distance of the feature to the centre of that cluster; NaN if left out |
| `depth_rank` | int64 | rank by that distance within the cluster, 0 is the nearest; -1 if left out |
| `depth_selected` | bool | whether the pair is kept |

The first three mean the same whatever the `rule` is that says which of the clustered pairs are kept.

A selection by scores has no clusters. In place of the first two columns it has `depth_score` (float64, the highest are
kept), and `depth_rank` is the rank among all pairs.
"""

import logging
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from .clustering import (
    SCOPES,
    Clustering,
    budget,
    check_fraction,
    check_n_clusters,
    cluster,
    gaussian_variance_explained,
    nearest_to_centre,
    rank_in_groups,
    row_norms,
)
from .ids import Ids, dense_ranks, id_at
from .rows import Rows, RowsOf
from .rules import RULES, draw_like, draw_scores, k_centre


logger = logging.getLogger(__name__)

DEPTH_COLUMNS = ("depth_cluster", "depth_distance", "depth_score", "depth_rank", "depth_selected")
# The Gaussian costs a matrix product of (n, n) by (n, d), so a larger pool is compared by a sample of it.
_GAUSSIAN_ROWS = 4096
# A few pairs may overflow. Where more than this share does, the model is broken and so is what is left.
_MAX_NOT_FINITE = 0.1
_NAMED_ROWS = 10


@dataclass(frozen=True, repr=False)
class DepthSelection:
    """
    Result of a depth selection over `n` pairs.

    Attributes:
        selected (`np.ndarray` of shape `(n,)`, bool):
            Whether each pair is kept.
        ranks (`np.ndarray` of shape `(n,)`, int64):
            Rank of each pair: in its cluster, or among all by their scores. -1 for a pair that was left out.
        metrics (`dict[str, float]`):
            `active_pairs`, `pairs_per_prompt_mean` (over the prompts that keep a pair), `pairs_per_prompt_max`,
            `prompts_without_pair` and `not_finite`. Where features were clustered also `zero_gradients`, `n_clusters`,
            `cluster_entropy` (of the kept pairs over the clusters, 1.0 is uniform), `variance_explained` by the
            clusters, `variance_explained_gaussian`, that of a Gaussian with the same covariance through the same
            pipeline, and `norm_kept_over_dropped`, the ratio of the mean norms of the features.
        clusters (`np.ndarray` of shape `(n,)`, int64, *optional*):
            Cluster of each pair, -1 for a pair that was left out. `None` without clusters.
        distances (`np.ndarray` of shape `(n,)`, float64, *optional*):
            Distance of each pair to its centre, NaN for a pair that was left out. `None` without clusters.
        scores (`np.ndarray` of shape `(n,)`, float64, *optional*):
            Score of each pair. `None` with clusters.
    """

    selected: np.ndarray
    ranks: np.ndarray
    metrics: dict[str, float]
    clusters: np.ndarray | None = None
    distances: np.ndarray | None = None
    scores: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"DepthSelection({self.selected.sum()} of {len(self.selected)} pairs, metrics={self.metrics})"

    @property
    def summary(self) -> str:
        """One line that tells what was kept."""
        line = (
            f"at most {self.metrics['pairs_per_prompt_max']:.0f} a prompt, "
            f"{self.metrics['prompts_without_pair']:.0f} prompts with none"
        )
        if self.clusters is not None:
            line += (
                f"; variance explained {self.metrics['variance_explained']:.3f}, of a Gaussian "
                f"{self.metrics['variance_explained_gaussian']:.3f}"
            )
        return line

    def annotate(self, dataset: Dataset) -> Dataset:
        """
        Add the `depth_*` columns to the pairs that were selected from.

        Args:
            dataset ([`~datasets.Dataset`]):
                The pairs, in the order of the selection.

        Returns:
            [`~datasets.Dataset`]: All pairs, with the columns of the module's table.
        """
        return self._with_columns(dataset, slice(None))

    def kept(self, dataset: Dataset) -> Dataset:
        """
        The pairs that were kept, with the columns of the module's table.

        Args:
            dataset ([`~datasets.Dataset`]):
                The pairs that were selected from, in the order of the selection.

        Returns:
            [`~datasets.Dataset`]: Those that were kept.
        """
        rows = np.flatnonzero(self.selected)
        return self._with_columns(dataset.select(rows), rows)

    def _with_columns(self, dataset: Dataset, rows: np.ndarray | slice) -> Dataset:
        columns = (self.clusters, self.distances, self.scores, self.ranks, self.selected)
        dataset = dataset.remove_columns([name for name in DEPTH_COLUMNS if name in dataset.column_names])
        for name, values in zip(DEPTH_COLUMNS, columns, strict=True):
            if values is not None:
                dataset = dataset.add_column(name, values[rows])
        return dataset


def _finite(values: np.ndarray, what: str, pair_ids: Ids) -> np.ndarray:
    # Which pairs have finite values. Says which have not, and stops where they are many.
    finite = np.isfinite(values)
    rows = np.flatnonzero(~finite)
    if len(rows) == 0:
        return finite
    named = ", ".join(f"{id_at(pair_ids, row)} (row {row})" for row in rows[:_NAMED_ROWS])
    message = (
        f"The {what} of {len(rows)} of {len(pair_ids)} pairs are not finite: {named}"
        f"{', and others' if len(rows) > _NAMED_ROWS else ''}."
    )
    if len(rows) > _MAX_NOT_FINITE * len(pair_ids):
        raise ValueError(f"{message} Look for an overflow in half precision or for broken weights.")
    logger.warning("%s They are left out of this selection.", message)
    return finite


def _metrics(selected: np.ndarray, prompts: np.ndarray, n_not_finite: int) -> dict[str, float]:
    _, kept_per_prompt = np.unique(prompts[selected], return_counts=True)
    return {
        "active_pairs": float(selected.sum()),
        "pairs_per_prompt_mean": float(kept_per_prompt.mean()),
        "pairs_per_prompt_max": float(kept_per_prompt.max()),
        "prompts_without_pair": float(len(np.unique(prompts)) - len(kept_per_prompt)),
        "not_finite": float(n_not_finite),
    }


class DepthSelector:
    """
    Keep the pairs whose gradients represent the others best: stage 3 of BPO (arXiv 2411.10914).

    The gradient features of all pairs are clustered together by K-means, and exactly `round(fraction * n)` of the `n`
    pairs, at least one, that lie nearest to the centres are kept. How many pairs a prompt keeps, none included, is the
    outcome. On a set with one pair a prompt, depth selects among prompts. The number of clusters, the distance, the
    normalisation and the scope are not specified by the paper.

    [`BPOTrainer`] runs this selection on its schedule; [`BPOTrainer.select_pairs`] runs it without training. To select
    by other features, hand them to [`~DepthSelector.select`]; to keep what scores highest, hand scores to
    [`~DepthSelector.select_by_score`].

    Args:
        fraction (`float`):
            Fraction of the pairs to keep, in (0, 1].
        n_clusters (`int`, *optional*):
            Number of clusters. If `None`, `round(sqrt(n / 2))`.
        scope (`str`, *optional*, defaults to `"per_cluster"`):
            `"per_cluster"` keeps the nearest of each cluster, in proportion to its size; `"overall"` keeps the nearest
            of all.
        rule (`str`, *optional*, defaults to `"nearest"`):
            Which of the clustered pairs are kept. `"nearest"` is the paper; the others are there to compare with:
            `"farthest"` from the centres, `"random"` (as many of each cluster as `"nearest"`), `"random_like_nearest"`
            (with the numbers of pairs a prompt of `"nearest"`) and `"k_centre"` (greedy k-centre, whatever the
            clusters); see `trl_bpo/rules.py`. Clusters, distances and ranks are the same under each.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether to scale the features to unit length. Otherwise the pairs nearest to a centre are those with hardly
            any gradient.
        min_pairs_per_prompt (`int`, *optional*, defaults to `0`):
            Pairs that every prompt keeps at least (all of them if it has fewer), within the budget: its first by the
            rule. Where that adds pairs, the last by the rule that no prompt needs make room, so that under `"random"` the
            numbers a cluster may move.
        seed (`int`, *optional*, defaults to `42`):
            Seed of K-means, of the Gaussian and of the rules that draw.

    Raises:
        `ValueError`: If an option is out of range.
    """

    def __init__(
        self,
        fraction: float,
        *,
        n_clusters: int | None = None,
        scope: str = "per_cluster",
        rule: str = "nearest",
        normalize: bool = True,
        min_pairs_per_prompt: int = 0,
        seed: int = 42,
    ) -> None:
        check_fraction("fraction", fraction)
        if scope not in SCOPES:
            raise ValueError(f"`scope` must be one of {SCOPES}, got {scope!r}.")
        if rule not in RULES:
            raise ValueError(f"`rule` must be one of {RULES}, got {rule!r}.")
        if min_pairs_per_prompt < 0:
            raise ValueError(f"`min_pairs_per_prompt` must not be negative, got {min_pairs_per_prompt}.")
        self.fraction = fraction
        self.n_clusters = n_clusters
        self.scope = scope
        self.rule = rule
        self.normalize = normalize
        self.min_pairs_per_prompt = min_pairs_per_prompt
        self.seed = seed

    def check(self, prompt_ids: Ids) -> int:
        """
        Refuse a pool that cannot be selected from, before any gradient is computed.

        Args:
            prompt_ids (`Sequence[str]`, `pyarrow.Array` or `pyarrow.ChunkedArray`):
                Prompt of each pair of the pool.

        Returns:
            `int`: The budget, in pairs.

        Raises:
            `ValueError`: If there is no pair, if there are more clusters than pairs, or if `min_pairs_per_prompt`
                asks for more pairs than the budget allows.
        """
        prompts = dense_ranks(prompt_ids)
        n_keep, n_prompts = self._budget(prompts), len(np.unique(prompts))
        if 2 * n_keep < n_prompts:
            logger.warning(
                "The budget leaves most prompts without a pair: %d pairs (fraction %s of %d) for %d prompts, so at "
                "least %d prompts keep none. Raise the fraction, or select fewer prompts beforehand.",
                n_keep,
                self.fraction,
                len(prompt_ids),
                n_prompts,
                n_prompts - n_keep,
            )
        return n_keep

    def _budget(self, prompts: np.ndarray) -> int:
        n = len(prompts)
        if n == 0:
            raise ValueError("There is no pair to select from: the dataset is empty, or every row was filtered out.")
        if self.n_clusters is not None:
            check_n_clusters("n_clusters", self.n_clusters, n)
        n_keep = budget(self.fraction, n)
        _, pairs_per_prompt = np.unique(prompts, return_counts=True)
        floor = int(np.minimum(pairs_per_prompt, self.min_pairs_per_prompt).sum())
        if floor > n_keep:
            raise ValueError(
                f"`min_pairs_per_prompt={self.min_pairs_per_prompt}` needs {floor} pairs, but a fraction of "
                f"{self.fraction} of {n} pairs is a budget of {n_keep}. Raise the fraction to at least "
                f"{floor / n:.3g}, or lower `min_pairs_per_prompt`."
            )
        return n_keep

    def select(self, features: Rows, pair_ids: Ids, prompt_ids: Ids, number: int = 0) -> DepthSelection:
        """
        Select pairs by their features.

        Memory beside them: about 0.5 GB, 200 bytes a pair, and what [`cluster`] takes: a copy of the features of up to
        32,768 pairs, of more pairs at most 2 GB, while the features are read in blocks. The rule `"k_centre"` takes two
        copies.

        Args:
            features ([`Rows`] of shape `(n, d)`):
                Feature of each pair, not normalised: an array, a memory-mapped file, or what reads like one. Rows of zeros (pairs without a gradient) and, with a warning that
                names them, rows that are not finite are left out of the clustering and are not kept; they are counted.
            pair_ids (`Sequence[str]`, `pyarrow.Array` or `pyarrow.ChunkedArray`):
                Content hash of each pair, which settles ties.
            prompt_ids (`Sequence[str]`, `pyarrow.Array` or `pyarrow.ChunkedArray`):
                Prompt of each pair.
            number (`int`, *optional*, defaults to `0`):
                Number of the draw, under the rules that draw: another number draws anew.

        Returns:
            [`DepthSelection`]: What is kept. Fewer pairs than the budget are kept only if fewer have a gradient.

        Raises:
            `ValueError`: If the features of more than a tenth of the pairs are not finite, if all are zero, or for the
                reasons of [`~DepthSelector.check`].
        """
        prompts, order_of_pairs = dense_ranks(prompt_ids), dense_ranks(pair_ids)
        n_keep = self._budget(prompts)
        n = len(pair_ids)
        norms = row_norms(features)
        finite = _finite(norms, "features", pair_ids)
        rows = np.flatnonzero(finite & (norms > 0))
        if len(rows) == 0:
            raise ValueError(
                f"The features of all {n} pairs are zero: chosen and rejected are the same, or nothing is trainable."
            )
        ids = order_of_pairs[rows]
        x: Rows = RowsOf(features, rows, norms if self.normalize else None)
        n_clusters = None if self.n_clusters is None else min(self.n_clusters, len(rows))
        clustering = cluster(x, ids, n_clusters, self.seed)
        kept = self._keep(x, clustering, ids, prompts[rows], min(n_keep, len(rows)), number)

        selected = np.zeros(n, dtype=bool)
        clusters, ranks, distances = np.full(n, -1), np.full(n, -1), np.full(n, np.nan)
        selected[rows] = kept
        clusters[rows], ranks[rows], distances[rows] = clustering.labels, clustering.ranks, clustering.distances

        variance_explained = clustering.variance_explained
        if len(rows) > _GAUSSIAN_ROWS:
            # The share explained depends on the number of rows a cluster, so both sides are taken over the sample.
            # By id, so that the order of the rows does not decide which are drawn.
            sample = np.random.default_rng(self.seed).choice(len(rows), _GAUSSIAN_ROWS, replace=False)
            sample = np.argsort(ids, kind="stable")[sample]
            x, ids = x[sample], ids[sample]
            n_clusters = min(clustering.n_clusters, _GAUSSIAN_ROWS)
            variance_explained = cluster(x, ids, n_clusters, self.seed).variance_explained
        gaussian = gaussian_variance_explained(
            x[:], ids, min(clustering.n_clusters, len(ids)), self.seed, self.normalize
        )
        shares = np.bincount(clusters[selected]) / selected.sum()
        shares = shares[shares > 0]
        dropped = finite & ~selected
        metrics = _metrics(selected, prompts, n - int(finite.sum())) | {
            "zero_gradients": float((norms == 0).sum()),
            "n_clusters": float(clustering.n_clusters),
            "cluster_entropy": float((shares * -np.log(shares)).sum() / max(np.log(clustering.n_clusters), 1e-12)),
            "variance_explained": variance_explained,
            "variance_explained_gaussian": gaussian,
        }
        if norms[dropped].any():
            # Sorted, so that the sum does not depend on the order of the rows.
            kept_norm, dropped_norm = (np.sort(norms[rows]).mean() for rows in (selected, dropped))
            metrics["norm_kept_over_dropped"] = float(kept_norm / dropped_norm)
        return DepthSelection(selected, ranks, metrics, clusters=clusters, distances=distances)

    def _keep(
        self, x: Rows, clustering: Clustering, ids: np.ndarray, prompts: np.ndarray, n_keep: int, number: int
    ) -> np.ndarray:
        if self.rule == "k_centre":
            places = k_centre(x[:], ids, n_keep)
            return self._with_floor(places < n_keep, places, ids, prompts)
        farthest = self.rule == "farthest"
        kept = nearest_to_centre(clustering, ids, n_keep, self.scope, farthest)
        kept = self._with_floor(kept, -clustering.distances if farthest else clustering.distances, ids, prompts)
        if self.rule == "random_like_nearest":
            return draw_like(kept, ids, prompts, self.seed, number)
        if self.rule == "random":
            draws = draw_scores(ids, self.seed, number)
            kept_of_cluster = np.bincount(clustering.labels, weights=kept)
            kept = rank_in_groups(clustering.labels, draws, ids) < kept_of_cluster[clustering.labels]
            return self._with_floor(kept, draws, ids, prompts)
        return kept

    def select_by_score(self, scores: np.ndarray, pair_ids: Ids, prompt_ids: Ids) -> DepthSelection:
        """
        Keep the pairs with the highest scores. `n_clusters`, `scope`, `rule` and `normalize` play no part.

        Args:
            scores (`np.ndarray` of shape `(n,)`):
                Score of each pair. Pairs whose score is not finite are left out with a warning that names them, and
                counted.
            pair_ids (`Sequence[str]`, `pyarrow.Array` or `pyarrow.ChunkedArray`):
                Content hash of each pair, which settles ties.
            prompt_ids (`Sequence[str]`, `pyarrow.Array` or `pyarrow.ChunkedArray`):
                Prompt of each pair.

        Returns:
            [`DepthSelection`]: What is kept. Fewer pairs than the budget are kept only if fewer have a score.

        Raises:
            `ValueError`: If the scores of more than a tenth of the pairs are not finite, or for the reasons of
                [`~DepthSelector.check`].
        """
        prompts = dense_ranks(prompt_ids)
        n_keep = self._budget(prompts)
        n = len(pair_ids)
        scores = scores.astype(np.float64)
        rows = np.flatnonzero(_finite(scores, "scores", pair_ids))
        ids = dense_ranks(pair_ids)[rows]
        order = np.lexsort((ids, -scores[rows]))
        kept = np.zeros(len(rows), dtype=bool)
        kept[order[:n_keep]] = True
        kept = self._with_floor(kept, -scores[rows], ids, prompts[rows])
        selected, ranks = np.zeros(n, dtype=bool), np.full(n, -1)
        selected[rows] = kept
        ranks[rows[order]] = np.arange(len(rows))
        return DepthSelection(selected, ranks, _metrics(selected, prompts, n - len(rows)), scores=scores)

    def _with_floor(self, kept: np.ndarray, distances: np.ndarray, ids: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        # Every prompt first keeps its first pairs by `distances`. Whatever that adds to the selection is taken back from
        # the last pairs that no prompt needs, so that the budget holds exactly.
        if self.min_pairs_per_prompt == 0:
            return kept
        needed = rank_in_groups(prompts, distances, ids) < self.min_pairs_per_prompt
        order = np.lexsort((ids, distances))[::-1]
        spare = order[kept[order] & ~needed[order]]
        n_keep = int(kept.sum())
        kept = kept | needed
        kept[spare[: int(kept.sum()) - n_keep]] = False
        return kept
