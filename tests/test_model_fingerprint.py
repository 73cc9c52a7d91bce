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


import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model_dir
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from trl_bpo.model_fingerprint import folder_fingerprint, model_fingerprint


@pytest.fixture
def model(tiny_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_dir)


def test_content_and_not_the_name(tiny_dir, tmp_path, model):
    other_dir = tiny_model_dir(tmp_path / "same")
    same = AutoModelForCausalLM.from_pretrained(other_dir)
    assert model_fingerprint(same) == model_fingerprint(model)
    assert folder_fingerprint(other_dir) == folder_fingerprint(tiny_dir)
    # The same folder with other weights.
    tiny_model_dir(tmp_path / "same", seed=1)
    assert model_fingerprint(AutoModelForCausalLM.from_pretrained(other_dir)) != model_fingerprint(model)
    assert folder_fingerprint(other_dir) != folder_fingerprint(tiny_dir)


def test_the_same_in_another_process(tiny_dir, model):
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"]))
    torch.nn.init.ones_(policy.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight)
    code = f"""
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl_bpo.model_fingerprint import model_fingerprint
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained({tiny_dir!r}), LoraConfig(target_modules=["v_proj", "k_proj", "q_proj"])
)
for name, parameter in model.named_parameters():
    if "lora_A" in name:
        parameter.data.fill_(1)
print(model_fingerprint(model))
"""
    for name, parameter in policy.named_parameters():
        if "lora_A" in name:
            parameter.data.fill_(1)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == model_fingerprint(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_single_value_counts(model, dtype):
    model = model.to(dtype)
    before = model_fingerprint(model)
    seen = {before}
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        weight = model.get_parameter(name).data.view(-1)
        for place in (0, 7, len(weight) - 1):
            value = weight[place].clone()
            weight[place] += 0.25
            seen.add(model_fingerprint(model))
            weight[place] = value
    assert len(seen) == 10
    assert model_fingerprint(model) == before


def test_swapped_weights_and_dtype_count(model):
    before = model_fingerprint(model)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    first.up_proj, second.up_proj = second.up_proj, first.up_proj
    assert model_fingerprint(model) != before
    first.up_proj, second.up_proj = second.up_proj, first.up_proj
    assert model_fingerprint(model) == before
    assert model_fingerprint(model.to(torch.bfloat16)) != before


def test_training_switches_do_not_count(model):
    before = model_fingerprint(model)
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    assert model_fingerprint(model) == before


def test_lora_adapters(model):
    base = model_fingerprint(model)
    policy = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    policy.add_adapter("other", LoraConfig(target_modules="all-linear", lora_alpha=32))
    seen = {base, model_fingerprint(policy)}
    with policy.disable_adapter():
        seen.add(model_fingerprint(policy))
    policy.set_adapter("other")
    seen.add(model_fingerprint(policy))
    policy.get_parameter("base_model.model.model.norm.weight").data[0] += 1
    seen.add(model_fingerprint(policy))
    policy.merge_adapter()
    seen.add(model_fingerprint(policy))
    assert len(seen) == 6


def test_prompt_tuning(model):
    policy = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    seen = {model_fingerprint(policy)}
    with policy.disable_adapter():
        seen.add(model_fingerprint(policy))
    policy.prompt_encoder["default"].embedding.weight.data[0] += 1
    seen.add(model_fingerprint(policy))
    assert len(seen) == 3


def test_quantized_weights(model):
    # As packed bytes, as a tensor that is made of others, and as buffers beside the layer.
    layer = model.model.layers[0].mlp
    packed = torch.arange(32, dtype=torch.uint8)
    layer.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    values, scales = torch.arange(6, dtype=torch.int8), torch.arange(6, dtype=torch.int8)
    layer.down_proj.weight = torch.nn.Parameter(TwoTensor(values, scales), requires_grad=False)
    layer.register_buffer("absmax", torch.tensor(1.0, dtype=torch.float8_e4m3fn))
    seen = {model_fingerprint(model)}
    for tensor in (packed, values, scales):
        tensor[-1] += 1
        seen.add(model_fingerprint(model))
    layer.absmax = torch.tensor(2.0, dtype=torch.float8_e4m3fn)
    seen.add(model_fingerprint(model))
    assert len(seen) == 5


def test_offloaded_weights(model):
    model.model.layers[0].to("meta")
    with pytest.raises(ValueError, match=r"`model.layers.0.* is offloaded"):
        model_fingerprint(model)


def test_weight_file_is_sampled_at_both_ends(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    content = bytearray(20_000_000)
    file.write_bytes(content)
    (tmp_path / "trainer_state.json").write_text("{}")
    seen = {folder_fingerprint(tmp_path)}
    (tmp_path / "trainer_state.json").unlink()
    assert folder_fingerprint(tmp_path) in seen
    for place in (0, -1):
        content[place] = 1
        file.write_bytes(content)
        seen.add(folder_fingerprint(tmp_path))
    file.write_bytes(content + b"0")
    seen.add(folder_fingerprint(tmp_path))
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    seen.add(folder_fingerprint(tmp_path))
    assert len(seen) == 5
