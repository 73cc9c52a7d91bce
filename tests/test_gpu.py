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


"""
What can only be tested on GPUs. These tests run only where there are GPUs, some only where there are two, and are skipped
everywhere else.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_script import RESELECT_EVERY_STEPS
from pairs import config, pairs, relative_error
from peft import LoraConfig
from recording import RecordingTrainer
from transformers import BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from trl_bpo import BPOConfig, BPOTrainer


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs `deepspeed`")


def make(tiny_dir, path, cls=RecordingTrainer, config_cls=BPOConfig, peft=True, quantization_config=None, **options):
    args = config(path, config_cls, **{"use_cpu": False, **options})
    if args.n_gpu > 1:
        # One process that sees several GPUs would spread over them by `nn.DataParallel`, which TRL refuses.
        args._n_gpu = 1
    return cls(
        tiny_dir,
        args=args,
        train_dataset=pairs(),
        quantization_config=quantization_config,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if peft else None,
    )


def check_training(trainer):
    """Train, and see that there was a selection an epoch, that only its pairs were trained on, and that it did something."""
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    trainer.train()
    assert [step for step, _ in trainer.selections] == [0, 5] and trainer.state.global_step == 10
    for step, rows in trainer.batches:
        assert set(rows) <= trainer.active(step)
    assert all(len(rows) == 9 for _, rows in trainer.selections)
    assert np.isfinite([log["loss"] for log in trainer.state.log_history if "loss" in log]).all()
    assert next(trainer.model.parameters()).is_cuda
    # In bfloat16 a small step may be lost, but not everywhere.
    after = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(not torch.equal(after[name].to(value.device), value) for name, value in before.items())


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_selection_with_the_default_precision(tiny_dir, tmp_path, peft):
    trainer = make(tiny_dir, tmp_path, peft=peft, bf16=None)
    # TRL computes in bfloat16 where nothing else is asked for.
    assert trainer.args.bf16 and trainer.accelerator.mixed_precision == "bf16"
    check_training(trainer)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="TRL refuses one process that sees several GPUs")
def test_without_any_arguments(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = BPOTrainer(tiny_dir, train_dataset=pairs())
    trainer.args.report_to = []
    assert trainer.accelerator.device.type == "cuda" and trainer.select_pairs().selected.sum() == 9


def test_activation_offloading(tiny_dir, tmp_path):
    check_training(make(tiny_dir, tmp_path, activation_offloading=True))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_qlora(tiny_dir, tmp_path, loss_type):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    trainer = make(tiny_dir, tmp_path, bf16=True, quantization_config=quantization, loss_type=loss_type)
    assert any(parameter.dtype == torch.uint8 for parameter in trainer.model.parameters())
    check_training(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled(tiny_dir, tmp_path, bf16):
    # One length of the batches is one graph to compile.
    options = {"torch_compile": True, "gradient_checkpointing": False, "pad_to_multiple_of": 64}
    check_training(make(tiny_dir, tmp_path, bf16=bf16, **options))


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
def test_features_are_those_on_the_cpu(tiny_dir, tmp_path, peft, loss_type):
    features = []
    for name, use_cpu in (("cpu", True), ("cuda", False)):
        trainer = make(tiny_dir, tmp_path / name, BPOTrainer, peft=peft, use_cpu=use_cpu, loss_type=loss_type)
        assert trainer.accelerator.device.type == name
        features.append(torch.from_numpy(trainer._pair_features()[:]))
    for on_cuda, on_cpu in zip(features[1], features[0], strict=True):
        assert relative_error(on_cuda, on_cpu) < 1e-3


def test_without_selection_it_trains_like_dpo(tiny_dir, tmp_path):
    losses = []
    for cls, config_cls, options in ((DPOTrainer, DPOConfig, {}), (BPOTrainer, BPOConfig, {"depth_fraction": 1.0})):
        trainer = make(tiny_dir, tmp_path / cls.__name__, cls, config_cls, learning_rate=1e-3, **options)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    # Sums on a GPU need not come out alike twice.
    assert len(losses[0]) == 18 and losses[1] == pytest.approx(losses[0], rel=1e-3)


# Two processes


def launch(kind, peft, tiny_dir, folder, num_processes=2):
    """Train in several processes, and return what each of them saw."""
    folder.mkdir()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)),
        *(str(Path(__file__).with_name("gpu_script.py")), kind, peft, tiny_dir, str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if num_processes == 1:
        # TRL refuses one process that sees several GPUs, if nothing has launched it as one of them.
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    result = subprocess.run(command, capture_output=True, text=True, timeout=540, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(num_processes)]


@pytest.fixture(scope="module")
def alone(tiny_dir, tmp_path_factory):
    """What one process saw, with LoRA and without."""
    folder = tmp_path_factory.mktemp("alone")
    return {peft: launch("ddp", peft, tiny_dir, folder / peft, num_processes=1)[0] for peft in ("lora", "full")}


@needs_two
@pytest.mark.parametrize("peft", ["lora", "full"])
@pytest.mark.parametrize(
    ("kind", "distributed_type"),
    [
        ("ddp", "MULTI_GPU"),
        ("fsdp2", "FSDP"),
        pytest.param("zero2", "DEEPSPEED", marks=needs_deepspeed),
        pytest.param("zero3", "DEEPSPEED", marks=needs_deepspeed),
    ],
)
def test_two_processes_agree(tiny_dir, tmp_path, alone, kind, distributed_type, peft):
    first, second = launch(kind, peft, tiny_dir, tmp_path / "run")
    for process in (first, second):
        assert process["num_processes"] == 2 and process["distributed_type"].endswith(distributed_type)
        # Of 9 pairs, three steps an epoch.
        assert process["steps"] == 6 and np.isfinite(process["losses"]).all()
        assert [step for step, _ in process["selections"]] == list(range(0, 6, RESELECT_EVERY_STEPS))
    for name in ("selections", "distances", "curated", "losses"):
        assert first[name] == second[name], name
    selected = dict(map(tuple, first["selections"]))
    for (step, rows), (_, other_rows) in zip(first["batches"], second["batches"], strict=True):
        assert set(rows) | set(other_rows) <= set(selected[step - step % RESELECT_EVERY_STEPS])
    # The first selection is that of one process, up to what the sums of sharded weights round.
    expected = alone[peft]
    assert first["selections"][0] == expected["selections"][0]
    assert np.allclose(first["distances"][0], expected["distances"][0], rtol=1e-2, atol=1e-5)
