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

import matplotlib.figure
import numpy as np
import pyarrow as pa
import pytest
from matplotlib.image import imread

from trl_bpo.report import gini, histogram_of, pairs_per_prompt, plot_pairs_per_prompt, statistics, summary_table
from trl_bpo.report.figures import clusters_figure, distances_figure, pairs_per_prompt_figure, prompt_map_figure


class TestPairsPerPrompt:
    def test_counts_prompts_by_kept_pairs(self):
        pool = ["a", "a", "a", "b", "b", "c", "d", "d"]
        assert pairs_per_prompt(pool, ["a", "d", "a", "b"]) == {0: 1, 1: 2, 2: 1}

    def test_zero_is_there_when_every_prompt_kept_a_pair(self):
        assert pairs_per_prompt(["a", "b"], ["b", "a"]) == {0: 0, 1: 2}

    def test_keys_ascend(self):
        assert list(pairs_per_prompt(["a", "b", "c"], ["a", "a", "a", "b"])) == [0, 1, 3]

    def test_unknown_prompt_raises(self):
        with pytest.raises(ValueError, match="1 prompt.*'z'"):
            pairs_per_prompt(["a"], ["a", "z", "z"])


class TestHistogramOf:
    def test_agrees_with_the_ids(self):
        rng = np.random.default_rng(0)
        ids = rng.integers(0, 40, 200).astype(str)
        for share in (0.0, 0.1, 0.7, 1.0):
            selected = rng.random(200) < share
            expected = pairs_per_prompt(ids.tolist(), ids[selected].tolist())
            found = histogram_of(pa.chunked_array([ids[:50].tolist(), ids[50:].tolist()]), selected)
            assert found == expected and list(found) == list(expected)


class TestGini:
    @pytest.mark.parametrize(
        "histogram, expected",
        [
            ({2: 7}, 0.0),
            ({0: 1, 1: 1}, 0.5),
            ({0: 9, 5: 1}, 0.9),
            # Kept pairs 1, 2, 3: the mean absolute difference is 8/9, and 8/9 / (2 * 2) = 2/9.
            ({1: 1, 2: 1, 3: 1}, 2 / 9),
            ({0: 4}, 0.0),
            ({}, 0.0),
        ],
    )
    def test_known_histograms(self, histogram, expected):
        assert gini(histogram) == pytest.approx(expected)

    def test_counts_only_matter_relative_to_each_other(self):
        assert gini({0: 30, 1: 50, 4: 20}) == pytest.approx(gini({0: 3, 1: 5, 4: 2}))


class TestPlotPairsPerPrompt:
    def test_bars_and_texts(self):
        figure = pairs_per_prompt_figure({0: 1200, 1: 30, 4: 5}, "Costs $5 and $6")
        assert isinstance(figure, matplotlib.figure.Figure)
        (axes,) = figure.axes
        assert [bar.get_height() for bar in axes.patches] == [1200, 30, 0, 0, 5]
        assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx([0, 1, 2, 3, 4])
        # Prompts without a pair stand apart from the others.
        colours = [bar.get_facecolor() for bar in axes.patches]
        assert colours[0] != colours[1] and len(set(colours[1:])) == 1
        assert axes.get_xlabel() == "Pairs kept of a prompt"
        assert axes.get_ylabel() == "Prompts"
        assert axes.get_title(loc="left") == r"Costs \$5 and \$6"
        texts = [text.get_text() for text in axes.texts]
        assert "1,200" in texts
        assert "1,235 prompts, 1,200 without a pair; mean 0.04, Gini 0.98" in texts

    def test_many_bars_are_not_labelled(self):
        (axes,) = pairs_per_prompt_figure({0: 3, 90: 1}).axes
        assert len(axes.patches) == 91
        assert len(axes.texts) == 1

    def test_writes_a_png(self, tmp_path):
        path = tmp_path / "picture.png"
        plot_pairs_per_prompt({0: 3}, path)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        height, width, _ = imread(path).shape
        assert (width, height) == (645, 465)

    def test_empty_histogram_raises(self, tmp_path):
        with pytest.raises(ValueError, match="`histogram` counts no prompt"):
            plot_pairs_per_prompt({0: 0}, tmp_path / "picture.png")

    def test_without_matplotlib_raises(self, tmp_path, monkeypatch):
        monkeypatch.delitem(sys.modules, "trl_bpo.report.figures", raising=False)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"pip install 'trl_bpo\[report\]'"):
            plot_pairs_per_prompt({1: 1}, tmp_path / "picture.png")


