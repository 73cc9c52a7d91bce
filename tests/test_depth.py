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
    with pytest.raises(ValueError, match="`rule` must be one of"):
        DepthSelector(0.5, rule="any")
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


# The farthest


@pytest.mark.parametrize("scope", ["per_cluster", "overall"])
def test_farthest_is_the_other_end(scope):
    features, pair_ids, prompt_ids = pool()
    near, far = (
        DepthSelector(0.5, scope=scope, rule=rule).select(features, pair_ids, prompt_ids)
        for rule in ("nearest", "farthest")
    )
    # Only what is kept differs: ranks still count from the nearest.
    for name in ("clusters", "distances", "ranks"):
        assert np.array_equal(getattr(near, name), getattr(far, name)), name
    assert near.selected.sum() == far.selected.sum() == 15
    assert near.distances[near.selected].mean() < far.distances[far.selected].mean()
    if scope == "overall":
        assert np.array_equal(near.selected, ~far.selected)
    else:
        for label in np.unique(far.clusters):
            own = far.clusters == label
            n_kept = far.selected[own].sum()
            assert set(far.ranks[own & far.selected]) == set(range(own.sum() - n_kept, own.sum()))


@pytest.mark.parametrize("scope", ["per_cluster", "overall"])
def test_floor_of_the_farthest(scope):
    features, pair_ids, prompt_ids = pool()
    selector = DepthSelector(1 / 3, scope=scope, rule="farthest", min_pairs_per_prompt=1)
    selection = selector.select(features, pair_ids, prompt_ids)
    # The budget is one a prompt, and what a prompt has to keep is its farthest pair.
    farthest = [rows[np.argmax(selection.distances[rows])] for rows in np.arange(30).reshape(10, 3)]
    assert np.flatnonzero(selection.selected).tolist() == farthest


# The other rules

OTHERS = ("random", "random_like_nearest", "k_centre")


def per_group(selection, groups):
    return Counter(np.asarray(groups)[selection.selected])


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("n", [1, 2, 12, 37])
def test_exactly_the_budget_by_any_rule(n, rule):
    features, pair_ids, prompt_ids = pool(n)
    for scope in ("per_cluster", "overall"):
        for fraction in (0.01, 0.3, 0.5, 1.0):
            for floor in (0, 1) if fraction >= 0.5 else (0,):
                selector = DepthSelector(fraction, scope=scope, rule=rule, min_pairs_per_prompt=floor)
                selection = selector.select(features, pair_ids, prompt_ids)
                assert selection.selected.sum() == selection.metrics["active_pairs"] == budget(fraction, n)


@pytest.mark.parametrize("rule", OTHERS)
def test_only_what_is_kept_differs(rule):
    features, pair_ids, prompt_ids = pool()
    near, other = (DepthSelector(0.4, rule=name).select(features, pair_ids, prompt_ids) for name in ("nearest", rule))
    for name in ("clusters", "distances", "ranks"):
        assert np.array_equal(getattr(near, name), getattr(other, name)), name
    assert near.metrics.keys() == other.metrics.keys()
    for name in ("n_clusters", "variance_explained", "variance_explained_gaussian"):
        assert near.metrics[name] == other.metrics[name]
    assert not np.array_equal(near.selected, other.selected)


@pytest.mark.parametrize("scope", ["per_cluster", "overall"])
def test_drawn_of_each_cluster_as_many_as_the_nearest(scope):
    features, pair_ids, prompt_ids = pool(60)
    features[7] = 0
    near = DepthSelector(0.4, scope=scope).select(features, pair_ids, prompt_ids)
    selector, chosen = DepthSelector(0.4, scope=scope, rule="random"), np.zeros(60)
    for number in range(200):
        drawn = selector.select(features, pair_ids, prompt_ids, number)
        assert per_group(drawn, drawn.clusters) == per_group(near, near.clusters)
        chosen += drawn.selected
    # Each of a cluster as often, with a standard deviation of at most 7.1, and none that was left out.
    quotas, sizes = per_group(near, near.clusters), Counter(near.clusters)
    expected = [200 * quotas[label] / sizes[label] for label in near.clusters]
    assert np.abs(chosen - expected).max() < 30 and chosen[7] == 0


