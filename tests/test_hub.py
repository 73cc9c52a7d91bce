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

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from datasets import Dataset, load_dataset
from minihub import MiniHub
from tiny import tiny_model_dir

from trl_bpo.card import CuratedCardData
from trl_bpo.hub import push_curated_dataset, save_curated_dataset


# Real clients in a process of their own, since they read the endpoint when they are imported.
PUSH = """
import dataclasses, json, sys
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard, metadata_update
from trl_bpo.card import CuratedCardData
from trl_bpo.hub import push_curated_dataset

rows = {"prompt": ["p", "q", "q"], "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"]}
first = Dataset.from_dict(rows)
second = Dataset.from_dict({**rows, "score_chosen": [9.0, 8.5, 7.0]})
data = CuratedCardData(pretty_name="Kept", policy_model="org/policy", num_pairs=3, num_prompts=2,
                       pairs_per_prompt={0: 1, 1: 1, 2: 1})
result = {}

def outcome(*args, **kwargs):
    try:
        return push_curated_dataset(*args, **kwargs)
    except Exception as error:
        return [isinstance(error, ValueError), str(error)]

def read(*args, **kwargs):
    return load_dataset(*args, split="train", download_mode="force_redownload", **kwargs).to_dict()

result["url"] = push_curated_dataset(first, "tester/kept", data, private=True)
result["default"] = read("tester/kept")
# The publisher sets what the card asks for, and tags.
metadata_update("tester/kept", {"license": "cc-by-4.0", "tags": ["own"]}, repo_type="dataset", overwrite=True)
push_curated_dataset(second, "tester/kept", dataclasses.replace(data, pretty_name="Round 2"), config_name="round2")
result["round2"] = read("tester/kept", "round2")
result["default_again"] = read("tester/kept", "default")
# The same configuration with another column.
push_curated_dataset(second, "tester/kept", data)
result["replaced"] = read("tester/kept")
result["round2_again"] = read("tester/kept", "round2")
push_curated_dataset(first, "tester/kept", data, revision="draft", commit_message="A draft")
result["draft"] = read("tester/kept", revision="draft")
result["main_after_draft"] = read("tester/kept")
result["forbidden"] = outcome(first, "other/kept", data)
result["unreadable"] = outcome(first, "tester/unreadable", data)
json.dump(result, open(sys.argv[1], "w"))
"""


def make_dataset(n=4):
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"Question {i // 2}"}] for i in range(n)],
            "chosen": [[{"role": "assistant", "content": f"Good {i}"}] for i in range(n)],
            "rejected": [[{"role": "assistant", "content": f"Bad {i}"}] for i in range(n)],
            "score_chosen": [9.0] * n,
            "topic": ["a"] * n,
        }
    )


def make_card_data(**kwargs):
    defaults = dict(
        pretty_name="Arena pairs",
        policy_model="org/policy-1B",
        num_pairs=4,
        num_prompts=2,
        source_datasets=["org/source", "prompts.jsonl"],
        source_revision="abc123",
        source_split="train[:10%]",
        judge="gpt-4.1",
        license="cc-by-4.0",
        date="2026-05-04",
        funnel=[("source", 61135, "rows read"), ("breadth", 6113, "nearest to their centres"), ("depth", 4, "")],
        settings={"breadth_fraction": 0.1, "num_responses": 4, "normalize": True, "seed": None},
        setting_notes={"num_responses": "not specified by the paper"},
        metrics={"variance explained": 0.054321, "variance explained, Gaussian": 0.061},
        pairs_per_prompt={0: 1500, 1: 1, 3: 1},
        columns={"topic": "Topic of the source row"},
        versions={"trl_bpo": "0.1.0", "trl": "1.16.0"},
    )
    return CuratedCardData(**{**defaults, **kwargs})


def split_card(card):
    _, front_matter, body = str(card).split("---\n", 2)
    return yaml.safe_load(front_matter), body


