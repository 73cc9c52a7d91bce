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

"""The panels of the report of a run: each has one picture, what it shows in words, and its numbers."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..run_folder import RunFolder
from ..suggest import elbow, suggested
from ..visible import excerpt
from . import figures
from .numbers import histogram_of


_ROWS_AT_A_TIME = 10_000
_MAX_BINS = 20
_EXCERPT = 90


@dataclass
class Panel:
    """
    A part of the report.

    Args:
        name (`str`):
            Name of its files.
        heading (`str`):
            What it is about.
        text (`str`):
            What to read from it, or why there is nothing to see.
        figure ([`~matplotlib.figure.Figure`], *optional*):
            The picture.
        alt (`str`, *optional*, defaults to `""`):
            The picture in words.
        columns (`tuple[str, ...]`, *optional*, defaults to `()`):
            Headings of the table of numbers.
        rows (`list[tuple]`, *optional*, defaults to `[]`):
            Rows of that table.
        points (`pyarrow.Table`, *optional*):
            Numbers that are too many for a table, saved as Parquet.
    """

    name: str
    heading: str
    text: str
    figure: Any = None
    alt: str = ""
    columns: tuple[str, ...] = ()
    rows: list[tuple] = field(default_factory=list)
    points: pa.Table | None = None


def _numpy(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy(zero_copy_only=False)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"


def _clusters(name: str, heading: str, labels: np.ndarray, selected: np.ndarray, what: str) -> Panel:
    used = labels >= 0
    sizes = np.bincount(labels[used])
    kept = np.bincount(labels[used & selected], minlength=len(sizes))
    order = np.lexsort((-kept, -sizes))
    return Panel(
        name,
        heading,
        f"One cluster that swallows most {what}, or many of one {what[:-1]}, is a sign of a number of clusters that does "
        "not fit.",
        figures.clusters_figure(sizes, kept, heading),
        f"Bar chart of {len(sizes):,} clusters of {what} by size, {sizes.min():,} to {sizes.max():,}, of which "
        f"{kept.min():,} to {kept.max():,} were kept.",
        ("Cluster", "Size", "Kept"),
        [(int(cluster), int(sizes[cluster]), int(kept[cluster])) for cluster in order],
    )


def _histogram(values: np.ndarray, selected: np.ndarray) -> list[tuple]:
    finite = np.isfinite(values)
    values, selected = values[finite], selected[finite]
    edges = np.histogram_bin_edges(values, bins=_MAX_BINS) if len(values) else np.array([0.0, 1.0])
    kept = np.histogram(values[selected], bins=edges)[0]
    dropped = np.histogram(values[~selected], bins=edges)[0]
    return [
        (f"{low:.4g} to {high:.4g}", int(k), int(d))
        for low, high, k, d in zip(edges[:-1], edges[1:], kept, dropped, strict=True)
    ]


def _measure(
    name: str, heading: str, text: str, values: np.ndarray, selected: np.ndarray, label: str, cut: bool
) -> Panel:
    kept = values[selected & np.isfinite(values)]
    span = f"; of those kept it lies between {kept.min():.3g} and {kept.max():.3g}" if len(kept) else ""
    return Panel(
        name,
        heading,
        text,
        figures.distances_figure(values, selected, heading, label, with_cut=cut),
        f"Histogram of the {label.lower()}, kept and dropped{span}.",
        (label, "Kept", "Dropped"),
        _histogram(values, selected),
    )


def _elbow(name: str, heading: str, sample: np.ndarray | None, used: int, why_not: str) -> Panel:
    if sample is None or len(sample) < 4:
        return Panel(name, heading, why_not)
    curve = elbow(sample)
    best = suggested(curve)
    return Panel(
        name,
        heading,
        f"{used:,} clusters were used. The curve says where more clusters begin to explain little more; whether there are "
        "clusters at all it does not say: trl-bpo suggest compares it with Gaussian data.",
        figures.elbow_figure(curve, best, title=heading),
        f"Curve of the variance explained by {curve[0][0]:,} to {curve[-1][0]:,} clusters of a sample of "
        f"{len(sample):,}, from {curve[0][1]:.3f} to {curve[-1][1]:.3f}; it bends most at {best:,}.",
        ("Clusters", "Variance explained"),
        [(k, round(share, 4)) for k, share in curve],
    )


def breadth_panels(run: RunFolder) -> list[Panel]:
    """
    Panels of the breadth selection.

    Args:
        run ([`~run_folder.RunFolder`]):
            The run.

    Returns:
        `list[Panel]`: The panels.
    """
    if run.breadth is None:
        return [Panel("breadth", "Breadth", "No breadth selection was saved: all prompts went on.")]
    prompts = run.breadth.prompts
    x, y, labels, distances, selected = (
        _numpy(prompts, name) for name in ("x", "y", "breadth_cluster", "breadth_distance", "breadth_selected")
    )
    n_clusters = len(np.unique(labels))
    return [
        Panel(
            "prompt_map",
            "Map of the prompts",
            "Prompts that lie close together ask for similar things. The map shows two of many dimensions, so what looks "
            "far from its centre here need not be.",
            figures.prompt_map_figure(x, y, selected, labels, "Map of the prompts"),
            f"Map of {len(x):,} prompts with the centres of {n_clusters:,} clusters; {int(selected.sum()):,} were kept.",
            points=prompts.select(["prompt_id", "x", "y", "breadth_cluster", "breadth_selected"]),
        ),
        _clusters("breadth_clusters", "Clusters of prompts", labels, selected, "prompts"),
        _examples(prompts, labels, distances, selected),
        _measure(
            "breadth_distances",
            "Distances of the prompts",
            "The nearest to each centre are kept: what is typical of its cluster.",
            distances,
            selected,
            "Distance to the centre",
            True,
        ),
        _elbow("breadth_elbow", "Number of clusters of prompts", run.breadth.sample, n_clusters, "Too few prompts."),
    ]


def _examples(prompts: pa.Table, labels: np.ndarray, distances: np.ndarray, selected: np.ndarray) -> Panel:
    rows = []
    sizes = np.bincount(labels)
    for cluster in np.argsort(-sizes, kind="stable")[:12]:
        members = np.flatnonzero(labels == cluster)
        members = members[np.argsort(distances[members], kind="stable")]
        kept, dropped = members[selected[members]], members[~selected[members]]
        texts = [
            excerpt(prompts["prompt"][int(some[at])].as_py(), _EXCERPT) if len(some) else ""
            for some, at in ((kept, 0), (dropped, -1))
        ]
        rows.append((int(cluster), len(members), *texts))
    return Panel(
        "breadth_examples",
        "What the clusters are about",
        "Of the largest clusters the prompt nearest to the centre, and the farthest of those that were dropped.",
        columns=("Cluster", "Size", "Nearest, kept", "Farthest, dropped"),
        rows=rows,
    )


def _scores_of(run: RunFolder) -> tuple[np.ndarray, int, int, int, int]:
    # Scores, responses without one that are not empty, empty responses, pairs of responses with equal scores, all pairs.
    parts, unreadable, empty, ties, pairs = [], 0, 0, 0, 0
    file = pq.ParquetFile(run.scores_file)
    for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=["responses", "scores"]):
        scores = pc.list_flatten(batch["scores"])
        texts = pc.fill_null(pc.list_flatten(batch["responses"]), "")
        blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
        empty += pc.sum(blank).as_py() or 0
        unreadable += pc.sum(pc.and_(pc.is_null(scores), pc.invert(blank))).as_py() or 0
        parts.append(scores.drop_null().to_numpy(zero_copy_only=False).astype(np.float64))
        for row in batch["scores"].to_pylist():
            counts = np.unique([score for score in row if score is not None], return_counts=True)[1]
            ties += int((counts * (counts - 1)).sum()) // 2
            pairs += int(counts.sum() * (counts.sum() - 1)) // 2
    return np.concatenate(parts) if parts else np.empty(0), unreadable, empty, ties, pairs


def candidate_panels(run: RunFolder) -> list[Panel]:
    """
    Panels of the responses, their scores and the pairs that were built of them.

    Args:
        run ([`~run_folder.RunFolder`]):
            The run.

    Returns:
        `list[Panel]`: The panels.
    """
    panels = []
    if run.scores_file is None:
        panels.append(Panel("scores", "Scores", "The pairs were there before, so that no responses were scored."))
    else:
        scores, unreadable, empty, ties, pairs = _scores_of(run)
        whole = bool(len(scores)) and bool((scores == np.round(scores)).all()) and np.ptp(scores) <= _MAX_BINS
        edges = np.arange(scores.min() - 0.5, scores.max() + 1) if whole else np.histogram_bin_edges(scores, _MAX_BINS)
        counts = np.histogram(scores, edges)[0]
        note = f"{len(scores):,} scores, {unreadable:,} unreadable verdicts"
        panels.append(
            Panel(
                "scores",
                "Scores of the judge",
                f"{ties:,} of {pairs:,} pairs of responses to the same prompt ({_share(ties, pairs)}) are tied and teach "
                f"nothing. {unreadable:,} responses got no score that could be read, {empty:,} were empty.",
                figures.bars_figure(list(edges), counts.tolist(), "Scores of the judge", note, "Score", "Responses"),
                f"Histogram of {len(scores):,} scores"
                + (
                    f" from {scores.min():.3g} to {scores.max():.3g}, mean {scores.mean():.3g}."
                    if len(scores)
                    else "."
                ),
                ("Score", "Responses"),
                [
                    (f"{(low + high) / 2:g}" if whole else f"{low:.4g} to {high:.4g}", int(count))
                    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
                ],
            )
        )
    if run.pool is None:
        return panels
    selected = _numpy(run.selections[-1].pairs, "depth_selected")
    if {"score_chosen", "score_rejected"} <= set(run.pool.column_names):
        margins = (_numpy(run.pool, "score_chosen") - _numpy(run.pool, "score_rejected")).astype(np.float64)
        text = "How sure the judge was. Small margins are noise as often as not."
        panels.append(_measure("margins", "Margins", text, margins, selected, "Margin of the scores", False))
    else:
        panels.append(Panel("margins", "Margins", "The pairs have no scores, so that they have no margins."))
    differences = (_numpy(run.pool, "chosen_tokens") - _numpy(run.pool, "rejected_tokens")).astype(np.float64)
    longer = differences > 0
    before, after = longer.mean(), longer[selected].mean() if selected.any() else 0.0
    panels.append(
        Panel(
            "lengths",
            "Length bias",
            "Where the longer response wins much more often than half of the time, the policy learns to write at length.",
            figures.lengths_figure(
                differences, selected, f"the longer one is chosen in {before:.0%} of the pool, {after:.0%} of the kept"
            ),
            f"Histogram of the tokens of the chosen response minus those of the rejected one: the chosen one is longer in "
            f"{before:.0%} of the pool and in {after:.0%} of the kept pairs.",
            ("Tokens, chosen minus rejected", "Kept", "Dropped"),
            _histogram(differences, selected),
        )
    )
    return panels


def depth_panels(run: RunFolder) -> list[Panel]:
    """
    Panels of the selections of pairs.

    Args:
        run ([`~run_folder.RunFolder`]):
            The run.

    Returns:
        `list[Panel]`: The panels.
    """
    if not run.selections:
        return [Panel("depth", "Depth", "No pairs were selected yet.")]
    last = run.selections[-1]
    selected = _numpy(last.pairs, "depth_selected")
    histogram = histogram_of(last.pairs["prompt_id"], selected)
    bars = "; ".join(f"{kept}: {prompts:,}" for kept, prompts in histogram.items())
    panels = [
        Panel(
            "pairs_per_prompt",
            "Pairs per prompt",
            "How deep the selection goes. With one pair a prompt in the pool, depth selects among prompts.",
            figures.pairs_per_prompt_figure(histogram),
            f"Bar chart of the prompts by the number of pairs that they kept ({bars}).",
            ("Pairs kept", "Prompts"),
            list(histogram.items()),
        )
    ]
    if "depth_cluster" in last.pairs.column_names:
        labels = _numpy(last.pairs, "depth_cluster")
        panels.append(_clusters("depth_clusters", "Clusters of pairs", labels, selected, "pairs"))
        explained = last.metrics.get("variance_explained"), last.metrics.get("variance_explained_gaussian")
        text = "The nearest to each centre are kept, under the rule of the paper."
        if None not in explained:
            text += (
                f" The clusters explain {explained[0]:.3f} of the variance, those of Gaussian data with the same covariance "
                f"{explained[1]:.3f}: only what exceeds that is more than noise."
            )
        distances = _numpy(last.pairs, "depth_distance")
        panels.append(
            _measure(
                "depth_distances", "Distances of the pairs", text, distances, selected, "Distance to the centre", True
            )
        )
        n_clusters = int(labels.max()) + 1
        panels.append(
            _elbow("depth_elbow", "Number of clusters of pairs", run.feature_sample, n_clusters, "Too few pairs.")
        )
    else:
        scores = _numpy(last.pairs, "depth_score")
        text = "The highest scores were kept; there are no clusters."
        panels.append(_measure("depth_scores", "Scores of the pairs", text, scores, selected, "Score", True))
    panels.append(_drift(run))
    return panels


def _drift(run: RunFolder) -> Panel:
    if len(run.selections) < 2:
        return Panel("drift", "Drift of the selection", "There was one selection, so that none could drift.")
    steps = [one.step for one in run.selections]
    first, previous = None, None
    with_previous: list[float | None] = []
    with_first: list[float] = []
    for one in run.selections:
        # One column at a time, and not the one that the selection would keep in memory.
        selected = pq.read_table(f"{one.path}.parquet", columns=["depth_selected"])["depth_selected"].to_numpy()
        first = selected if first is None else first
        with_previous.append(
            None if previous is None else float((selected & previous).sum() / (selected | previous).sum())
        )
        with_first.append(float((selected & first).sum() / (selected | first).sum()))
        previous = selected
    return Panel(
        "drift",
        "Drift of the selection",
        "What a new selection under the trained policy changes. Near 1 the next one is not worth its cost; what chance alone "
        f"would give is {_chance(previous):.2f}.",
        figures.drift_figure(steps, with_previous, with_first),
        f"Lines of the overlap of {len(steps):,} selections with the previous one and the first.",
        ("Step", "With the previous", "With the first"),
        [
            (step, "" if before is None else round(before, 3), round(begin, 3))
            for step, before, begin in zip(steps, with_previous, with_first, strict=True)
        ],
    )


def _chance(selected: np.ndarray | None) -> float:
    share = 0.0 if selected is None else float(selected.mean())
    return share / (2 - share)


def cost_panels(run: RunFolder) -> list[Panel]:
    """
    Panels of what the run cost.

    Args:
        run ([`~run_folder.RunFolder`]):
            The run.

    Returns:
        `list[Panel]`: The panels.
    """
    if not run.funnel:
        text = "No costs were recorded: recipes/bpo.py writes them down, a training by itself does not."
        return [Panel("costs", "Costs", text)]

    def note(stage: dict[str, Any]) -> str:
        parts = [f"{stage['tokens']:,} tokens"] if stage["tokens"] else []
        parts += [f"US$ {stage['cost']:.2f}"] if stage["cost"] is not None else []
        return ", ".join(parts)

    names = [excerpt(stage["stage"], 24) for stage in run.funnel]
    seconds = [stage["seconds"] for stage in run.funnel]
    money = sum(stage["cost"] or 0.0 for stage in run.funnel)
    return [
        Panel(
            "costs",
            "Costs",
            "Minutes are those of the last run: what an earlier one had done was taken up in no time. Tokens and money of an "
            "API are those of all runs together.",
            figures.costs_figure(names, seconds, [note(stage) for stage in run.funnel]),
            f"Bar chart of the minutes of {len(names)} stages, {sum(seconds) / 60:.3g} in all; US$ {money:.2f} in all.",
            ("Stage", "Minutes", "Tokens", "US$"),
            [
                (
                    name,
                    round(stage["seconds"] / 60, 2),
                    stage["tokens"] or "",
                    "" if stage["cost"] is None else stage["cost"],
                )
                for name, stage in zip(names, run.funnel, strict=True)
            ],
        )
    ]


def all_panels(run: RunFolder) -> dict[str, list[Panel]]:
    """
    All panels of a run.

    Args:
        run ([`~run_folder.RunFolder`]):
            The run.

    Returns:
        `dict[str, list[Panel]]`: Heading of a section -> its panels.
    """
    sections: dict[str, Callable[[RunFolder], list[Panel]]] = {
        "Depth: which pairs were kept": depth_panels,
        "Breadth: which prompts were kept": breadth_panels,
        "Responses, scores and lengths": candidate_panels,
        "Costs": cost_panels,
    }
    return {heading: panels(run) for heading, panels in sections.items()}


def numbers_of(panels: Iterable[Panel]) -> dict[str, Any]:
    """
    The numbers of panels, as JSON has them.

    Args:
        panels (`Iterable[Panel]`):
            The panels.

    Returns:
        `dict[str, Any]`: Name of a panel -> its heading, its text, its picture in words, and its table.
    """
    return {
        panel.name: {
            "heading": panel.heading,
            "text": panel.text,
            "picture": panel.alt,
            "columns": list(panel.columns),
            "rows": json.loads(json.dumps(panel.rows)),
        }
        for panel in panels
    }