@pytest.mark.parametrize("scope", ["per_cluster", "overall"])
@pytest.mark.parametrize("floor", [0, 1, 2])
def test_drawn_with_the_depths_of_the_nearest(scope, floor):
    features, pair_ids, _ = pool(60)
    features[[0, 55]] = 0
    prompt_ids = [f"p{int(np.sqrt(i))}" for i in range(60)]
    options = {"scope": scope, "min_pairs_per_prompt": floor}
    near = DepthSelector(0.4, **options).select(features, pair_ids, prompt_ids)
    other, again = (
        DepthSelector(0.4, rule="random_like_nearest", **options).select(features, pair_ids, prompt_ids, number)
        for number in range(2)
    )
    for drawn in (other, again):
        assert sorted(per_group(drawn, prompt_ids).values()) == sorted(per_group(near, prompt_ids).values())
        for name in ("pairs_per_prompt_mean", "pairs_per_prompt_max", "prompts_without_pair"):
            assert drawn.metrics[name] == near.metrics[name]
        # "p0" has one pair, and it has no gradient.
        assert all(per_group(drawn, prompt_ids)[f"p{p}"] >= floor for p in range(1, 8))
        assert not drawn.selected[[0, 55]].any()
    assert not np.array_equal(other.selected, again.selected)


def test_k_centre_covers_better_than_the_nearest():
    features, pair_ids, prompt_ids = pool(60)
    for normalize in (True, False):
        scaled = features * np.linspace(0.5, 4, 60, dtype=np.float32)[:, None]
        x = scaled / np.linalg.norm(scaled, axis=1, keepdims=True) if normalize else scaled
        kept = {
            rule: DepthSelector(0.3, rule=rule, normalize=normalize).select(scaled, pair_ids, prompt_ids).selected
            for rule in ("nearest", "k_centre")
        }
        radius = {
            rule: np.linalg.norm(x[:, None] - x[None, rows], axis=2).min(axis=1).max() for rule, rows in kept.items()
        }
        assert radius["k_centre"] < radius["nearest"]
        # Greedily, and on the features as they are normalised: the centres lie apart by the radius at least.
        apart = np.linalg.norm(x[kept["k_centre"]][:, None] - x[None, kept["k_centre"]], axis=2)
        assert apart[~np.eye(len(apart), dtype=bool)].min() >= radius["k_centre"] * (1 - 1e-5)
        assert kept["k_centre"][np.linalg.norm(x - x.mean(axis=0), axis=1).argmin()]


def test_k_centre_knows_no_clusters_and_no_draws():
    features, pair_ids, prompt_ids = pool()
    plain = DepthSelector(0.4, rule="k_centre").select(features, pair_ids, prompt_ids)
    for options in ({"scope": "overall"}, {"n_clusters": 7}, {"seed": 1}):
        selection = DepthSelector(0.4, rule="k_centre", **options).select(features, pair_ids, prompt_ids, 3)
        assert np.array_equal(selection.selected, plain.selected), options


def test_floor_of_k_centre():
    # On a line, the mean at 0: kept are 0 and then the outermost, all of them of the first prompt.
    features = np.array([[0.0], [9], [-9], [6], [1], [2], [-9]]) + 100
    prompt_ids, pair_ids = list("aaaabbb"), list("1234567")
    options = {"rule": "k_centre", "n_clusters": 1, "normalize": False}
    free = DepthSelector(3 / 7, **options).select(features, pair_ids, prompt_ids)
    assert np.flatnonzero(free.selected).tolist() == [0, 1, 2]
    # The last of these makes room for the pair of "b" that is farthest from them.
    held = DepthSelector(3 / 7, min_pairs_per_prompt=1, **options).select(features, pair_ids, prompt_ids)
    assert np.flatnonzero(held.selected).tolist() == [0, 1, 5]


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("floor", [1, 2, 5])
def test_every_prompt_keeps_its_floor_by_any_rule(floor, rule):
    features, pair_ids, _ = pool()
    prompt_ids = ["a"] * 10 + ["b"] * 2 + ["c"] * 18
    for number in range(10):
        selector = DepthSelector(0.4, rule=rule, min_pairs_per_prompt=floor)
        kept = per_group(selector.select(features, pair_ids, prompt_ids, number), prompt_ids)
        assert sum(kept.values()) == 12
        for prompt, n in (("a", 10), ("b", 2), ("c", 18)):
            assert kept[prompt] >= min(floor, n)


