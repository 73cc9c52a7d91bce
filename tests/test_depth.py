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

import logging
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from trl_bpo import DepthSelector
from trl_bpo.clustering import budget


def pool(n=30, per_prompt=3, dim=16, seed=0):
    """Features, pair ids and prompt ids of a random pool."""
    features = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return features, [f"pair-{(7 * i) % 997:03d}" for i in range(n)], [f"prompt-{i // per_prompt}" for i in range(n)]


def test_keeps_exactly_the_budget():
    for n in (1, 2, 12, 37):
        features, pair_ids, prompt_ids = pool(n)
        for scope in ("per_cluster", "overall"):
            for fraction in (0.01, 0.3, 0.5, 1.0):
                selection = DepthSelector(fraction, scope=scope).select(features, pair_ids, prompt_ids)
                assert selection.selected.sum() == selection.metrics["active_pairs"] == budget(fraction, n)


def test_keeps_the_nearest_of_each_cluster():
    features, pair_ids, prompt_ids = pool()
    selection = DepthSelector(0.5, n_clusters=3).select(features, pair_ids, prompt_ids)
    for label in range(3):
        members = np.flatnonzero(selection.clusters == label)
        assert sorted(selection.ranks[members]) == list(range(len(members)))
        kept = selection.selected[members]
        assert np.array_equal(kept, selection.ranks[members] < kept.sum())
        assert abs(kept.sum() - len(members) / 2) < 1


def test_row_order_does_not_matter():
    features, pair_ids, prompt_ids = pool()
    first = DepthSelector(0.4).select(features, pair_ids, prompt_ids)
    order = np.random.default_rng(1).permutation(len(features))
    again = DepthSelector(0.4).select(features[order], [pair_ids[i] for i in order], [prompt_ids[i] for i in order])
    for name in ("selected", "clusters", "distances", "ranks"):
        assert np.array_equal(getattr(again, name), getattr(first, name)[order]), name
    assert again.metrics == first.metrics


def test_normalisation_takes_the_length_out():
    features, pair_ids, prompt_ids = pool()
    scaled = features * np.logspace(-3, 3, len(features), dtype=np.float32)[:, None]
    selector = DepthSelector(0.4)
    first, again = (selector.select(x, pair_ids, prompt_ids) for x in (features, scaled))
    assert np.array_equal(first.selected, again.selected)
    np.testing.assert_allclose(first.distances, again.distances, atol=1e-5)
    raw, large = (
        DepthSelector(0.4, normalize=False).select(x, pair_ids, prompt_ids) for x in (features, 8 * features)
    )
    np.testing.assert_allclose(large.distances, 8 * raw.distances, rtol=1e-6)


def test_without_normalisation_hardly_any_gradient_is_near_to_the_centre():
    features, pair_ids, prompt_ids = pool()
    features[:10] *= 1e-3
    selection = DepthSelector(1 / 3, n_clusters=1, normalize=False).select(features, pair_ids, prompt_ids)
    assert np.flatnonzero(selection.selected).tolist() == list(range(10))


def test_input_is_not_changed():
    features, pair_ids, prompt_ids = pool()
    features = features.astype(np.float64)
    copy = features.copy()
    DepthSelector(0.4).select(features, pair_ids, prompt_ids)
    assert np.array_equal(features, copy)


def test_metrics():
    features, pair_ids, prompt_ids = pool()
    selection = DepthSelector(0.4, n_clusters=4).select(features, pair_ids, prompt_ids)
    kept = Counter(np.asarray(prompt_ids)[selection.selected])
    metrics = selection.metrics
    assert metrics["pairs_per_prompt_mean"] == pytest.approx(12 / len(kept))
    assert metrics["pairs_per_prompt_max"] == max(kept.values())
    assert metrics["prompts_without_pair"] == 10 - len(kept)
    assert metrics["zero_gradients"] == 0
    assert metrics["n_clusters"] == 4
    assert 0 < metrics["cluster_entropy"] <= 1
    assert 0 < metrics["variance_explained"] < 1 and 0 < metrics["variance_explained_gaussian"] < 1
    assert all(type(value) is float for value in metrics.values())


