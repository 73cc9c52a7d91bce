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


"""Two machines, each with an `accelerate launch` of its own, as on a cluster: gloo between two groups of processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset

from trl_bpo import quickstart


SCRIPT = Path(__file__).with_name("machines_script.py")


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    words = "rivers volcanoes sonnets taxes sorting engines gardens chess".split()
    questions = ("What are {}?", "Write about {} and {}.", "Why would anyone study {}?", "List facts on {} for {}.")
    texts = [question.format(one, other) for question in questions for one in words for other in words[:3]]
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    Dataset.from_dict({"prompt": texts}).to_parquet(path)
    return str(path)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(model_dir, prompts_file, folders, caches, seconds=0.0):
    """Start one launcher a machine, as on GPUs. `ACCELERATE_USE_CPU` has their processes use gloo."""
    port, launchers, kind = free_port(), [], "--multi_gpu" if len(folders) > 1 else "--cpu"
    for rank, (folder, cache) in enumerate(zip(folders, caches, strict=True)):
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", kind, "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--num_machines", str(len(folders)), "--num_processes", str(len(folders))),
            *("--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
            *("--num_cpu_threads_per_process", "1", str(SCRIPT), model_dir, quickstart.encoder_path(), prompts_file),
            *(str(folder), str(seconds)),
        ]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(cache)}
        log = open(folder / f"machine-{rank}.log", "w")
        options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
        launchers.append(subprocess.Popen(command, **options))
    return launchers


def finish(launchers, folders):
    for rank, (launcher, folder) in enumerate(zip(launchers, folders, strict=True)):
        assert launcher.wait(timeout=300) == 0, (folder / f"machine-{rank}.log").read_text()[-4000:]
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank, folder in enumerate(folders)]


def outcome(result):
    return {name: result[name] for name in ("breadth", "by_prompt", "depth", "curated")}


@pytest.fixture(scope="module")
def alone(tiny_dir, prompts_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    (result,) = finish(launch(tiny_dir, prompts_file, [folder], [folder / "cache"]), [folder])
    assert result["machines"] == 1
    return result


def check(results, alone):
    assert [result["machines"] for result in results] == [2, 2]
    for result in results:
        # Training differs: a step has twice the pairs. Which were selected before it does not. What is sampled depends on
        # the rows beside it in a batch; how much, and of what, does not.
        assert outcome(result) == outcome(alone)
        assert result["collected"] == results[0]["collected"]
        assert result["collected"]["prompt"] == alone["collected"]["prompt"]
        assert all(len(scores) == 2 for scores in result["collected"]["scores"])


@pytest.mark.parametrize("shared", [True, False], ids=["shared disk", "disks of their own"])
def test_two_machines_select_as_one_process(alone, tiny_dir, prompts_file, tmp_path, shared):
    folders = [tmp_path / "run"] * 2 if shared else [tmp_path / "a", tmp_path / "b"]
    caches = [tmp_path / "cache"] * 2 if shared else [tmp_path / "cache-a", tmp_path / "cache-b"]
    check(finish(launch(tiny_dir, prompts_file, folders, caches), folders), alone)
    for rank, folder in enumerate(folders):
        # Each machine embedded its shards, and none embedded all.
        log = (folder / f"machine-{rank}.log").read_text()
        parts = [part for part in range(1, 6) if f"Embedding prompts, part {part} of" in log]
        assert parts == [part for part in range(1, 6) if part % 2 != rank and f"part {part} of" in log] and parts


def written(folder, rank):
    path = folder / f"written-{rank}.log"
    return path.read_text().splitlines() if path.exists() else []


def test_a_machine_that_dies(alone, tiny_dir, prompts_file, tmp_path):
    folders, caches = [tmp_path / "run"] * 2, [tmp_path / "cache"] * 2
    launchers = launch(tiny_dir, prompts_file, folders, caches, seconds=1.0)
    try:
        deadline = time.monotonic() + 200
        while len(written(folders[1], 1)) < 2:
            assert time.monotonic() < deadline and launchers[1].poll() is None
            time.sleep(0.05)
        # The other machine is not left waiting.
        os.kill(int((folders[1] / "pid-1").read_text()), signal.SIGKILL)
        assert all(launcher.wait(timeout=120) != 0 for launcher in launchers)
    finally:
        for launcher in launchers:
            launcher.kill()
    before = [written(folders[0], rank) for rank in range(2)]
    embedded = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("cache-*.arrow")}
    assert embedded and not list(folders[0].glob("result-*.json"))
    check(finish(launch(tiny_dir, prompts_file, folders, caches), folders), alone)
    # What was embedded and differentiated was not done again.
    after = [set(written(folders[0], rank)[len(before[rank]) :]) for rank in range(2)]
    assert all(before) and after[0] and after[1] and not set(before[0] + before[1]) & (after[0] | after[1])
    assert all(path.stat().st_mtime_ns == when for path, when in embedded.items())
