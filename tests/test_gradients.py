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

import pytest
import torch
from datasets import Dataset
from pairs import IdentityProjection, config, pairs, relative_error
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from tiny import tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from trl_bpo import BPOTrainer
from trl_bpo.capture import stacked_weights, target_modules
from trl_bpo.gradients import response_gradients
from trl_bpo.projection import SparseProjection
from trl_bpo.responses import PairResponses, deal, length_batches, pad_batch, unique_responses


# Mixed lengths, a completion of one token, and a completion that starts right at the beginning.
RESPONSES = PairResponses(
    input_ids=[[5, 6, 7, 8, 9, 10], [5, 6, 7, 11], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32], [40, 41, 42, 43]],
    starts=[3, 3, 2, 2, 0],
    chosen=None,
    rejected=None,
)


def load(tiny_dir, kind, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=dtype)
    add_fused_lm_head(model)
    if kind != "full":
        # Dropout shows whether the features are computed in evaluation mode.
        lora = LoraConfig(r=4, target_modules="all-linear", use_dora=kind == "dora", lora_dropout=0.3)
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at zero, the gradients of A would be zero
                nn.init.normal_(parameter, std=0.1)
        model.to(dtype)
    return model


def gradients(model, responses=RESPONSES, projection=None, **kwargs):
    projection = projection or SparseProjection(64)
    return response_gradients(model, responses, projection, pad_token_id=0, disable_tqdm=True, **kwargs)


def direct(model, responses=RESPONSES):
    """Log-probability and its gradient, one response at a time, without the code under test."""
    training, weights = model.training, [module.weight for module in target_modules(model).values()]
    model.eval()
    features, logps = [], []
    for ids, start in zip(responses.input_ids, responses.starts, strict=True):
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        logp = sum(log_probs[t - 1, ids[t]] for t in range(max(start, 1), len(ids)))
        features.append(torch.cat([g.flatten() for g in torch.autograd.grad(logp, weights)]))
        logps.append(logp.detach())
    model.train(training)
    return torch.stack(features), torch.stack(logps)


