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

import math

import numpy as np
import pytest

from trl_bpo.bootstrap import Contrast, bootstrap_interval, holm, non_inferior, paired_contrast, seed_deviation


def _differences(index, num_seeds=10, num_prompts=200, seed_sd=0.3, prompt_sd=1.0, rest_sd=1.0):
    rng = np.random.default_rng(index)
    return (
        rng.normal(0, seed_sd, (num_seeds, 1))
        + rng.normal(0, prompt_sd, (1, num_prompts))
        + rng.normal(0, rest_sd, (num_seeds, num_prompts))
    )


def _contrast(low=-0.1, high=0.1):
    return Contrast(mean=0.0, low=low, high=high, p_value=1.0, num_seeds=3, num_prompts=5, num_missing=0)


class TestBootstrapInterval:
    def test_agrees_with_the_normal_interval_on_many_values(self):
        values = np.random.default_rng(0).normal(5, 2, 400)
        half = 1.96 * values.std() / 20
        low, high = bootstrap_interval(values)
        assert low == pytest.approx(values.mean() - half, abs=0.02)
        assert high == pytest.approx(values.mean() + half, abs=0.02)

    def test_level_widens(self):
        values = list(range(20))
        low, high = bootstrap_interval(values, level=0.99)
        inner_low, inner_high = bootstrap_interval(values, level=0.5)
        assert low < inner_low < 9.5 < inner_high < high

    def test_seed_decides(self):
        values = np.random.default_rng(0).normal(size=20)
        assert bootstrap_interval(values, num_resamples=777) == bootstrap_interval(values, num_resamples=777)
        assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)

    def test_one_value_is_its_own_interval(self):
        assert bootstrap_interval([3.0]) == (3.0, 3.0)

    @pytest.mark.parametrize(
        "values, options, message",
        [
            ([], {}, "`values`.*at least one"),
            ([1.0, math.nan, math.nan], {}, "`values` has 2 NaN"),
            ([1.0], {"level": 95}, "`level` is 95"),
            ([1.0], {"num_resamples": 0}, "`num_resamples` is 0"),
        ],
    )
    def test_refuses(self, values, options, message):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(values, **options)