@pytest.mark.parametrize("rule", OTHERS)
@pytest.mark.parametrize("floor", [0, 1])
def test_row_order_does_not_matter_by_any_rule(floor, rule):
    features, pair_ids, prompt_ids = pool()
    features[10:14] = features[0]
    order = np.random.default_rng(1).permutation(30)
    selector = DepthSelector(0.4, rule=rule, min_pairs_per_prompt=floor)
    first = selector.select(features, pair_ids, prompt_ids, 2)
    again = selector.select(features[order], [pair_ids[i] for i in order], [prompt_ids[i] for i in order], 2)
    assert np.array_equal(again.selected, first.selected[order]) and again.metrics == first.metrics


@pytest.mark.parametrize("rule", OTHERS)
def test_numbers_of_draws(rule):
    features, pair_ids, prompt_ids = pool()
    select = DepthSelector(0.4, rule=rule).select
    kept = [select(features, pair_ids, prompt_ids, number).selected for number in (0, 1, 2, 1)]
    assert np.array_equal(kept[1], kept[3])
    assert len({rows.tobytes() for rows in kept}) == (1 if rule == "k_centre" else 3)


@pytest.mark.parametrize("rule", ["nearest", "farthest"])
def test_the_number_of_the_draw_is_nothing_to_what_is_not_drawn(rule):
    features, pair_ids, prompt_ids = pool()
    first, again = (DepthSelector(0.4, rule=rule).select(features, pair_ids, prompt_ids, n) for n in (0, 5))
    assert np.array_equal(first.selected, again.selected) and first.metrics == again.metrics


# Norms


def test_ratio_of_the_norms():
    features, pair_ids, prompt_ids = pool()
    features *= np.linspace(0.5, 4, 30, dtype=np.float32)[:, None]
    features[7] = 0
    selection = DepthSelector(0.4).select(features, pair_ids, prompt_ids)
    norms = np.linalg.norm(features.astype(np.float64), axis=1)
    expected = norms[selection.selected].mean() / norms[~selection.selected].mean()
    assert selection.metrics["norm_kept_over_dropped"] == pytest.approx(expected, rel=1e-9)


def test_ratio_of_the_norms_without_what_is_not_finite():
    features, pair_ids, prompt_ids = pool()
    features[7, 0] = np.inf
    selection = DepthSelector(0.4).select(features, pair_ids, prompt_ids)
    norms = np.linalg.norm(features.astype(np.float64), axis=1)
    dropped = ~selection.selected & (np.arange(30) != 7)
    expected = norms[selection.selected].mean() / norms[dropped].mean()
    assert selection.metrics["norm_kept_over_dropped"] == pytest.approx(expected, rel=1e-9)


def test_no_ratio_where_nothing_was_dropped():
    features, pair_ids, prompt_ids = pool()
    assert "norm_kept_over_dropped" not in DepthSelector(1.0).select(features, pair_ids, prompt_ids).metrics
    # Nor where what was dropped has no norm.
    features[15:] = 0
    assert "norm_kept_over_dropped" not in DepthSelector(0.5).select(features, pair_ids, prompt_ids).metrics


# By scores


