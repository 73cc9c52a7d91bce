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


"""
A training that is stopped or killed at any moment and goes on from its last checkpoint ends like one that is not.

The cases are random. `TRL_BPO_RESUME_SEED` gives others and `TRL_BPO_RESUME_CASES` more; the name of a test has the seed
and the number of its case, from which it can be run again. Those beyond the first dozen are `slow`.
"""

import json
import os
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from recording import RecordingTrainer
from resume_script import MOMENTS, Training, draw_case, make_trainer, outcome, weights
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint


SEED = int(os.environ.get("TRL_BPO_RESUME_SEED", "21"))
CASES = int(os.environ.get("TRL_BPO_RESUME_CASES", "12"))
SLOW_CASES = 60
KINDS = [*MOMENTS, "outside"]


def cases(n_slow=0):
    return [
        pytest.param(number, marks=[pytest.mark.slow] if number >= CASES else [], id=f"{SEED}-{number}")
        for number in range(CASES + n_slow)
    ]


def describe(request, what):
    """Have it shown if the test fails."""
    again = f"TRL_BPO_RESUME_SEED={SEED} TRL_BPO_RESUME_CASES={CASES} pytest -m '' '{request.node.nodeid}'"
    request.node.add_report_section("call", "case", f"{what}\nAgain: {again}")


# Killed


def kill(run, whole, rng, kind):
    """Start `run`, and kill it at a moment of this kind that lies ahead of it."""
    start = run.resumes_from()
    if kind == "outside":
        lines = [line for line in whole.trace(0) if line[1] >= start]
        return bool(lines) and run.kill(rng.randint(1, len(lines)), rng.random() * 0.05), kind
    rank = rng.randrange(run.num_processes)
    names = [name for name, step, _ in whole.moments(rank) if step >= start and name in MOMENTS[kind]]
    if not names:
        return False, None
    name = rng.choice(sorted(set(names)))
    # A checkpoint is there when the training goes on from it.
    moment = rng.choice([m for m in whole.moments(rank) if m[0] == name and m[1] >= start])
    return run.kill_itself(rank, moment, rng.random() * 0.05), (rank, *moment)


def assert_trace(run, whole, rank):
    """Each start trained on what the uninterrupted run did, from its checkpoint on, and the last one to the end."""
    expected, starts = whole.trace(rank)[1:], []
    for kind, step, *rows in run.trace(rank):
        if kind == "start":
            starts.append((step, []))
        else:
            starts[-1][1].append([kind, step, *rows])
    for number, (step, found) in enumerate(starts):
        ahead = [line for line in expected if line[1] >= step]
        assert found == (ahead if number == len(starts) - 1 else ahead[: len(found)]), (rank, number, step)


def assert_equal(run, whole):
    for rank in range(run.num_processes):
        assert_trace(run, whole, rank)
        found, expected = (json.loads((r.folder / f"outcome-{rank}.json").read_text()) for r in (run, whole))
        for name, value in expected.items():
            assert found[name] == value, (rank, name)
        found, expected = (np.load(r.folder / f"weights-{rank}.npz") for r in (run, whole))
        assert found.files == expected.files
        for name in expected.files:
            assert np.array_equal(found[name], expected[name]), (rank, name)
    for pattern in ("_selections/*.parquet", "_curated_dataset/**/*.parquet"):
        found, expected = (
            {path.relative_to(r.folder): pq.read_table(path) for path in r.folder.glob(f"output/{pattern}")}
            for r in (run, whole)
        )
        assert expected and set(found) == set(expected)
        for path, table in expected.items():
            assert found[path].equals(table), path


@pytest.mark.parametrize("number", cases(SLOW_CASES))
def test_a_killed_training_goes_on_as_if_it_were_not(tiny_dir, tmp_path, request, number):
    rng = random.Random(f"{SEED} {number}")
    num_processes = 2 if number % 3 == 2 else 1
    kinds = [KINDS[number % len(KINDS)]]
    if rng.random() < 0.4:
        kinds.append(rng.choice(KINDS))
    case = draw_case(rng, num_processes)
    describe(request, {"processes": num_processes, "kinds": kinds, **case})

    whole = Training(tiny_dir, tmp_path / "whole", case, num_processes).finish()
    run = Training(tiny_dir, tmp_path / "killed", case, num_processes)
    for n_before, kind in enumerate(kinds):
        killed, moment = kill(run, whole, rng, kind)
        request.node.add_report_section("call", "kill", f"{moment}; goes on from step {run.resumes_from()}")
        # The second time it need not come to its moment: what a selection has on the disk it does not compute again, and
        # nothing may lie ahead of a last checkpoint.
        assert killed or n_before > 0
    assert_equal(run.finish(), whole)


# Stopped


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("number", cases())
def test_a_stopped_training_goes_on_as_if_it_were_not(tiny_dir, tmp_path, request, number):
    rng = random.Random(f"stopped {SEED} {number}")
    case = draw_case(rng)
    case["save_strategy"] = "no"
    trainers = [make_trainer(RecordingTrainer, tiny_dir, tmp_path / "whole", case)]
    trainers[0].train()
    whole = trainers[0]
    # Anywhere, and where a selection lies behind it in the same epoch.
    selected_at = [step for step, _ in whole.selections]
    soon = [step + 1 for step in selected_at if 0 < step < whole.state.max_steps - 1]
    stops = sorted({rng.randrange(1, whole.state.max_steps), rng.choice(soon or [1])})
    describe(request, {"stops": stops, **case})
    step = 0
    for stop in [*stops, None]:
        resumed = make_trainer(RecordingTrainer, tiny_dir, tmp_path / "stopped", case)
        resumed.add_callback(StopAt(stop))
        resumed.train(resume_from_checkpoint=get_last_checkpoint(tmp_path / "stopped") if step else None)
        end = stop or whole.state.global_step
        assert resumed.state.global_step == end
        assert resumed.batches == [(at, rows) for at, rows in whole.batches if step <= at < end]
        assert resumed.selections == [(at, rows) for at, rows in whole.selections if step <= at < end]
        step = end
    assert outcome(resumed) == outcome(whole)
    found, expected = weights(resumed), weights(whole)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name
