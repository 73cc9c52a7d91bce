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

"""What a run made, for people: its numbers, their pictures, and a page that shows both."""

from pathlib import Path

from .numbers import gini, histogram_of, pairs_per_prompt, statistics, summary_table


__all__ = [
    "gini",
    "histogram_of",
    "pairs_per_prompt",
    "plot_pairs_per_prompt",
    "statistics",
    "summary_table",
    "write_report",
]


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
    from .figures import pairs_per_prompt_figure

    pairs_per_prompt_figure(histogram, title).savefig(path, dpi=150)


def write_report(path: str | Path) -> Path:
    """
    Write the report of a run into its folder: one page that needs no network, its pictures, and their numbers.

    Args:
        path (`str` or `Path`):
            The `output_dir` of the run.

    Returns:
        `Path`: The page, `_report/index.html`.

    Raises:
        `ImportError`: If `matplotlib` is not installed.
        `ValueError`: If the folder holds no selection.
    """
    from .page import write_page

    return write_page(path)
