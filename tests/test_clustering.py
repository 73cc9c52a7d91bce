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
from sklearn.metrics import adjusted_rand_score

from trl_bpo.clustering import (
    Clustering,
    budget,
    check_fraction,
    check_n_clusters,
    cluster,
    default_n_clusters,
    gaussian_like,
    gaussian_variance_explained,
    nearest_to_centre,
)


def ids_of(n):
    # As content hashes, the ids have nothing to do with the order of the rows.
    return [f"{(7 * i) % n:04d}" if n % 7 else f"{i:04d}" for i in range(n)]


def blobs(sizes, dim=8, spread=0.1, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return 5 * np.eye(dim)[labels] + spread * rng.standard_normal((len(labels), dim)), labels


def from_labels(labels, distances, ids):
    """A clustering with known labels and distances."""
    labels, distances = np.asarray(labels), np.asarray(distances, dtype=float)
    ranks = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        ranks[sorted(rows, key=lambda row: (distances[row], ids[row]))] = np.arange(len(rows))
    return Clustering(labels, distances, ranks, 0.5)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"`depth_fraction` must be in \(0, 1\]"):
        check_fraction("depth_fraction", fraction)


def test_fraction_in_range():
    for fraction in (1e-9, 0.5, 1, 1.0):
        check_fraction("fraction", fraction)


def test_budget_and_default_number_of_clusters():
    assert [budget(f, n) for f, n in [(0.5, 9), (0.5, 10), (0.1, 1), (0.001, 10), (1.0, 7), (1 / 3, 9)]] == [
        4,
        5,
        1,
        1,
        7,
        3,
    ]
    assert [default_n_clusters(n) for n in (1, 2, 12, 200, 20000)] == [1, 1, 2, 10, 100]


@pytest.mark.parametrize("scope", ["per_cluster", "overall"])
@pytest.mark.parametrize("n", [1, 2, 3, 12, 37, 100])
def test_exactly_the_budget(n, scope):
    features = np.random.default_rng(n).standard_normal((n, 5))
    ids = ids_of(n)
    for n_clusters in {None, 1, min(3, n), n}:
        clustering = cluster(features, ids, n_clusters)
        for fraction in (1e-6, 0.1, 1 / 3, 0.5, 0.77, 1.0):
            n_keep = budget(fraction, n)
            selected = nearest_to_centre(clustering, ids, n_keep, scope)
            assert selected.dtype == bool and selected.sum() == n_keep


def test_quotas_go_by_largest_remainder():
    # 7 of 10 rows: the shares of clusters of 5, 3 and 2 rows are 3.5, 2.1 and 1.4, so the spare row goes to the first.
    labels = [0] * 5 + [1] * 3 + [2] * 2
    clustering = from_labels(labels, np.arange(10), ids_of(10))
    selected = nearest_to_centre(clustering, ids_of(10), 7)
    assert np.bincount(np.asarray(labels)[selected]).tolist() == [4, 2, 1]
    assert selected.tolist() == [True] * 4 + [False] + [True] * 2 + [False] + [True, False]


def test_equal_remainders_go_by_the_smallest_id():
    # Three clusters of two rows and a budget of two: every share is 2/3.
    ids = ["f", "e", "a", "z", "b", "y"]
    selected = nearest_to_centre(from_labels([0, 0, 1, 1, 2, 2], [1, 2, 1, 2, 1, 2], ids), ids, 2)
    assert selected.tolist() == [False, False, True, False, True, False]


def test_equal_distances_go_by_id():
    ids = ["d", "b", "a", "c"]
    corners = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    clustering = cluster(corners, ids, 1)
    assert clustering.ranks.tolist() == [3, 1, 0, 2]
    for scope in ("per_cluster", "overall"):
        assert nearest_to_centre(clustering, ids, 2, scope).tolist() == [False, True, True, False]


def test_overall_keeps_the_nearest_wherever_they_lie():
    clustering = from_labels([0, 0, 0, 1, 1, 1], [0.1, 0.2, 0.3, 5, 6, 7], list("abcdef"))
    assert nearest_to_centre(clustering, list("abcdef"), 3, "overall").tolist() == [True] * 3 + [False] * 3
    assert nearest_to_centre(clustering, list("abcdef"), 2, "per_cluster").tolist() == [True, False, False] * 2


