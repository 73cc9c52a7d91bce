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

"""What a run made, for people: the table at the end of a run and the picture of how many pairs each prompt kept."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Two colours of Okabe and Ito's palette that stay apart under every kind of colour blindness, and in print.
_KEPT, _NONE = "#0072B2", "#E69F00"
# Beyond this many bars their counts would run into each other.
_MAX_LABELLED_BARS = 20


def pairs_per_prompt(prompt_ids_pool: Sequence[str], prompt_ids_kept: Sequence[str]) -> dict[int, int]:
    """
    How many prompts kept how many pairs.

    Args:
        prompt_ids_pool (`Sequence[str]`):
            The `prompt_id` column of the pool that was selected from. Repeated ids are one prompt.
        prompt_ids_kept (`Sequence[str]`):
            The `prompt_id` column of the pairs that were kept, one entry a pair.

    Returns:
        `dict[int, int]`: Number of kept pairs -> number of prompts, in ascending order. The key `0` counts the prompts
        of the pool that kept no pair, and is always there.

    Raises:
        `ValueError`: If a kept pair belongs to a prompt that the pool does not have.
    """
    kept = Counter(prompt_ids_kept)
    pool = set(prompt_ids_pool)
    unknown = kept.keys() - pool
    if unknown:
        raise ValueError(
            f"`prompt_ids_kept` has {len(unknown)} prompt(s) that `prompt_ids_pool` lacks, such as {min(unknown)!r}. "
            "Pass the `prompt_id` column of the pool from which the pairs were selected."
        )
    histogram = Counter(kept.values())
    return {0: len(pool) - len(kept), **dict(sorted(histogram.items()))}


def gini(histogram: dict[int, int]) -> float:
    """
    Gini coefficient of how the kept pairs are spread over the prompts.

    Args:
        histogram (`dict[int, int]`):
            Number of kept pairs -> number of prompts, as [`pairs_per_prompt`] returns it.

    Returns:
        `float`: 0 where every prompt keeps equally many pairs, or none keeps any; towards 1 where few prompts hold
        all pairs.
    """
    prompts = sum(histogram.values())
    pairs = sum(kept * count for kept, count in histogram.items())
    if not pairs:
        return 0.0
    differences = sum(abs(a - b) * n * m for a, n in histogram.items() for b, m in histogram.items())
    return differences / (2 * prompts * pairs)


def _pairs_per_prompt_figure(histogram: dict[int, int], title: str | None = None) -> "Figure":
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    except ImportError as error:
        raise ImportError(
            "`plot_pairs_per_prompt` requires the `matplotlib` package. Install it with `pip install 'trl_bpo[report]'`."
        ) from error

    prompts = sum(histogram.values())
    if not prompts:
        raise ValueError("`histogram` counts no prompt. Pass the result of `pairs_per_prompt` for a pool with rows.")
    mean = sum(kept * count for kept, count in histogram.items()) / prompts
    # At least four places, so that one or two bars do not fill the whole width.
    kept = range(max(3, *histogram) + 1)
    counts = [histogram.get(k, 0) for k in kept]

    # A Figure without pyplot touches no global state: neither the user's backend nor open figures.
    figure = Figure(figsize=(7, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    axes = figure.add_subplot()
    bars = axes.bar(kept, counts, width=0.8, color=[_NONE if k == 0 else _KEPT for k in kept])
    if len(counts) <= _MAX_LABELLED_BARS:
        axes.bar_label(bars, labels=[f"{count:,}" for count in counts], padding=3, fontsize=9, color="#333333")
    # `$` would open a formula in matplotlib's text.
    heading = (title or "Pairs per prompt").replace("$", r"\$")
    axes.set_title(heading, loc="left", fontsize=13, fontweight="bold", pad=28)
    axes.annotate(
        f"{prompts:,} prompts, {histogram.get(0, 0):,} without a pair; mean {mean:.2f}, Gini {gini(histogram):.2f}",
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, 12),
        textcoords="offset points",
        fontsize=10,
        color="#555555",
    )
    axes.set_xlabel("Pairs kept of a prompt")
    axes.set_ylabel("Prompts")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=_MAX_LABELLED_BARS))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.margins(y=0.1)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def plot_pairs_per_prompt(histogram: dict[int, int], path: str | Path, title: str | None = None) -> None:
    """
    Draw how many prompts kept how many pairs, with the prompts that kept none as a bar of its own.

    Args:
        histogram (`dict[int, int]`):
            Number of kept pairs -> number of prompts, as [`pairs_per_prompt`] returns it.
        path (`str` or `Path`):
            File to write; its suffix chooses the format.
        title (`str`, *optional*):
            Title of the picture. Mean and Gini coefficient stand in the line below it.

    Raises:
        `ImportError`: If `matplotlib` is not installed.
        `ValueError`: If the histogram counts no prompt.
    """
    _pairs_per_prompt_figure(histogram, title).savefig(path, dpi=150)


def summary_table(rows: list[tuple[str, str | int | float, str]]) -> str:
    """
    Plain text table for the terminal.

    Args:
        rows (`list[tuple[str, str | int | float, str]]`):
            Stage, count and note of each row. Integers get thousands separators, floats three significant digits.

    Returns:
        `str`: The aligned table with a heading, without a newline at its end.
    """

    def cell(value: str | int | float) -> str:
        if isinstance(value, str):
            return " ".join(value.split())
        return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"

    table = [("stage", "count", "note"), *(tuple(map(cell, row)) for row in rows)]
    stage_width, count_width, note_width = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = [f"{stage:<{stage_width}}  {count:>{count_width}}  {note}".rstrip() for stage, count, note in table]
    lines.insert(1, "  ".join("-" * width for width in (stage_width, count_width, note_width)))
    return "\n".join(lines)
