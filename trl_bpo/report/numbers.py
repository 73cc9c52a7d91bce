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

"""The numbers behind the pictures and tables of a run. Nothing here draws."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa


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


def histogram_of(prompt_ids: pa.ChunkedArray, selected: np.ndarray) -> dict[int, int]:
    """
    The same of columns of a table. Memory: about 20 bytes a pair.

    Args:
        prompt_ids (`pyarrow.ChunkedArray`):
            The `prompt_id` of every pair of the pool.
        selected (`np.ndarray` of shape `(n,)`, bool):
            Whether each pair was kept.

    Returns:
        `dict[int, int]`: Number of kept pairs -> number of prompts, see [`pairs_per_prompt`].
    """
    encoded = prompt_ids.combine_chunks().dictionary_encode()
    prompts = encoded.indices.to_numpy(zero_copy_only=False)
    counts = np.bincount(np.bincount(prompts[selected], minlength=len(encoded.dictionary)))
    return {0: int(counts[0])} | {kept: int(counts[kept]) for kept in np.flatnonzero(counts).tolist() if kept}


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


def statistics(pool: pa.Table, selected: np.ndarray) -> list[tuple[str, float | None, float | None]]:
    """
    Scores and lengths before and after a selection.

    Args:
        pool (`pyarrow.Table`):
            One row a pair, see [`~selection_state.save_pool`].
        selected (`np.ndarray` of shape `(n,)`, bool):
            Whether each pair was kept.

    Returns:
        `list[tuple[str, float | None, float | None]]`: Measure, its value over the pool, and over the kept pairs. Measures
        of columns that the pool lacks are left out; a value is `None` where no row has it.
    """
    columns = {}
    for name in ("score_chosen", "score_rejected", "chosen_tokens", "rejected_tokens"):
        if name in pool.column_names:
            columns[name] = pool[name].to_numpy(zero_copy_only=False).astype(np.float64)
    measures: dict[str, tuple[np.ndarray, bool]] = {}
    if {"score_chosen", "score_rejected"} <= set(columns):
        measures["score of the chosen response, mean"] = (columns["score_chosen"], False)
        measures["score of the rejected response, mean"] = (columns["score_rejected"], False)
        measures["margin of the scores, mean"] = (columns["score_chosen"] - columns["score_rejected"], False)
    for side in ("chosen", "rejected"):
        if f"{side}_tokens" in columns:
            measures[f"tokens of the {side} response, mean"] = (columns[f"{side}_tokens"], False)
            measures[f"tokens of the {side} response, median"] = (columns[f"{side}_tokens"], True)
    if {"chosen_tokens", "rejected_tokens"} <= set(columns):
        longer = columns["chosen_tokens"] > columns["rejected_tokens"]
        measures["share where the chosen response is longer"] = (longer.astype(np.float64), False)

    def summary(values: np.ndarray, median: bool) -> float | None:
        values = values[np.isfinite(values)]
        return None if len(values) == 0 else float(np.median(values) if median else values.mean())

    return [
        (name, summary(values, median), summary(values[selected], median))
        for name, (values, median) in measures.items()
    ]


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