def test_metrics_tell_structure_from_its_lack():
    rng = np.random.default_rng(0)
    _, pair_ids, prompt_ids = pool(120)
    planted = 4 * np.eye(16)[np.arange(120) % 4] + 0.3 * rng.standard_normal((120, 16))
    gaussian = rng.standard_normal((120, 16)) * np.linspace(0.2, 2, 16)
    found, nothing = (
        DepthSelector(0.5, n_clusters=4).select(x, pair_ids, prompt_ids).metrics for x in (planted, gaussian)
    )
    assert found["variance_explained"] > found["variance_explained_gaussian"] + 0.2
    assert abs(nothing["variance_explained"] - nothing["variance_explained_gaussian"]) < 0.1
    assert found["cluster_entropy"] == pytest.approx(1.0)


def test_pairs_without_a_gradient_are_counted_and_left_out():
    features, pair_ids, prompt_ids = pool()
    features[[3, 20]] = 0
    selection = DepthSelector(0.5).select(features, pair_ids, prompt_ids)
    assert selection.metrics["zero_gradients"] == 2
    assert selection.selected.sum() == 15 and not selection.selected[[3, 20]].any()
    assert selection.clusters[[3, 20]].tolist() == selection.ranks[[3, 20]].tolist() == [-1, -1]
    assert np.isnan(selection.distances[[3, 20]]).all() and np.isfinite(np.delete(selection.distances, [3, 20])).all()
    # They would have been one more point for the clustering.
    rest = np.delete(np.arange(30), [3, 20])
    alone = DepthSelector(15 / 28, n_clusters=4).select(
        features[rest], [pair_ids[i] for i in rest], [prompt_ids[i] for i in rest]
    )
    assert np.array_equal(
        DepthSelector(0.5, n_clusters=4).select(features, pair_ids, prompt_ids).selected[rest], alone.selected
    )


def test_fewer_gradients_than_the_budget():
    features, pair_ids, prompt_ids = pool(12)
    features[4:] = 0
    selection = DepthSelector(0.5, n_clusters=6).select(features, pair_ids, prompt_ids)
    assert np.flatnonzero(selection.selected).tolist() == [0, 1, 2, 3]
    assert selection.metrics["active_pairs"] == 4 and selection.metrics["zero_gradients"] == 8
    one = DepthSelector(0.5).select(np.eye(12, 3, dtype=np.float32), pair_ids, prompt_ids)
    assert one.selected.sum() == 3


def test_features_that_are_not_finite_are_named_and_left_out(caplog):
    features, pair_ids, prompt_ids = pool(40)
    whole = DepthSelector(0.5).select(features, pair_ids, prompt_ids)
    features[5, 2], features[7, 0], features[9, 1] = np.nan, np.inf, -np.inf
    selection = DepthSelector(0.5).select(features, pair_ids, prompt_ids)
    broken = [5, 7, 9]
    named = ", ".join(f"{pair_ids[row]} (row {row})" for row in broken)
    assert f"features of 3 of 40 pairs are not finite: {named}. They are left out" in caplog.text
    assert not selection.selected[broken].any() and selection.selected.sum() == whole.selected.sum() == 20
    assert (selection.clusters[broken] == -1).all() and np.isnan(selection.distances[broken]).all()
    assert selection.metrics["not_finite"] == 3 and selection.metrics["zero_gradients"] == 0
    rest = np.delete(np.arange(40), broken)
    alone = DepthSelector(20 / 37).select(
        features[rest], [pair_ids[row] for row in rest], [prompt_ids[row] for row in rest]
    )
    assert np.array_equal(selection.selected[rest], alone.selected)


def test_many_features_that_are_not_finite_stop_the_selection():
    features, pair_ids, prompt_ids = pool(40)
    features[:5, 0] = np.nan
    with pytest.raises(
        ValueError, match=r"features of 5 of 40 pairs are not finite: .*\(row 4\)\. Look for an overflow"
    ):
        DepthSelector(0.5).select(features, pair_ids, prompt_ids)
    with pytest.raises(ValueError, match="features of all 40 pairs are zero"):
        DepthSelector(0.5).select(np.zeros_like(features), pair_ids, prompt_ids)
    features[:, 0] = np.nan
    with pytest.raises(ValueError, match=r"of 40 of 40 .*\(row 9\), and others"):
        DepthSelector(0.5).select(features, pair_ids, prompt_ids)


