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

"""What a training leaves in its folder: over a resumed run, a run anew in the same folder, and a run from a manifest."""

import json
import shutil

import pytest
from pairs import config, pairs
from peft import LoraConfig

from trl_bpo import BPOConfig, BPOTrainer
from trl_bpo.manifest import sha256_of_ids
from trl_bpo.run_folder import RunFolder


def make(tiny_dir, folder, args=None, dataset=None, **kwargs):
    args = args or config(folder, **{"depth_fraction": 0.5, "num_train_epochs": 3, **kwargs})
    return BPOTrainer(
        tiny_dir, args=args, train_dataset=dataset or pairs(), peft_config=LoraConfig(r=2, lora_dropout=0.0)
    )


def steps(folder):
    return [one.step for one in RunFolder(folder).selections]


def outputs(folder):
    return [one.manifest["outputs"] for one in RunFolder(folder).selections]


def test_a_selection_by_scores_has_no_sample_of_features(tiny_dir, tmp_path):
    make(tiny_dir, tmp_path, num_train_epochs=1).train()
    assert RunFolder(tmp_path).feature_sample is not None
    make(tiny_dir, tmp_path, num_train_epochs=1, depth_strategy="random").train()
    assert RunFolder(tmp_path).feature_sample is None


def test_a_run_is_read_back(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, curated_dataset_license="mit")
    trainer.train()
    run = RunFolder(tmp_path)
    assert steps(tmp_path) == [0, 5, 10]
    assert run.pool["pair_id"].to_pylist() == run.selections[0].pairs["pair_id"].to_pylist()
    assert run.selections[-1].pairs["depth_selected"].to_pylist() == trainer.selection.selected.tolist()
    assert run.card_data == trainer.curated_card_data() and run.card_data.license == "mit"
    assert run.breadth is None and run.scores_file is None and run.funnel == [] and run.pool_file is None
    # The features lie at unit length, and all of so few.
    assert run.feature_sample.shape == (18, min(2048, run.feature_sample.shape[1]))
    inputs = run.selections[1].manifest["inputs"]
    assert inputs["pool"] == sha256_of_ids(run.pool["pair_id"].to_pylist()) and inputs["selection"] == 2
    # The policy has moved.
    assert len({one.manifest["inputs"]["model_fingerprint"] for one in run.selections}) == 3


def test_the_same_selections_from_the_manifest(tiny_dir, tmp_path):
    make(tiny_dir, tmp_path / "first", seed=7, learning_rate=3e-2, depth_clusters=4, beta=0.3).train()
    manifest = RunFolder(tmp_path / "first").selections[-1].manifest
    parameters = json.loads(json.dumps(manifest["parameters"]))
    assert parameters["seed"] == 7 and parameters["depth_clusters"] == 4
    args = BPOConfig(output_dir=str(tmp_path / "again"), report_to="none", save_strategy="no", **parameters)
    make(tiny_dir, tmp_path / "again", args=args).train()
    assert outputs(tmp_path / "again") == outputs(tmp_path / "first")
    make(tiny_dir, tmp_path / "other", seed=8, learning_rate=3e-2, depth_clusters=4, beta=0.3).train()
    assert outputs(tmp_path / "other") != outputs(tmp_path / "first")


def test_selections_of_an_earlier_run_are_not_mixed_in(tiny_dir, tmp_path):
    make(tiny_dir, tmp_path, reselect_every_steps=2, num_train_epochs=1).train()
    assert steps(tmp_path) == [0, 2, 4]
    make(tiny_dir, tmp_path, dataset=pairs(seed=1)).train()
    assert steps(tmp_path) == [0, 5, 10]
    run = RunFolder(tmp_path)
    assert {one.manifest["inputs"]["pool"] for one in run.selections} == {
        sha256_of_ids(run.pool["pair_id"].to_pylist())
    }


@pytest.mark.parametrize("where", ["same", "lost", "elsewhere"])
def test_a_resumed_run_ends_with_the_same_folder(tiny_dir, tmp_path, where):
    whole, half = tmp_path / "whole", tmp_path / "half"
    make(tiny_dir, whole, save_strategy="steps", save_steps=7).train()
    shutil.copytree(whole, half)
    checkpoint = str(half / "checkpoint-7")
    if where == "lost":
        shutil.rmtree(half / "_selections")
    folder = tmp_path / "new" if where == "elsewhere" else half
    trainer = make(tiny_dir, folder, save_strategy="steps", save_steps=7)
    trainer.train(resume_from_checkpoint=checkpoint)
    if where == "same":
        assert steps(folder) == [0, 5, 10] and outputs(folder) == outputs(whole)
    else:
        # The selection of the checkpoint is saved again; that before it is not there any more.
        assert steps(folder) == [5, 10] and outputs(folder) == outputs(whole)[1:]
    assert RunFolder(folder).card_data.num_pairs == 9


def test_a_selection_without_training_is_saved(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path)
    selection = trainer.select_pairs()
    run = RunFolder(tmp_path)
    assert steps(tmp_path) == [0]
    assert run.selections[0].pairs["depth_selected"].to_pylist() == selection.selected.tolist()
    with pytest.raises(ValueError, match="Name the dataset repository"):
        trainer.push_curated_dataset()


def test_the_pool_is_saved_on_request(tiny_dir, tmp_path):
    make(tiny_dir, tmp_path, curated_dataset_push_pool=True, num_train_epochs=1).train()
    assert RunFolder(tmp_path).pool_file is not None
    make(tiny_dir, tmp_path, num_train_epochs=1).train()
    assert RunFolder(tmp_path).pool_file is None


def test_no_selection_no_files(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, depth_fraction=1.0, num_train_epochs=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert not list(tmp_path.glob("_*"))
    with pytest.raises(ValueError, match="not the folder of a run"):
        RunFolder(tmp_path)


def test_the_model_card_says_what_was_trained_on(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.args.curated_dataset_hub_id = "me/kept"
    trainer.create_model_card(model_name="model", dataset_name="org/source")
    text = (tmp_path / "README.md").read_text()
    assert "9 of 18 preference pairs" in text and "https://huggingface.co/datasets/me/kept" in text
    assert "org/source" in text and "[None]" not in text
