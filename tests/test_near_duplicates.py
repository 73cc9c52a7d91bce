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


import numpy as np
import pytest

from trl_bpo import BreadthSelector
from trl_bpo.near_duplicates import near_duplicates


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def planted(groups=200, copies=4, d=48, noise=0.01, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, d))
    return unit(np.repeat(centres, copies, axis=0) + noise * rng.standard_normal((groups * copies, d)))


def test_planted_groups():
    rows = planted()
    order = np.random.default_rng(1).permutation(len(rows))
    original = near_duplicates(rows[order], 0.95)
    groups = order // 4
    # The first of each group stays, and the others repeat it.
    _, first = np.unique(groups, return_index=True)
    assert np.array_equal(original, first[groups])


def test_large_groups_over_several_blocks():
    original = near_duplicates(planted(groups=4, copies=900), 0.95)
    assert np.array_equal(original, np.repeat([0, 900, 1800, 2700], 900))


def test_a_chain_is_not_one_group():
    angles = np.deg2rad([0, 15, 30, 45])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    # cos 15 = 0.966, cos 30 = 0.866: the second repeats the first, the third repeats none that stays.
    assert near_duplicates(rows, 0.95).tolist() == [0, 0, 2, 2]


def test_threshold_of_one_takes_equal_rows_alone():
    rows = planted(groups=20, copies=1)
    rows[7], rows[9] = rows[3], rows[3]
    original = near_duplicates(rows, 1.0)
    assert (
        original[[7, 9]].tolist() == [3, 3] and (np.delete(original, [7, 9]) == np.delete(np.arange(20), [7, 9])).all()
    )


def test_same_result_every_time():
    rows = planted(groups=400, copies=3, noise=0.1)
    assert np.array_equal(near_duplicates(rows, 0.9), near_duplicates(rows, 0.9))


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.5])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match="`near_duplicate_threshold` must be in"):
        BreadthSelector(0.5, near_duplicate_threshold=threshold)