@pytest.mark.parametrize("scope", ["per_cluster", "overall"])
@pytest.mark.parametrize("floor", [1, 2, 5])
def test_every_prompt_keeps_its_floor(scope, floor):
    features, pair_ids, _ = pool()
    prompt_ids = ["a"] * 10 + ["b"] * 2 + ["c"] * 18
    selection = DepthSelector(0.4, scope=scope, min_pairs_per_prompt=floor).select(features, pair_ids, prompt_ids)
    kept = Counter(np.asarray(prompt_ids)[selection.selected])
    assert selection.selected.sum() == 12
    for prompt, n in (("a", 10), ("b", 2), ("c", 18)):
        assert kept[prompt] >= min(floor, n)
    # What a prompt has to keep are its nearest pairs.
    own = np.flatnonzero(np.asarray(prompt_ids) == "b")
    if floor == 1 and kept["b"] == 1:
        assert selection.selected[own[np.argmin(selection.distances[own])]]


def test_floor_that_takes_the_whole_budget():
    features, pair_ids, prompt_ids = pool()
    selection = DepthSelector(1 / 3, min_pairs_per_prompt=1).select(features, pair_ids, prompt_ids)
    assert set(Counter(np.asarray(prompt_ids)[selection.selected]).values()) == {1}
    nearest = [rows[np.argmin(selection.distances[rows])] for rows in np.arange(30).reshape(10, 3)]
    assert np.flatnonzero(selection.selected).tolist() == nearest


def test_floor_counts_pairs_with_a_gradient():
    features, pair_ids, prompt_ids = pool()
    features[:3] = 0  # all pairs of the first prompt
    selection = DepthSelector(1 / 3, min_pairs_per_prompt=1).select(features, pair_ids, prompt_ids)
    kept = Counter(np.asarray(prompt_ids)[selection.selected])
    assert len(kept) == 9 and sum(kept.values()) == 10
    assert selection.metrics["prompts_without_pair"] == 1


def test_floor_beyond_the_budget():
    features, pair_ids, prompt_ids = pool()
    with pytest.raises(
        ValueError, match="`min_pairs_per_prompt=2` needs 20 pairs, .* of 30 pairs is a budget of 15.*at least 0.667"
    ):
        DepthSelector(0.5, min_pairs_per_prompt=2).select(features, pair_ids, prompt_ids)


def test_warns_when_most_prompts_stay_without_a_pair(caplog):
    _, _, prompt_ids = pool()
    with caplog.at_level(logging.WARNING, logger="trl_bpo"):
        assert DepthSelector(0.17).check(prompt_ids) == 5
        assert not caplog.records
        assert DepthSelector(0.1).check(prompt_ids) == 3
    assert "most prompts without a pair: 3 pairs (fraction 0.1 of 30) for 10 prompts" in caplog.text


def test_errors():
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="`fraction` must be in"):
            DepthSelector(fraction)
    with pytest.raises(ValueError, match="`scope` must be one of"):
        DepthSelector(0.5, scope="all")
    with pytest.raises(ValueError, match="`min_pairs_per_prompt` must not be negative"):
        DepthSelector(0.5, min_pairs_per_prompt=-1)
    with pytest.raises(ValueError, match="no pair to select from"):
        DepthSelector(0.5).check([])
    with pytest.raises(ValueError, match=r"more clusters than there are rows \(3\)"):
        DepthSelector(0.5, n_clusters=4).check(["a", "b", "c"])


def test_annotate():
    features, pair_ids, prompt_ids = pool(12)
    features[2] = 0
    selection = DepthSelector(0.5).select(features, pair_ids, prompt_ids)
    dataset = Dataset.from_dict({"pair_id": pair_ids, "text": prompt_ids})
    for annotated in (selection.annotate(dataset), selection.annotate(selection.annotate(dataset))):
        assert annotated.column_names == [
            *("pair_id", "text", "depth_cluster", "depth_distance", "depth_rank", "depth_selected"),
        ]
        assert {name: feature.dtype for name, feature in annotated.features.items()} == {
            "pair_id": "string",
            "text": "string",
            "depth_cluster": "int64",
            "depth_distance": "float64",
            "depth_rank": "int64",
            "depth_selected": "bool",
        }
    assert np.array_equal(annotated["depth_selected"], selection.selected)
    assert annotated["depth_cluster"][2] == annotated["depth_rank"][2] == -1
    assert np.isnan(annotated["depth_distance"][2])
