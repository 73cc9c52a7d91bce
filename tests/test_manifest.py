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

import hashlib
import json

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from trl_bpo import BPOConfig, BreadthSelector
from trl_bpo.manifest import (
    installed_versions,
    public_name,
    public_value,
    sha256_of_ids,
    sha256_of_text,
    training_parameters,
    write_json,
    write_manifest,
)


def test_public_names(tmp_path, monkeypatch):
    assert public_name("org/model") == "org/model"
    assert public_name(str(tmp_path / "sub" / "model") + "/") == "model"
    assert public_name("/not/there/model") == "model"
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("runs/sft") == "sft"


def test_public_values():
    value = {"a": ("/home/me/x.json", torch.float16), "b": [1, 2.5, None, True], 3: "org/model"}
    assert public_value(value) == {"a": ["x.json", "float16"], "b": [1, 2.5, None, True], "3": "org/model"}


def test_digests():
    assert sha256_of_ids(["a", "bc"]) == hashlib.sha256(b"abc").hexdigest()
    assert sha256_of_text("é") == hashlib.sha256("é".encode()).hexdigest() and sha256_of_text(None) is None


def test_versions_are_of_what_is_installed():
    versions = installed_versions()
    assert versions["torch"] == torch.__version__ and {"trl_bpo", "trl", "numpy", "scikit-learn"} <= set(versions)


def test_training_parameters_make_the_arguments_again(tmp_path):
    given = {
        "depth_fraction": 0.3,
        "learning_rate": 3e-5,
        "num_train_epochs": 2,
        "beta": 0.3,
        "loss_type": ["sigmoid"],
        "lr_scheduler_type": "cosine",
        "gradient_layers": [1, 2],
        "seed": 7,
        "per_device_train_batch_size": 3,
        "model_init_kwargs": {"dtype": "bfloat16", "revision": "main"},
        "use_cpu": True,
        "bf16": False,
        "warmup_steps": 0.1,
    }
    hidden = {
        "output_dir": str(tmp_path / "secret place"),
        "hub_token": "hf_planted",
        "hub_model_id": "me/model",
        "curated_dataset_hub_id": "me/data",
        "curated_dataset_license": "mit",
        "logging_steps": 3,
        "run_name": "mine",
        "report_to": [],
        "save_steps": 7,
    }
    args = BPOConfig(**given, **hidden)
    parameters = training_parameters(args)
    text = json.dumps(parameters)
    assert "hf_planted" not in text and str(tmp_path) not in text
    assert not set(parameters) & set(hidden)
    again = BPOConfig(output_dir=str(tmp_path), **json.loads(text))
    for name in given:
        assert getattr(again, name) == getattr(args, name), name
    assert training_parameters(again) == parameters
    # What is left at its default is not there.
    assert not {"adam_beta1", "accelerator_config"} & set(parameters) and "reselect_every_epochs" not in parameters


def test_no_path_of_this_machine(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, lr_scheduler_kwargs={"file": str(tmp_path / "x")})
    assert training_parameters(args)["lr_scheduler_kwargs"] == {"file": "x"}


def test_a_manifest(tmp_path):
    (tmp_path / "data").write_bytes(b"abc")
    outputs = {"data": tmp_path / "data", "num_kept": 3}
    manifest = write_manifest(tmp_path / "manifest.json", "depth", {"pool": "x"}, {"seed": 1}, outputs, step=12)
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["outputs"] == {"data": hashlib.sha256(b"abc").hexdigest(), "num_kept": 3}
    assert (manifest["format"], manifest["stage"], manifest["step"]) == (1, "depth", 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "manifest.json"]


def test_a_file_is_replaced_in_one_go(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_breadth_can_be_made_again_from_its_manifest(tmp_path, encoder):
    dataset = Dataset.from_dict(
        {"prompt": [f"Tell me about {noun} {i}" for i in range(10) for noun in ("cats", "law", "rain")]}
    )
    first = BreadthSelector(0.3, encoder, n_clusters=4, scope="overall", seed=3).select(dataset)
    first.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    # The encoder is named by the last part of its path; where it lies is for who has it to say.
    again = BreadthSelector(**{**manifest["parameters"], "encoder": encoder}).select(dataset)
    again.save(tmp_path / "again")
    other = json.loads((tmp_path / "again" / "manifest.json").read_text())
    assert {**manifest, "date": ""} == {**other, "date": ""}
    assert manifest["outputs"]["num_kept"] == 9 and encoder not in json.dumps(manifest)
    changed = BreadthSelector(0.3, encoder, n_clusters=4, scope="overall", seed=3).select(dataset.select(range(29)))
    changed.save(tmp_path / "changed")
    assert json.loads((tmp_path / "changed" / "manifest.json").read_text())["inputs"] != manifest["inputs"]
