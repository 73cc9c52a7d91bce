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


import importlib.util

import numpy as np
import pytest
import torch
from features_script import Run
from pairs import IdentityProjection, config, pairs, relative_error
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.utils import add_fused_lm_head

from trl_bpo import BPOTrainer
from trl_bpo.capture import target_modules
from trl_bpo.feature_store import tensors_hash
from trl_bpo.gradients import can_pack, pair_gradients
from trl_bpo.projection import SparseProjection
from trl_bpo.responses import PairResponses, unique_responses


# An odd number of batches, so that one process repeats a batch of the other.
SETTINGS = {"gradient_batch_tokens": 60, "loss_type": "ipo", "train": True, "max_steps": 3, "reselect_every_steps": 2}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs `deepspeed`")


def largest_difference(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("sharded", ["fsdp", pytest.param("zero3", marks=needs_deepspeed)])
@pytest.mark.parametrize(
    ("packed", "lora"), [(True, True), (False, True), (False, False)], ids=["packed", "responses", "full"]
)
def test_features_of_sharded_weights(tiny_dir, tmp_path, sharded, packed, lora):
    settings = {**SETTINGS, "packed": packed, "lora": lora}
    whole = Run(tiny_dir, tmp_path / "whole", **settings, learning_rate=1e-4).finish(2)
    run = Run(tiny_dir, tmp_path / "sharded", **settings, learning_rate=1e-4, sharded=sharded).finish(2)
    # At first, and after steps that leave the weights as gathered, or not.
    for step, tolerance in ((0, 1e-5), (2, 1e-2)):
        expected = np.load(whole.folder / f"features-{step}.npz")["features"]
        assert largest_difference(np.load(run.folder / f"features-{step}.npz")["features"], expected) < tolerance
    # Training goes on after each selection.
    assert [np.load(run.folder / f"result-{rank}.npz")["steps"] for rank in range(2)] == [3, 3]


@pytest.mark.parametrize("sharded", ["fsdp", pytest.param("zero3", marks=needs_deepspeed)])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_losses_and_margins_of_sharded_weights(tiny_dir, tmp_path, sharded, lora):
    settings = {**SETTINGS, "packed": False, "lora": lora, "depth_strategy": "implicit_reward_margin_high"}
    whole = Run(tiny_dir, tmp_path / "whole", **settings, learning_rate=1e-4).finish(2)
    run = Run(tiny_dir, tmp_path / "sharded", **settings, learning_rate=1e-4, sharded=sharded).finish(2)
    for step, tolerance in ((0, 1e-5), (2, 1e-2)):
        scores = [np.load(r.folder / f"scores-{step}-{rank}.npz") for r in (whole, run) for rank in range(2)]
        for name in ("losses", "margins"):
            # All processes have them all.
            assert np.array_equal(scores[2][name], scores[3][name])
            scale = np.abs(scores[0]["losses"]).max()
            assert np.abs(scores[2][name] - scores[0][name]).max() < tolerance * scale
    assert [np.load(run.folder / f"result-{rank}.npz")["steps"] for rank in range(2)] == [3, 3]


def test_a_sharded_run_that_was_killed_goes_on(tiny_dir, tmp_path):
    settings = {**SETTINGS, "sharded": "fsdp", "max_steps": 1}
    whole = Run(tiny_dir, tmp_path / "whole", **settings).finish(2)
    run = Run(tiny_dir, tmp_path / "killed", **settings)
    n_written = run.kill(4, num_processes=2)
    run.finish(2)
    found, expected = (np.load(r.folder / "features-0.npz") for r in (run, whole))
    assert found.files == expected.files and all(np.array_equal(found[name], expected[name]) for name in found.files)
    batches = [tuple(rows) for _, rows in run.written()]
    assert len(set(batches)) == len(batches) > n_written


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_features_on_a_gpu_are_those_on_the_cpu(tiny_dir, packed, dtype, tolerance):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 300, 12).tolist() for _ in range(6)]
    ids = [prompt + rng.integers(3, 300, n).tolist() for prompt in prompts for n in (5, 9)]
    responses = PairResponses(ids, [12] * 12, np.arange(0, 12, 2), np.arange(1, 12, 2))
    features = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
        add_fused_lm_head(model)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        model.to(device, kind)
        assert can_pack(model, responses, 0)

        def weigh(rows, pieces, sums):
            return [torch.full_like(piece, 0.5 if i % 2 else -2.0) for i, piece in enumerate(pieces)]

        options = {"pad_token_id": 0, "batch_tokens": 100, "packed": packed, "disable_tqdm": True}
        features.append(pair_gradients(model, responses, SparseProjection(512), weigh, **options))
        assert features[-1].device.type == "cpu" and features[-1].dtype == torch.float32
    for row in range(6):
        assert relative_error(features[1][row], features[0][row]) < tolerance


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs `bitsandbytes`")
@pytest.mark.parametrize("packed", [False, True])
def test_adapters_of_a_quantised_model(tiny_dir, tmp_path, monkeypatch, packed):
    monkeypatch.setattr("trl_bpo.pair_features._packing_pays", lambda *_: packed)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, quantization_config=quantisation, dtype=torch.float32)
    trainer = BPOTrainer(
        model,
        args=config(tmp_path, depth_feature="sum", gradient_batch_tokens=100, use_cpu=not torch.cuda.is_available()),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    modules = target_modules(trainer.model)
    assert len(modules) == 2 * 2 * 7
    trainer._projection = IdentityProjection(modules)
    features = torch.from_numpy(trainer._pair_features()[:])
    # TRL keeps the adapters of a quantised model in bfloat16.
    responses, weights = unique_responses(trainer.train_dataset), [module.weight for module in modules.values()]
    trainer.model.eval()
    gradients = []
    for ids, start in zip(responses.input_ids, responses.starts, strict=True):
        log_probs = trainer.model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().log_softmax(-1)
        logp = sum(log_probs[t - 1, ids[t]] for t in range(start, len(ids)))
        gradients.append(torch.cat([g.flatten().float().cpu() for g in torch.autograd.grad(logp, weights)]))
    gradients = torch.stack(gradients)
    assert relative_error(features, gradients[responses.chosen] + gradients[responses.rejected]) < 0.02
    # Packed four-bit weights have a hash, too.
    before = tensors_hash(trainer.model.named_parameters())
    quantised = next(p for p in trainer.model.parameters() if p.dtype == torch.uint8)
    quantised.data.view(-1)[0] ^= 1
    assert tensors_hash(trainer.model.named_parameters()) != before
