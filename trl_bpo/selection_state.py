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

"""What a selection leaves on the disk: its files in `output_dir`, and its state in a checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from .depth import DepthSelection


FILE_NAME = "bpo_selection.safetensors"
_ARRAYS = ("clusters", "distances", "ranks", "scores")


def save_selection(path: Path, selection: DepthSelection, pairs: Dataset, metrics: dict[str, float]) -> None:
    """
    Save a selection: the kept pairs with all columns as `{path}/train.parquet`, every pair with its ids and `depth_*`
    columns as `{path}.parquet`, and the metrics as `{path}.json`.

    Args:
        path (`Path`):
            Where to, without an ending.
        selection ([`DepthSelection`]):
            The selection.
        pairs ([`~datasets.Dataset`]):
            The pairs that were selected from, with `pair_id` and `prompt_id`.
        metrics (`dict[str, float]`):
            What was measured.
    """
    path.mkdir(parents=True, exist_ok=True)
    selection.kept(pairs).to_parquet(path / "train.parquet")
    selection.annotate(pairs.select_columns(["pair_id", "prompt_id"])).to_parquet(f"{path}.parquet")
    Path(f"{path}.json").write_text(json.dumps(metrics, indent=2) + "\n")


def save_selection_state(
    folder: str | Path, selection: DepthSelection | None, seen: np.ndarray, header: dict[str, Any]
) -> None:
    """
    Save the state of the selection. Size: one bit a pair before the first selection, and about 24 bytes a pair after it.

    Args:
        folder (`str` or `Path`):
            Folder of the checkpoint, created if need be.
        selection ([`DepthSelection`], *optional*):
            The last selection.
        seen (`np.ndarray` of shape `(n,)`, bool):
            Which pairs were trained on so far.
        header (`dict[str, Any]`):
            What else a resumed run needs, as JSON.
    """
    arrays = {"seen": np.packbits(seen)}
    if selection is not None:
        arrays["selected"] = np.packbits(selection.selected)
        arrays |= {name: values for name in _ARRAYS if (values := getattr(selection, name)) is not None}
        header = header | {"metrics": selection.metrics}
    path = Path(folder) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(arrays, path, metadata={"header": json.dumps(header)})


def load_selection_state(folder: str | Path, n: int) -> tuple[DepthSelection | None, np.ndarray]:
    """
    Load what [`save_selection_state`] saved.

    Args:
        folder (`str` or `Path`):
            Folder of the checkpoint.
        n (`int`):
            Number of pairs.

    Returns:
        `tuple[DepthSelection | None, np.ndarray]`: The selection, and which pairs were trained on so far.
    """
    path = Path(folder) / FILE_NAME
    arrays = load_file(path)
    seen = np.unpackbits(arrays.pop("seen"), count=n).astype(bool)
    if "selected" not in arrays:
        return None, seen
    selected = np.unpackbits(arrays.pop("selected"), count=n).astype(bool)
    with safe_open(path, framework="numpy") as file:
        metrics = json.loads(file.metadata()["header"])["metrics"]
    return DepthSelection(selected, metrics=metrics, **arrays), seen


def load_header(folder: str | Path) -> dict[str, Any] | None:
    """
    Load the header alone.

    Args:
        folder (`str` or `Path`):
            Folder of the checkpoint.

    Returns:
        `dict[str, Any]`, *optional*: The header, `None` where the folder has no state of a selection.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["header"])
