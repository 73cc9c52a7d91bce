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

"""Runs of a comparison: what fits together, and the files they are kept in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


Run = dict[str, Any]
# The runs of an arm at a budget, by seed.
Cells = dict[tuple[str, int], dict[int | None, Run]]


def index_runs(runs: Sequence[Run]) -> Cells:
    """
    Order runs by arm, budget and seed, after checking that they can be compared.

    Args:
        runs (`Sequence[dict]`):
            Runs with the keys `label`, `task`, `model`, `budget`, `seed` and `prompt_scores`.

    Returns:
        `dict[tuple[str, int], dict[int | None, dict]]`: Label and budget -> seed -> run, by ascending seed.

    Raises:
        `ValueError`: If there is no run, they are of several tasks or models, have different numbers of prompts, or two
            have the same label, budget and seed.
    """
    if not runs:
        raise ValueError("`runs` is empty. Pass at least one run.")
    cells: Cells = {}
    first = runs[0]
    for number, run in enumerate(runs):
        for field in ("task", "model"):
            if run[field] != first[field]:
                raise ValueError(
                    f"Run {number} has the `{field}` {run[field]!r}, run 0 has {first[field]!r}. Compare the runs of "
                    f"each {field} apart."
                )
        if len(run["prompt_scores"]) != len(first["prompt_scores"]):
            raise ValueError(
                f"Run {number} has {len(run['prompt_scores'])} `prompt_scores`, run 0 has "
                f"{len(first['prompt_scores'])}. Score all runs on the same held-out prompts, with null where a "
                "prompt has no score."
            )
        cell = cells.setdefault((run["label"], run["budget"]), {})
        if run["seed"] in cell:
            raise ValueError(
                f"Run {number} is the second one with `label` {run['label']!r}, `budget` {run['budget']} and `seed` "
                f"{run['seed']}. Give settings that differ labels that differ."
            )
        cell[run["seed"]] = run

    def order(item: tuple[int | None, Run]) -> int:
        return -1 if item[0] is None else item[0]

    return {key: dict(sorted(cell.items(), key=order)) for key, cell in cells.items()}


def _files(folder: str | Path, name: str) -> tuple[Path, Path]:
    return Path(folder) / f"{name}.json", Path(folder) / f"{name}_prompt_scores.parquet"


def save_runs(runs: Sequence[Run], folder: str | Path, name: str) -> None:
    """
    Save runs as `<name>.json`, and their scores of single prompts as `<name>_prompt_scores.parquet`.

    Args:
        runs (`Sequence[dict]`):
            Runs of one task and model, as for [`~comparison.summarize`].
        folder (`str` or `Path`):
            Folder for the two files; it is made if it does not exist.
        name (`str`):
            Name of the files.

    Raises:
        `ValueError`: If the runs do not fit together, or a number is NaN or infinite, which JSON lacks.
    """
    index_runs(runs)
    text, scores = _files(folder, name)
    without_scores = [{field: value for field, value in run.items() if field != "prompt_scores"} for run in runs]
    try:
        content = json.dumps(without_scores, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError("A number in `runs` is NaN or infinite. Use `None` for what is not known.") from error
    table = pa.table(
        {
            "label": pa.array([run["label"] for run in runs], pa.string()),
            "budget": pa.array([run["budget"] for run in runs], pa.int64()),
            "seed": pa.array([run["seed"] for run in runs], pa.int64()),
            "prompt_scores": pa.array([run["prompt_scores"] for run in runs], pa.list_(pa.float32())),
        }
    )
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(content + "\n", encoding="utf-8")
    pq.write_table(table, scores)


def load_runs(folder: str | Path, name: str) -> list[Run]:
    """
    Load what [`save_runs`] saved.

    Args:
        folder (`str` or `Path`):
            Folder with the two files.
        name (`str`):
            Name of the files.

    Returns:
        `list[dict]`: The runs, with `prompt_scores` in single precision.

    Raises:
        `ValueError`: If the two files do not hold the same runs.
    """
    text, scores = _files(folder, name)
    runs = json.loads(text.read_text(encoding="utf-8"))
    rows = pq.read_table(scores).to_pylist()
    by_key = {(row["label"], row["budget"], row["seed"]): row["prompt_scores"] for row in rows}
    if sorted(by_key, key=repr) != sorted(((run["label"], run["budget"], run["seed"]) for run in runs), key=repr):
        raise ValueError(f"`{text.name}` and `{scores.name}` do not hold the same runs. Save them together again.")
    return [{**run, "prompt_scores": by_key[run["label"], run["budget"], run["seed"]]} for run in runs]
