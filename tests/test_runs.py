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

import json
import math

import numpy as np
import pytest

from trl_bpo.runs import load_runs, save_runs


def _runs():
    rng = np.random.default_rng(0)
    return [
        {
            "label": label,
            "task": "tiny",
            "model": "tiny-model",
            "budget": budget,
            "seed": seed,
            "score": 7.25,
            "options": {"fraction": 0.25},
            "perplexity_median": None,
            "prompt_scores": [None, *rng.normal(7, 1, 4).astype(np.float32).tolist()],
        }
        for label, budget, seed in [("bpo ½", 240, 0), ("bpo ½", 240, 1), ("bpo ½", 480, 0), ("sft", 0, None)]
    ]


class TestSaveAndLoad:
    def test_round_trip(self, tmp_path):
        runs = _runs()
        save_runs(runs, tmp_path / "new" / "folder", "tiny")
        assert load_runs(tmp_path / "new" / "folder", "tiny") == runs

    def test_single_scores_are_kept_out_of_the_json(self, tmp_path):
        runs = _runs()
        save_runs(runs, tmp_path, "tiny")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny_prompt_scores.parquet"]
        saved = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
        assert [{**run, "prompt_scores": runs[i]["prompt_scores"]} for i, run in enumerate(saved)] == runs
        assert "prompt_scores" not in saved[0] and "prompt_scores" in runs[0]

    def test_scores_are_rounded_to_single_precision(self, tmp_path):
        runs = _runs()
        runs[0]["prompt_scores"][1] = 0.1
        save_runs(runs, tmp_path, "tiny")
        assert load_runs(tmp_path, "tiny")[0]["prompt_scores"][1] == float(np.float32(0.1))

    def test_files_in_another_order_belong_together(self, tmp_path):
        runs = _runs()
        save_runs(runs[::-1], tmp_path, "tiny")
        (tmp_path / "reversed.json").write_text((tmp_path / "tiny.json").read_text(encoding="utf-8"), encoding="utf-8")
        save_runs(runs, tmp_path, "tiny")
        (tmp_path / "tiny.json").write_text((tmp_path / "reversed.json").read_text("utf-8"), encoding="utf-8")
        assert load_runs(tmp_path, "tiny") == runs[::-1]

    def test_refuses_files_of_different_runs(self, tmp_path):
        save_runs(_runs(), tmp_path, "tiny")
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))[1:]), encoding="utf-8")
        with pytest.raises(ValueError, match="`tiny.json` and `tiny_prompt_scores.parquet` do not hold the same runs"):
            load_runs(tmp_path, "tiny")

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_refuses_what_json_lacks_and_writes_nothing(self, tmp_path, number):
        runs = _runs()
        runs[2]["perplexity_median"] = number
        with pytest.raises(ValueError, match="NaN or infinite. Use `None`"):
            save_runs(runs, tmp_path, "tiny")
        assert not list(tmp_path.iterdir())

    def test_refuses_two_runs_of_one_setting(self, tmp_path):
        with pytest.raises(ValueError, match="Run 4 is the second one"):
            save_runs([*_runs(), _runs()[1]], tmp_path, "tiny")
