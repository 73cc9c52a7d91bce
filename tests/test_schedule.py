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


import itertools
import math

import pytest

from trl_bpo.schedule import SelectionSchedule


def make(first=0, every_steps=None, every_epochs=1, steps_per_epoch=5, rows_per_step=2, rows=9, rows_used=None):
    return SelectionSchedule(
        first=first,
        every_steps=every_steps,
        every_epochs=every_epochs,
        steps_per_epoch=steps_per_epoch,
        rows_per_step=rows_per_step,
        rows_per_epoch=rows,
        rows_used_per_epoch=rows if rows_used is None else rows_used,
    )


def selections(schedule, steps, start=0, last=None):
    """Steps before which a run that goes from `start` to `steps` selects."""
    found = []
    for step in range(start, steps):
        if schedule.is_due(step, last):
            found.append(step)
            last = step
    return found


@pytest.mark.parametrize("steps_per_epoch", [1, 4, 5])
@pytest.mark.parametrize("first", [0, 1, 4, 7, 10])
def test_epochs(steps_per_epoch, first):
    boundaries = range(0, 40, steps_per_epoch)
    for every in (1, 2, 3):
        schedule = make(first, every_epochs=every, steps_per_epoch=steps_per_epoch)
        # Every so many boundaries, counted from the start of training. The first selection is one more.
        assert selections(schedule, 40) == [first, *(step for step in boundaries[::every] if step > first)]
    assert selections(make(first, every_epochs=0, steps_per_epoch=steps_per_epoch), 40) == [first]


@pytest.mark.parametrize("every_epochs", [0, 1, 3])
@pytest.mark.parametrize("first", [0, 1, 4, 7, 10])
def test_steps_are_counted_from_the_first_selection(first, every_epochs):
    for every in (1, 2, 3, 7, 100):
        assert selections(make(first, every, every_epochs), 40) == list(range(first, 40, every))


def test_examples():
    assert selections(make(), 20) == [0, 5, 10, 15]
    assert selections(make(every_epochs=2), 20) == [0, 10]
    assert selections(make(first=3), 20) == [3, 5, 10, 15]
    assert selections(make(first=5, every_epochs=2), 20) == [5, 10]
    assert selections(make(first=3, every_steps=4), 20) == [3, 7, 11, 15, 19]


@pytest.mark.parametrize(
    "options", [{}, {"every_epochs": 2}, {"every_epochs": 0}, {"every_steps": 3}, {"every_steps": 1}]
)
@pytest.mark.parametrize("first", [0, 2, 6])
def test_a_resumed_run_selects_at_the_steps_of_a_whole_one(first, options):
    schedule = make(first, **options)
    whole = selections(schedule, 30)
    for start in range(30):
        last = max((step for step in whole if step < start), default=None)
        assert selections(schedule, 30, start, last) == [step for step in whole if step >= start]
        # A run that was stopped after it selected and before the step does not select a second time.
        if start in whole:
            assert not schedule.is_due(start, start)


@pytest.mark.parametrize("options", [{}, {"every_epochs": 2}, {"every_epochs": 0}, {"every_steps": 3}])
@pytest.mark.parametrize("first", [0, 2, 6])
def test_a_run_that_goes_on_from_one_without_selection(first, options):
    schedule = make(first, **options)
    whole = selections(schedule, 30)
    for start in (1, 3, 5, 7, 13, 29):
        # There is nothing to train on, so it selects at once. After that it is back on the schedule.
        begin = max(start, first)
        assert selections(schedule, 30, start) == [begin, *(step for step in whole if step > begin)]


def test_not_before_the_first_selection():
    # As where `first_selection_step` was raised for the second part of a run.
    schedule = make(first=8)
    assert not any(schedule.is_due(step, 2) for step in range(3, 8))


def epoch(n, batch, accumulation, drop_last):
    """Rows of each optimizer step of an epoch, batch by batch as a dataloader makes them."""
    batches = [list(range(n))[start : start + batch] for start in range(0, n, batch)]
    if drop_last and len(batches[-1]) < batch:
        batches.pop()
    steps = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    return len(batches), [list(itertools.chain(*step)) for step in steps]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_rows_of_each_step(batch, accumulation, drop_last):
    for n in range(batch, 14):
        n_batches, steps = epoch(n, batch, accumulation, drop_last)
        schedule = make(
            steps_per_epoch=math.ceil(n_batches / accumulation),
            rows_per_step=batch * accumulation,
            rows=n,
            rows_used=min(n, n_batches * batch),
        )
        assert schedule.steps_per_epoch == len(steps)
        step = 0
        for before in range(0, 3 * n, n):
            first, within = step, 0
            for rows in steps:
                assert schedule.epoch_start(step) == first
                # An epoch takes all of its rows off the stream, those of a batch that is dropped as well.
                assert schedule.rows_before(step) == before + within
                assert schedule.rows_of(step) == len(rows)
                within += len(rows)
                step += 1
        assert sum(schedule.rows_of(step) for step in range(len(steps))) == n - drop_last * (n % batch)
