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

"""What a training pushes, against a local Hub that keeps the bytes: whole runs, existing cards, faults, two processes."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from minihub import MiniHub


SCRIPT = Path(__file__).parent / "push_script.py"
# Every request that a push makes.
ENDPOINTS = {
    "create": ("POST", r"/api/repos/create"),
    "info": ("GET", r"/api/datasets/tester/[\w-]+(/revision/\w+)?"),
    "readme": ("HEAD", r"/datasets/tester/[\w-]+/resolve/\w+/README.md"),
    "preupload": ("POST", r"/api/datasets/tester/[\w-]+/preupload/\w+"),
    "batch": ("POST", r"/datasets/tester/[\w-]+\.git/info/lfs/objects/batch"),
    "commit": ("POST", r"/api/datasets/tester/[\w-]+/commit/\w+"),
}
EXISTING = """---
license: mit
language:
- en
tags:
- mine
custom_field:
  nested: [1, two]
configs:
- config_name: mine
  data_files:
  - split: train
    path: mine/train.parquet
- config_name: step-000777
  data_files:
  - split: train
    path: step-000777/train-*
---

# My own words

They took me *hours*.
"""


class Faults:
    """Fails requests of the repositories `tester/once-X` the first time and of `tester/always-X` every time."""

    def __init__(self):
        self.seen, self.failed = Counter(), Counter()

    def __call__(self, method, path, data=b""):
        name = re.search(r"tester/(once|always)-(\w+)", path)
        # A repository is created by its name in the body.
        kind = name.groups() if name else None
        if path == "/api/repos/create" and (body := re.search(rb'"(once|always)-(create)"', data)):
            kind = tuple(part.decode() for part in body.groups())
        if kind is None:
            return None
        wanted, pattern = ENDPOINTS[kind[1]]
        if method != wanted or not re.fullmatch(pattern, path.split("?")[0]):
            return None
        self.seen[kind] += 1
        if kind[0] == "once" and self.seen[kind] > 1:
            return None
        self.failed[kind] += 1
        return 503, "Come back later", None


@pytest.fixture(scope="module")
def pushed(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    (folder / "existing.md").write_text(EXISTING)
    Dataset.from_dict({"prompt": ["mine"]}).to_parquet(folder / "mine.parquet")
    faults = Faults()
    with MiniHub() as hub:
        hub.fault = faults
        env = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "home"),
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]),
        }
        env.pop("HF_HUB_OFFLINE", None)
        arguments = [str(SCRIPT), tiny_dir, str(folder), str(folder / "result.json"), ",".join(ENDPOINTS)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        for command in ([sys.executable, *arguments], [*launcher, *arguments]):
            process = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
            assert process.returncode == 0, process.stderr[-20000:]
        yield hub, json.loads((folder / "result.json").read_text()), faults, folder


def test_three_selections_are_read_back(pushed):
    hub, result, _, _ = pushed
    result = result["round_trip"]
    assert len(result["steps"]) == 3
    names = [f"step-{step:06d}" for step in result["steps"]]
    for name in names:
        assert result["loaded"][name] == result["saved"][name]
        assert len(result["loaded"][name]["pair_id"]) == 9
    assert result["loaded"]["default"] == result["by_default"] == result["saved"][names[-1]]
    # Three different selections: otherwise the last would not be told from the first.
    assert len({json.dumps(result["saved"][name]["pair_id"]) for name in names}) > 1
    assert hub.repos["dataset", "tester/kept"].private
    assert not [line for line in result["log"] if line.startswith("ERROR")]


def test_the_pool_tells_what_was_dropped(pushed):
    _, result, _, _ = pushed
    pool = result["round_trip"]["loaded"]["pool"]
    assert pool["depth_selected"] == result["round_trip"]["selected"]
    kept = [pair for pair, selected in zip(pool["pair_id"], pool["depth_selected"], strict=True) if selected]
    assert kept == result["round_trip"]["by_default"]["pair_id"]
    assert set(pool) >= {"prompt", "chosen", "rejected", "depth_cluster", "depth_distance", "depth_rank"}


def test_the_card_on_the_hub(pushed):
    hub, result, _, _ = pushed
    metadata, text = result["round_trip"]["metadata"], result["round_trip"]["text"]
    assert {"trl", "trl-bpo", "preference", "dpo"} <= set(metadata["tags"])
    assert metadata["license"] == "cc-by-4.0" and metadata["task_categories"] == ["text-generation"]
    names = [config["config_name"] for config in metadata["configs"]]
    assert set(names) == {"default", "pool", *(f"step-{step:06d}" for step in result["round_trip"]["steps"])}
    assert [config["config_name"] for config in metadata["configs"] if config.get("default")] == ["default"]
    assert 'load_dataset("tester/kept"' in text
    files = hub.files("dataset", "tester/kept")
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", text)
    assert len(pictures) == 3
    for alt, name in pictures:
        assert len(alt) > 20 and files[name].startswith(b"\x89PNG")
    for step in result["round_trip"]["steps"]:
        manifest = json.loads(files[f"step-{step:06d}/manifest.json"])
        assert manifest["step"] == step
    last = json.loads(files["data/manifest.json"])
    assert last["step"] == result["round_trip"]["steps"][-1] and last["outputs"]["kept"] in text


def test_every_selection_is_one_commit(pushed):
    hub, result, _, _ = pushed
    titles = [entry["title"] for entry in hub.repos["dataset", "tester/kept"].log][1:]
    steps = result["round_trip"]["steps"]
    # A push that is under way takes the next selection along, and the one at the end has them all.
    assert 2 <= len(titles) <= 4 and titles[-1] == f"Push the selection at step {steps[-1]}"


def test_what_was_there_stays(pushed):
    _, result, _, _ = pushed
    existing = result["existing"]
    front, body = existing["card"].split("---\n", 2)[1:]
    metadata = yaml.safe_load(front)
    # The run names a licence; where it does not, that of the card stays.
    assert metadata["license"] == "cc-by-4.0" and metadata["language"] == ["en"]
    assert metadata["custom_field"] == {"nested": [1, "two"]}
    assert {"mine", "trl-bpo"} <= set(metadata["tags"])
    assert "# My own words" in body and "They took me *hours*." in body
    assert body.count("Balanced Preference Optimization (BPO)") == 1
    assert existing["mine"] == {"prompt": ["mine"]}
    assert existing["default"] == result["round_trip"]["by_default"]
    # The step of an earlier run and shards of another size are gone, other files are not.
    assert "notes.txt" in existing["files"] and "mine/train.parquet" in existing["files"]
    assert not [path for path in existing["files"] if "777" in path or "00001-of-00002" in path]
    assert "step-000777" not in {config["config_name"] for config in metadata["configs"]}
    assert sorted(existing["files"]) == sorted(existing["files_first"])


def test_a_wrong_token_is_refused_before_any_training(pushed):
    _, result, _, _ = pushed
    wrong = result["wrong_token"]
    assert wrong["train"]["is_value_error"] and "'tester/kept'" in wrong["train"]["message"]
    assert "`curated_dataset_hub_id`" in wrong["train"]["message"] and not wrong["selected"]
    assert "401" in wrong["push"]["message"] and "403" in wrong["other"]["message"]
    assert "hf_wrong" not in json.dumps(wrong)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_fault_is_tried_again(pushed, endpoint):
    hub, result, faults, _ = pushed
    outcome = result["faults"][endpoint]
    assert faults.failed["once", endpoint] == 1 and outcome["once"]["url"].endswith(f"tester/once-{endpoint}")
    assert outcome["readable"] == result["round_trip"]["by_default"]
    # Where it goes on the push fails, and the repository is as it was.
    assert faults.failed["always", endpoint] >= 4 and "error" in outcome["always"]
    repo = hub.repos.get(("dataset", f"tester/always-{endpoint}"))
    assert repo is None or len(repo.log) == 1


def test_a_hub_that_is_down_does_not_stop_a_training(pushed):
    hub, result, _, folder = pushed
    down = result["down"]
    assert down["steps"] > 0 and down["saved"]
    errors = [line for line in down["log"] if line.startswith("ERROR")]
    assert len(errors) == 1 and f"trl-bpo push {folder / 'down'} --repo_id tester/always-commit" in errors[0]
    assert down["pushed_later"]["url"].endswith("tester/later")
    assert "data/train-00000-of-00001.parquet" in hub.files("dataset", "tester/later")


def test_what_cannot_be_pushed_says_why(pushed):
    _, result, _, _ = pushed
    assert "`curated_dataset_push_pool=True`" in result["refused"]["no_pool"]["message"]
    assert result["refused"]["no_run"]["is_value_error"]


def test_data_in_another_format_is_not_made_unreadable(pushed):
    hub, result, _, _ = pushed
    mixed = result["mixed"]
    assert mixed["is_value_error"] and "['mine']" in mixed["message"] and "Parquet" in mixed["message"]
    assert len(hub.repos["dataset", "tester/mixed"].log) == 2


def test_one_of_two_processes_pushes(pushed):
    hub, _, _, _ = pushed
    log = hub.repos["dataset", "tester/two"].log
    assert [entry["title"] for entry in log[1:]] == ["Push the selection at step 6"]
    assert "step-000003/train-00000-of-00001.parquet" in hub.files("dataset", "tester/two")