@pytest.mark.parametrize("kind", ["lora", "full", "dora"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_equals_autograd_response_by_response(tiny_dir, kind, dtype, tolerance):
    model = load(tiny_dir, kind, dtype)
    projection = IdentityProjection(target_modules(model))
    for batch_tokens in (1, 1000):
        features, logps = gradients(model, projection=projection, batch_tokens=batch_tokens)
        expected, expected_logps = direct(model)
        assert features.dtype == dtype and logps.dtype == torch.float64
        for row in range(5):
            assert relative_error(features[row], expected[row]) < tolerance
        torch.testing.assert_close(logps, expected_logps.double(), rtol=1e-5, atol=1e-4)
        # Responses are told apart, and every target has a part in every one of them.
        assert relative_error(features[0], expected[1]) > 0.1
        for start, module in zip(projection.offsets.values(), target_modules(model).values(), strict=True):
            assert (features[:, start : start + module.weight.numel()].norm(dim=1) > 0).all()


def test_targets(tiny_dir):
    lora = target_modules(load(tiny_dir, "lora"))
    assert len(lora) == 2 * 2 * 7 and all("lora_A" in name or "lora_B" in name for name in lora)
    assert target_modules(load(tiny_dir, "dora")).keys() == lora.keys()
    full = target_modules(load(tiny_dir, "full"))
    assert len(full) == 2 * 7 and not any("lm_head" in name or "embed" in name for name in full)


def test_nothing_trainable_to_project(tiny_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    model = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    with pytest.raises(ValueError, match="no trainable `nn.Linear`.*`depth_fraction=1.0`"):
        target_modules(model)


def test_batch_size_does_not_matter(tiny_dir):
    model = load(tiny_dir, "lora")
    alone, alone_logps = gradients(model, batch_tokens=1)
    for batch_tokens in (8, 14, 4096):
        features, logps = gradients(model, batch_tokens=batch_tokens)
        torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logps, alone_logps)


def test_order_of_the_responses_does_not_matter(tiny_dir):
    model = load(tiny_dir, "lora", torch.float32)
    order = [3, 1, 4, 0, 2]
    shuffled = PairResponses([RESPONSES.input_ids[i] for i in order], [RESPONSES.starts[i] for i in order], None, None)
    assert torch.equal(gradients(model, shuffled, batch_tokens=14)[0], gradients(model, batch_tokens=14)[0][order])


def test_batches_are_dealt():
    batches = [[0, 1], [2], [3], [4], [5]]
    assert [deal(batches, rank, 2, False) for rank in range(2)] == [([[0, 1], [3], [5]], 3), ([[2], [4]], 2)]
    # Where every forward pass takes all processes, nobody runs fewer.
    assert deal(batches, 1, 2, True) == ([[2], [4], [5]], 2)
    assert deal(batches[:4], 1, 2, True) == ([[2], [4]], 2)
    assert deal(batches[:1], 1, 2, True) == ([[0, 1]], 0) and deal([], 1, 2, True) == ([], 0)


def state(model):
    return (
        {name: (p.grad, p.requires_grad) for name, p in model.named_parameters()},
        {name: (m.training, len(m._forward_hooks), len(m._backward_hooks)) for name, m in model.named_modules()},
    )


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_leaves_no_trace(tiny_dir, kind):
    model = load(tiny_dir, kind).train()
    # A part that was put into evaluation mode stays there.
    part = model.get_base_model().model.layers[0] if kind == "lora" else model.model.layers[0]
    part.eval()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    before, random_state = state(model), torch.get_rng_state()
    gradients(model)
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_leaves_accumulated_gradients_alone(tiny_dir):
    model = load(tiny_dir, "lora")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    gradients(model)
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)


class Interrupted(IdentityProjection):
    calls = 0

    def weight_gradient(self, *args):
        self.calls += 1
        if self.calls == 5:
            raise KeyboardInterrupt
        return super().weight_gradient(*args)


def test_leaves_no_trace_after_an_exception(tiny_dir):
    model = load(tiny_dir, "lora").train()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        gradients(model, projection=Interrupted(target_modules(model)))
    assert state(model) == before
    expected, _ = direct(model)
    features, _ = gradients(model, projection=IdentityProjection(target_modules(model)))
    assert relative_error(features, expected) < 1e-6


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny_dir, use_reentrant):
    model = load(tiny_dir, "lora", torch.float32).train()
    expected = gradients(model)[0]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert torch.equal(gradients(model)[0], expected)
    assert model.is_gradient_checkpointing


def test_works_where_gradients_are_switched_off(tiny_dir):
    model = load(tiny_dir, "lora", torch.float32)
    expected = gradients(model)[0]
    with torch.no_grad():
        assert torch.equal(gradients(model)[0], expected)


def test_half_precision(tiny_dir):
    expected = gradients(load(tiny_dir, "lora", torch.float32))[0]
    features, logps = gradients(load(tiny_dir, "lora", torch.bfloat16))
    assert features.dtype == torch.float32 and logps.dtype == torch.float64
    assert relative_error(features, expected) < 0.1


