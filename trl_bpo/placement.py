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


"""Where prompts and pairs stand in the selections of a run, and what decided: from what the run saved alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .clustering import Clustering, budget, nearest_to_centre
from .run_folder import SavedBreadth, SavedSelection


# What the strategies without a cut keep: they draw, or go by the distance to the pairs that are kept already.
_WITHOUT_CUT = {
    "gradient_random": "drawn at random from each cluster, as many as the nearest of it would be",
    "random_like_gradient": "drawn at random, with as many prompts of each number of pairs as the nearest would have",
    "gradient_k_centre": "each the pair farthest from those kept before it, from the pair nearest to the mean on",
}
# What those keep that go by a score.
_BY_SCORE = {
    "gradient_norm": "with the largest gradient",
    "loss": "with the highest loss",
    "implicit_reward_margin_high": "with the highest margin of the implicit rewards",
    "implicit_reward_margin_low": "with the lowest margin of the implicit rewards",
    "score_margin_high": "whose scores of chosen and rejected differ most",
    "score_margin_low": "whose scores of chosen and rejected differ least",
    "longest": "with the longest chosen response",
    "random": "that a random draw put first",
    "random_once": "that a random draw put first",
    "equal_per_prompt": "that come first when the prompts give a pair each in turn, drawn at random",
    "best_worst_per_prompt": "that come first when the prompts give a pair each in turn, the one with the largest "
    "difference of scores first",
}


@dataclass(frozen=True)
class Place:
    """
    Where a prompt or pair stands in one selection, and why it is kept or dropped.

    Attributes:
        selected (`bool`):
            Whether it is kept.
        reason (`str`):
            `"within_cut"` or `"beyond_cut"`; `"added"` or `"displaced"` where `min_pairs_per_prompt` decided otherwise
            than the cut; `"by_rule"` where the rule has no cut; `"left_out"` for a pair without a usable gradient or score.
        sentence (`str`):
            The same in words.
        cluster, cluster_size, cluster_kept (`int`, *optional*):
            Its cluster, how many are in it, and how many of them are kept. `None` without clusters.
        distance (`float`, *optional*):
            Distance to the centre of the cluster.
        score (`float`, *optional*):
            Score, for a selection by scores.
        rank (`int`, *optional*):
            Rank, from 0: by distance within the cluster, or by score among all. `None` for a pair that was left out.
        rank_of_all (`int`, *optional*):
            Where the scope is `"overall"`, rank by distance among all, from 0; of the farthest, from the far end.
        cut_rank (`int`, *optional*):
            The cut: rank of the last that is kept by the rule. It is to be compared with `rank_of_all` where there is one,
            with `rank` otherwise. `None` where the rule has no cut, or keeps nothing of the cluster.
        cut_distance, cut_score (`float`, *optional*):
            Distance or score of that one.
    """

    selected: bool
    reason: str
    sentence: str
    cluster: int | None = None
    cluster_size: int | None = None
    cluster_kept: int | None = None
    distance: float | None = None
    score: float | None = None
    rank: int | None = None
    rank_of_all: int | None = None
    cut_rank: int | None = None
    cut_distance: float | None = None
    cut_score: float | None = None


@dataclass(frozen=True)
class PromptInBreadth:
    """
    A prompt in the breadth selection.

    Attributes:
        place ([`Place`]):
            Where it stands.
        rows, duplicates (`int`):
            Rows of the dataset that have this prompt, and how many of them were dropped because they repeat another.
        num_prompts, num_kept (`int`):
            Distinct prompts of the dataset, and how many are kept.
    """

    place: Place
    rows: int
    duplicates: int
    num_prompts: int
    num_kept: int


@dataclass(frozen=True)
class PairInSelection:
    """
    A pair in a selection of pairs.

    Attributes:
        pair_id (`str`):
            Its id.
        row (`int`):
            Its row in the pool. Pairs that repeat another have the same id and a row of their own.
        place ([`Place`]):
            Where it stands.
    """

    pair_id: str
    row: int
    place: Place


@dataclass(frozen=True)
class SelectionOfPairs:
    """
    What a selection of pairs made of those in question.

    Attributes:
        step (`int`):
            Optimizer step.
        parameters (`dict[str, Any]`):
            Training arguments that made it.
        num_pairs, num_kept (`int`):
            Pairs of the pool, and how many are kept.
        pairs (`list[PairInSelection]`):
            The pairs in question.
    """

    step: int
    parameters: dict[str, Any]
    num_pairs: int
    num_kept: int
    pairs: list[PairInSelection]


def _number(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy()


def _text(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_pylist())


def _few(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class _Cuts:
    # Rows that were clustered, and which of them nearness, or its opposite, keeps.

    def __init__(
        self, table: pa.Table, stage: str, ids: np.ndarray, rows: np.ndarray, n_keep: int, scope: str, farthest: bool
    ) -> None:
        self.noun = "prompt" if stage == "breadth" else "pair"
        self.scope, self.farthest = scope, farthest
        n = table.num_rows
        self.clusters, self.distances, self.ranks, self.selected = (
            _number(table[f"{stage}_{name}"]) for name in ("cluster", "distance", "rank", "selected")
        )
        ids = ids[rows]
        clustering = Clustering(self.clusters[rows], self.distances[rows], self.ranks[rows], 0.0)
        self.by_rule = np.zeros(n, dtype=bool)
        self.by_rule[rows] = nearest_to_centre(clustering, ids.tolist(), n_keep, scope, farthest)
        self.n_clustered, self.n_keep = len(rows), n_keep
        self.ranks_of_all = np.full(n, -1)
        order = np.lexsort((ids, -clustering.distances if farthest else clustering.distances))
        self.ranks_of_all[rows[order]] = np.arange(len(rows))

    def place(self, row: int, reason: str, sentence: str, with_cut: bool = True) -> Place:
        own = self.clusters == self.clusters[row]
        numbers: dict[str, Any] = {}
        if with_cut and self.scope == "overall":
            numbers["rank_of_all"] = int(self.ranks_of_all[row])
        rivals = self.by_rule if self.scope == "overall" else self.by_rule & own
        if with_cut and rivals.any():
            ranks = self.ranks_of_all if self.scope == "overall" else self.ranks
            # In a cluster the farthest are those of the highest ranks.
            lowest = self.farthest and self.scope != "overall"
            kept = np.flatnonzero(rivals)
            last = int(kept[ranks[kept].argmin() if lowest else ranks[kept].argmax()])
            numbers |= {"cut_rank": int(ranks[last]), "cut_distance": float(self.distances[last])}
        return Place(
            selected=bool(self.selected[row]),
            reason=reason,
            sentence=sentence,
            cluster=int(self.clusters[row]),
            cluster_size=int(own.sum()),
            cluster_kept=int((own & self.selected).sum()),
            distance=float(self.distances[row]),
            rank=int(self.ranks[row]),
            **numbers,
        )

    def sentence(self, row: int) -> str:
        """Why the cut keeps or drops a row."""
        noun, where = self.noun, "farthest from" if self.farthest else "nearest to"
        kept = self.by_rule[row]
        if self.scope == "overall":
            among = f"the {_few(self.n_keep, noun)} of {self.n_clustered:,} {where} the centres of their clusters"
            return f"Kept: it is among {among}." if kept else f"Dropped: it is not among {among}."
        label = self.clusters[row]
        own = self.clusters == label
        size, quota = int(own.sum()), int((own & self.by_rule).sum())
        share = f"cluster {label} may keep {quota:,} of its {_few(size, noun)}, its share of the budget"
        if kept and quota == size:
            return f"Kept: {share}."
        if kept:
            return f"Kept: {share}, and this one is among those {where} the centre."
        if quota == 0:
            return f"Dropped: cluster {label} is too small, its share of the budget comes to no {noun}."
        return f"Dropped: {share}, and others are {'farther from' if self.farthest else 'nearer to'} the centre."


def _contradiction(what: str) -> ValueError:
    return ValueError(
        f"{what} does not follow from the distances and ranks that are saved with it. The files of the run were changed, "
        "or are of several runs."
    )


def place_in_breadth(breadth: SavedBreadth, prompt: int) -> PromptInBreadth:
    """
    Place a prompt in the breadth selection.

    Args:
        breadth ([`~run_folder.SavedBreadth`]):
            The selection.
        prompt (`int`):
            Row of the prompt in its table.

    Returns:
        [`PromptInBreadth`]: Where it stands.

    Raises:
        `ValueError`: If what was selected does not follow from the distances that are saved with it.
    """
    table, parameters = breadth.prompts, breadth.manifest["parameters"]
    n = table.num_rows
    ids, n_keep = _text(table["prompt_id"]), budget(parameters["fraction"], n)
    cuts = _Cuts(table, "breadth", ids, np.arange(n), n_keep, parameters["scope"], farthest=False)
    if not np.array_equal(cuts.by_rule, cuts.selected):
        raise _contradiction("The breadth selection")
    reason = "within_cut" if cuts.by_rule[prompt] else "beyond_cut"
    rows, duplicates = (table[name][prompt].as_py() for name in ("rows", "duplicates"))
    return PromptInBreadth(cuts.place(prompt, reason, cuts.sentence(prompt)), rows, duplicates, n, n_keep)


def _decided(by_rule: bool, selected: bool) -> str:
    if by_rule == selected:
        return "within_cut" if selected else "beyond_cut"
    return "added" if selected else "displaced"


def _sentence(by_rule: str, reason: str, floor: int) -> str:
    if reason == "added":
        return (
            f"Kept beyond the cut: `min_pairs_per_prompt={floor}` keeps {_few(floor, 'pair')} of every prompt, and this "
            "is among the first of its own."
        )
    if reason == "displaced":
        return (
            f"Dropped within the cut: it is among the last, and had to make room for the pairs that "
            f"`min_pairs_per_prompt={floor}` keeps of other prompts."
        )
    return by_rule


def _left_out(metrics: dict[str, Any], what: str) -> Place:
    zero, not_finite = metrics.get("zero_gradients", 0), metrics["not_finite"]
    if zero and not_finite:
        why = f"its {what} is zero or not finite"
    else:
        why = f"its {what} is zero" if zero else f"its {what} is not finite"
    return Place(False, "left_out", f"Dropped: {why}, so that it took no part in the selection.")


def _places_by_distance(saved: SavedSelection, rows: Sequence[int]) -> list[Place]:
    table, parameters = saved.pairs, saved.manifest["parameters"]
    strategy, floor = parameters["depth_strategy"], parameters["min_pairs_per_prompt"]
    clustered = np.flatnonzero(_number(table["depth_rank"]) >= 0)
    n_keep = min(budget(parameters["depth_fraction"], table.num_rows), len(clustered))
    ids = _text(table["pair_id"])
    farthest = strategy.endswith("_farthest")
    cuts = _Cuts(table, "depth", ids, clustered, n_keep, parameters["depth_scope"], farthest)
    rule = _WITHOUT_CUT.get(strategy)
    if rule is None and floor == 0 and not np.array_equal(cuts.by_rule, cuts.selected):
        raise _contradiction(f"The selection at step {saved.step}")
    places = []
    for row in rows:
        if cuts.ranks[row] < 0:
            places.append(_left_out(saved.metrics, "embedding" if strategy.startswith("embedding") else "gradient"))
        elif rule is not None:
            verdict = "Kept: it is" if cuts.selected[row] else "Dropped: it is not"
            sentence = (
                f"{verdict} among the {_few(n_keep, 'pair')} of {len(clustered):,} that `{strategy}` keeps: {rule}."
            )
            if floor:
                sentence += (
                    f" `min_pairs_per_prompt={floor}` keeps {_few(floor, 'pair')} of every prompt all the same."
                )
            places.append(cuts.place(row, "by_rule", sentence, with_cut=False))
        else:
            reason = _decided(cuts.by_rule[row], cuts.selected[row])
            places.append(cuts.place(row, reason, _sentence(cuts.sentence(row), reason, floor)))
    return places


def _places_by_score(saved: SavedSelection, rows: Sequence[int]) -> list[Place]:
    table, parameters = saved.pairs, saved.manifest["parameters"]
    strategy, floor = parameters["depth_strategy"], parameters["min_pairs_per_prompt"]
    scores, ranks, selected = (_number(table[f"depth_{name}"]) for name in ("score", "rank", "selected"))
    n_scored = int((ranks >= 0).sum())
    n_keep = min(budget(parameters["depth_fraction"], table.num_rows), n_scored)
    by_rule = (ranks >= 0) & (ranks < n_keep)
    if floor == 0 and not np.array_equal(by_rule, selected):
        raise _contradiction(f"The selection at step {saved.step}")
    cut_score = float(scores[ranks == n_keep - 1][0])
    among = f"among the {_few(n_keep, 'pair')} of {n_scored:,} {_BY_SCORE[strategy]}"
    places = []
    for row in rows:
        if ranks[row] < 0:
            places.append(_left_out(saved.metrics, "score"))
            continue
        reason = _decided(by_rule[row], selected[row])
        sentence = f"Kept: it is {among}." if by_rule[row] else f"Dropped: it is not {among}."
        places.append(
            Place(
                selected=bool(selected[row]),
                reason=reason,
                sentence=_sentence(sentence, reason, floor),
                score=float(scores[row]),
                rank=int(ranks[row]),
                cut_rank=n_keep - 1,
                cut_score=cut_score,
            )
        )
    return places


def place_in_selection(saved: SavedSelection, rows: Sequence[int]) -> SelectionOfPairs:
    """
    Place pairs in a selection of pairs.

    Args:
        saved ([`~run_folder.SavedSelection`]):
            The selection.
        rows (`Sequence[int]`):
            Rows of the pairs in the pool.

    Returns:
        [`SelectionOfPairs`]: Where they stand.

    Raises:
        `ValueError`: If what was selected does not follow from the distances or scores that are saved with it.
    """
    by_score = "depth_score" in saved.pairs.column_names
    places = _places_by_score(saved, rows) if by_score else _places_by_distance(saved, rows)
    ids = saved.pairs["pair_id"]
    return SelectionOfPairs(
        saved.step,
        saved.manifest["parameters"],
        saved.pairs.num_rows,
        pc.sum(saved.pairs["depth_selected"]).as_py(),
        [PairInSelection(ids[row].as_py(), row, place) for row, place in zip(rows, places, strict=True)],
    )
