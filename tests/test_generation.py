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
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trl_bpo.generation import TransformersGenerator


MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather of a city"}}]
PROMPTS = [
    "The sea",
    MESSAGES,
    [{"role": "system", "content": "Be brief."}, *MESSAGES],
    [*MESSAGES, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Italy?"}],
    "How do I sort a list of numbers in Python? Use the function",
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir)


def force_token(model, token_id):
    # A huge bias on one row of the head makes the model say that token whatever it reads.
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    model.lm_head.bias.data[token_id] = 1e4


def test_shape_and_order(model_dir):
    generator = TransformersGenerator(model_dir, max_new_tokens=6, batch_size=4)
    responses = generator(PROMPTS, num_responses=3)
    assert [len(row) for row in responses] == [3] * len(PROMPTS)
    assert all(1 <= response.num_tokens <= 6 for row in responses for response in row)
    assert len({response.text for row in responses for response in row}) > 10


def test_left_padded_batch_equals_single_prompts(model, tokenizer):
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=8, temperature=0, batch_size=8)
    batched = generator(PROMPTS, num_responses=1)
    assert batched == [generator([prompt], num_responses=1)[0] for prompt in PROMPTS]
    # The direct way, for one prompt of each format.
    encoded = {0: tokenizer(PROMPTS[0])["input_ids"]}
    encoded[1] = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    for row, ids in encoded.items():
        output = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        assert batched[row][0].text == tokenizer.decode(output, skip_special_tokens=True)


def test_responses_belong_to_their_prompts(model, tokenizer):
    # So cold a temperature is as good as greedy, with several responses a prompt and several prompts a batch.
    greedy = TransformersGenerator(model, tokenizer, max_new_tokens=8, temperature=0)(PROMPTS, num_responses=1)
    cold = TransformersGenerator(model, tokenizer, max_new_tokens=8, temperature=1e-5)(PROMPTS, num_responses=3)
    assert cold == [row * 3 for row in greedy]
    assert len({row[0].text for row in greedy}) == len(PROMPTS)


def test_peft_model_with_gradient_checkpointing(model, tokenizer):
    base = TransformersGenerator(model, tokenizer, max_new_tokens=8, temperature=0)(PROMPTS, num_responses=1)
    policy = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    policy.gradient_checkpointing_enable()
    policy.train()
    generator = TransformersGenerator(policy, tokenizer, max_new_tokens=8, temperature=0)
    responses = generator(PROMPTS, num_responses=1)
    assert policy.training and responses != base
    with policy.disable_adapter():
        assert generator(PROMPTS, num_responses=1) == base


def test_more_responses_than_batch_size(model_dir):
    responses = TransformersGenerator(model_dir, max_new_tokens=8, batch_size=3)(["The sea"], num_responses=7)
    assert len(responses[0]) == 7
    # Every part of the split is seeded differently.
    assert len({response.text for response in responses[0]}) == 7


def test_ends_with_eos(model, tokenizer):
    force_token(model, tokenizer.eos_token_id)
    (response,) = TransformersGenerator(model, tokenizer, max_new_tokens=5)([MESSAGES], num_responses=1)[0]
    assert (response.text, response.truncated, response.num_tokens) == ("", False, 1)


def test_truncated_at_the_limit(model, tokenizer):
    force_token(model, tokenizer.convert_tokens_to_ids("a"))
    (response,) = TransformersGenerator(model, tokenizer, max_new_tokens=5)([MESSAGES], num_responses=1)[0]
    assert (response.text, response.truncated, response.num_tokens) == ("aaaaa", True, 5)


@pytest.mark.parametrize("as_list", [True, False])
def test_eos_of_the_generation_config_counts(model, tokenizer, as_list):
    token_id = tokenizer.convert_tokens_to_ids("a")
    force_token(model, token_id)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, token_id] if as_list else token_id
    (response,) = TransformersGenerator(model, tokenizer, max_new_tokens=5)([MESSAGES], num_responses=1)[0]
    assert (response.text, response.truncated, response.num_tokens) == ("", False, 1)


def test_mixed_lengths_in_a_batch(model, tokenizer):
    # The same token ends some responses early: what follows their end must not be counted.
    model.generation_config.eos_token_id = list(range(40, 120))
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=12)
    responses = [response for row in generator(PROMPTS[:2], num_responses=8) for response in row]
    assert {response.truncated for response in responses} == {False, True}
    assert all(response.num_tokens == 12 for response in responses if response.truncated)
    assert len({response.num_tokens for response in responses}) > 3


