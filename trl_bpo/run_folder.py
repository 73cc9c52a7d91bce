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


"""What a run left in its output folder, read back: for the report, the explanations and the pushes."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file


if TYPE_CHECKING:
    from .card import CuratedCardData


BREADTH, SELECTIONS, FUNNEL = "_breadth", "_selections", "_funnel.json"
# Names of stages of the funnel that leave files.
BREADTH_STAGE, SCORES_STAGE = "prompts kept (breadth)", "scores"


def step_name(step: int) -> str:
    """
    Name of the selection at an optimizer step: of its files, and of its configuration on the Hub.

    Args:
        step (`int`):
            Optimizer step.

    Returns:
        `str`: Such as `"step-000012"`.
    """
    return f"step-{step:06d}"


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class SavedBreadth:
    """
    A breadth selection, as [`~breadth.BreadthSelection.save`] wrote it.

    Args:
        path (`Path`):
            Its folder.
    """

    path: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What it was made from, by which parameters, and what came out."""
        return _json(self.path / "manifest.json")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Its counts and the variance that the clusters explain."""
        return _json(self.path / "metrics.json")

    @cached_property
    def prompts(self) -> pa.Table:
        """One row a distinct prompt, see [`~breadth.BreadthSelection`]."""
        return pq.read_table(self.path / "prompts.parquet")

    @cached_property
    def sample(self) -> np.ndarray:
        """Embeddings of a sample of the prompts, of shape `(m, d)`."""
        return load_file(self.path / "sample.safetensors")["embeddings"]


@dataclass(frozen=True)
class SavedSelection:
    """
    A selection of pairs, as [`~selection_state.save_selection`] wrote it.

    Args:
        path (`Path`):
            Its path without an ending, which is also the folder of the pairs that it kept.
        step (`int`):
            Optimizer step at which it was made.
    """

    path: Path
    step: int

    @property
    def kept_file(self) -> Path:
        """Parquet file of the pairs that were kept."""
        return self.path / "train.parquet"

    @property
    def manifest_file(self) -> Path:
        """JSON file of what it was made from, by which parameters, and what came out."""
        return self.path / "manifest.json"

    @property
    def card_file(self) -> Path:
        """JSON file of what its card shows."""
        return self.path / "card.json"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of the manifest."""
        return _json(self.manifest_file)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What was measured on it."""
        return _json(Path(f"{self.path}.json"))

    @cached_property
    def pairs(self) -> pa.Table:
        """One row a pair of the pool, see [`depth`]."""
        return pq.read_table(f"{self.path}.parquet")


class RunFolder:
    """
    The folder of a run. Nothing is read before it is asked for.

    Args:
        path (`str` or `Path`):
            The `output_dir` of the run.

    Raises:
        `ValueError`: If the folder holds neither a breadth selection nor a selection of pairs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / BREADTH / "manifest.json").is_file() and not (self._selections / "index.json").is_file():
            raise ValueError(
                f"{str(self.path)!r} is not the folder of a run with a selection: it has neither `{BREADTH}` nor "
                f"`{SELECTIONS}`. Name the `output_dir` of a run of trl_bpo."
            )

    @property
    def name(self) -> str:
        """Last part of the path: where your files lie is nobody else's business."""
        return self.path.resolve().name

    @property
    def _selections(self) -> Path:
        return self.path / SELECTIONS

    @cached_property
    def breadth(self) -> SavedBreadth | None:
        """The breadth selection, `None` if there was none."""
        saved = SavedBreadth(self.path / BREADTH)
        return saved if (saved.path / "manifest.json").is_file() and self._had(BREADTH_STAGE) else None

    def _had(self, stage: str) -> bool:
        # Files of an earlier run in the folder may have cost money, and stay. They are not of this one.
        return not self.funnel or any(one["stage"] == stage for one in self.funnel)

    @cached_property
    def selections(self) -> list[SavedSelection]:
        """The selections of pairs of the last run in the folder, in their order. Those of earlier runs are left out."""
        index = self._selections / "index.json"
        steps = _json(index)["steps"] if index.is_file() else []
        return [SavedSelection(self._selections / step_name(step), step) for step in steps]

    @cached_property
    def pool(self) -> pa.Table | None:
        """One row a pair of the pool, see [`~selection_state.save_pool`]; `None` without a selection of pairs."""
        return pq.read_table(self._selections / "pool.parquet") if self.selections else None

    @property
    def pool_file(self) -> Path | None:
        """Parquet file of all pairs of the pool with their texts, `None` unless `curated_dataset_push_pool` was set."""
        file = self._selections / "pool" / "train.parquet"
        return file if file.is_file() else None

    @cached_property
    def feature_sample(self) -> np.ndarray | None:
        """Features of a sample of the pairs at the last selection, as they were clustered, `None` without clusters."""
        file = self._selections / "sample.safetensors"
        return load_file(file)["features"] if file.is_file() else None

    @property
    def scores_file(self) -> Path | None:
        """Parquet file of the responses and their scores, `None` where the pairs were there before."""
        file = self.path / "_collected" / "scores.parquet"
        return file if file.is_file() and self._had(SCORES_STAGE) else None

    @cached_property
    def funnel(self) -> list[dict[str, Any]]:
        """Stages of the run: `stage`, `rows`, `note`, `seconds`, `tokens` and `cost` (US dollars) of each."""
        file = self.path / FUNNEL
        return _json(file) if file.is_file() else []

    @cached_property
    def card_data(self) -> "CuratedCardData | None":
        """What the card of the last selection shows, `None` without a selection of pairs."""
        # The card draws on the report, which reads run folders.
        from .card import CuratedCardData

        return CuratedCardData.from_dict(_json(self.selections[-1].card_file)) if self.selections else None
