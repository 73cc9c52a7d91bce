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


import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset
from safetensors import safe_open
from safetensors.numpy import load_file

from trl_bpo import DepthSelector
from trl_bpo.selection_state import (
    FILE_NAME,
    list_selections,
    load_header,
    load_selection_state,
    save_feature_sample,
    save_pool,
    save_selection,
    save_selection_state,
)


HEADER = {"pool": "ab" * 32, "budget": 7, "selection_steps": [0, 3]}


def select(kind, n):
    rng = np.random.default_rng(n)
    pair_ids, prompt_ids = [f"pair-{i}" for i in range(n)], [f"prompt-{i // 3}" for i in range(n)]
    selector = DepthSelector(0.5)
    if kind == "scores":
        return selector.select_by_score(rng.standard_normal(n) / 3, pair_ids, prompt_ids)
    features = rng.standard_normal((n, 5))
    if n > 1:
        features[1] = 0  # a pair that is left out: its distance is NaN
    return selector.select(features, pair_ids, prompt_ids)


def assert_same(actual, expected):
    for name in ("selected", "ranks", "clusters", "distances", "scores"):
        first, second = getattr(actual, name), getattr(expected, name)
        assert (first is None) == (second is None), name
        if second is not None:
            assert first.dtype == second.dtype and first.shape == second.shape
            assert first.tobytes() == second.tobytes(), name
    assert actual.metrics == expected.metrics and list(actual.metrics) == list(expected.metrics)


@pytest.mark.parametrize("kind", ["clusters", "scores"])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 29])
def test_round_trip_to_the_last_bit(tmp_path, kind, n):
    selection, seen = select(kind, n), np.random.default_rng(0).random(n) < 0.5
    save_selection_state(tmp_path, selection, seen, HEADER)
    loaded, loaded_seen = load_selection_state(tmp_path, n)
    assert_same(loaded, selection)
    assert loaded_seen.dtype == bool and np.array_equal(loaded_seen, seen)
    assert loaded.summary == selection.summary


def test_kinds_keep_what_they_have(tmp_path):
    for kind, has in (("clusters", (True, True, False)), ("scores", (False, False, True))):
        save_selection_state(tmp_path, select(kind, 12), np.zeros(12, dtype=bool), HEADER)
        loaded, _ = load_selection_state(tmp_path, 12)
        assert tuple(getattr(loaded, name) is not None for name in ("clusters", "distances", "scores")) == has


def test_scores_that_are_not_finite(tmp_path):
    scores = np.arange(40.0)
    scores[[3, 5, 7]] = np.nan, np.inf, -np.inf
    selection = DepthSelector(0.5).select_by_score(scores, [f"{i:02d}" for i in range(40)], ["a"] * 40)
    save_selection_state(tmp_path, selection, np.ones(40, dtype=bool), HEADER)
    assert_same(load_selection_state(tmp_path, 40)[0], selection)


@pytest.mark.parametrize("n", [1, 8, 13])
def test_before_the_first_selection(tmp_path, n):
    seen = np.arange(n) % 3 == 0
    save_selection_state(tmp_path, None, seen, HEADER)
    selection, loaded = load_selection_state(tmp_path, n)
    assert selection is None and np.array_equal(loaded, seen)
    assert load_header(tmp_path) == HEADER


def test_header(tmp_path):
    given = dict(HEADER)
    selection = select("clusters", 12)
    save_selection_state(tmp_path, selection, np.zeros(12, dtype=bool), given)
    assert load_header(tmp_path) == HEADER | {"metrics": selection.metrics}
    assert given == HEADER


def test_no_state_in_a_folder(tmp_path):
    assert load_header(tmp_path) is None and load_header(tmp_path / "missing") is None


def test_the_folder_is_made_and_a_state_replaced(tmp_path):
    folder = tmp_path / "a" / "checkpoint-3"
    for n in (12, 9):
        save_selection_state(str(folder), select("scores", n), np.zeros(n, dtype=bool), HEADER)
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]
    assert_same(load_selection_state(str(folder), 9)[0], select("scores", 9))