class TestSaveCuratedDataset:
    def test_load_dataset_reads_it_back(self, tmp_path):
        dataset = make_dataset()
        save_curated_dataset(dataset, tmp_path / "out" / "kept", make_card_data())
        loaded = load_dataset(str(tmp_path / "out" / "kept"), cache_dir=tmp_path / "cache")
        assert list(loaded) == ["train"]
        assert loaded["train"].features == dataset.features
        assert loaded["train"].to_list() == dataset.to_list()

    def test_files(self, tmp_path):
        save_curated_dataset(make_dataset(), tmp_path, make_card_data())
        files = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
        assert files == {"README.md", "pairs_per_prompt.png", "data/train-00000-of-00001.parquet"}
        assert (tmp_path / "pairs_per_prompt.png").read_bytes().startswith(b"\x89PNG")
        assert "](pairs_per_prompt.png)" in (tmp_path / "README.md").read_text()

    def test_without_histogram_there_is_no_picture(self, tmp_path):
        save_curated_dataset(make_dataset(), tmp_path, make_card_data(pairs_per_prompt={}))
        assert not (tmp_path / "pairs_per_prompt.png").exists()
        assert "![" not in (tmp_path / "README.md").read_text()

    def test_without_matplotlib_there_is_no_picture(self, tmp_path, monkeypatch, caplog):
        monkeypatch.delitem(sys.modules, "trl_bpo.report.figures", raising=False)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        save_curated_dataset(make_dataset(), tmp_path, make_card_data())
        assert not (tmp_path / "pairs_per_prompt.png").exists()
        card = (tmp_path / "README.md").read_text()
        assert "![" not in card and "| 0 | 1,500 |" in card
        assert "pip install 'trl_bpo[report]'" in caplog.text

    def test_a_selection_of_rows_is_saved_in_its_order(self, tmp_path):
        dataset = make_dataset(10).select([7, 2, 5])
        save_curated_dataset(dataset, tmp_path / "kept", make_card_data())
        loaded = load_dataset(str(tmp_path / "kept"), split="train", cache_dir=tmp_path / "cache")
        assert loaded.to_list() == dataset.to_list()

    def test_shards_and_saving_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr("trl_bpo.hub._MAX_SHARD_BYTES", 1000)
        save_curated_dataset(make_dataset(60), tmp_path / "kept", make_card_data())
        assert len(list((tmp_path / "kept" / "data").iterdir())) > 2
        (tmp_path / "kept" / "notes.txt").write_text("mine")
        loaded = load_dataset(str(tmp_path / "kept"), split="train", cache_dir=tmp_path / "cache")
        assert loaded.to_list() == make_dataset(60).to_list()
        monkeypatch.undo()
        save_curated_dataset(make_dataset(6), tmp_path / "kept", make_card_data())
        loaded = load_dataset(str(tmp_path / "kept"), split="train", cache_dir=tmp_path / "cache")
        assert loaded.to_list() == make_dataset(6).to_list()
        assert (tmp_path / "kept" / "notes.txt").read_text() == "mine"

    def test_the_code_of_the_card_trains(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        model = tiny_model_dir(tmp_path / "policy")
        dataset = make_dataset(4).add_column("pair_id", ["x"] * 4).add_column("depth_selected", [True] * 4)
        data = make_card_data(policy_model=model, repo_id=str(tmp_path / "kept"))
        save_curated_dataset(dataset, tmp_path / "kept", data)
        code = "\n".join(re.findall(r"```python\n(.*?)```", (tmp_path / "kept" / "README.md").read_text(), re.DOTALL))
        options = f'output_dir="{tmp_path}", max_steps=1, use_cpu=True, bf16=False, report_to="none"'
        assert 'output_dir="bpo-model"' in code
        scope = {}
        exec(code.replace('output_dir="bpo-model"', options).replace("path/to/the/policy", model), scope)
        assert scope["trainer"].state.global_step == 1


class TestPushCuratedDataset:
    @pytest.fixture(scope="class")
    def pushed(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("push")

        def fault(method, path, data):
            if "tester/unreadable" in path and path.endswith("README.md"):
                return 403, "Not now", "Disabled"
            return None

        with MiniHub() as hub:
            hub.fault = fault
            env = {
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": "hf_test",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HOME": str(folder),
            }
            env.pop("HF_HUB_OFFLINE", None)
            run = [sys.executable, "-c", PUSH, str(folder / "result.json")]
            process = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
            assert process.returncode == 0, process.stderr
            yield hub, json.loads((folder / "result.json").read_text())

    rows = {"prompt": ["p", "q", "q"], "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"]}
    more_rows = {**rows, "score_chosen": [9.0, 8.5, 7.0]}

    def test_reads_back(self, pushed):
        hub, result = pushed
        assert result["url"] == f"{hub.url}/datasets/tester/kept"
        assert hub.repos["dataset", "tester/kept"].private
        assert result["default"] == self.rows

    def test_second_configuration_keeps_the_first(self, pushed):
        _, result = pushed
        assert result["round2"] == self.more_rows
        assert result["default_again"] == self.rows

    def test_pushing_again_with_other_columns(self, pushed):
        _, result = pushed
        assert result["replaced"] == self.more_rows
        assert result["round2_again"] == self.more_rows

    def test_card_on_the_hub(self, pushed):
        hub, _ = pushed
        files = hub.files("dataset", "tester/kept")
        metadata, body = split_card(files["README.md"].decode())
        assert {config["config_name"] for config in metadata["configs"]} == {"default", "round2"}
        assert metadata["license"] == "cc-by-4.0"
        assert set(metadata["tags"]) == {"own", "trl", "trl-bpo", "bpo", "preference", "dpo"}
        assert "\n# Kept\n" in body
        assert 'load_dataset("tester/kept", split="train")' in body
        assert "](pairs_per_prompt.png)" in body
        assert files["pairs_per_prompt.png"].startswith(b"\x89PNG")
        assert files["round2/pairs_per_prompt.png"].startswith(b"\x89PNG")

    def test_revision(self, pushed):
        hub, result = pushed
        assert result["draft"] == self.rows
        assert result["main_after_draft"] == self.more_rows
        titles = [entry["title"] for entry in hub.repos["dataset", "tester/kept"].log if entry["ref"] == "draft"]
        assert titles == ["A draft"]

    def test_refusal_is_told(self, pushed):
        _, result = pushed
        is_value_error, message = result["forbidden"]
        assert not is_value_error and "403" in message

    def test_unreadable_card_is_not_overwritten(self, pushed):
        hub, result = pushed
        assert len(result["unreadable"]) == 2
        assert list(hub.files("dataset", "tester/unreadable")) == [".gitattributes"]

    @pytest.mark.parametrize("repo_id", ["a/b/c", "me/bad name", "me/..", ""])
    def test_bad_repo_id(self, repo_id):
        with pytest.raises(ValueError):
            push_curated_dataset(make_dataset(), repo_id, make_card_data(), token="hf_test")

    def test_bad_config_name(self):
        with pytest.raises(ValueError, match="`config_name` is '../x'"):
            push_curated_dataset(make_dataset(), "me/kept", make_card_data(), token="hf_test", config_name="../x")

    def test_missing_token(self, monkeypatch, tmp_path):
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(ValueError, match="No Hugging Face token.*`HF_TOKEN`"):
            push_curated_dataset(make_dataset(), "me/kept", make_card_data())
