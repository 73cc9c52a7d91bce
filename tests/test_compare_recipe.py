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
import os
import subprocess
import sys
from pathlib import Path

import pytest


RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))

from compare_arms import ARMS, parse_arm  # noqa: E402
from tiny_task import HELD_OUT, TRAINED, make_demonstrations, make_prompts  # noqa: E402

from trl_bpo import BPOConfig, VerifiableJudge  # noqa: E402
from trl_bpo.bpo_config import DATA_STRATEGIES, POLICY_STRATEGIES  # noqa: E402
from trl_bpo.splits import check_no_overlap, normalize_prompt  # noqa: E402


class TestArms:
    def test_label_is_without_the_fraction(self, tmp_path):
        arm = parse_arm("bpo fraction=0.1 depth_clusters=8", BPOConfig(str(tmp_path), use_cpu=True, bf16=False))
        assert arm.label == "bpo depth_clusters=8"
        assert arm.options == {"fraction": 0.1, "depth_clusters": 8}
        assert arm.slug == "bpo-fraction=0.1-depth_clusters=8"

    @pytest.mark.parametrize("label", ["best", "bpo depth_cluster=8", "bpo 8"])
    def test_refuses_the_unknown(self, tmp_path, label):
        with pytest.raises(ValueError, match="`arms` has"):
            parse_arm(label, BPOConfig(str(tmp_path), use_cpu=True, bf16=False))

    def test_every_strategy_is_one_of_the_trainer(self):
        strategies = {depth for _, depth in ARMS.values()} - {"all", "none"}
        assert strategies <= {*POLICY_STRATEGIES, *DATA_STRATEGIES}


class TestTinyTask:
    def test_prompts_are_apart_and_can_be_graded(self):
        evaluation = make_prompts(60, (*TRAINED, *HELD_OUT), zipf=False, seed=1)
        without = {normalize_prompt(prompt) for prompt in evaluation["prompt"]}
        train = make_prompts(100, TRAINED, zipf=True, seed=2, without=without)
        check_no_overlap(train, evaluation)
        assert len(set(map(normalize_prompt, train["prompt"]))) == 100
        assert not set(train["source"]) & set(HELD_OUT)
        # The most frequent family is drawn far more often than the rarest.
        assert train["source"].count(TRAINED[0]) > 3 * train["source"].count(TRAINED[-1])

    def test_demonstrations_honour_each_family_now_and_then(self):
        demonstrations = make_demonstrations(1600, seed=3)
        scores = VerifiableJudge()(
            prompts=demonstrations["prompt"],
            completions=[completion[0]["content"] for completion in demonstrations["completion"]],
            constraints=demonstrations["constraints"],
        )
        for kind in (*TRAINED, *HELD_OUT):
            own = [score for score, source in zip(scores, demonstrations["source"], strict=True) if source == kind]
            full_marks = sum(score == 10 for score in own) / len(own)
            assert 0.1 < full_marks < 0.9, kind


ARGUMENTS = [
    *("--config", str(RECIPES / "configs" / "compare_small.yaml"), "--num_workers", "1", "--num_seeds", "2"),
    *("--num_demonstrations", "256", "--num_train_prompts", "30", "--num_eval_prompts", "24"),
    *("--num_responses", "4", "--max_new_tokens", "24", "--projection_dim", "128"),
    *("--arms", "sft", "full", "flipped_labels", "random", "random_redraw", "bpo", "random match_compute=bpo"),
]


def _compare(folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, str(RECIPES / "compare.py"), *ARGUMENTS, "--output_dir", str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_arms_are_compared_and_a_run_that_is_missing_is_done_again(tmp_path):
    output = _compare(tmp_path)
    runs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")}
    # The policy before training has no seed.
    assert len(runs) == 1 + 6 * 2
    full, random, bpo = (runs[f"{arm}-seed100"] for arm in ("full", "random", "bpo"))
    assert full["budget"] == full["pool_pairs"] == full["unique_pairs"]
    assert random["budget"] == bpo["budget"] == round(0.25 * full["pool_pairs"])
    assert random["unique_pairs"] == random["budget"] < runs["random_redraw-seed100"]["unique_pairs"]
    # Breadth saves judge calls, and only what goes by gradients pays for a selection.
    assert bpo["judge_calls"] < random["judge_calls"] == 30 * 4
    assert bpo["flops_by_phase"]["selection"] > random["flops_by_phase"]["selection"] == 0
    matched = runs["random-match_compute=bpo-seed100"]
    # To the nearest of very few steps.
    assert matched["flops"] == pytest.approx(bpo["flops"], rel=0.4)
    assert matched["steps"] != random["steps"]
    assert all(len(run["prompt_scores"]) == 24 and set(run["groups"]) > {"families held out"} for run in runs.values())
    for suffix in ("_curves.png", "_contrasts.png", ".json", ".md", "_prompt_scores.parquet"):
        assert (tmp_path / f"compare_tiny{suffix}").stat().st_size > 0
    assert "| random_redraw |" in output

    # Killed before one run was done: the same command does that run alone, and comes to the same.
    (tmp_path / "runs" / "bpo-seed101.json").unlink()
    (tmp_path / "work" / "bpo-seed101").mkdir(parents=True)
    output = _compare(tmp_path)
    assert [line.split()[1] for line in output.splitlines() if " in " in line and "-seed" in line] == ["bpo-seed101:"]
    again = json.loads((tmp_path / "runs" / "bpo-seed101.json").read_text())
    assert again["prompt_scores"] == runs["bpo-seed101"]["prompt_scores"]