@pytest.mark.parametrize("kind", ["clusters", "scores"])
def test_the_file_is_safetensors_and_small(tmp_path, kind):
    n = 4001
    save_selection_state(tmp_path, select(kind, n), np.ones(n, dtype=bool), HEADER)
    content = (tmp_path / FILE_NAME).read_bytes()
    # The length of a JSON header, the header, and numbers: no pickle.
    length = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + length])
    assert json.loads(tensors.pop("__metadata__")["header"])["budget"] == 7
    assert {tensor["dtype"] for tensor in tensors.values()} <= {"U8", "I64", "F64"}
    assert len(content) <= 8 + length + 24 * n + 2 * (n // 8 + 1)
    with safe_open(tmp_path / FILE_NAME, framework="numpy") as file:
        assert file.get_tensor("selected").shape == file.get_tensor("seen").shape == (501,)


@pytest.mark.parametrize("kind", ["clusters", "scores"])
def test_files_of_a_selection(tmp_path, kind):
    selection = select(kind, 12)
    columns = {"pair_id": [f"pair-{i}" for i in range(12)], "prompt_id": ["p"] * 12, "chosen": list("abcdefghijkl")}
    # As of an earlier selection.
    pairs = Dataset.from_dict(columns | {"depth_selected": [True] * 12, "depth_rank": [99] * 12})
    folder = tmp_path / "a"
    options = {"inputs": {"pool": "ab"}, "parameters": {"depth_fraction": 0.5}}
    manifest = save_selection(folder, 7, selection, pairs, {"active_pairs": 6.0}, **options)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    files = {f"step-000007{name}" for name in (".json", ".parquet", "/train.parquet", "/manifest.json")}
    assert names == files
    list_selections(folder, [3, 7])
    assert json.loads((folder / "index.json").read_text()) == {"steps": [3, 7]}
    assert json.loads((folder / "step-000007.json").read_text()) == {"step": 7, "active_pairs": 6.0}
    cache = str(tmp_path / "cache")
    every = Dataset.from_parquet(str(folder / "step-000007.parquet"), cache_dir=cache)
    depth = ["depth_cluster", "depth_distance"] if kind == "clusters" else ["depth_score"]
    depth += ["depth_rank", "depth_selected"]
    assert every.column_names == ["pair_id", "prompt_id", *depth]
    assert np.array_equal(every["depth_selected"][:], selection.selected)
    assert np.array_equal(every["depth_rank"][:], selection.ranks)
    # The manifest beside the pairs is none of the data.
    kept = load_dataset(str(folder / "step-000007"), split="train", cache_dir=cache)
    assert kept.column_names == ["pair_id", "prompt_id", "chosen", *depth]
    ids = [f"pair-{i}" for i in np.flatnonzero(selection.selected)]
    assert kept["pair_id"][:] == ids
    assert manifest == json.loads((folder / "step-000007" / "manifest.json").read_text())
    assert (manifest["stage"], manifest["step"]) == ("depth", 7)
    assert manifest["inputs"] == {"pool": "ab"} and manifest["parameters"] == {"depth_fraction": 0.5}
    digests = {
        "train.parquet": hashlib.sha256((folder / "step-000007" / "train.parquet").read_bytes()).hexdigest(),
        "step-000007.parquet": hashlib.sha256((folder / "step-000007.parquet").read_bytes()).hexdigest(),
        "kept": hashlib.sha256("".join(ids).encode()).hexdigest(),
        "num_kept": len(ids),
    }
    assert manifest["outputs"] == digests
    assert manifest["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("conversational", [False, True])
def test_the_pool(tmp_path, conversational):
    prompts = ["x" * 300, "é" * 250, "short"]
    turns = [[{"role": "user", "content": text}] for text in prompts] if conversational else prompts
    columns = {"pair_id": list("abc"), "prompt_id": ["p", "q", "p"], "prompt": turns, "chosen": ["1", "2", "3"]}
    pairs = Dataset.from_dict(
        columns | {"score_chosen": [9, None, 7], "score_rejected": [1, 2, 3], "other": [0, 0, 0]}
    )
    tokenized = Dataset.from_dict({"chosen_ids": [[1], [1, 2], []], "rejected_ids": [[1] * 5, [], [3]]})
    # Rows that were filtered out are none of the pool.
    pairs, tokenized = pairs.select([0, 1, 2]), tokenized.select([2, 1, 0]).select([2, 1, 0])
    table = save_pool(tmp_path / "s", pairs, tokenized, with_texts=True)
    assert table.to_pydict() == {
        "pair_id": ["a", "b", "c"],
        "prompt_id": ["p", "q", "p"],
        "prompt": ["x" * 200, "é" * 200, "short"],
        "score_chosen": [9.0, None, 7.0],
        "score_rejected": [1.0, 2.0, 3.0],
        "chosen_tokens": [1, 2, 0],
        "rejected_tokens": [5, 0, 1],
    }
    assert pq.read_table(tmp_path / "s" / "pool.parquet").equals(table)
    texts = tmp_path / "s" / "pool" / "train.parquet"
    assert pq.read_table(texts)["other"].to_pylist() == [0, 0, 0]
    # The texts of an earlier run do not stay.
    save_pool(tmp_path / "s", pairs.remove_columns("score_chosen"), tokenized, with_texts=False)
    assert not texts.exists()


@pytest.mark.parametrize("normalize", [True, False])
def test_the_sample_of_features(tmp_path, normalize):
    features = np.random.default_rng(0).standard_normal((3000, 8)).astype(np.float32) * 1e6
    features[5], features[7, 2], features[9] = 0, np.inf, 3e-30
    save_feature_sample(tmp_path, features, normalize, seed=1)
    sample = load_file(tmp_path / "sample.safetensors")["features"]
    assert sample.dtype == np.float16 and np.isfinite(sample).all() and 2040 <= len(sample) <= 2048
    norms = np.linalg.norm(sample.astype(np.float32), axis=1)
    assert (
        np.allclose(norms, 1, atol=0.01)
        if normalize
        else (norms.max() == pytest.approx(1, abs=0.01) and norms.min() < 0.5)
    )
    # All rows of a small pool are there, in their order.
    save_feature_sample(tmp_path, features[10:20], normalize, seed=1)
    few = load_file(tmp_path / "sample.safetensors")["features"].astype(np.float32)
    cosines = (few * features[10:20]).sum(1) / np.linalg.norm(few, axis=1) / np.linalg.norm(features[10:20], axis=1)
    assert np.allclose(cosines, 1, atol=1e-3)
