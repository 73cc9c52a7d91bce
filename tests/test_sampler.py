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

from itertools import islice

import numpy as np
import pytest
import torch

from trl_bpo.sampler import ActivePairsSampler


def make(num_samples=7, seed=3, rows=range(10, 17), selection=1):
    sampler = ActivePairsSampler(num_samples, seed)
    sampler.set_rows(np.asarray(rows), selection)
    return sampler


def stream(sampler, start, length):
    """Positions `start` to `start + length` of the stream, read one by one."""
    values = []
    for position in range(start, start + length):
        sampler.start = position
        values.append(next(iter(sampler)))
    return values


def test_a_pass_covers_every_active_row_once():
    sampler = make()
    assert sorted(sampler) == list(range(10, 17))
    assert len(sampler) == 7


def test_passes_differ():
    sampler = make()
    first = list(sampler)
    sampler.start = 7
    second = list(sampler)
    assert sorted(second) == sorted(first) and second != first
    assert all(type(row) is int for row in first)


def test_an_iteration_continues_the_stream_across_passes():
    sampler = make()
    whole = stream(sampler, 0, 28)
    assert [sorted(whole[i : i + 7]) for i in (0, 7, 14)] == [list(range(10, 17))] * 3
    for start in (0, 3, 7, 12, 20):
        sampler.start = start
        assert list(sampler) == whole[start : start + 7]


def test_the_rest_of_an_epoch():
    sampler = make()
    whole = stream(sampler, 0, 14)
    sampler.start, sampler.already_drawn = 0, 4
    assert list(sampler) == whole[:3]
    sampler.start = 5
    assert list(sampler) == whole[5:8]
    assert len(sampler) == 7


def test_selection_with_fewer_rows_than_the_budget():
    # Pairs without a gradient may leave fewer rows than the length: passes are shorter, the length stays.
    sampler = make(num_samples=7, rows=[1, 2, 3])
    rows = list(sampler)
    assert len(rows) == 7 and sorted(rows[:3]) == sorted(rows[3:6]) == [1, 2, 3]


def test_order_depends_on_seed_selection_and_position_alone():
    first = list(make())
    torch.manual_seed(0)
    np.random.default_rng(0)
    assert list(make()) == first
    state = torch.get_rng_state()
    list(make())
    assert torch.equal(torch.get_rng_state(), state)
    assert list(make(seed=4)) != first
    assert list(make(selection=2)) != first


def test_new_rows_take_effect_at_the_next_iteration():
    sampler = make()
    iterator = iter(sampler)
    list(islice(iterator, 2))
    sampler.set_rows(np.arange(20, 27), 2)
    assert sorted(sampler) == list(range(20, 27))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_selections(size):
    assert sorted(make(num_samples=size, rows=range(size))) == list(range(size))