def test_repeatable_and_global_rng_untouched(model_dir):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = TransformersGenerator(model_dir, max_new_tokens=6, seed=1)(PROMPTS, num_responses=2)
    assert torch.equal(torch.rand(3), expected)
    generator = TransformersGenerator(model_dir, max_new_tokens=6, seed=1)
    assert generator(PROMPTS, num_responses=2) == first
    assert generator(PROMPTS, num_responses=2) == first
    assert TransformersGenerator(model_dir, max_new_tokens=6, seed=2)(PROMPTS, num_responses=2) != first


def test_model_and_tokenizer_are_restored(model, tokenizer):
    model.train()
    model.config.use_cache = False
    tokenizer.padding_side = "right"
    before = (json.dumps(model.generation_config.to_dict(), default=str), tokenizer.pad_token)
    TransformersGenerator(model, tokenizer, max_new_tokens=4)(PROMPTS, num_responses=2)
    assert model.training and not model.config.use_cache
    assert tokenizer.padding_side == "right"
    assert (json.dumps(model.generation_config.to_dict(), default=str), tokenizer.pad_token) == before


LEAKS = {
    "top_k": 1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(5, 200)],
    "suppress_tokens": list(range(5, 200)),
    "begin_suppress_tokens": list(range(5, 200)),
    "sequence_bias": [[[20], 50.0]],
    "exponential_decay_length_penalty": (1, 50.0),
    "guidance_scale": 3.0,
    "forced_eos_token_id": 20,
    "min_new_tokens": 6,
    "num_beams": 3,
}


@pytest.mark.parametrize("option", LEAKS)
def test_model_generation_config_does_not_change_the_sampling(model, tokenizer, option):
    # Few tokens end a response, so that options about the end show as well.
    model.generation_config.eos_token_id = list(range(40, 120))
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=6)
    reference = generator(PROMPTS, num_responses=2)
    setattr(model.generation_config, option, LEAKS[option])
    config, before = model.generation_config, model.generation_config.to_dict()
    assert generator(PROMPTS, num_responses=2) == reference
    assert model.generation_config is config and config.to_dict() == before


@pytest.mark.parametrize("of_its_own", [True, False])
def test_generation_config_of_a_peft_model(model, tokenizer, of_its_own):
    policy = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    generator = TransformersGenerator(policy, tokenizer, max_new_tokens=6)
    reference = generator(PROMPTS, num_responses=2)
    config = own = model.generation_config
    if of_its_own:
        policy.generation_config = own = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    config.no_repeat_ngram_size = own.no_repeat_ngram_size = 1
    assert generator(PROMPTS, num_responses=2) == reference
    assert model.generation_config is config and policy.generation_config is own
    assert ("generation_config" in vars(policy)) == of_its_own


def test_generation_config_is_restored_after_an_error(model, tokenizer):
    config = model.generation_config
    model.train()
    # A token that the embedding does not have.
    tokenizer.add_tokens("sea")
    with pytest.raises(IndexError):
        TransformersGenerator(model, tokenizer, max_new_tokens=2)(["sea"], num_responses=1)
    assert model.generation_config is config and model.training


def test_tokenizer_without_pad_token(model, tokenizer):
    expected = TransformersGenerator(model, tokenizer, max_new_tokens=8, temperature=0)(PROMPTS, num_responses=1)
    tokenizer.pad_token = None
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=8, temperature=0)
    assert generator(PROMPTS, num_responses=1) == expected
    assert tokenizer.pad_token is None


def test_tools_reach_the_model(model, tokenizer):
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=8, temperature=0)
    without, as_list, as_json = (
        generator([MESSAGES], num_responses=1, tools=tools) for tools in (None, [TOOLS], [json.dumps(TOOLS)])
    )
    assert as_list == as_json != without