def test_the_highest_scores_are_kept():
    _, pair_ids, prompt_ids = pool()
    scores = np.random.default_rng(0).permutation(30).astype(np.float32)
    selection = DepthSelector(0.4).select_by_score(scores, pair_ids, prompt_ids)
    assert np.array_equal(selection.selected, scores >= 18)
    assert np.array_equal(selection.ranks, 29 - scores)
    assert np.array_equal(selection.scores, scores) and selection.scores.dtype == np.float64
    assert selection.clusters is None and selection.distances is None
    kept = Counter(np.asarray(prompt_ids)[selection.selected])
    assert selection.metrics == {
        "active_pairs": 12.0,
        "pairs_per_prompt_mean": 12 / len(kept),
        "pairs_per_prompt_max": float(max(kept.values())),
        "prompts_without_pair": 10.0 - len(kept),
        "not_finite": 0.0,
    }
    assert all(type(value) is float for value in selection.metrics.values())


@pytest.mark.parametrize("n", [1, 2, 12, 37])
def test_exactly_the_budget_by_score(n):
    _, pair_ids, prompt_ids = pool(n)
    # Many are equal, and zero is a score like any other.
    scores = np.random.default_rng(0).integers(-1, 2, n)
    for fraction in (0.01, 0.3, 0.5, 1.0):
        selection = DepthSelector(fraction).select_by_score(scores, pair_ids, prompt_ids)
        assert selection.selected.sum() == selection.metrics["active_pairs"] == budget(fraction, n)
        assert sorted(selection.ranks) == list(range(n))


def test_equal_scores_go_by_id():
    pair_ids = ["d", "b", "a", "c"]
    selection = DepthSelector(0.5).select_by_score(np.array([1.0, 1, 1, 2]), pair_ids, ["p"] * 4)
    assert selection.selected.tolist() == [False, False, True, True]
    assert selection.ranks.tolist() == [3, 2, 1, 0]


def test_row_order_does_not_matter_to_scores():
    _, pair_ids, prompt_ids = pool()
    rng = np.random.default_rng(0)
    scores, order = rng.integers(0, 4, 30).astype(float), rng.permutation(30)
    selector = DepthSelector(0.4, min_pairs_per_prompt=1)
    first = selector.select_by_score(scores, pair_ids, prompt_ids)
    again = selector.select_by_score(scores[order], [pair_ids[i] for i in order], [prompt_ids[i] for i in order])
    for name in ("selected", "ranks", "scores"):
        assert np.array_equal(getattr(again, name), getattr(first, name)[order]), name
    assert again.metrics == first.metrics


def test_what_plays_no_part_by_score():
    _, pair_ids, prompt_ids = pool()
    scores = np.random.default_rng(0).standard_normal(30)
    plain = DepthSelector(0.4).select_by_score(scores, pair_ids, prompt_ids)
    for options in ({"rule": "farthest"}, {"scope": "overall"}, {"n_clusters": 30}, {"normalize": False}, {"seed": 1}):
        selection = DepthSelector(0.4, **options).select_by_score(scores, pair_ids, prompt_ids)
        assert np.array_equal(selection.selected, plain.selected), options


@pytest.mark.parametrize("floor", [1, 2, 5])
def test_floor_by_score(floor):
    _, pair_ids, _ = pool()
    prompt_ids = ["a"] * 10 + ["b"] * 2 + ["c"] * 18
    # Those of the last prompt are the highest.
    scores = np.arange(30.0)
    selection = DepthSelector(0.4, min_pairs_per_prompt=floor).select_by_score(scores, pair_ids, prompt_ids)
    kept = [np.flatnonzero(selection.selected & (np.asarray(prompt_ids) == prompt)).tolist() for prompt in "abc"]
    few = min(floor, 2)
    assert kept == [list(range(10 - floor, 10)), list(range(12 - few, 12)), list(range(18 + floor + few, 30))]
    # The rank is that of the score alone.
    assert selection.ranks.tolist() == list(range(30))[::-1]


