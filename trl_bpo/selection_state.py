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
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from trl.trainer.utils import get_config_model_id

from .bpo_config import POLICY_STRATEGIES
from .depth import DepthSelection
from .ids import id_column
from .manifest import public_name, sha256_of_ids, sha256_of_text, write_json, write_manifest
from .model_fingerprint import model_fingerprint
from .prompts import EXCERPT_CHARACTERS, render_prompt
from .rows import Rows
from .run_folder import step_name


FILE_NAME = "bpo_selection.safetensors"
SAMPLE_NAME = "sample.safetensors"
_ROWS_AT_A_TIME = 10_000
_SAMPLE_ROWS = 2048
_SCORES = ("score_chosen", "score_rejected")
_ARRAYS = ("clusters", "distances", "ranks", "scores")


def _excerpts(batch: pa.Table) -> pa.Array:
    prompts = batch["prompt"]
    tools = batch["tools"] if "tools" in batch.column_names else None
    if pa.types.is_string(prompts.type) and tools is None:
        return pc.utf8_slice_codeunits(prompts, 0, EXCERPT_CHARACTERS)
    texts = [
        render_prompt(prompt, None if tools is None else tools[row].as_py())[:EXCERPT_CHARACTERS]
        for row, prompt in enumerate(prompts.to_pylist())
    ]
    return pa.array(texts, pa.string())


def save_pool(folder: Path, pairs: Dataset, tokenized: Dataset, with_texts: bool) -> pa.Table:
    """
    Save what is to be known of every pair of a pool without its texts, as `pool.parquet`.

    Memory: about 350 bytes a pair.

    Args:
        folder (`Path`):
            Folder of the selections, created if need be.
        pairs ([`~datasets.Dataset`]):
            The pairs as they came in, with `pair_id` and `prompt_id`.
        tokenized ([`~datasets.Dataset`]):
            The same pairs, as [`~trl.DPOTrainer`] tokenised them.
        with_texts (`bool`):
            Whether to save the pairs with all columns as well, as `pool/train.parquet`.

    Returns:
        `pyarrow.Table`: One row a pair: `pair_id`, `prompt_id`, `prompt` (its first 200 characters), `score_chosen` and
        `score_rejected` where the pairs have them, and `chosen_tokens` and `rejected_tokens`, the lengths of the
        responses before `max_length` cuts them.
    """
    ids = ["pair_id", "prompt_id"]
    scores = [name for name in _SCORES if name in pairs.column_names]
    texts = [name for name in ("prompt", "tools") if name in pairs.column_names]
    parts = []
    rows = pairs.select_columns([*ids, *texts, *scores]).with_format("arrow").iter(_ROWS_AT_A_TIME)
    tokens = tokenized.select_columns(["chosen_ids", "rejected_ids"]).with_format("arrow").iter(_ROWS_AT_A_TIME)
    for batch, ids_of_tokens in zip(rows, tokens, strict=True):
        columns = {name: batch[name].cast(pa.string()) for name in ids}
        columns["prompt"] = _excerpts(batch)
        columns |= {name: batch[name].cast(pa.float64()) for name in scores}
        for side in ("chosen", "rejected"):
            columns[f"{side}_tokens"] = pc.list_value_length(ids_of_tokens[f"{side}_ids"]).cast(pa.int64())
        parts.append(pa.table(columns))
    table = pa.concat_tables(parts)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "pool.parquet")
    texts_file = folder / "pool" / "train.parquet"
    # That of an earlier run would not be of these pairs.
    texts_file.unlink(missing_ok=True)
    if with_texts:
        texts_file.parent.mkdir(exist_ok=True)
        pairs.to_parquet(texts_file)
    return table