class Flattening(nn.Module):
    """Runs a linear layer over the tokens of all rows in one line, as OPT does."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Routing(Flattening):
    """Runs a linear layer over some of the tokens, as an expert of a mixture does."""

    def forward(self, x):
        rest = super().forward(x[:, 1:])
        return torch.cat([rest[:, :1], rest], dim=1)


def replace_down_proj(model, cls):
    name = "model.layers.0.mlp.down_proj"
    model.model.layers[0].mlp.down_proj = cls(model.model.layers[0].mlp.down_proj)
    return name


def test_a_layer_that_sees_all_tokens_in_one_line(tiny_dir):
    model = load(tiny_dir, "full")
    expected = gradients(model, projection=IdentityProjection(target_modules(model)))[0]
    replace_down_proj(model, Flattening)
    assert relative_error(gradients(model, projection=IdentityProjection(target_modules(model)))[0], expected) < 1e-6


def test_a_layer_that_sees_some_of_the_tokens_is_refused(tiny_dir):
    model = load(tiny_dir, "full")
    name = replace_down_proj(model, Routing)
    with pytest.raises(ValueError, match=f"`{name}.linear` does not see one row a response"):
        gradients(model)


# The responses of a tokenised dataset


def test_shared_responses_are_found():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [6]},
        {"prompt_ids": [1, 2], "chosen_ids": [5], "rejected_ids": [6]},
        # The same tokens with the completion starting elsewhere are another response.
        {"prompt_ids": [1], "chosen_ids": [2, 3, 4], "rejected_ids": [9]},
    ]
    responses = unique_responses(Dataset.from_list(rows))
    assert len(responses.input_ids) == 5
    for row, chosen, rejected in zip(rows, responses.chosen, responses.rejected, strict=True):
        for index, ids in ((chosen, row["chosen_ids"]), (rejected, row["rejected_ids"])):
            assert responses.input_ids[index] == row["prompt_ids"] + ids
            assert responses.starts[index] == len(row["prompt_ids"])


def test_responses_that_truncation_makes_equal_are_one():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [3, 4, 6]}]
    responses = unique_responses(Dataset.from_list(rows), max_length=4)
    assert list(responses.input_ids) == [[1, 2, 3, 4]] and responses.chosen == responses.rejected == [0]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 1, 4, 6, 7, 100])
def test_truncation_equals_that_of_the_collator(mode, max_length):
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6, 7], "rejected_ids": [8]},
        {"prompt_ids": [1, 2, 3, 4, 5, 6], "chosen_ids": [7, 8], "rejected_ids": [9, 10, 11]},
        {"prompt_ids": [9], "chosen_ids": [9], "rejected_ids": [9, 9, 9, 9, 9, 9]},
    ]
    responses = unique_responses(Dataset.from_list(rows), max_length, mode)
    expected = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)(rows)
    batch = pad_batch(responses, [*responses.chosen, *responses.rejected], pad_token_id=0)
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


def test_responses_of_a_dataset_that_dpo_tokenised(tiny_dir, tmp_path):
    trainer = DPOTrainer(tiny_dir, args=config(tmp_path, DPOConfig, max_length=24), train_dataset=pairs(3, 2))
    responses = unique_responses(trainer.train_dataset, 24)
    batch = trainer.data_collator(list(trainer.train_dataset))
    mine = pad_batch(responses, [*responses.chosen, *responses.rejected], trainer._tokenizer.pad_token_id)
    assert all(torch.equal(mine[key], batch[key]) for key in mine)
    assert mine["input_ids"].shape[1] == 24  # something was cut


def test_batches_keep_to_the_budget():
    lengths = [3, 9, 1, 4, 4, 30, 2, 9, 5]
    ids = [[index] * length for index, length in enumerate(lengths)]
    batches = length_batches(ids, 18)
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    for batch in batches:
        padded = max(lengths[index] for index in batch) * len(batch)
        assert padded <= 18 or len(batch) == 1
    assert batches[0] == [5]  # longer than the budget: alone, and first
    assert len(batches) == 4


def test_batches_depend_on_the_responses_alone():
    ids = [[i % 7] * (1 + i % 5) + [i] for i in range(30)]
    batches = [[ids[i] for i in batch] for batch in length_batches(ids, 20)]
    backwards = ids[::-1]
    assert [[backwards[i] for i in batch] for batch in length_batches(backwards, 20)] == batches


def test_trainable_experts_are_named():
    # Their weights are stacked in one parameter, behind which no hook of a linear layer fires.
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert stacked_weights(model) == [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    assert not any("experts" in name for name in target_modules(model)) and len(target_modules(model)) >= 4
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert len(target_modules(lora)) == 4 and stacked_weights(lora) == []


def test_adapters_of_experts_alone_have_no_gradient_to_select_by(tmp_path):
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    gpt_oss = GptOssConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **heads)
    experts = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    trainer = BPOTrainer(
        AutoModelForCausalLM.from_config(gpt_oss),
        args=config(tmp_path),
        train_dataset=pairs(2, 2),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_parameters=experts, target_modules=[]),
    )
    with pytest.raises(ValueError, match="None of the 4 trainable linear layers, such as .*experts"):
        trainer.select_pairs()


def test_layers_without_a_part_in_the_pass_are_named(tiny_dir, caplog):
    model = load(tiny_dir, "lora")
    model.register_module("bystander", nn.Linear(4, 4))
    response_gradients(model, RESPONSES, SparseProjection(16), pad_token_id=0)
    assert "1 trainable linear layers, such as `bystander`, took no part" in caplog.text
