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

from trl_bpo.bootstrap import holm, paired_contrast
from trl_bpo.comparison import power_verdict, summarize


_OPTIONS = {"num_resamples": 500}


def _make(effects, num_seeds=4, num_prompts=30, budgets=(240, 480)):
    """Runs of arms with known effects; `full` and `sft` have one budget, and `sft` one run without a seed."""
    rng = np.random.default_rng(0)
    prompts, seeds = rng.normal(7, 1, num_prompts), rng.normal(0, 0.05, num_seeds)
    runs = []
    for label, effect in effects.items():
        for budget in {"sft": [0], "full": [1920]}.get(label, budgets):
            for seed in [None] if label == "sft" else range(num_seeds):
                noise = rng.normal(0, 0.1, num_prompts) + (0 if seed is None else seeds[seed])
                scores = (prompts + effect + noise).tolist()
                runs.append(
                    {
                        "label": label,
                        "arm": label.split()[0],
                        "task": "tiny",
                        "model": "tiny-model",
                        "budget": budget,
                        "seed": seed,
                        "score": float(np.mean(scores)),
                        "prompt_scores": scores,
                        "groups": {"held-out kinds": {"score": 5.0 + effect, "num_prompts": 3}},
                        "unique_pairs": budget // 2,
                        "tokens": 100 * budget,
                        "steps": budget // 4,
                        "flops": 1e12 + 1e10 * budget,
                        "judge_calls": 4800 if "bpo" in label else 2 * budget,
                        "length_mean": 100.0 + (seed or 0),
                        "distinct_1": 0.4,
                        "distinct_2": 0.8,
                        "empty_rate": 0.01,
                        "truncated_rate": 0.05,
                        "perplexity_median": None if label == "sft" else 12.0,
                    }
                )
    return runs


def _by_key(summaries):
    return {(summary.label, summary.budget): summary for summary in summaries}


@pytest.fixture
def runs():
    return _make({"random": 0.0, "bpo": 0.4, "breadth": 0.1, "flipped": -0.5, "full": 0.6, "sft": -0.2})


class TestSummarize:
    def test_means_and_deviation(self, runs):
        summary = _by_key(summarize(runs, "random", **_OPTIONS))["bpo", 480]
        scores = [run["score"] for run in runs if (run["label"], run["budget"]) == ("bpo", 480)]
        assert (summary.num_seeds, summary.num_missing) == (4, 0)
        assert summary.score == pytest.approx(np.mean(scores))
        assert summary.deviation == pytest.approx(np.std(scores, ddof=1))
        assert summary.means["unique_pairs"] == 240
        assert summary.means["length_mean"] == 101.5
        assert summary.groups == {"held-out kinds": pytest.approx(5.4)}

    def test_what_one_run_lacks_has_no_mean(self, runs):
        runs[0]["perplexity_median"] = None
        summaries = _by_key(summarize(runs, "random", **_OPTIONS))
        assert summaries["random", 240].means["perplexity_median"] is None
        assert summaries["random", 480].means["perplexity_median"] == 12

    def test_contrast_at_the_same_budget(self, runs):
        contrast = _by_key(summarize(runs, "random", **_OPTIONS))["bpo", 240].contrast

        def scores(label):
            return np.array([r["prompt_scores"] for r in runs if (r["label"], r["budget"]) == (label, 240)])

        assert contrast == paired_contrast(scores("bpo"), scores("random"), **_OPTIONS)
        assert contrast.mean == pytest.approx(0.4, abs=0.05)

    def test_order_of_runs_does_not_matter(self, runs):
        assert summarize(runs[::-1], "random", **_OPTIONS) == summarize(runs, "random", **_OPTIONS)

    def test_no_contrast_for_the_baseline_and_where_it_has_not_the_budget(self, runs):
        summaries = _by_key(summarize(runs, "random", **_OPTIONS))
        for key in (("random", 240), ("full", 1920), ("sft", 0)):
            assert summaries[key].contrast is None
            assert summaries[key].holm_p_value is None

    def test_baseline_with_one_budget_is_compared_at_every_budget(self, runs):
        summaries = _by_key(summarize(runs, "full", **_OPTIONS))
        for budget in (240, 480):
            assert summaries["bpo", budget].contrast.mean == pytest.approx(-0.2, abs=0.05)

    def test_untrained_model_stands_for_every_seed(self, runs):
        summaries = _by_key(summarize(runs, "sft", **_OPTIONS))
        contrast = summaries["full", 1920].contrast
        sft = np.array([run["prompt_scores"] for run in runs if run["label"] == "sft"] * 4)
        full = np.array([run["prompt_scores"] for run in runs if run["label"] == "full"])
        assert contrast == paired_contrast(full, sft, **_OPTIONS)
        assert (contrast.num_seeds, summaries["sft", 0].deviation) == (4, None)

    def test_a_trained_model_with_one_run_is_compared_on_its_seed_alone(self, runs):
        runs = [run for run in runs if run["label"] != "bpo" or run["seed"] == 2]
        assert _by_key(summarize(runs, "random", **_OPTIONS))["bpo", 240].contrast.num_seeds == 1

    def test_only_shared_seeds_are_compared(self, runs):
        for run in runs:
            if run["label"] == "bpo":
                run["seed"] += 2
            if run["label"] == "breadth":
                run["seed"] += 10
        summaries = _by_key(summarize(runs, "random", **_OPTIONS))
        assert (summaries["bpo", 240].num_seeds, summaries["bpo", 240].contrast.num_seeds) == (4, 2)
        assert summaries["breadth", 240].contrast is None

    @pytest.mark.parametrize("missing", [None, math.nan])
    def test_missing_scores_are_counted(self, runs, missing):
        runs[0]["prompt_scores"][3] = missing
        summaries = _by_key(summarize(runs, "random", **_OPTIONS))
        assert summaries["random", 240].num_missing == 1
        assert summaries["bpo", 240].contrast.num_missing == 1

    def test_holm_over_all_but_the_preregistered(self, runs):
        options = {"preregistered_label": "bpo", "preregistered_budget": 480}
        summaries = summarize(runs, "random", **options, **_OPTIONS)
        assert _by_key(summaries)["bpo", 480].holm_p_value is None
        family = [summary for summary in summaries if summary.holm_p_value is not None]
        assert len(family) == 5 and ("bpo", 240) in _by_key(family)
        adjusted = holm([summary.contrast.p_value for summary in family])
        assert [summary.holm_p_value for summary in family] == pytest.approx(adjusted)

    def test_preregistered_budget_must_be_clear(self, runs):
        for budget in (None, 960):
            with pytest.raises(ValueError, match=f"budgets 240, 480.*`preregistered_budget={budget}`"):
                summarize(runs, "random", preregistered_label="bpo", preregistered_budget=budget)

    def test_by_budget_and_falling_score(self, runs):
        labels = [summary.label for summary in summarize(runs, "random", **_OPTIONS)]
        arms = ["bpo", "breadth", "random", "flipped"]
        assert labels == ["sft", *arms, *arms, "full"]

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda runs: runs.clear(), "`runs` is empty"),
            (lambda runs: runs[5].update(task="other"), "Run 5 has the `task` 'other'"),
            (lambda runs: runs[5].update(model="other"), "Run 5 has the `model` 'other'"),
            (lambda runs: runs[5]["prompt_scores"].pop(), "Run 5 has 29 `prompt_scores`, run 0 has 30"),
            (lambda runs: runs.append(runs[1]), "second one with `label` 'random', `budget` 240 and `seed` 1"),
        ],
    )
    def test_refuses_runs_that_do_not_fit(self, runs, change, message):
        change(runs)
        with pytest.raises(ValueError, match=message):
            summarize(runs, "random")

    def test_refuses_an_unknown_label(self, runs):
        with pytest.raises(ValueError, match="`baseline_label` is 'rando', .*'random', 'sft'"):
            summarize(runs, "rando")


