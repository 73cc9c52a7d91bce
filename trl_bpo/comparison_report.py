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

"""A comparison of arms for people: Markdown tables, curves over budgets, and differences with their intervals."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .comparison import ArmSummary
from .runs import Run


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's palette without yellow, which is too faint for lines, and without black, which the references have.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_OTHER, _REFERENCE, _TEXT = "#9A9A9A", "#222222", "#555555"
_STYLES = ("-", "--", ":")
_MARKERS = "osD^vPX*<>pd"
_INSTALL = "requires the `matplotlib` package. Install it with `pip install 'trl_bpo[report]'`."


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Labels stand on the left, numbers on the right; a bar in a label would open a new cell.
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _p_value(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def contrast_table(summaries: Sequence[ArmSummary], baseline_label: str, level: float = 0.95) -> str:
    """
    Markdown tables of a comparison: scores and differences, then what the answers look like, then what it cost.

    Args:
        summaries (`Sequence[ArmSummary]`):
            Result of [`summarize`].
        baseline_label (`str`):
            Label of the baseline, as for [`summarize`].
        level (`float`, *optional*, defaults to `0.95`):
            Coverage of the intervals, as for [`summarize`].

    Returns:
        `str`: Three tables with a line of explanation above each, without a newline at the end.
    """
    scores, answers, costs = [], [], []
    groups = list(dict.fromkeys(name for summary in summaries for name in summary.groups))
    for summary in summaries:
        name, means, contrast = [summary.label, f"{summary.budget:,}"], summary.means, summary.contrast
        deviation = "" if summary.deviation is None else f" ± {summary.deviation:.3f}"
        score = [*name, f"{summary.num_seeds}", f"{summary.score:.3f}{deviation}"]
        if contrast:
            score += [
                f"{contrast.mean:+.3f}",
                f"{contrast.low:+.3f} to {contrast.high:+.3f}",
                f"{contrast.num_seeds}",
                _p_value(contrast.p_value),
                _p_value(summary.holm_p_value),
            ]
        scores.append(score + ["–"] * (9 - len(score)))
        forms = {"length_mean": ".1f", "distinct_1": ".3f", "distinct_2": ".3f", "empty_rate": ".1%"}
        forms |= {"truncated_rate": ".1%", "perplexity_median": ".2f"}
        answers.append(
            [
                *name,
                *(_number(means[field], form) for field, form in forms.items()),
                *(_number(summary.groups.get(group), ".3f") for group in groups),
            ]
        )
        forms = {"unique_pairs": ",.0f", "tokens": ",.0f", "steps": ",.0f", "judge_calls": ",.0f", "flops": ".2e"}
        costs.append([*name, *(_number(means[field], form) for field, form in forms.items())])

    missing = sum(summary.num_missing for summary in summaries)
    lines = [
        "Score: mean ± standard deviation over seeds. Difference: to `"
        + baseline_label
        + "`, on shared seeds, with its "
        f"{level:.0%} interval over seeds and prompts. Holm p: corrected over all exploratory differences; the "
        "pre-registered one stands without."
        + (f" {missing:,} held-out answer(s) have no score and are left out." if missing else ""),
        _markdown(["Arm", "Pairs", "Seeds", "Score", "Difference", "Interval", "Shared seeds", "p", "Holm p"], scores),
        "Answers: means over seeds." + (" The last columns are scores by group of prompts." if groups else ""),
        _markdown(
            ["Arm", "Pairs", "Length", "Distinct-1", "Distinct-2", "Empty", "Truncated", "Perplexity", *groups],
            answers,
        ),
        "Cost: means over seeds. FLOPs are all of a run's, with generation and selection.",
        _markdown(["Arm", "Pairs", "Unique pairs", "Tokens", "Steps", "Judge calls", "FLOPs"], costs),
    ]
    return "\n\n".join(lines)


def _text(label: str) -> str:
    # `$` would open a formula in matplotlib's text.
    return label.replace("$", r"\$")


def _figure(size: tuple[float, float], function: str) -> "Figure":
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(f"`{function}` {_INSTALL}") from error
    # A Figure without pyplot touches no global state: neither the user's backend nor open figures.
    return Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))


def _strip(axes: "Axes") -> None:
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _points(runs: Sequence[Run], field: str) -> np.ndarray:
    # Mean of the field, mean score and its deviation over seeds, a row for each budget.
    by_budget = defaultdict(list)
    for run in runs:
        by_budget[run["budget"]].append((run[field], run["score"]))
    rows = []
    for _, values in sorted(by_budget.items()):
        x, score = np.array(values, dtype=float).T
        rows.append((x.mean(), score.mean(), score.std(ddof=1) if len(score) > 1 else 0.0))
    return np.array(rows)


def _draw_panel(
    axes: "Axes", curves: dict[str, list[Run]], field: str, coloured: Sequence[str], references: dict[str, float]
) -> None:
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure(root=True)
    assert figure is not None
    for name, score in references.items():
        axes.axhline(score, color=_REFERENCE, linewidth=1.2, linestyle="--", zorder=1)
        axes.annotate(
            _text(name),
            xy=(1, score),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_REFERENCE,
        )
    for index, (label, runs) in enumerate(curves.items()):
        x, score, deviation = _points(runs, field).T
        marker = _MARKERS[index % len(_MARKERS)]
        if label not in coloured:
            style = _STYLES[index // len(_MARKERS) % len(_STYLES)]
            axes.plot(
                x,
                score,
                color=_OTHER,
                linestyle=style,
                linewidth=0.9,
                marker=marker,
                markersize=4,
                zorder=2,
                label=_text(label),
            )
            continue
        # Arms have budgets and judge calls in common, so their curves are moved apart by a few points.
        place = coloured.index(label)
        step = min(3.5, 20 / len(coloured)) if field != "flops" else 0
        shift = (place - (len(coloured) - 1) / 2) * step / 72
        axes.errorbar(
            x,
            score,
            yerr=deviation if len(coloured) <= len(_COLOURS) else None,
            color=_COLOURS[place % len(_COLOURS)],
            linestyle=_STYLES[place // len(_COLOURS) % len(_STYLES)],
            linewidth=1.7,
            elinewidth=1.2,
            capsize=2.5,
            marker=marker,
            markersize=5.5,
            zorder=4,
            transform=axes.transData + ScaledTranslation(shift, 0, figure.dpi_scale_trans),
            label=_text(label),
        )
        # What has a transform of its own does not count for the limits of the axes.
        axes.update_datalim(np.column_stack([[*x, *x], [*(score - deviation), *(score + deviation)]]))


def plot_curves(
    runs: Sequence[Run],
    path: str | Path,
    highlighted: Sequence[str] | None = None,
    reference_arms: Sequence[str] = ("full", "sft"),
    title: str | None = None,
) -> None:
    """
    Draw the score of each arm against what it cost: active pairs, judge calls and FLOPs.

    A point is the mean over seeds at one budget, its bar the standard deviation over seeds, up and down. Points of arms
    with the same number of pairs or judge calls are drawn beside each other.

    Args:
        runs (`Sequence[dict]`):
            Runs of one task and model, as for [`~comparison.summarize`].
        path (`str` or `Path`):
            File to write; its suffix chooses the format.
        highlighted (`Sequence[str]`, *optional*):
            Labels of up to six arms that are drawn in colour; all others are grey and without bars. By default all arms
            are in colour, with bars if there are at most six of them.
        reference_arms (`Sequence[str]`, *optional*, defaults to `("full", "sft")`):
            Arms (the key `arm` of a run) that are drawn as horizontal lines at their mean score.
        title (`str`, *optional*):
            Title of the picture.

    Raises:
        `ImportError`: If `matplotlib` is not installed.
        `ValueError`: If there is no run besides the references, or `highlighted` has too many labels or an unknown one.
    """
    figure = _figure((15, 5.6), "plot_curves")
    from matplotlib.ticker import MaxNLocator

    curves, references = defaultdict(list), defaultdict(list)
    for run in runs:
        if run["arm"] in reference_arms:
            references[run["label"]].append(run["score"])
        else:
            curves[run["label"]].append(run)
    if not curves:
        raise ValueError(
            "`runs` has no run besides those of `reference_arms`. Pass the runs of at least one more arm."
        )
    unknown = [label for label in highlighted or [] if label not in curves]
    if highlighted is not None and (unknown or len(highlighted) > len(_COLOURS)):
        raise ValueError(
            f"`highlighted` has {len(highlighted)} labels, of which no curve has {unknown}. Pass at most "
            f"{len(_COLOURS)} labels of {sorted(curves)}."
        )
    # The highlighted ones come first in the legend, then the others by score at their largest budget.
    order = sorted(curves, key=lambda label: -_points(curves[label], "budget")[-1, 1])
    if highlighted is not None:
        order = [*highlighted, *(label for label in order if label not in highlighted)]
    levels = {label: float(np.mean(scores)) for label, scores in references.items()}

    panels = figure.subplots(1, 3, sharey=True)
    fields = {"budget": "Active pairs", "judge_calls": "Judge calls", "flops": "FLOPs, all phases"}
    for axes, (field, name) in zip(panels, fields.items(), strict=True):
        _draw_panel(axes, {label: curves[label] for label in order}, field, highlighted or order, levels)
        values = [run[field] for label in order for run in curves[label]]
        if min(values) > 0 and max(values) > 10 * min(values):
            axes.set_xscale("log")
        elif field != "flops":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(name)
        axes.margins(x=0.08)
        axes.autoscale_view()
        _strip(axes)
    with_bars = len(highlighted or order) <= len(_COLOURS)
    panels[0].set_ylabel("Score (± standard deviation over seeds)" if with_bars else "Score (mean over seeds)")
    handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    labels = [_text(label) for label in order]
    figure.legend([handles[label] for label in labels], labels, loc="outside right center", frameon=False, fontsize=9)
    if title:
        figure.suptitle(_text(title), x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=150)


def plot_contrasts(
    summaries: Sequence[ArmSummary],
    path: str | Path,
    baseline_label: str,
    preregistered_label: str | None = None,
    title: str | None = None,
) -> None:
    """
    Draw the difference of each arm to the baseline with its interval, a panel for each budget.

    Args:
        summaries (`Sequence[ArmSummary]`):
            Result of [`~comparison.summarize`].
        path (`str` or `Path`):
            File to write; its suffix chooses the format.
        baseline_label (`str`):
            Label of the baseline, as for [`~comparison.summarize`].
        preregistered_label (`str`, *optional*):
            Label of the pre-registered arm, as for [`~comparison.summarize`]. Its pre-registered difference is drawn in
            a colour of its own.
        title (`str`, *optional*):
            Title of the picture.

    Raises:
        `ImportError`: If `matplotlib` is not installed.
        `ValueError`: If no arm has a difference.
    """
    found = [(summary, summary.contrast) for summary in summaries if summary.contrast]
    if not found:
        raise ValueError("No summary has a `contrast`. Run arms at the baseline's budget and with its seeds.")
    budgets = sorted({summary.budget for summary, _ in found})
    # Arms of one budget each share a panel, and are named with their budget.
    together = len(budgets) > 1 and len(found) == len({summary.label for summary, _ in found})
    names = [f"{summary.label} ({summary.budget:,} pairs)" if together else summary.label for summary, _ in found]
    # By the difference at the largest budget that an arm has, the best on top.
    rows = sorted(zip(found, names, strict=True), key=lambda row: row[0][0].budget)
    largest = {name: contrast.mean for (_, contrast), name in rows}
    order = sorted(largest, key=lambda name: largest[name])
    num_panels = 1 if together else len(budgets)
    figure = _figure((4.6 + 3.4 * (num_panels - 0.5), 1.9 + 0.28 * len(order)), "plot_contrasts")
    panels = figure.subplots(1, num_panels, sharey=True, sharex=True, squeeze=False)[0]
    for (summary, contrast), name in rows:
        preregistered = summary.label == preregistered_label and summary.holm_p_value is None
        panels[0 if together else budgets.index(summary.budget)].plot(
            [contrast.low, contrast.mean, contrast.high],
            [order.index(name)] * 3,
            color=_COLOURS[1] if preregistered else _COLOURS[0],
            linewidth=2,
            marker="D" if preregistered else "o",
            markersize=6,
            markevery=[1],
        )
    for axes, budget in zip(panels, budgets, strict=False):
        axes.axvline(0, color=_REFERENCE, linewidth=1)
        if not together:
            axes.set_title(f"{budget:,} active pairs", fontsize=10, color=_TEXT)
        axes.set_yticks(range(len(order)), labels=[_text(name) for name in order], fontsize=9)
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.tick_params(axis="y", length=0)
        _strip(axes)
    figure.supxlabel(_text(f"Difference of the score to {baseline_label}, with its interval"), fontsize=10)
    if title:
        figure.suptitle(_text(title), x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=150)
