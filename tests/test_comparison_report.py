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

import sys

import pytest
from matplotlib.image import imread

from trl_bpo.comparison import summarize
from trl_bpo.comparison_report import contrast_table, plot_contrasts, plot_curves


_LABELS = ["random", "bpo fraction=0.25", "breadth | depth", "costs $5 or $6"]


def _run(label, budget, seed, score, **others):
    numbers = dict.fromkeys(
        ["unique_pairs", "tokens", "steps", "length_mean", "distinct_1", "distinct_2", "empty_rate", "truncated_rate"],
        0.5,
    )
    return {
        "label": label,
        "arm": label.split()[0],
        "task": "tiny",
        "model": "tiny-model",
        "budget": budget,
        "seed": seed,
        "score": score,
        "prompt_scores": [score - 1, score + 0.1 * (seed or 0), score + 1, None],
        "groups": {"new kinds": {"score": 3.25, "num_prompts": 2}} if label == "random" else {},
        "perplexity_median": None,
        "judge_calls": 4800,
        "flops": 1e12 + 1e10 * budget,
        **numbers,
        **others,
    }


def _make(labels=_LABELS, budgets=(240, 480), num_seeds=3):
    runs = [
        _run(label, budget, seed, 5 + 0.3 * index + budget / 1000 + 0.01 * seed)
        for index, label in enumerate(labels)
        for budget in budgets
        for seed in range(num_seeds)
    ]
    return [*runs, *(_run("full", 1920, seed, 7.0) for seed in range(num_seeds)), _run("sft", 0, None, 4.0)]


def _summaries(runs, **options):
    return summarize(runs, "random", num_resamples=200, **options)


def _svg(path):
    # Texts are drawn as paths in an SVG file, each under a comment with its words.
    return path.read_text(encoding="utf-8")


def _cells(table):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


class TestContrastTable:
    def test_three_tables_of_equal_width(self):
        runs = _make()
        summaries = _summaries(runs)
        blocks = contrast_table(summaries, "random").split("\n\n")
        assert len(blocks) == 6
        for table in blocks[1::2]:
            lines = _cells(table)
            assert len(lines) == 2 + len(summaries)
            assert len({len(line) for line in lines}) == 1

    def test_values(self):
        summaries = _summaries(_make(), preregistered_label=_LABELS[1], preregistered_budget=480)
        scores, answers, costs = (_cells(table) for table in contrast_table(summaries, "random").split("\n\n")[1::2])
        row = next(line for line in scores if line[:2] == [_LABELS[1], "480"])
        assert row[:5] == [_LABELS[1], "480", "3", "5.790 ± 0.010", "+0.300"]
        assert row[6] == "3" and row[8] == "–"
        baseline = next(line for line in scores if line[:2] == ["random", "480"])
        assert baseline[4:] == ["–"] * 5
        assert next(line for line in scores if line[0] == "sft")[3] == "4.000"
        assert answers[0][-1] == "new kinds"
        assert {line[-1] for line in answers[2:] if line[0] != "random"} == {"–"}
        assert next(line for line in costs if line[0] == "full")[-2:] == ["4,800", "2.02e+13"]

    def test_missing_scores_are_reported(self):
        summaries = _summaries(_make())
        assert f" {2 * 3 * 4 + 3 + 1} held-out answer(s) have no score" in contrast_table(summaries, "random")

    def test_a_bar_in_a_label_opens_no_cell(self):
        assert r"| breadth \| depth |" in contrast_table(_summaries(_make()), "random")


