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


from collections import Counter

import numpy as np
import pytest

from trl_bpo.rules import draw_like, draw_scores, k_centre


def ids_of(n):
    """Ids in another order than the rows."""
    return [f"pair-{(7 * i) % 997:03d}" for i in range(n)]


def prompts_of(sizes):
    return [f"prompt-{p}" for p, size in enumerate(sizes) for _ in range(size)]


def histogram(selected, prompt_ids):
    return sorted(Counter(np.asarray(prompt_ids)[selected]).values())


def test_draws_depend_on_the_ids_and_not_on_their_order():
    ids = [f"pair-{(7 * i) % 31}" for i in range(31)]
    scores = draw_scores(ids, 1, 2)
    assert scores.shape == (31,) and (scores >= 0).all() and (scores < 1).all() and len(set(scores)) == 31
    order = np.random.default_rng(0).permutation(31)
    assert np.array_equal(draw_scores([ids[i] for i in order], 1, 2), scores[order])
    assert np.array_equal(draw_scores(ids, 1, 2), scores)
    for seed, number in ((2, 2), (1, 3), (2, 1)):
        assert not np.array_equal(draw_scores(ids, seed, number), scores)


# With the numbers of pairs a prompt of another selection


@pytest.mark.parametrize("sizes", [[3] * 10, [9, 1, 4, 4, 2, 1, 1], [20, 1], [1] * 7, [5], [2, 3, 4, 5, 6, 7]])
def test_as_many_prompts_of_each_number_of_pairs(sizes):
    prompt_ids = prompts_of(sizes)
    n = len(prompt_ids)
    for number in range(20):
        selected = np.random.default_rng(number).random(n) < 0.4
        drawn = draw_like(selected, ids_of(n), prompt_ids, 0, number)
        assert drawn.dtype == bool and histogram(drawn, prompt_ids) == histogram(selected, prompt_ids)


def test_numbers_go_to_prompts_that_have_as_many():
    # Only the first and the second can take the four, and only one of them then the three.
    prompt_ids = prompts_of([4, 4, 2, 1])
    selected = np.array([True] * 4 + [True] * 3 + [False] + [True, False] + [False])
    drawn = [draw_like(selected, ids_of(11), prompt_ids, 0, number) for number in range(40)]
    counts = {tuple(Counter(np.asarray(prompt_ids)[rows])[f"prompt-{p}"] for p in range(4)) for rows in drawn}
    assert counts == {(4, 3, 1, 0), (4, 3, 0, 1), (3, 4, 1, 0), (3, 4, 0, 1)}


def test_every_prompt_and_every_pair_of_it_has_the_same_chance():
    prompt_ids = prompts_of([3] * 6)
    selected = np.array([True, True, False] * 2 + [False] * 12)
    counts = np.sum([draw_like(selected, ids_of(18), prompt_ids, 0, number) for number in range(600)], axis=0)
    # 4 of 18 pairs in each of 600 draws, with a standard deviation of 10.
    assert np.abs(counts - 600 * 4 / 18).max() < 50


def test_rows_may_come_in_any_order():
    prompt_ids, order = prompts_of([9, 1, 4, 4, 2, 1, 1]), np.random.default_rng(0).permutation(22)
    selected, ids = np.random.default_rng(1).random(22) < 0.5, ids_of(22)
    first = draw_like(selected, ids, prompt_ids, 3, 1)
    again = draw_like(selected[order], [ids[i] for i in order], [prompt_ids[i] for i in order], 3, 1)
    assert np.array_equal(again, first[order])
    for seed, number in ((3, 2), (4, 1)):
        assert not np.array_equal(draw_like(selected, ids, prompt_ids, seed, number), first)


# Greedy k-centre


def naive_k_centre(features, ids, n_keep):
    """Rows in the order in which they are kept, from all distances between them."""
    x = features.astype(np.float64)
    distances = np.linalg.norm(x[:, None] - x[None], axis=2)
    to_mean = np.linalg.norm(x - x.mean(axis=0), axis=1)
    kept = [min(range(len(x)), key=lambda row: (to_mean[row], ids[row]))]
    while len(kept) < n_keep:
        left = [row for row in range(len(x)) if row not in kept]
        kept.append(min(left, key=lambda row: (-min(distances[row, kept]), ids[row])))
    return kept


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
# Two would be equally near to their mean, but for rounding.
@pytest.mark.parametrize("n", [1, 3, 12, 37])
def test_k_centre_is_that_of_all_distances(n, dtype):
    features, ids = np.random.default_rng(n).standard_normal((n, 6)).astype(dtype), ids_of(n)
    for n_keep in {1, n // 2 or 1, n - 1 or 1, n}:
        places = k_centre(features, ids, n_keep)
        assert sorted(places) == list(range(n))
        kept = naive_k_centre(features, ids, n_keep)
        assert np.argsort(places)[:n_keep].tolist() == kept
        # What follows: the farthest from what was kept.
        rest = np.argsort(places)[n_keep:]
        to_kept = [min(np.linalg.norm(features[row] - features[kept], axis=1)) for row in rest]
        assert to_kept == sorted(to_kept, reverse=True)


def test_k_centre_on_a_line():
    features = np.array([[0.0], [1.0], [5.0], [6.0], [13.0]])
    # The mean is 5. From there 13 is farthest, then 0, and 1 and 6 are both at a distance of 1.
    assert k_centre(features, list("edcba"), 3).tolist() == [2, 4, 0, 3, 1]
    assert k_centre(features, list("eacdb"), 4).tolist() == [2, 3, 0, 4, 1]


def test_equal_rows_are_kept_last_and_by_id():
    features = np.random.default_rng(0).standard_normal((4, 33)).astype(np.float32)[[0, 1, 2, 3, 1, 1, 0]]
    ids = list("gfedcba")
    for n_keep in range(1, 8):
        order = np.argsort(k_centre(features, ids, n_keep))[:n_keep]
        assert len(set(order.tolist())) == n_keep
        assert order.tolist() == naive_k_centre(features, ids, n_keep)
    assert {ids[row] for row in order[:4]} == {"a", "b", "d", "e"} and [ids[row] for row in order[4:]] == list("cfg")
    # With nothing but equal rows.
    assert k_centre(np.ones((5, 3)), list("badce"), 3).tolist() == [1, 0, 3, 2, 4]


def test_row_order_does_not_matter_to_k_centre():
    rng = np.random.default_rng(0)
    features, ids = rng.standard_normal((60, 6)).astype(np.float32), np.asarray(ids_of(60))
    features[10:20] = features[0]
    order = rng.permutation(60)
    first, copy = k_centre(features, ids.tolist(), 55), features.copy()
    assert np.array_equal(k_centre(features[order], ids[order].tolist(), 55), first[order])
    assert np.array_equal(features, copy)
