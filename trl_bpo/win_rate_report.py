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


"""What an evaluation found, for people: the tables at its end and its picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .win_rate import WinRate


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Of Okabe and Ito's palette, whose colours stay apart under every kind of colour blindness, and in print.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Comparison:
    """
    A win rate with what it is of.

    Args:
        benchmark (`str`):
            Name of the benchmark, with the criterion where there are several.
        model (`str`):
            Name of the model.
        baseline (`str`):
            Name of what it is compared with.
        result ([`~win_rate.WinRate`]):
            The win rate.
    """

    benchmark: str
    model: str
    baseline: str
    result: WinRate


@dataclass(frozen=True)
class ScoreSummary:
    """
    Mean score of a model on a benchmark.

    Args:
        benchmark (`str`):
            Name of the benchmark, with the criterion where there are several.
        model (`str`):
            Name of the model.
        mean (`float`, *optional*):
            Mean score; `None` if no answer has one.
        interval (`tuple[float, float]`, *optional*):
            Bootstrap interval of the mean.
        num_scored (`int`):
            Number of answers with a score.
        num_unscored (`int`):
            Number of answers without one, missing answers included.
        groups (`dict[str, float | None]`):
            Mean score of each group of prompts.
    """

    benchmark: str
    model: str
    mean: float | None
    interval: tuple[float, float] | None
    num_scored: int
    num_unscored: int
    groups: dict[str, float | None] = field(default_factory=dict)


def _align(rows: Sequence[Sequence[str]], num_left: int) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None, digits: int = 2) -> str:
    return "none" if value is None else f"{value:,.{digits}f}"


def win_rate_table(comparisons: Sequence[Comparison]) -> str:
    """
    Plain text table of win rates, those of groups indented below the whole.

    Args:
        comparisons (`Sequence[Comparison]`):
            The win rates.

    Returns:
        `str`: The aligned table with a heading, without a newline at its end.
    """
    rows: list[tuple[str, ...]] = [
        (
            *("benchmark", "model", "against", "win rate", "interval", "wins", "ties", "losses", "unjudged"),
            *("characters", "against", "longer wins"),
        )
    ]
    for comparison in comparisons:
        parts = [(comparison.benchmark, comparison.result)]
        parts += [(f"  {name}", result) for name, result in comparison.result.groups.items()]
        for label, result in parts:
            interval = "none"
            if result.interval is not None:
                interval = f"{100 * result.interval[0]:.1f} to {100 * result.interval[1]:.1f}"
            rows.append(
                (
                    *(label, comparison.model, comparison.baseline, _percent(result.win_rate), interval),
                    *(f"{count:,}" for count in (result.wins, result.ties, result.losses, result.unjudged)),
                    _number(result.length_mean, 0),
                    _number(result.baseline_length_mean, 0),
                    _percent(result.longer_win_share),
                )
            )
    return _align(rows, num_left=3)


def score_table(summaries: Sequence[ScoreSummary]) -> str:
    """
    Plain text table of mean scores, those of groups indented below the whole.

    Args:
        summaries (`Sequence[ScoreSummary]`):
            The scores.

    Returns:
        `str`: The aligned table with a heading, without a newline at its end.
    """
    rows = [("benchmark", "model", "score", "interval", "scored", "without")]
    for summary in summaries:
        interval = "none"
        if summary.interval is not None:
            interval = f"{summary.interval[0]:.2f} to {summary.interval[1]:.2f}"
        counts = (f"{summary.num_scored:,}", f"{summary.num_unscored:,}")
        rows.append((summary.benchmark, summary.model, _number(summary.mean), interval, *counts))
        rows += [(f"  {name}", summary.model, _number(mean), "", "", "") for name, mean in summary.groups.items()]
    return _align(rows, num_left=2)


def answer_table(benchmarks: dict[str, dict]) -> str:
    """
    Plain text table of what the models answered, before anybody judged it.

    Args:
        benchmarks (`dict[str, dict]`):
            For each benchmark the number of its prompts in `num_prompts`, rows that were left out in `dropped`, by the
            reason, and for each model in `answers` the numbers `answered`, `missing`, `empty`, `truncated` (but for
            answers that are no model's) and `characters_mean`.

    Returns:
        `str`: The aligned table with a heading and a line for each benchmark with dropped rows, without a newline at its
        end.
    """
    rows = [("benchmark", "model", "prompts", "answered", "missing", "empty", "cut at the limit", "characters")]
    dropped = []
    for name, benchmark in benchmarks.items():
        for model, answers in benchmark["answers"].items():
            counts = [
                benchmark["num_prompts"],
                *(answers.get(key) for key in ("answered", "missing", "empty", "truncated")),
            ]
            cells = ("" if count is None else f"{count:,}" for count in counts)
            rows.append((name, model, *cells, _number(answers["characters_mean"], 0)))
        if benchmark["dropped"]:
            reasons = ", ".join(f"{count:,} x {reason}" for reason, count in benchmark["dropped"].items())
            dropped.append(f"Left out of {name}: {reasons}.")
    return "\n".join([_align(rows, num_left=2), *dropped])


def _figure(comparisons: Sequence[Comparison], summaries: Sequence[ScoreSummary]) -> "Figure":
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            "`plot_evaluation` requires the `matplotlib` package. Install it with `pip install 'trl_bpo[report]'`."
        ) from error

    judged = [comparison for comparison in comparisons if comparison.result.win_rate is not None]
    graded = [summary for summary in summaries if len(summary.groups) > 1]
    if not judged and not graded:
        raise ValueError("There is nothing to draw: no prompt has a verdict. See what the judge says of its failures.")
    heights = [1.1 + 0.42 * len(judged)] * bool(judged)
    heights += [1.4 + 0.34 * len(_group_labels(graded))] * bool(graded)
    # A Figure without pyplot touches no global state: neither the user's backend nor open figures.
    figure = Figure(figsize=(8.5, sum(heights) + 0.4), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    axes = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    names = list(dict.fromkeys([*(item.model for item in judged), *(item.model for item in summaries)]))
    style = {name: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}
    if judged:
        _draw_win_rates(axes.pop(0), judged, style)
    if graded:
        _draw_groups(axes.pop(0), graded, style)
    return figure


def _plain(text: str) -> str:
    # `$` would open a formula in matplotlib's text.
    return text.replace("$", r"\$")


def _finish(axes: "Axes", labels: list[str], title: str) -> None:
    axes.set_yticks(range(len(labels)), labels=[_plain(label) for label in labels], fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_win_rates(axes: "Axes", comparisons: list[Comparison], style: dict[str, tuple[str, str]]) -> None:
    axes.axvline(50, color="#888888", linewidth=1, zorder=1)
    for place, comparison in enumerate(comparisons):
        result, (colour, marker) = comparison.result, style[comparison.model]
        assert result.win_rate is not None and result.interval is not None
        axes.plot([100 * end for end in result.interval], [place, place], color=colour, linewidth=2, zorder=2)
        axes.plot(100 * result.win_rate, place, marker=marker, color=colour, markersize=7, zorder=3)
    axes.set_xlim(0, 100)
    axes.set_xlabel("Win rate in %, ties counting half, with its bootstrap interval", fontsize=9)
    labels = [f"{item.benchmark}: {item.model} against {item.baseline}" for item in comparisons]
    _finish(axes, labels, "Win rates")


def _draw_groups(axes: "Axes", summaries: list[ScoreSummary], style: dict[str, tuple[str, str]]) -> None:
    labels = _group_labels(summaries)
    for model in dict.fromkeys(summary.model for summary in summaries):
        colour, marker = style[model]
        points = [
            (mean, labels.index(f"{summary.benchmark}: {group}"))
            for summary in summaries
            if summary.model == model
            for group, mean in summary.groups.items()
            if mean is not None
        ]
        scores, places = zip(*points, strict=True) if points else ((), ())
        axes.plot(scores, places, marker, color=colour, markersize=7, alpha=0.85, label=_plain(model))
    axes.set_xlabel("Mean score", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _finish(axes, labels, "Mean scores by group")


def _group_labels(summaries: Sequence[ScoreSummary]) -> list[str]:
    return list(dict.fromkeys(f"{summary.benchmark}: {group}" for summary in summaries for group in summary.groups))


def plot_evaluation(comparisons: Sequence[Comparison], summaries: Sequence[ScoreSummary], path: str | Path) -> None:
    """
    Draw win rates with their intervals, and the mean scores of each group where a benchmark has several.

    Args:
        comparisons (`Sequence[Comparison]`):
            The win rates.
        summaries (`Sequence[ScoreSummary]`):
            The scores.
        path (`str` or `Path`):
            File to write; its suffix chooses the format.

    Raises:
        `ImportError`: If `matplotlib` is not installed.
        `ValueError`: If there is nothing to draw.
    """
    _figure(comparisons, summaries).savefig(path, dpi=150)