class TestSummaryTable:
    def test_aligned(self):
        rows = [
            ("pool", 61135, "all\nprompts"),
            ("depth", 12, ""),
            ("share", 0.123456, "of the pool"),
            ("x", "n/a", ""),
        ]
        assert summary_table(rows).split("\n") == [
            "stage   count  note",
            "-----  ------  -----------",
            "pool   61,135  all prompts",
            "depth      12",
            "share   0.123  of the pool",
            "x         n/a",
        ]

    def test_without_rows(self):
        assert summary_table([]) == "stage  count  note\n-----  -----  ----"


class TestStatistics:
    def test_against_plain_sums(self):
        pool = pa.table(
            {
                "score_chosen": [9.0, None, 7.0, 5.0],
                "score_rejected": [1.0, 2.0, 6.0, 5.0],
                "chosen_tokens": [10, 20, 30, 100],
                "rejected_tokens": [10, 10, 40, 50],
            }
        )
        rows = {name: values for name, *values in statistics(pool, np.array([True, True, False, True]))}
        assert rows["score of the chosen response, mean"] == [7.0, 7.0]
        assert rows["margin of the scores, mean"] == [3.0, 4.0]
        assert rows["tokens of the chosen response, mean"] == [40.0, pytest.approx(130 / 3)]
        assert rows["tokens of the chosen response, median"] == [25.0, 20.0]
        assert rows["share where the chosen response is longer"] == [0.5, pytest.approx(2 / 3)]

    def test_what_the_pool_lacks_is_left_out(self):
        pool = pa.table(
            {"chosen_tokens": [1, 2], "rejected_tokens": [2, 1], "score_chosen": pa.array([None, None], pa.float64())}
        )
        names = [name for name, *_ in statistics(pool, np.array([True, False]))]
        assert names and not [name for name in names if "score" in name]


class TestOtherFigures:
    def test_clusters(self):
        figure = clusters_figure(np.array([2, 7, 1]), np.array([1, 3, 0]))
        heights = [bar.get_height() for bar in figure.axes[0].patches]
        assert heights == [3, 1, 0, 4, 1, 1]

    @pytest.mark.parametrize(
        ("selected", "with_cut", "note"),
        [
            ([True, True, False, False], True, "one cut, at 2.5"),
            ([False, False, True, True], True, "one cut, at 2.5"),
            ([True, False, True, False], True, "each cluster has its own"),
            ([True, True, False, False], False, "2 kept, 2 dropped"),
        ],
    )
    def test_the_cut(self, selected, with_cut, note):
        values = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
        figure = distances_figure(values, np.array([*selected, False]), with_cut=with_cut)
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert any(text.endswith(note) for text in texts), texts
        assert len(figure.axes[0].lines) == (with_cut and "one cut" in note)
        assert sum(bar.get_height() for bar in figure.axes[0].patches) == 4

    def test_a_map_shows_a_sample_and_all_centres(self):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((2, 5000))
        clusters = np.arange(5000) % 4
        figure = prompt_map_figure(x, y, clusters == 0, clusters)
        dropped, kept, centres = (collection.get_offsets() for collection in figure.axes[0].collections)
        assert len(dropped) + len(kept) == 2000
        expected = [[x[clusters == k].mean(), y[clusters == k].mean()] for k in range(4)]
        assert np.allclose(centres, expected)