class TestPlotCurves:
    def test_writes_a_picture(self, tmp_path):
        plot_curves(_make(), tmp_path / "curves.png", title="Costs $1 or $2")
        picture = imread(tmp_path / "curves.png")
        assert picture.shape[1] > picture.shape[0] > 500
        # All four arms are in colour: of the palette's colours, these four are seen.
        pixels = (255 * picture[..., :3]).round()
        for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)):
            assert (pixels == colour).all(axis=-1).any()

    def test_names_arms_references_and_panels(self, tmp_path):
        plot_curves(_make(), tmp_path / "curves.svg")
        drawn = _svg(tmp_path / "curves.svg")
        for text in [*_LABELS, "full", "sft", "Active pairs", "Judge calls", "FLOPs, all phases"]:
            assert f"<!-- {text} -->" in drawn, text

    def test_highlighted_arms_are_in_colour_and_the_others_grey(self, tmp_path):
        labels = [f"arm {number}" for number in range(19)]
        plot_curves(_make(labels), tmp_path / "curves.svg", highlighted=["arm 3"])
        drawn = _svg(tmp_path / "curves.svg")
        assert "#0072b2" in drawn and "#9a9a9a" in drawn and "#d55e00" not in drawn
        assert all(f"<!-- {label} -->" in drawn for label in labels)

    def test_many_arms_have_no_bars_and_the_axis_says_so(self, tmp_path):
        plot_curves(_make([f"arm {number}" for number in range(7)]), tmp_path / "curves.svg")
        assert "<!-- Score (mean over seeds) -->" in _svg(tmp_path / "curves.svg")

    def test_all_points_are_within_the_picture(self, tmp_path):
        runs = [run for run in _make(["random", "worse"], budgets=(480,)) if run["arm"] not in ("full", "sft")]
        for run in runs:
            run["score"] -= 100 if run["label"] == "worse" else 0
        plot_curves(runs, tmp_path / "curves.svg")
        drawn = _svg(tmp_path / "curves.svg")
        assert "<!-- −80 -->" in drawn and "<!-- 0 -->" in drawn

    def test_wide_ranges_are_logarithmic(self, tmp_path):
        runs = _make()
        plot_curves(runs, tmp_path / "linear.svg")
        for run in runs:
            run["flops"] = 1e10 * max(1, run["budget"]) ** 4
        plot_curves(runs, tmp_path / "wide.svg")
        assert "10^{" in _svg(tmp_path / "wide.svg") and "10^{" not in _svg(tmp_path / "linear.svg")

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"highlighted": ["bpo"]}, r"no curve has \['bpo'\]"),
            ({"highlighted": _LABELS * 2}, "has 8 labels.*at most 6"),
            ({"reference_arms": ("full", "sft", "random", "bpo", "breadth", "costs")}, "no run besides"),
        ],
    )
    def test_refuses(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            plot_curves(_make(), tmp_path / "curves.png", **options)

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"`plot_curves` requires.*pip install 'trl_bpo\[report\]'"):
            plot_curves(_make(), tmp_path / "curves.png")


class TestPlotContrasts:
    def test_a_panel_for_each_budget_and_a_colour_for_the_preregistered(self, tmp_path):
        summaries = _summaries(_make(), preregistered_label=_LABELS[1], preregistered_budget=480)
        plot_contrasts(summaries, tmp_path / "all.svg", "random")
        plot_contrasts(summaries, tmp_path / "one.svg", "random", preregistered_label=_LABELS[1], title="Tiny")
        drawn = _svg(tmp_path / "one.svg")
        assert "<!-- 240 active pairs -->" in drawn and "<!-- 480 active pairs -->" in drawn
        assert "#d55e00" in drawn and "#d55e00" not in _svg(tmp_path / "all.svg")
        assert "<!-- random -->" not in drawn and "<!-- Tiny -->" in drawn

    def test_arms_of_one_budget_each_share_a_panel(self, tmp_path):
        plot_contrasts(_summaries(_make(budgets=(240,))), tmp_path / "contrasts.svg", "random")
        drawn = _svg(tmp_path / "contrasts.svg")
        for name in (f"{_LABELS[1]} (240 pairs)", "full (1,920 pairs)", "sft (0 pairs)"):
            assert f"<!-- {name} -->" in drawn
        assert "active pairs" not in drawn

    def test_refuses_without_a_difference(self, tmp_path):
        with pytest.raises(ValueError, match="No summary has a `contrast`"):
            plot_contrasts(_summaries(_make(["random"])), tmp_path / "contrasts.png", "random")

    def test_without_matplotlib(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"`plot_contrasts` requires.*pip install 'trl_bpo\[report\]'"):
            plot_contrasts(_summaries(_make()), tmp_path / "contrasts.png", "random")
