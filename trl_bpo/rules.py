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
What [`DepthSelector`] keeps of clustered features: the values of its `rule`. All but the first are there to compare with.

| rule | keeps |
| --- | --- |
| `nearest` | the pairs nearest to the centres of their clusters: BPO |
| `farthest` | those farthest from them |
| `random` | as many of each cluster as `nearest`, drawn at random: what nearness does beyond the clusters |
| `random_like_nearest` | pairs at random of prompts at random, with the numbers of pairs a prompt of `nearest`: what the shape of depth does alone |
| `k_centre` | the pair nearest to the mean, then always the pair farthest from those kept: the greedy k-centre of Gonzalez (1985), as in the core-sets of Sener and Savarese (arXiv 1708.00489) |
"""

import numpy as np
from sklearn.metrics import DistanceMetric

from .clustering import rank_in_groups
from .ids import Ids, dense_ranks


RULES = ("nearest", "farthest", "random", "random_like_nearest", "k_centre")


def draw_scores(ids: Ids, seed: int, number: int) -> np.ndarray:
    """
    Random scores that depend on the ids and not on their order.

    Args:
        ids (`Sequence[str]`, or integers that are ordered alike):
            Ids of the pairs.
        seed (`int`):
            Seed of the run.
        number (`int`):
            Number of the draw.

    Returns:
        `np.ndarray` of shape `(n,)`: Scores in [0, 1).
    """
    scores = np.empty(len(ids))
    order = np.argsort(dense_ranks(ids), kind="stable")
    scores[order] = np.random.default_rng([seed, number]).random(len(ids))
    return scores


def draw_like(selected: np.ndarray, pair_ids: Ids, prompt_ids: Ids, seed: int, number: int) -> np.ndarray:
    """
    Draw a selection at random that has as many prompts of each number of pairs as another one.

    The numbers of pairs are given to prompts that have enough pairs, the largest first, so that one is always found. A
    floor that the other selection keeps, this one keeps too.

    Args:
        selected (`np.ndarray` of shape `(n,)`, bool):
            The other selection.
        pair_ids (`Sequence[str]`, or integers that are ordered alike):
            Content hash of each pair.
        prompt_ids (`Sequence[str]`, or integers that are ordered alike):
            Prompt of each pair.
        seed (`int`):
            Seed of the run.
        number (`int`):
            Number of the draw.

    Returns:
        `np.ndarray` of shape `(n,)`, bool: Whether each pair is drawn.
    """
    prompts, own, sizes = np.unique(dense_ranks(prompt_ids), return_inverse=True, return_counts=True)
    # One draw for both: two of the same length would be the same.
    pairs = len(prompts) + dense_ranks(pair_ids)
    draws = draw_scores(np.concatenate([np.arange(len(prompts)), pairs]), seed, number)
    of_prompts, of_pairs = draws[: len(prompts)], draws[len(prompts) :]
    counts = np.zeros(len(prompts), dtype=np.int64)
    free = np.ones(len(prompts), dtype=bool)
    values, times = np.unique(np.bincount(own[selected], minlength=len(prompts)), return_counts=True)
    for count, n_prompts in zip(values[::-1], times[::-1], strict=True):
        eligible = np.flatnonzero(free & (sizes >= count))
        taken = eligible[np.argsort(of_prompts[eligible])[:n_prompts]]
        counts[taken], free[taken] = count, False
    return rank_in_groups(own, of_pairs, pair_ids) < counts[own]


def k_centre(features: np.ndarray, ids: Ids, n_keep: int) -> np.ndarray:
    """
    Order in which greedy k-centre keeps rows: first the one nearest to the mean, then always the one farthest from those
    kept. Time is `O(n * n_keep * d)`, memory one copy of the features.

    Args:
        features (`np.ndarray` of shape `(n, d)`, float32 or float64):
            One row a point. Must be finite.
        ids (`Sequence[str]`, or integers that are ordered alike):
            Content hash of each row, which settles ties.
        n_keep (`int`):
            Number of rows to keep.

    Returns:
        `np.ndarray` of shape `(n,)`, int64: Place of each row: below `n_keep` for those that are kept, in the order in
        which they were; the others follow, the farthest from those kept first.
    """
    order = np.argsort(dense_ranks(ids), kind="stable")
    features = features[order]
    # Distances by differences. By inner products equal rows would lie apart by the rounding.
    metric = DistanceMetric.get_metric("euclidean", dtype=features.dtype.type)
    mean = features.mean(axis=0, dtype=np.float64).astype(features.dtype)
    row = int(metric.pairwise(features, mean[None])[:, 0].argmin())
    to_kept, kept = np.full(len(features), np.inf), []
    for _ in range(n_keep):
        kept.append(row)
        np.minimum(to_kept, metric.pairwise(features, features[row : row + 1])[:, 0], out=to_kept)
        # Below the zero of a row that equals one of those kept.
        to_kept[row] = -1.0
        row = int(to_kept.argmax())
    places = np.empty(len(features), dtype=np.int64)
    rest = np.argsort(-to_kept, kind="stable")[: len(features) - n_keep]
    places[order[np.concatenate([kept, rest])]] = np.arange(len(features))
    return places
