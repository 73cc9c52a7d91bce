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

import numpy as np
import pytest
from features_script import Run


# By hand, with more of them.
KILLS = int(os.environ.get("TRL_BPO_TEST_KILLS", "3"))
# About fifty batches of features.
LARGE = {"prompts": 30, "per_prompt": 3, "gradient_batch_tokens": 90}


def assert_equal(run, whole, num_processes=1):
    """Features, what is stored, and the outcome are the same to the last bit, and no batch was computed twice."""
    names = [f"result-{rank}.npz" for rank in range(num_processes)]
    expected = {path.name: path for path in whole.folder.glob("features-*.npz")}
    assert expected and {path.name for path in run.folder.glob("features-*.npz")} == set(expected)
    pairs = [(run.folder / name, path) for name, path in expected.items()]
    pairs += [(run.folder / name, whole.folder / "result-0.npz") for name in names]
    for path, expected_path in pairs:
        found, wanted = np.load(path), np.load(expected_path)
        assert found.files == wanted.files
        for name in found.files:
            assert np.array_equal(found[name], wanted[name]), (path.name, name)
    batches, expected_batches = ([(step, *rows) for step, rows in r.written()] for r in (run, whole))
    assert len(set(batches)) == len(batches) and set(batches) <= set(expected_batches)
    # Killed between the two, a process leaves a batch on the disk and no line in the log.
    assert len(expected_batches) - len(batches) <= run.n_killed


# Killed


@pytest.mark.parametrize("packed", [False, True])
def test_a_selection_killed_at_random_moments(tiny_dir, tmp_path, packed):
    settings = {**LARGE, "packed": packed, "loss_type": "ipo"}
    whole = Run(tiny_dir, tmp_path / "whole", **settings).finish()
    n_batches = len(whole.written())
    assert n_batches > 35
    run = Run(tiny_dir, tmp_path / "killed", **settings).kill_at_random(n_batches, KILLS, seed=KILLS + packed)
    assert KILLS < len(run.written()) < n_batches and not list(run.folder.glob("result*"))
    assert_equal(run.finish(), whole)
    assert not (run.folder / "output" / "_features").exists()


def test_a_batch_of_which_a_part_is_there_is_computed_as_a_whole(tiny_dir, tmp_path):
    # With other rows beside it, a row would have other last bits. A kill may cut a long write in two.
    settings = {"gradient_batch_tokens": 120}
    whole = Run(tiny_dir, tmp_path / "whole", **settings).finish()
    run = Run(tiny_dir, tmp_path / "killed", **settings)
    n_written = run.kill(3)
    records = run.folder / "output" / "_features" / "step-000000" / "part-00000.rows"
    with records.open("r+b") as file:
        file.truncate(records.stat().st_size - 40)
    run.finish()
    assert np.array_equal(*(np.load(r.folder / "features-0.npz")["stored"] for r in (run, whole)))
    assert run.written()[n_written] in run.written()[:n_written]


def test_a_training_killed_during_its_selections(tiny_dir, tmp_path):
    settings = {
        "train": True,
        "gradient_batch_tokens": 60,
        "reselect_every_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 7,
    }
    whole = Run(tiny_dir, tmp_path / "whole", **settings).finish()
    steps = [step for step, _ in whole.written()]
    assert set(steps) == {0, 3, 6}
    run = Run(tiny_dir, tmp_path / "killed", **settings)
    # In the first selection, before there is a checkpoint, and in the last one, in which it resumes from the fourth step
    # (or, as it may still be writing that, from the second).
    for step, n_more in ((0, 3), (0, 7), (6, 2)):
        run.kill(steps.index(step) + n_more)
    assert run.written()[-1][0] == 6
    assert_equal(run.finish(), whole)


# Two processes


@pytest.fixture(scope="module")
def alone(tiny_dir, tmp_path_factory):
    """Runs of one process."""
    folder, runs = tmp_path_factory.mktemp("alone"), {}

    def run(**settings):
        key = repr(settings)
        if key not in runs:
            runs[key] = Run(tiny_dir, folder / str(len(runs)), **settings).finish()
        return runs[key]

    return run


RESPONSES = {"gradient_batch_tokens": 60, "loss_type": "ipo"}
PACKED = {"gradient_batch_tokens": 85, "loss_type": "ipo", "packed": True}
ONE_BATCH = {"gradient_batch_tokens": 10**6}


@pytest.mark.parametrize("settings", [RESPONSES, PACKED, ONE_BATCH], ids=["responses", "packed", "one batch"])
def test_two_processes_compute_what_one_does(tiny_dir, tmp_path, alone, settings):
    whole = alone(**settings)
    # An uneven share, or none at all.
    assert len(whole.written()) % 2 == 1 and (settings == ONE_BATCH) == (len(whole.written()) == 1)
    run = Run(tiny_dir, tmp_path / "two", **settings).finish(2)
    assert_equal(run, whole, num_processes=2)


@pytest.mark.parametrize("settings", [RESPONSES, PACKED], ids=["responses", "packed"])
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(tiny_dir, tmp_path, alone, settings, first, then):
    run = Run(tiny_dir, tmp_path / "killed", **settings)
    run.kill(4, num_processes=first)
    assert_equal(run.finish(then), alone(**settings), num_processes=then)


@pytest.mark.parametrize("settings", [RESPONSES, PACKED], ids=["responses", "packed"])
def test_processes_without_a_folder_in_common(tiny_dir, tmp_path, alone, settings):
    run = Run(tiny_dir, tmp_path / "killed", shared=False, **settings)
    run.kill(4, num_processes=2)
    parts = list(run.folder.glob("output-*/_features/step-000000/part-*.rows"))
    assert sorted(part.name for part in parts) == ["part-00000.rows", "part-00001.rows"]
    assert_equal(run.finish(2), alone(**settings), num_processes=2)


def change_model(run, step):
    """As if the store of the second process were that of another model."""
    path = run.folder / "output-1" / "_features" / f"step-{step:06d}" / "part-00001.json"
    path.write_text(path.read_text().replace('"model": "', '"model": "other-'))


def test_what_one_process_refuses_ends_all(tiny_dir, tmp_path):
    run = Run(tiny_dir, tmp_path / "killed", shared=False, **RESPONSES)
    run.kill(4, num_processes=2)
    change_model(run, 0)
    processes = run.start(2)
    for process in processes:
        # The other one would wait for it.
        process.join(120)
    assert [process.exitcode for process in processes] == [1, 1]


def test_what_one_process_computes_anew_all_do(tiny_dir, tmp_path):
    # Steps that were trained again need not give the same bits, and so a store that fits no more, on every machine.
    settings = {
        "train": True,
        "shared": False,
        "gradient_batch_tokens": 60,
        "reselect_every_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_on_each_node": True,
        "max_steps": 4,
    }
    whole = Run(tiny_dir, tmp_path / "whole", **settings).finish(2)
    run = Run(tiny_dir, tmp_path / "killed", **settings)
    steps = [step for step, _ in whole.written()]
    n_written = run.kill(steps.index(3) + 4, num_processes=2)
    change_model(run, 3)
    run.finish(2)
    for name in ("features-0.npz", "features-3.npz", "result-0.npz", "result-1.npz"):
        found, expected = np.load(run.folder / name), np.load(whole.folder / name)
        for key in expected.files:
            assert np.array_equal(found[key], expected[key]), (name, key)
    # All of it, and by both.
    again = run.written()[n_written:]
    assert sorted(again) == sorted(batch for batch in whole.written() if batch[0] == 3)