class TestPowerVerdict:
    def test_a_task_with_power(self, runs):
        runs = [run for run in runs if run["label"] != "flipped" or run["budget"] == 480]
        verdict = power_verdict(runs, "sft", "full", "random", "flipped", budget=480, **_OPTIONS)
        random = [run["score"] for run in runs if (run["label"], run["budget"]) == ("random", 480)]
        assert verdict.gain.mean == pytest.approx(0.8, abs=0.1)
        assert verdict.deviation == pytest.approx(np.std(random, ddof=1))
        assert verdict.ratio == pytest.approx(verdict.gain.mean / verdict.deviation)
        assert verdict.passes and verdict.ratio > 3
        assert verdict.flipped.high < 0

    def test_a_task_without_power(self):
        verdict = power_verdict(
            _make({"random": 0.0, "full": -0.5, "sft": 0.0}, budgets=(240,)), "sft", "full", "random", **_OPTIONS
        )
        assert verdict.ratio < -3 and not verdict.passes
        assert verdict.flipped is None

    def test_threshold(self, runs):
        ratio = power_verdict(runs, "sft", "full", "random", budget=480, **_OPTIONS).ratio
        for threshold, passes in ((ratio, True), (ratio * 1.01, False)):
            verdict = power_verdict(runs, "sft", "full", "random", budget=480, threshold=threshold, **_OPTIONS)
            assert verdict.passes is passes

    def test_refuses_an_unclear_budget(self, runs):
        with pytest.raises(ValueError, match="`random_label` is 'random'.*240, 480.*`budget=None`"):
            power_verdict(runs, "sft", "full", "random")

    def test_refuses_one_seed(self, runs):
        runs = [run for run in runs if not run["seed"]]
        with pytest.raises(ValueError, match="'random' has one seed at the budget 240"):
            power_verdict(runs, "sft", "full", "random", budget=240)

    def test_refuses_arms_without_a_shared_seed(self, runs):
        for run in runs:
            if run["label"] == "full":
                run["seed"] += 10
        runs = [
            {**run, "label": "sft"} if run["label"] == "flipped" and run["budget"] == 240 else run
            for run in runs
            if run["label"] != "sft"
        ]
        with pytest.raises(ValueError, match="'full' and 'sft' share no seed"):
            power_verdict(runs, "sft", "full", "random", budget=240)
