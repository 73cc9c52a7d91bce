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
The pictures, as figures of matplotlib. They take plain numbers, so that the same ones go to the page, the card and the
trackers.

A `Figure` without pyplot touches no global state: neither the user's backend nor open figures.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from .numbers import gini


try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter
except ImportError as error:
    raise ImportError(
        "The pictures require the `matplotlib` package. Install it with `pip install 'trl_bpo[report]'`."
    ) from error


# Two colours of Okabe and Ito's palette that stay apart under every kind of colour blindness, and in print.
KEPT, DROPPED = "#0072B2", "#E69F00"
# The page shows these as the colours of its theme, and so must know them.
TEXT, MUTED, GRID = "#222222", "#555555", "#DDDDDD"
# Narrow enough to be read on a phone at its own width.
_SIZE = (4.3, 3.1)
# Beyond this many bars their counts would run into each other.
_MAX_LABELLED_BARS = 12
_MAX_POINTS = 2000
_BINS = 40


def _plain(text: str) -> str:
    # `$` would open a formula in matplotlib's text.
    return text.replace("$", r"\$")


def _axes(title: str, subtitle: str, xlabel: str, ylabel: str, size: tuple[float, float] = _SIZE) -> Axes:
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    axes = figure.add_subplot()
    axes.set_title(_plain(title), loc="left", fontsize=12, fontweight="bold", color=TEXT, pad=24)
    axes.annotate(
        _plain(subtitle),
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 10),
        textcoords="offset points",
        fontsize=9,
        color=MUTED,
    )
    axes.set_xlabel(_plain(xlabel), color=TEXT)
    axes.set_ylabel(_plain(ylabel), color=TEXT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(axis="both", colors=MUTED, labelsize=9)
    axes.tick_params(axis="y", length=0)
    return axes


def _counts_on(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _legend(axes: Axes, loc: Literal["best", "upper right"] = "upper right") -> None:
    axes.legend(loc=loc, frameon=False, fontsize=9, labelcolor=MUTED, handlelength=1.5)


def _figure(axes: Axes) -> Figure:
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def pairs_per_prompt_figure(histogram: dict[int, int], title: str | None = None) -> Figure:
    """
    How many prompts kept how many pairs, with the prompts that kept none as a bar of its own (Figure 4 of the paper).

    Args:
        histogram (`dict[int, int]`):
            Number of kept pairs -> number of prompts, as [`~report.pairs_per_prompt`] returns it.
        title (`str`, *optional*):
            Title of the picture. Mean and Gini coefficient stand in the line below it.

    Returns:
        [`~matplotlib.figure.Figure`]: The picture.

    Raises:
        `ValueError`: If the histogram counts no prompt.
    """
    prompts = sum(histogram.values())
    if not prompts:
        raise ValueError("`histogram` counts no prompt. Pass the result of `pairs_per_prompt` for a pool with rows.")
    mean = sum(kept * count for kept, count in histogram.items()) / prompts
    # At least four places, so that one or two bars do not fill the whole width.
    kept = range(max(3, *histogram) + 1)
    counts = [histogram.get(k, 0) for k in kept]
    axes = _axes(
        title or "Pairs per prompt",
        f"{prompts:,} prompts, {histogram.get(0, 0):,} without a pair; mean {mean:.2f}, Gini {gini(histogram):.2f}",
        "Pairs kept of a prompt",
        "Prompts",
    )
    bars = axes.bar(kept, counts, width=0.8, color=[DROPPED if k == 0 else KEPT for k in kept])
    if len(counts) <= _MAX_LABELLED_BARS:
        axes.bar_label(bars, labels=[f"{count:,}" for count in counts], padding=3, fontsize=9, color=TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=_MAX_LABELLED_BARS))
    _counts_on(axes)
    axes.margins(y=0.1)
    return _figure(axes)


def clusters_figure(sizes: np.ndarray, kept: np.ndarray, title: str | None = None) -> Figure:
    """
    Sizes of the clusters, the largest first, and what was kept of each.

    Args:
        sizes (`np.ndarray` of shape `(k,)`):
            Rows of each cluster.
        kept (`np.ndarray` of shape `(k,)`):
            Rows that were kept of each.
        title (`str`, *optional*):
            Title of the picture.

    Returns:
        [`~matplotlib.figure.Figure`]: The picture.
    """
    order = np.lexsort((-kept, -sizes))
    sizes, kept = sizes[order], kept[order]
    share = sizes[0] / max(1, sizes.sum())
    axes = _axes(
        title or "Clusters",
        f"{len(sizes):,} clusters; the largest has {share:.0%} of all rows",
        "Cluster, the largest first",
        "Rows",
    )
    places = np.arange(1, len(sizes) + 1)
    width = 0.8 if len(sizes) <= 60 else 1.0
    axes.bar(places, kept, width=width, color=KEPT, label="kept")
    axes.bar(places, sizes - kept, bottom=kept, width=width, color=DROPPED, label="dropped")
    # Room for the legend where all clusters are equally large.
    axes.margins(y=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    _counts_on(axes)
    _legend(axes)
    return _figure(axes)


def distances_figure(
    values: np.ndarray,
    selected: np.ndarray,
    title: str | None = None,
    label: str = "Distance to the centre",
    with_cut: bool = True,
) -> Figure:
    """
    How a measure is spread over the rows that were kept and dropped, with the cut between them.

    Args:
        values (`np.ndarray` of shape `(n,)`):
            The measure. Rows where it is not finite are left out.
        selected (`np.ndarray` of shape `(n,)`, bool):
            Whether each row was kept.
        title (`str`, *optional*):
            Title of the picture.
        label (`str`, *optional*, defaults to `"Distance to the centre"`):
            Name of the measure.
        with_cut (`bool`, *optional*, defaults to `True`):
            Whether the rows were selected by this measure, so that there is a cut.

    Returns:
        [`~matplotlib.figure.Figure`]: The picture.
    """
    finite = np.isfinite(values)
    values, selected = values[finite], selected[finite]
    kept, dropped = values[selected], values[~selected]
    cut = None
    if with_cut and len(kept) and len(dropped):
        if kept.max() <= dropped.min():
            cut = (kept.max() + dropped.min()) / 2
        elif kept.min() >= dropped.max():
            cut = (kept.min() + dropped.max()) / 2
    # Where every cluster has a cut of its own, they overlap.
    note = f"; one cut, at {cut:.3g}" if cut is not None else "; no single cut: each cluster has its own"
    note = note if with_cut else ""
    axes = _axes(title or label, f"{len(kept):,} kept, {len(dropped):,} dropped{note}", label, "Rows")
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    axes.hist([kept, dropped], bins=list(edges), stacked=True, color=[KEPT, DROPPED], label=["kept", "dropped"])
    if cut is not None:
        axes.axvline(cut, color=TEXT, linestyle="--", linewidth=1.2, label="cut")
    _counts_on(axes)
    axes.margins(y=0.3)
    _legend(axes)
    return _figure(axes)


def prompt_map_figure(
    x: np.ndarray, y: np.ndarray, selected: np.ndarray, clusters: np.ndarray, title: str | None = None
) -> Figure:
    """
    The prompts on a plane, kept and dropped, with the centres of their clusters. Of more than 2,000 prompts a random sample
    is drawn.

    Args:
        x, y (`np.ndarray` of shape `(n,)`):
            Place of each prompt.
        selected (`np.ndarray` of shape `(n,)`, bool):
            Whether each prompt was kept.
        clusters (`np.ndarray` of shape `(n,)`, int):
            Cluster of each prompt. In the plane a centre is the mean of its members.
        title (`str`, *optional*):
            Title of the picture.

    Returns:
        [`~matplotlib.figure.Figure`]: The picture.
    """
    used, members, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    centres = [np.bincount(members, weights=values) / sizes for values in (x, y)]
    shown = np.sort(np.random.default_rng(0).permutation(len(x))[:_MAX_POINTS])
    note = f"{_MAX_POINTS:,} of {len(x):,} prompts shown" if len(x) > _MAX_POINTS else f"{len(x):,} prompts"
    axes = _axes(
        title or "Prompts",
        f"{note}, {int(selected.sum()):,} kept, {len(used):,} centres",
        "First principal component",
        "Second",
    )
    x, y, selected = x[shown], y[shown], selected[shown]
    axes.scatter(x[~selected], y[~selected], s=9, color=DROPPED, alpha=0.45, linewidths=0, label="dropped")
    axes.scatter(x[selected], y[selected], s=11, color=KEPT, alpha=0.8, linewidths=0, label="kept")
    axes.scatter(centres[0], centres[1], s=28, marker="x", color=TEXT, linewidths=1.2, label="centre")
    axes.set_xticks([])
    axes.set_yticks([])
    _legend(axes, "best")
    return _figure(axes)


def bars_figure(
    edges: Sequence[float], counts: Sequence[int], title: str, subtitle: str, label: str, what: str
) -> Figure:
    """
    A histogram that was counted beforehand.

    Args:
        edges (`Sequence[float]` of length `k + 1`):
            Edges of the bins.
        counts (`Sequence[int]` of length `k`):
            Rows in each.
        title (`str`):
            Title of the picture.
        subtitle (`str`):
            The line below it.
        label (`str`):
            What was measured.
        what (`str`):
            What was counted.

    Returns:
        [`~matplotlib.figure.Figure`]: The picture.
    """
    axes = _axes(title, subtitle, label, what)
    axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.92, align="edge", color=KEPT)
    _counts_on(axes)
    axes.margins(y=0.1)
    return _figure(axes)


def lengths_figure(differences: np.ndarray, selected: np.ndarray, subtitle: str) -> Figure:
    """
    How much longer the chosen responses are than the rejected ones.

    Args:
        differences (`np.ndarray` of shape `(n,)`):
            Tokens of the chosen response minus those of the rejected one.
        selected (`np.ndarray` of shape `(n,)`, bool):
            Whether each pair was kept.
        subtitle (`str`):
            The line below the title.

    Returns:
        [`~matplotlib.figure.Figure`]: The picture.
    """
    axes = _axes("Length bias", subtitle, "Tokens, chosen minus rejected", "Pairs")
    # A few very long responses would leave one bar for all others.
    limit = max(1.0, float(np.quantile(np.abs(differences), 0.99)))
    shown = np.clip(differences, -limit, limit)
    edges = list(np.linspace(-limit, limit, _BINS + 2))
    axes.hist(
        [shown[selected], shown[~selected]], bins=edges, stacked=True, color=[KEPT, DROPPED], label=["kept", "dropped"]
    )
    axes.axvline(0, color=TEXT, linestyle="--", linewidth=1.2)
    _counts_on(axes)
    axes.margins(y=0.3)
    _legend(axes)
    return _figure(axes)


def drift_figure(steps: Sequence[int], with_previous: Sequence[float | None], with_first: Sequence[float]) -> Figure:
    """
    How much of a selection is in the next.

    Args:
        steps (`Sequence[int]`):
            Optimizer step of each selection.
        with_previous (`Sequence[float | None]`):
            Pairs that a selection shares with the one before, over the pairs of either (Jaccard). The first has `None`.
        with_first (`Sequence[float]`):
            The same with the first selection.

    Returns:
        [`~matplotlib.figure.Figure`]: The picture.
    """
    axes = _axes(
        "Drift of the selection", "pairs that two selections share, over those of either", "Optimizer step", "Overlap"
    )
    axes.plot(steps[1:], np.asarray(with_previous[1:], dtype=np.float64), "o-", color=KEPT, label="with the previous")
    axes.plot(steps[1:], with_first[1:], "s--", color=DROPPED, label="with the first")
    axes.set_ylim(0, 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    _legend(axes, "best")
    return _figure(axes)


def costs_figure(stages: Sequence[str], seconds: Sequence[float], notes: Sequence[str]) -> Figure:
    """
    Where the time of a run went.

    Args:
        stages (`Sequence[str]`):
            Name of each stage.
        seconds (`Sequence[float]`):
            Time of each.
        notes (`Sequence[str]`):
            What stands at the end of each bar, such as tokens and money.

    Returns:
        [`~matplotlib.figure.Figure`]: The picture.
    """
    minutes = np.asarray(seconds) / 60
    axes = _axes(
        "Where the time went",
        f"{minutes.sum():.3g} minutes in all, in the last run",
        "Minutes",
        "",
        (_SIZE[0], 1.3 + 0.32 * len(stages)),
    )
    bars = axes.barh(np.arange(len(stages)), minutes, color=KEPT, height=0.7)
    axes.set_yticks(np.arange(len(stages)), [_plain(stage) for stage in stages])
    axes.invert_yaxis()
    axes.bar_label(bars, labels=[_plain(note) for note in notes], padding=3, fontsize=8.5, color=MUTED)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.margins(x=0.35)
    return _figure(axes)


def elbow_figure(
    curve: Sequence[tuple[int, float]],
    suggested: int,
    gaussian: Sequence[tuple[int, float]] | None = None,
    title: str | None = None,
) -> Figure:
    """
    Variance that K-means explains by the number of clusters.

    Args:
        curve (`Sequence[tuple[int, float]]`):
            Number of clusters and the share of the variance that they explain.
        suggested (`int`):
            Number of clusters that is suggested.
        gaussian (`Sequence[tuple[int, float]]`, *optional*):
            The same of Gaussian data with the same covariance, which has no clusters.
        title (`str`, *optional*):
            Title of the picture.

    Returns:
        [`~matplotlib.figure.Figure`]: The picture.
    """
    axes = _axes(
        title or "Number of clusters", f"the curve bends most at {suggested:,}", "Clusters", "Variance explained"
    )
    axes.plot(*zip(*curve, strict=True), "o-", color=KEPT, label="the data")
    if gaussian:
        axes.plot(*zip(*gaussian, strict=True), "s--", color=DROPPED, label="Gaussian, same covariance")
    axes.axvline(suggested, color=TEXT, linestyle="--", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    _legend(axes, "best")
    return _figure(axes)