def test_floor_beyond_the_budget_by_score():
    _, pair_ids, prompt_ids = pool()
    with pytest.raises(ValueError, match="`min_pairs_per_prompt=2` needs 20 pairs"):
        DepthSelector(0.5, min_pairs_per_prompt=2).select_by_score(np.zeros(30), pair_ids, prompt_ids)
    with pytest.raises(ValueError, match="no pair to select from"):
        DepthSelector(0.5).select_by_score(np.zeros(0), [], [])


def test_scores_that_are_not_finite_are_named_and_left_out(caplog):
    _, pair_ids, prompt_ids = pool()
    scores = np.arange(30.0)
    scores[[28, 29, 3]] = np.nan, np.inf, -np.inf
    selection = DepthSelector(0.5, min_pairs_per_prompt=1).select_by_score(scores, pair_ids, prompt_ids)
    broken = [3, 28, 29]
    named = ", ".join(f"{pair_ids[row]} (row {row})" for row in broken)
    assert f"scores of 3 of 30 pairs are not finite: {named}. They are left out" in caplog.text
    assert not selection.selected[broken].any() and selection.selected.sum() == 15
    assert selection.ranks[broken].tolist() == [-1] * 3 and selection.metrics["not_finite"] == 3
    assert sorted(np.delete(selection.ranks, broken)) == list(range(27))
    assert np.array_equal(selection.scores, scores, equal_nan=True)


def test_many_scores_that_are_not_finite_stop_the_selection():
    _, pair_ids, prompt_ids = pool()
    scores = np.arange(30.0)
    scores[:4] = np.nan
    with pytest.raises(
        ValueError, match=r"scores of 4 of 30 pairs are not finite: .*\(row 3\)\. Look for an overflow"
    ):
        DepthSelector(0.5).select_by_score(scores, pair_ids, prompt_ids)
    # A tenth of them may be.
    scores[3] = 0
    assert DepthSelector(0.5).select_by_score(scores, pair_ids, prompt_ids).metrics["not_finite"] == 3


def test_fewer_scores_than_the_budget():
    _, pair_ids, prompt_ids = pool()
    scores = np.arange(30.0)
    scores[0] = np.nan
    selection = DepthSelector(1.0).select_by_score(scores, pair_ids, prompt_ids)
    assert selection.selected.tolist() == [False] + [True] * 29 and selection.metrics["active_pairs"] == 29


def test_annotate_by_score():
    _, pair_ids, prompt_ids = pool(12)
    selection = DepthSelector(0.5).select_by_score(np.arange(12.0), pair_ids, prompt_ids)
    dataset = Dataset.from_dict({"pair_id": pair_ids, "text": prompt_ids})
    annotated = selection.annotate(dataset)
    assert annotated.column_names == ["pair_id", "text", "depth_score", "depth_rank", "depth_selected"]
    assert annotated.features["depth_score"].dtype == "float64" and annotated["depth_score"][:] == list(range(12))
    # Columns of the other kind do not stay behind.
    features, _, _ = pool(12)
    clusters = DepthSelector(0.5).select(features, pair_ids, prompt_ids)
    assert selection.annotate(clusters.annotate(dataset)).column_names == annotated.column_names
    assert clusters.annotate(annotated).column_names == clusters.annotate(dataset).column_names


def test_summary():
    features, pair_ids, prompt_ids = pool()
    clusters = DepthSelector(0.5).select(features, pair_ids, prompt_ids)
    metrics = clusters.metrics
    counts = f"at most {metrics['pairs_per_prompt_max']:.0f} a prompt, {metrics['prompts_without_pair']:.0f} prompts with none"
    explained = (metrics["variance_explained"], metrics["variance_explained_gaussian"])
    assert clusters.summary == f"{counts}; variance explained {explained[0]:.3f}, of a Gaussian {explained[1]:.3f}"
    # The first 3 of 10 prompts keep their 9 pairs.
    scores = DepthSelector(0.3).select_by_score(-np.arange(30.0), pair_ids, prompt_ids)
    assert scores.summary == "at most 3 a prompt, 7 prompts with none"
    assert repr(scores).startswith("DepthSelection(9 of 30 pairs, metrics={'active_pairs': 9.0")
