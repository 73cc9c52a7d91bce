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

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from distributed_script import make, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def processes(tiny_dir, folder):
    """What each of two processes saw."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(Path(__file__).with_name("distributed_script.py")), tiny_dir, str(folder)),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(folder / f"process-{rank}.pt", weights_only=False) for rank in range(2)]


def test_there_are_two_processes(processes):
    assert [process["sigmoid"]["num_processes"] for process in processes] == [2, 2]


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_features_and_first_selection_are_those_of_one_process(processes, tiny_dir, tmp_path, loss_type):
    alone = run(make(tiny_dir, tmp_path, loss_type=loss_type, max_steps=1))
    assert alone["num_processes"] == 1
    # The main process has them all, the other none.
    assert np.array_equal(processes[0][loss_type]["features"], alone["features"])
    assert processes[1][loss_type]["features"] is None
    for process in processes:
        assert process[loss_type]["selections"][0] == alone["selections"][0]


def test_processes_agree(processes):
    first, second = (process["sigmoid"] for process in processes)
    # Three steps an epoch; every process selects at each second step.
    assert first["steps"] == 6 and [step for step, _ in first["selections"]] == [0, 2, 4]
    assert first["selections"] == second["selections"] and first["curated"] == second["curated"]
    assert len({frozenset(rows) for _, rows in first["selections"]}) > 1
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name


def test_processes_share_the_selected_pairs(processes):
    first, second = (process["sigmoid"] for process in processes)
    selected = dict(first["selections"])
    for (step, rows), (other_step, other_rows) in zip(first["batches"], second["batches"], strict=True):
        assert step == other_step and set(rows) | set(other_rows) <= selected[step - step % 2]
        # Disjoint but at the end of an epoch, where a process whose share ran out starts over.
        assert step % 3 == 2 or not set(rows) & set(other_rows)


def test_a_resumed_run_ends_like_an_uninterrupted_one(processes):
    # Step 5 is the last of an epoch that a selection has cut in two.
    for process in processes:
        whole, resumed = process["sigmoid"], process["resumed"]
        assert resumed["batches"] == [(step, rows) for step, rows in whole["batches"] if step >= 5]
        for name, value in whole["weights"].items():
            assert torch.equal(resumed["weights"][name], value), name


def test_batches_that_are_split(processes):
    first, second = (process["split"] for process in processes)
    # Nine pairs in batches of two, one each: five steps an epoch, and a selection at each second.
    assert first["steps"] == 10 and [step for step, _ in first["selections"]] == [0, 2, 4, 6, 8]
    assert first["selections"] == second["selections"]
    for (step, rows), (_, other_rows) in zip(first["batches"], second["batches"], strict=True):
        assert len(rows) == len(other_rows) == 1
        assert {*rows, *other_rows} <= dict(first["selections"])[step - step % 2]
        assert step % 5 == 4 or rows != other_rows


def test_an_error_of_the_main_process_reaches_all(processes):
    assert [process["failing"]["error"] for process in processes] == ["no clusters today"] * 2


def test_files_are_written_once(processes, folder, tmp_path):
    assert len(list((folder / "sigmoid" / "_selections").glob("step-*.parquet"))) == 3
    saved = load_dataset(str(folder / "sigmoid" / "_curated_dataset"), split="train", cache_dir=str(tmp_path))
    assert saved["pair_id"] == processes[0]["sigmoid"]["curated"]["pair_id"]
