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
import torch
from sklearn.cluster import KMeans

from trl_bpo import clustering, kmeans
from trl_bpo.clustering import cluster, nearest_to_centre
from trl_bpo.kmeans import fit_kmeans
from trl_bpo.rows import RowsOf


def mixture(n=6000, d=16, components=60, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((components, d))
    rows = means[rng.integers(components, size=n)] + 0.4 * rng.standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    # What happens to a million rows happens here to some thousand.
    monkeypatch.setattr(kmeans, "_MIN_TRAINING_ROWS", 1000)
    monkeypatch.setattr(kmeans, "_ROWS_A_BLOCK", {"cpu": 512})


def fit(rows, k=40, **kwargs):
    return fit_kmeans(rows, np.arange(len(rows)), k, device="cpu", **kwargs)


def test_inertia_is_that_of_full_lloyd():
    rows = mixture(20_000)
    found = [np.square(fit(rows, seed=seed).distances).sum() for seed in range(12)]
    full = [KMeans(40, n_init=1, random_state=seed).fit(rows).inertia_ for seed in range(12)]
    # Seeded from 16 rows a cluster, they end at 1.015 (24 starts of each); from four, at 1.035.
    assert np.mean(found) < 1.025 * np.mean(full)


def test_distances_are_those_to_the_nearest_centre():
    rows = mixture()
    result = fit(rows)
    assert result.labels.shape == result.distances.shape == (6000,) and len(np.unique(result.labels)) == 40
    # The centres are means of the rows that were nearest before, so that hardly any row lies elsewhere now.
    means = np.stack([rows[result.labels == label].mean(axis=0) for label in range(40)])
    to_means = np.linalg.norm(rows[:, None] - means, axis=2)
    assert (to_means.argmin(axis=1) == result.labels).mean() > 0.98
    assert np.abs(result.distances - to_means[np.arange(6000), result.labels]).mean() < 0.01
    explained = 1 - np.square(result.distances).sum() / np.square(rows - rows.mean(axis=0)).sum()
    assert result.variance_explained == pytest.approx(explained, abs=1e-5)


def test_order_of_the_rows_plays_no_part():
    rows, ids = mixture(), np.random.default_rng(1).permutation(6000)
    first = fit_kmeans(rows, np.argsort(ids), 40)
    shuffle = np.random.default_rng(2).permutation(6000)
    second = fit_kmeans(rows[shuffle], np.argsort(ids[shuffle]), 40)
    assert np.array_equal(first.labels[shuffle], second.labels)
    assert np.array_equal(first.distances[shuffle], second.distances)


def test_number_of_threads_plays_no_part():
    rows, before = mixture(), torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(fit(rows))
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert np.array_equal(results[0].labels, other.labels)
        assert np.array_equal(results[0].distances, other.distances)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_file_and_memory_are_alike(tmp_path, dtype):
    rows = mixture().astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
    first, second = fit(rows), fit(stored)
    assert np.array_equal(first.labels, second.labels) and np.array_equal(first.distances, second.distances)


def test_spherical_centres_have_unit_length():
    rows = mixture()
    result = fit(rows, spherical=True)
    # To a centre of unit length, which is the direction of the mean.
    means = np.stack([rows[result.labels == label].mean(axis=0) for label in range(40)])
    to_centres = np.linalg.norm(rows - (means / np.linalg.norm(means, axis=1, keepdims=True))[result.labels], axis=1)
    assert np.abs(result.distances - to_centres).mean() < 0.01


def test_first_centres_are_spread():
    # One row far out in each of 30 directions, among rows that lie close together.
    rows = np.full((3000, 32), 5.0) + 0.1 * np.random.default_rng(0).standard_normal((3000, 32))
    far = np.random.default_rng(1).choice(3000, 30, replace=False)
    rows[far, np.arange(30)] += 100.0
    centres = kmeans._kmeans_plusplus(torch.from_numpy(rows.astype(np.float32)), 31, seed=0)
    assert sorted(np.flatnonzero((centres > 50).sum(axis=0)).tolist()) == list(range(30))
    assert (centres > 50).sum() == 30


def test_rows_that_coincide():
    rows = np.ones((3000, 4), dtype=np.float32)
    result = fit(rows, k=3)
    assert result.variance_explained == 0.0 and result.distances.max() < 1e-6


def test_every_cluster_is_filled():
    # A few points far out, which k-means++ on a part of the sample does not see.
    rows = mixture(4000, d=4, components=2)
    result = fit(rows, k=100)
    assert len(np.unique(result.labels)) == 100


def test_as_many_clusters_as_training_rows():
    assert len(np.unique(fit(mixture(1200), k=1100).labels)) > 1000


def test_rows_far_from_the_origin():
    rows = mixture() + np.float32(1000.0)
    assert fit(rows).variance_explained == pytest.approx(fit(mixture()).variance_explained, abs=0.02)


def test_some_rows_and_their_norms():
    rows = mixture(100) * np.arange(1, 101, dtype=np.float32)[:, None]
    some = np.asarray([3, 50, 7])
    unit = RowsOf(rows, some, np.linalg.norm(rows, axis=1))
    np.testing.assert_allclose(np.linalg.norm(unit[:], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(RowsOf(rows, some)[1:], rows[[50, 7]])
    assert unit.shape == (3, 16)


def test_large_sets_take_this_way(monkeypatch):
    rows, ids = mixture(), [f"{row:05d}" for row in np.random.default_rng(1).permutation(6000)]
    exact = cluster(rows, ids, 40)
    monkeypatch.setattr(clustering, "_MAX_ROWS_AT_ONCE", 5999)
    sampled = cluster(rows, ids, 40)
    assert not np.array_equal(exact.labels, sampled.labels)
    assert sampled.variance_explained == pytest.approx(exact.variance_explained, rel=0.03)
    selected = nearest_to_centre(sampled, ids, 600)
    assert selected.sum() == 600 and sampled.distances[selected].mean() < sampled.distances[~selected].mean()