@pytest.mark.parametrize("scope", ["per_cluster", "overall"])
def test_row_order_does_not_matter(scope):
    rng = np.random.default_rng(0)
    features, ids = rng.standard_normal((60, 6)), np.asarray(ids_of(60))
    features[10:20] = features[0]  # ties, too
    first = cluster(features, ids.tolist(), 5)
    kept = set(ids[nearest_to_centre(first, ids.tolist(), 20, scope)])
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(60)
        again = cluster(features[order], ids[order].tolist(), 5)
        for name in ("labels", "distances", "ranks"):
            assert np.array_equal(getattr(again, name), getattr(first, name)[order]), name
        assert again.variance_explained == first.variance_explained
        assert set(ids[order][nearest_to_centre(again, ids[order].tolist(), 20, scope)]) == kept


def test_planted_clusters_are_found_and_distances_are_to_their_centres():
    features, truth = blobs([30, 20, 10])
    clustering = cluster(features, ids_of(60), 3)
    assert adjusted_rand_score(truth, clustering.labels) == 1.0
    assert clustering.n_clusters == 3 and clustering.variance_explained > 0.98
    centres = np.stack([features[truth == label].mean(axis=0) for label in range(3)])
    np.testing.assert_allclose(clustering.distances, np.linalg.norm(features - centres[truth], axis=1), rtol=1e-6)
    for label in range(3):
        rows = np.flatnonzero(truth == label)
        assert (
            rows[np.argsort(clustering.distances[rows])].tolist() == rows[np.argsort(clustering.ranks[rows])].tolist()
        )
    kept = nearest_to_centre(clustering, ids_of(60), 30)
    assert np.bincount(truth[kept]).tolist() == [15, 10, 5]


def test_one_row_and_as_many_clusters_as_rows():
    clustering = cluster(np.ones((1, 3)), ["a"])
    assert clustering.distances.tolist() == [0.0] and clustering.ranks.tolist() == [0]
    clustering = cluster(np.arange(8.0).reshape(4, 2), list("abcd"), 4)
    assert clustering.n_clusters == 4 and clustering.variance_explained == 1.0


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3])
def test_rows_that_coincide_explain_nothing(value):
    clustering = cluster(np.full((12, 3), value), ids_of(12), 3)
    assert clustering.variance_explained == 0.0
    assert nearest_to_centre(clustering, ids_of(12), 5).sum() == 5


def test_more_clusters_than_rows():
    with pytest.raises(ValueError, match=r"`n_clusters=5` asks for more clusters than there are rows \(4\)"):
        cluster(np.eye(4), list("abcd"), 5)
    with pytest.raises(ValueError, match="`n_clusters` must be at least 1, got 0"):
        cluster(np.eye(4), list("abcd"), 0)
    check_n_clusters("n_clusters", 4, 4)


def test_the_seed_decides():
    features = np.random.default_rng(0).standard_normal((80, 4))
    labels = [cluster(features, ids_of(80), 8, seed).labels for seed in (0, 0, 1)]
    assert np.array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[0], labels[2])


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("n", "dim"), [(60, 20), (20, 20), (20, 50)])
def test_gaussian_has_the_mean_and_the_covariance_of_the_features(n, dim):
    x = 3 + np.random.default_rng(0).standard_normal((n, dim)) * np.arange(1, dim + 1)
    sample = gaussian_like(x, normalize=False)(np.random.default_rng(1))
    np.testing.assert_allclose(sample.mean(axis=0), x.mean(axis=0))
    np.testing.assert_allclose(np.cov(sample.T), np.cov(x.T), atol=1e-8 * dim**2)
    assert np.abs(sample - x).max() > 1
    # Of unit length, the variances along the principal components.
    x = unit(x)
    sample = gaussian_like(x, normalize=True)(np.random.default_rng(1))
    values, vectors = np.linalg.eigh(np.cov(x.T))
    np.testing.assert_allclose(np.linalg.norm(sample, axis=1), 1.0)
    np.testing.assert_allclose(sample.mean(axis=0), x.mean(axis=0), atol=0.01)
    leading = values > 0.05 * values[-1]
    np.testing.assert_allclose(np.var(sample @ vectors, axis=0, ddof=1)[leading], values[leading], rtol=0.05)


def test_planted_clusters_explain_more_than_the_gaussian():
    features, _ = blobs([40] * 5)
    clustering = cluster(features, ids_of(200), 5)
    gaussian = gaussian_variance_explained(features, ids_of(200), 5, normalize=False)
    assert clustering.variance_explained > gaussian + 0.3


def test_gaussian_does_not_depend_on_row_order():
    features = unit(np.random.default_rng(0).standard_normal((50, 4)))
    ids, order = np.asarray(ids_of(50)), np.random.default_rng(1).permutation(50)
    assert gaussian_variance_explained(features, ids.tolist(), 4) == gaussian_variance_explained(
        features[order], ids[order].tolist(), 4
    )