def save_feature_sample(folder: Path, features: Rows, normalize: bool, seed: int) -> None:
    """
    Save a random sample of up to 2,048 features as `sample.safetensors`, in half precision: at most 8 MB for 2,048
    dimensions.

    Args:
        folder (`Path`):
            The folder of the selections, created if need be.
        features ([`Rows`] of shape `(n, d)`):
            Features of the pairs. Those that are zero or not finite are left out.
        normalize (`bool`):
            Whether they are clustered at unit length.
        seed (`int`):
            Seed of the sample.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(features.shape[0])[:_SAMPLE_ROWS])
    sample = features[rows].astype(np.float32)
    norms = np.linalg.norm(sample, axis=1)
    usable = np.isfinite(norms) & (norms > 0)
    # Half precision ends at 65,504; a common factor changes no clustering.
    scale = norms[usable, None] if normalize else max(norms[usable].max(initial=0.0), 1e-30)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"features": (sample[usable] / scale).astype(np.float16)}, folder / SAMPLE_NAME)


def inputs_of_selection(trainer: Any, pool: str, number: int) -> dict[str, Any]:
    """
    What a selection is made from, for its manifest.

    Args:
        trainer ([`BPOTrainer`]):
            The trainer.
        pool (`str`):
            SHA-256 over the ids of the pairs.
        number (`int`):
            Number of the selection in its run, from 1.

    Returns:
        `dict[str, Any]`: Digest and number of the pairs; name, commit and fingerprint of the policy as it is now (the
        last only where its weights are needed, and lie whole on this process); digest of the chat template; number and
        kind of the devices.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    template = getattr(trainer.processing_class, "chat_template", None)
    if template is not None and not isinstance(template, str):
        template = json.dumps(template, sort_keys=True)
    inputs = {
        "pool": pool,
        "num_pairs": len(trainer.train_dataset),
        "selection": number,
        "model": public_name(get_config_model_id(model.config)),
        "model_commit": getattr(model.config, "_commit_hash", None),
        "chat_template": sha256_of_text(template),
        "num_processes": trainer.accelerator.num_processes,
        "device": trainer.accelerator.device.type,
    }
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.args.depth_strategy in POLICY_STRATEGIES and not sharded:
        inputs["model_fingerprint"] = model_fingerprint(model)
    return inputs


def save_selection(
    folder: Path,
    step: int,
    selection: DepthSelection,
    pairs: Dataset,
    metrics: dict[str, float],
    inputs: dict[str, Any],
    parameters: dict[str, Any],
) -> dict[str, Any]:
    """
    Save a selection under the name `step-{step:06d}`: the kept pairs with all columns as `train.parquet` in a folder of
    that name, with the manifest beside them as `manifest.json`; every pair with its ids and `depth_*` columns as
    `{name}.parquet`; and the metrics as `{name}.json`. It counts once [`list_selections`] has listed it.

    Args:
        folder (`Path`):
            Folder of the selections, created if need be.
        step (`int`):
            Optimizer step of the selection.
        selection ([`DepthSelection`]):
            The selection.
        pairs ([`~datasets.Dataset`]):
            The pairs that were selected from, with `pair_id` and `prompt_id`.
        metrics (`dict[str, float]`):
            What was measured.
        inputs (`dict[str, Any]`):
            What the selection was made from, for the manifest.
        parameters (`dict[str, Any]`):
            The training arguments that make it again, for the manifest.

    Returns:
        `dict[str, Any]`: The manifest.
    """
    path = folder / step_name(step)
    path.mkdir(parents=True, exist_ok=True)
    kept = selection.kept(pairs)
    kept.to_parquet(path / "train.parquet")
    table = Path(f"{path}.parquet")
    selection.annotate(pairs.select_columns(["pair_id", "prompt_id"])).to_parquet(table)
    write_json(Path(f"{path}.json"), {"step": step, **metrics})
    outputs = {"kept": sha256_of_ids(id_column(kept, "pair_id")), "num_kept": len(kept)}
    outputs |= {"train.parquet": path / "train.parquet", table.name: table}
    return write_manifest(path / "manifest.json", "depth", inputs, parameters, outputs, step=step)


def list_selections(folder: Path, steps: list[int]) -> None:
    """
    Say which selections are of this run. Until one is listed nobody reads it, so that what is read is whole.

    Args:
        folder (`Path`):
            Folder of the selections.
        steps (`list[int]`):
            Their optimizer steps, in their order.
    """
    write_json(folder / "index.json", {"steps": steps})


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
