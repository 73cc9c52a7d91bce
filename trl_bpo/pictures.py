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

"""The pictures of a card, and what they show in words."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .report import histogram_of
from .run_folder import RunFolder


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def histogram_picture(histogram: dict[int, int]) -> tuple["Figure", str]:
    """
    The pairs per prompt, as a picture and in words.

    Args:
        histogram (`dict[int, int]`):
            Number of kept pairs -> number of prompts, see [`~report.pairs_per_prompt`].

    Returns:
        `tuple[Figure, str]`: The picture and its alt text.

    Raises:
        `ImportError`: If `matplotlib` is not installed.
    """
    from .report.figures import pairs_per_prompt_figure

    bars = "; ".join(f"{kept}: {prompts:,}" for kept, prompts in histogram.items())
    alt = f"Bar chart of the prompts by the number of pairs that they kept ({bars})"
    return pairs_per_prompt_figure(histogram), alt


def pictures_of_run(run: RunFolder) -> dict[str, tuple["Figure", str]]:
    """
    Up to three pictures of a run for the card of its last selection: the pairs per prompt; the sizes of the clusters of
    pairs, or the scores where a score decided; and the map of the prompts, or without a breadth selection the distances
    of the pairs to their centres.

    Args:
        run ([`~run_folder.RunFolder`]):
            The folder of a run with a selection of pairs.

    Returns:
        `dict[str, tuple[Figure, str]]`: File name -> picture and alt text.

    Raises:
        `ImportError`: If `matplotlib` is not installed.
    """
    from .report.figures import clusters_figure, distances_figure, prompt_map_figure

    pairs = run.selections[-1].pairs
    selected = pairs["depth_selected"].to_numpy()
    pictures = {"pairs_per_prompt.png": histogram_picture(histogram_of(pairs["prompt_id"], selected))}
    if "depth_cluster" in pairs.column_names:
        clusters, distances = pairs["depth_cluster"].to_numpy(), pairs["depth_distance"].to_numpy()
        used = clusters >= 0
        sizes = np.bincount(clusters[used])
        kept = np.bincount(clusters[used & selected], minlength=len(sizes))
        alt = (
            f"Bar chart of the {_counted(len(sizes), 'cluster')} of pairs by size, kept and dropped: "
            f"{sizes.min():,} to {sizes.max():,} pairs, of which {kept.min():,} to {kept.max():,} were kept"
        )
        pictures["clusters.png"] = (clusters_figure(sizes, kept, "Clusters of pairs"), alt)
        values, label = distances, "Distance to the centre"
    else:
        values, label = pairs["depth_score"].to_numpy(), "Score"
    if run.breadth is None or label == "Score":
        finite = np.isfinite(values)
        bounds = [f"{value:.3g}" for value in (values[selected].min(), values[selected].max())]
        alt = (
            f"Histogram of the {label.lower()} of the pairs, kept and dropped; of those kept it lies between "
            f"{bounds[0]} and {bounds[1]}"
        )
        figure = distances_figure(values[finite], selected[finite], label, label=label)
        pictures["distances.png" if label != "Score" else "scores.png"] = (figure, alt)
    if run.breadth is not None:
        prompts = run.breadth.prompts
        x, y, clusters, kept = (prompts[name].to_numpy() for name in ("x", "y", "breadth_cluster", "breadth_selected"))
        alt = (
            f"Map of {_counted(len(x), 'prompt')} by the first two principal components of their embeddings, with the "
            f"centres of {_counted(len(np.unique(clusters)), 'cluster')}; {int(kept.sum()):,} were kept"
        )
        pictures["prompt_map.png"] = (prompt_map_figure(x, y, kept, clusters, "Prompts"), alt)
    return pictures


def save_pictures(pictures: Mapping[str, tuple["Figure", str]], folder: Path) -> dict[str, str]:
    """
    Write pictures as files.

    Args:
        pictures (`Mapping[str, tuple[Figure, str]]`):
            File name -> picture and alt text.
        folder (`Path`):
            Where to.

    Returns:
        `dict[str, str]`: File name -> alt text.
    """
    for name, (figure, _) in pictures.items():
        figure.savefig(folder / name, dpi=180)
    return {name: alt for name, (_, alt) in pictures.items()}