def test_too_long_prompt_is_named_before_any_generation(model, tokenizer):
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=1000)
    with pytest.raises(ValueError, match=r"row 1 .*sea sea.* 1024 tokens. Lower `max_new_tokens`"):
        generator(["The sea", "sea " * 40], num_responses=1)
    with pytest.raises(ValueError, match="row 0 is empty"):
        generator([""], num_responses=1)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1}, {"top_p": 0}, {"model_init_kwargs": {}}]
)
def test_bad_options(model, tokenizer, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        TransformersGenerator(model, tokenizer, **options)


def test_greedy_gives_one_response(model, tokenizer):
    with pytest.raises(ValueError, match="`temperature=0`"):
        TransformersGenerator(model, tokenizer, temperature=0)(["The sea"], num_responses=2)


def test_model_init_kwargs(model_dir):
    generator = TransformersGenerator(model_dir, max_new_tokens=2, model_init_kwargs={"dtype": torch.bfloat16})
    assert generator.model.dtype == torch.bfloat16
    assert len(generator(["The sea"], num_responses=1)[0]) == 1


def stored_keys(folder):
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return [key for line in lines if line.endswith(b"}\n") for key in json.loads(line)["keys"]]


def test_stored_responses_are_not_generated_again(model, tokenizer, tmp_path, caplog):
    options = {"max_new_tokens": 6, "batch_size": 4}
    expected = TransformersGenerator(model, tokenizer, **options)(PROMPTS, num_responses=6)
    store = tmp_path / "responses"
    for _ in range(2):
        generator = TransformersGenerator(model, tokenizer, cache_dir=str(store), **options)
        assert generator(PROMPTS, num_responses=6) == expected
    # Four and two responses of each prompt.
    assert len(stored_keys(store)) == 2 * len(PROMPTS)
    with caplog.at_level("INFO", logger="trl_bpo"):
        assert generator(PROMPTS, num_responses=6) == expected
    assert "30 of 30 responses" in caplog.text
    assert len(stored_keys(store)) == 2 * len(PROMPTS)


def test_only_new_prompts_are_generated(model, tokenizer, tmp_path):
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=6, cache_dir=str(tmp_path))
    first = generator(PROMPTS[1:3], num_responses=2)
    responses = generator(PROMPTS, num_responses=2)
    assert responses[1:3] == first
    assert len(stored_keys(tmp_path)) == len(PROMPTS)


def test_same_prompt_twice(model, tokenizer, tmp_path):
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=6, cache_dir=str(tmp_path))
    responses = generator(["The sea", "The sea"], num_responses=2)
    assert responses[0] != responses[1]
    assert generator(["The sea", "The sea"], num_responses=2) == responses


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 7}, {"temperature": 0.9}, {"top_p": 0.5}, {"seed": 1}, {"continuous_batching": True}],
)
def test_another_request_is_not_answered_from_the_store(model, tokenizer, tmp_path, options):
    defaults = {"max_new_tokens": 6, "cache_dir": str(tmp_path)}
    TransformersGenerator(model, tokenizer, **defaults)(["The sea"], num_responses=1)
    TransformersGenerator(model, tokenizer, **{**defaults, **options})(["The sea"], num_responses=1)
    assert len(set(stored_keys(tmp_path))) == 2


def test_other_weights_and_ends_are_not_answered_from_the_store(model, tokenizer, tmp_path):
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=6, cache_dir=str(tmp_path))
    first = generator(["The sea"], num_responses=1)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 40]
    generator(["The sea"], num_responses=1)
    assert len(stored_keys(tmp_path)) == 2
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    weight = model.model.layers[0].mlp.up_proj.weight.data
    before = weight.clone()
    weight[0, 0] += 0.5
    generator(["The sea"], num_responses=1)
    assert len(stored_keys(tmp_path)) == 3
    weight.copy_(before)
    assert generator(["The sea"], num_responses=1) == first
    assert len(stored_keys(tmp_path)) == 3


def test_disabled_adapter_is_another_model(model, tokenizer, tmp_path):
    policy = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    generator = TransformersGenerator(policy, tokenizer, max_new_tokens=8, temperature=0, cache_dir=str(tmp_path))
    adapted = generator(PROMPTS, num_responses=1)
    with policy.disable_adapter():
        assert generator(PROMPTS, num_responses=1) != adapted
    assert generator(PROMPTS, num_responses=1) == adapted


@pytest.mark.parametrize("continuous_batching", [False, True])
def test_killed_and_resumed(model, tokenizer, tmp_path, continuous_batching):
    # With many tokens that end a response, the lengths are mixed.
    model.generation_config.eos_token_id = list(range(40, 60))
    options = {"max_new_tokens": 60, "batch_size": 2, "continuous_batching": continuous_batching}
    prompts = PROMPTS * 4
    expected = TransformersGenerator(model, tokenizer, **options)(prompts, num_responses=3)
    generator = TransformersGenerator(model, tokenizer, cache_dir=str(tmp_path), **options)
    context = multiprocessing.get_context("fork")
    stored = 0
    for _ in range(3):
        process = context.Process(target=generator, args=(prompts, 3))
        process.start()
        while len(stored_keys(tmp_path)) < stored + 4:
            assert process.is_alive()
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        stored = len(stored_keys(tmp_path))
    before = set(stored_keys(tmp_path))
    responses = generator(prompts, num_responses=3)
    keys = stored_keys(tmp_path)
    # Nothing twice, nothing lost, and more than one process had a part in it.
    assert len(keys) == len(set(keys)) == len(prompts) * (3 if continuous_batching else 2)
    assert before < set(keys) and len(list(tmp_path.glob("*.jsonl"))) == 4
    assert generator(prompts, num_responses=3) == responses
    if not continuous_batching:
        assert responses == expected