def test_the_farthest():
    labels, distances, ids = [0] * 4 + [1] * 2, [4, 1, 3, 2, 9, 8], list("abcdef")
    clustering = from_labels(labels, distances, ids)
    kept = nearest_to_centre(clustering, ids, 3, farthest=True)
    # Two of the four and one of the two, as the nearest would be.
    assert kept.tolist() == [True, False, True, False, True, False]
    assert nearest_to_centre(clustering, ids, 3).tolist() == [False, True, False, True, False, True]
    overall = nearest_to_centre(clustering, ids, 3, "overall", farthest=True)
    assert overall.tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize("n", [1, 2, 12, 37])
def test_exactly_the_budget_of_the_farthest(n):
    features, ids = np.random.default_rng(n).standard_normal((n, 5)), ids_of(n)
    for n_clusters in {None, 1, min(3, n), n}:
        clustering = cluster(features, ids, n_clusters)
        for n_keep in {1, n // 2 or 1, n - 1 or 1, n}:
            near, far = (nearest_to_centre(clustering, ids, n_keep, farthest=farthest) for farthest in (False, True))
            assert near.sum() == far.sum() == n_keep
            for label in np.unique(clustering.labels):
                own = clustering.labels == label
                # As many of each cluster, and from the other end.
                assert near[own].sum() == far[own].sum()
                left = own & ~far
                if left.any() and (own & far).any():
                    assert clustering.distances[own & far].min() >= clustering.distances[left].max()
            far = nearest_to_centre(clustering, ids, n_keep, "overall", farthest=True)
            assert far.sum() == n_keep
            if n_keep < n:
                assert clustering.distances[far].min() >= clustering.distances[~far].max()


@pytest.mark.parametrize("n_keep", [3, 6])
def test_half_and_its_opposite_are_all(n_keep):
    clustering = from_labels([0] * 12, np.arange(12) % 5, ids_of(12))
    near = nearest_to_centre(clustering, ids_of(12), n_keep)
    far = nearest_to_centre(clustering, ids_of(12), 12 - n_keep, farthest=True)
    # Among equal distances the ranks decide as well, so that no row is both near and far.
    assert np.array_equal(near, ~far)


@pytest.mark.parametrize("scope", ["per_cluster", "overall"])
def test_row_order_does_not_matter_to_the_farthest(scope):
    rng = np.random.default_rng(0)
    features, ids = rng.standard_normal((60, 6)), np.asarray(ids_of(60))
    features[10:20] = features[0]
    first = cluster(features, ids.tolist(), 5)
    kept = set(ids[nearest_to_centre(first, ids.tolist(), 20, scope, farthest=True)])
    order = rng.permutation(60)
    again = cluster(features[order], ids[order].tolist(), 5)
    assert set(ids[order][nearest_to_centre(again, ids[order].tolist(), 20, scope, farthest=True)]) == kept


def differences_to_gaussian(normalize, scales, n=80, k=6, draws=12):
    rng = np.random.default_rng(0)
    differences = []
    for seed in range(draws):
        x = rng.standard_normal((n, len(scales))) * scales
        x = unit(x) if normalize else x
        features = cluster(x, ids_of(n), k, seed).variance_explained
        differences.append(features - gaussian_variance_explained(x, ids_of(n), k, seed, normalize))
    return np.asarray(differences)


@pytest.mark.parametrize("dim", [200, 40])
@pytest.mark.parametrize("normalize", [False, True])
def test_gaussian_features_explain_no_more_and_no_less_than_their_gaussian(normalize, dim):
    # More dimensions than rows, and uneven variances: a sample with a covariance of its own would explain more.
    differences = differences_to_gaussian(normalize, np.linspace(0.2, 2.0, dim))
    assert abs(differences.mean()) < 3 * differences.std(ddof=1) / np.sqrt(len(differences))


def test_gaussian_of_unit_length_holds_where_the_spectrum_falls_steeply():
    # A sample that is scaled once more than the features were would explain a fifth less.
    differences = differences_to_gaussian(True, np.geomspace(1, 0.01, 60), n=200)
    assert abs(differences.mean()) < 3 * differences.std(ddof=1) / np.sqrt(len(differences))
    assert differences.std(ddof=1) < 0.03


@pytest.mark.parametrize(
    "features",
    [
        np.full((6, 3), 1 / 3**0.5),
        # On one line through the origin, almost all on one side: a sample may fall on that side alone.
        np.asarray([[1.0, 0.0]] * 11 + [[-1.0, 0.0]]),
        np.asarray([[0.6, 0.8], [0.8, 0.6]]),
        np.ones((1, 1)),
    ],
)
def test_gaussian_of_degenerate_features(features):
    for seed in range(8):
        value = gaussian_variance_explained(features, ids_of(len(features)), min(2, len(features)), seed)
        assert 0.0 <= value <= 1.0