class TestPairedContrast:
    @pytest.mark.parametrize(
        "num_seeds, seed_sd, prompt_sd, rest_sd",
        [(10, 0.3, 1.0, 1.0), (10, 0.3, 0.0, 0.5), (10, 0.0, 1.0, 1.0), (3, 0.3, 1.0, 1.0)],
    )
    def test_coverage(self, num_seeds, seed_sd, prompt_sd, rest_sd):
        contrasts = [
            paired_contrast(differences, np.zeros_like(differences), num_resamples=500)
            for differences in (
                _differences(index, num_seeds, seed_sd=seed_sd, prompt_sd=prompt_sd, rest_sd=rest_sd)
                for index in range(300)
            )
        ]
        covered = np.mean([contrast.low <= 0 <= contrast.high for contrast in contrasts])
        found = np.mean([contrast.p_value <= 0.05 for contrast in contrasts])
        assert 0.90 <= covered <= 0.99
        assert 0.01 <= found <= 0.10

    def test_width_is_that_of_the_variance_components(self):
        widths = [
            contrast.high - contrast.low
            for contrast in (paired_contrast(d, np.zeros_like(d)) for d in map(_differences, range(20)))
        ]
        # Student's t widens the seeds' part beyond the normal interval, by 2.26 / 1.96 at most.
        exact = 2 * 1.96 * math.sqrt(0.3**2 / 10 + 1 / 200 + 1 / 2000)
        assert exact < np.median(widths) < 1.25 * exact

    def test_what_arms_share_cancels(self):
        rng = np.random.default_rng(0)
        baseline = rng.normal(0, 5, (1, 50)) + rng.normal(0, 5, (4, 1)) + np.zeros((4, 50))
        contrast = paired_contrast(baseline + 0.25, baseline)
        assert (contrast.mean, contrast.low, contrast.high) == pytest.approx((0.25, 0.25, 0.25))
        assert contrast.p_value == pytest.approx(2 / 10_001)

    def test_equal_arms(self):
        scores = _differences(0)
        contrast = paired_contrast(scores, scores)
        assert (contrast.mean, contrast.low, contrast.high, contrast.p_value) == (0, 0, 0, 1)

    def test_swapping_the_arms_changes_the_sign(self):
        scores, baseline = _differences(0) + 0.3, _differences(1)
        there, back = paired_contrast(scores, baseline), paired_contrast(baseline, scores)
        assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))
        assert there.p_value == back.p_value

    def test_p_value_agrees_with_the_interval(self):
        differences = _differences(3)
        for shift in (0.0, 0.1, 0.2, 0.3, 0.4):
            contrast = paired_contrast(differences + shift, np.zeros_like(differences))
            assert (contrast.low > 0 or contrast.high < 0) == (contrast.p_value < 0.05)

    def test_few_seeds_make_it_wide(self):
        widths = {2: [], 10: []}
        for differences in map(_differences, range(20)):
            for num_seeds, found in widths.items():
                contrast = paired_contrast(differences[:num_seeds], np.zeros((num_seeds, 200)), num_resamples=2000)
                found.append(contrast.high - contrast.low)
        # The normal interval of two seeds would be twice as wide as that of ten.
        assert np.median(widths[2]) > 4 * np.median(widths[10])

    def test_one_seed_resamples_prompts_alone(self):
        differences = _differences(0, num_seeds=1)
        contrast = paired_contrast(differences, np.zeros((1, 200)))
        assert contrast.num_seeds == 1
        assert (contrast.low, contrast.high) == pytest.approx(bootstrap_interval(differences[0]), abs=0.03)

    def test_missing_scores_are_left_out_of_both_and_counted(self):
        scores, baseline = _differences(0, 4, 30) + 1, _differences(1, 4, 30)
        scores[0, 3] = scores[:, 7] = baseline[2, 5] = math.nan
        contrast = paired_contrast(scores, baseline)
        assert contrast.mean == pytest.approx(np.nanmean(scores - baseline))
        assert (contrast.num_seeds, contrast.num_prompts, contrast.num_missing) == (4, 29, 6)
        kept = np.delete(np.arange(30), 7)
        assert paired_contrast(scores[:, kept], baseline[:, kept]).low == contrast.low

    def test_a_seed_effect_on_unequally_missing_rows_is_kept(self):
        scores = np.repeat([[1.0], [2.0], [6.0]], 40, axis=1)
        scores[2, 10:] = math.nan
        contrast = paired_contrast(scores, np.zeros((3, 40)))
        assert contrast.mean == pytest.approx((40 + 80 + 60) / 90)
        assert contrast.low < contrast.mean < contrast.high

    def test_mostly_missing_scores_still_give_an_interval(self):
        scores = np.full((2, 3), math.nan)
        scores[0, 0], scores[1, 2] = 1.0, 2.0
        contrast = paired_contrast(scores, np.zeros((2, 3)))
        assert np.isfinite([contrast.mean, contrast.low, contrast.high, contrast.p_value]).all()

    @pytest.mark.parametrize(
        "scores, baseline, message",
        [
            (np.zeros((2, 3)), np.zeros((1, 3)), r"\(2, 3\) and \(1, 3\)"),
            (np.zeros(3), np.zeros(3), r"\(num_seeds, num_prompts\)"),
            (np.zeros((2, 0)), np.zeros((2, 0)), r"\(2, 0\)"),
            (np.array([[1.0, 2.0], [math.nan, 1.0]]), np.array([[1.0, 2.0], [1.0, math.nan]]), "Row 1"),
        ],
    )
    def test_refuses(self, scores, baseline, message):
        with pytest.raises(ValueError, match=message):
            paired_contrast(scores, baseline)


class TestHolm:
    def test_known_values(self):
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_never_above_one_and_ties_stay_equal(self):
        assert holm([0.9, 0.4, 0.4]) == pytest.approx([1.0, 1.0, 1.0])
        assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])

    def test_one_and_none(self):
        assert holm([0.03]) == [0.03]
        assert holm([]) == []

    @pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
    def test_refuses(self, wrong):
        with pytest.raises(ValueError, match="position 1"):
            holm([0.5, wrong])


class TestNonInferior:
    @pytest.mark.parametrize("low, expected", [(-0.1, True), (-0.2, False), (-0.3, False), (0.1, True)])
    def test_the_lower_end_decides(self, low, expected):
        assert non_inferior(_contrast(low=low, high=0.5), margin=0.2) is expected

    @pytest.mark.parametrize("margin", [0.0, -0.2, math.nan])
    def test_refuses(self, margin):
        with pytest.raises(ValueError, match="`margin`"):
            non_inferior(_contrast(), margin=margin)


class TestSeedDeviation:
    def test_deviation_of_the_means(self):
        scores = np.array([[1.0, 3.0], [3.0, 5.0], [math.nan, 6.0]])
        assert seed_deviation(scores) == pytest.approx(2.0)

    def test_one_seed_has_none(self):
        assert math.isnan(seed_deviation(np.ones((1, 4))))

    def test_refuses(self):
        with pytest.raises(ValueError, match="Row 1"):
            seed_deviation(np.array([[1.0, 2.0], [math.nan, math.nan]]))
        with pytest.raises(ValueError, match="shape"):
            seed_deviation(np.ones(3))