def test_continuous_batching_greedy(model, tokenizer):
    options = {"max_new_tokens": 8, "temperature": 0}
    expected = TransformersGenerator(model, tokenizer, **options)(PROMPTS, num_responses=1)
    generator = TransformersGenerator(model, tokenizer, batch_size=2, continuous_batching=True, **options)
    assert generator(PROMPTS, num_responses=1) == expected


def test_continuous_batching_samples(model, tokenizer):
    model.generation_config.eos_token_id = list(range(40, 120))
    options = {"max_new_tokens": 12, "batch_size": 3, "continuous_batching": True}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = TransformersGenerator(model, tokenizer, seed=1, **options)(PROMPTS, num_responses=4)
    assert torch.equal(torch.rand(3), expected)
    assert [len(row) for row in first] == [4] * len(PROMPTS)
    responses = [response for row in first for response in row]
    assert {response.truncated for response in responses} == {False, True}
    assert all(response.num_tokens == 12 for response in responses if response.truncated)
    assert len({response.text for response in responses}) > 10
    assert TransformersGenerator(model, tokenizer, seed=1, **options)(PROMPTS, num_responses=4) == first
    assert TransformersGenerator(model, tokenizer, seed=2, **options)(PROMPTS, num_responses=4) != first


@pytest.mark.parametrize("option", ["top_k", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"])
def test_generation_config_does_not_change_continuous_batching(model, tokenizer, option):
    model.generation_config.eos_token_id = list(range(40, 120))
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=6, continuous_batching=True)
    reference = generator(PROMPTS, num_responses=2)
    setattr(model.generation_config, option, LEAKS[option])
    assert generator(PROMPTS, num_responses=2) == reference


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_restores_the_model(model, tokenizer, attention):
    model.set_attn_implementation(attention)
    model.train()
    config = model.generation_config
    before = config.to_dict()
    TransformersGenerator(model, tokenizer, max_new_tokens=4, continuous_batching=True)(PROMPTS, num_responses=2)
    assert model.training and model.config._attn_implementation == attention
    assert model.generation_config is config and config.to_dict() == before


def test_continuous_batching_of_a_peft_model(model, tokenizer):
    policy = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    options = {"max_new_tokens": 8, "temperature": 0}
    expected = TransformersGenerator(policy, tokenizer, **options)(PROMPTS, num_responses=1)
    generator = TransformersGenerator(policy, tokenizer, continuous_batching=True, **options)
    assert generator(PROMPTS, num_responses=1) == expected
    with policy.disable_adapter():
        assert generator(PROMPTS, num_responses=1) != expected


def test_continuous_batching_refuses_prompt_tuning(model, tokenizer):
    policy = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="`continuous_batching`"):
        TransformersGenerator(policy, tokenizer, continuous_batching=True)


def test_continuous_batching_ends_when_storing_fails(model, tokenizer, tmp_path):
    folder = tmp_path / "folder"
    generator = TransformersGenerator(
        model, tokenizer, max_new_tokens=50, batch_size=1, cache_dir=str(folder), continuous_batching=True
    )
    folder.rmdir()
    folder.touch()
    threads = threading.active_count()
    with pytest.raises(OSError):
        generator(PROMPTS, num_responses=50)
    assert threading.active_count() == threads


def test_continuous_batching_names_the_failure(model, tokenizer):
    # A token that the embedding does not have.
    tokenizer.add_tokens("sea")
    with pytest.raises(RuntimeError, match="index out of range"):
        TransformersGenerator(model, tokenizer, max_new_tokens=2, continuous_batching=True)(["sea"], num_responses=1)
    assert model.config._attn_implementation == "sdpa"


def test_batch_that_a_kill_tore(model_dir, tmp_path):
    # A write of several answers can be cut anywhere. What is left of the batch must be what it would have been.
    prompts = [f"Question number {row}" for row in range(6)]

    def generate(folder):
        return TransformersGenerator(model_dir, max_new_tokens=6, batch_size=6, cache_dir=str(folder))(prompts, 2)

    whole = generate(tmp_path)
    (path,) = tmp_path.glob("answers-*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    for cut in (1, len(lines[1]) // 2, len(lines[1]) - 1):
        path.write_bytes(lines[0] + lines[1][:cut])
        assert generate(tmp_path) == whole, cut
        for other in tmp_path.glob("answers-*.jsonl"):
            if other != path:
                other.unlink()
