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
import statistics

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import tiny_model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import enable_progress_bar

from trl_bpo import Verdict
from trl_bpo.evaluation import comparison_table, distinct_n, evaluate_policy, paired_difference, perplexity
from trl_bpo.generation import Response, TransformersGenerator
from trl_bpo.verifiable import VerifiableJudge


PROMPTS = ["What is the capital of France?", "Write a poem.", "Sort a list.", "Name the sea.", "What is it?"]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather of a city"}}]
RESPONSES = ["Paris.", "The sea and the wind, please.", " \n", "It depends on what you want to do with it.", "x"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tiny_model_dir(tmp_path_factory.mktemp("tiny"))
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def conversational(prompts):
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def looped_perplexity(model, tokenizer, prompt, response, tools=None):
    if isinstance(prompt, list):
        prompt_ids = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]
    response_ids = tokenizer(response)["input_ids"]
    nll = 0.0
    for position, token in enumerate(response_ids):
        context = torch.tensor([prompt_ids + response_ids[:position]])
        with torch.no_grad():
            nll -= model(context).logits[0, -1].log_softmax(-1)[token].item()
    return math.exp(nll / len(response_ids))


class CannedGenerator:
    """A policy whose responses are known: for each prompt the next ones of a list."""

    def __init__(self, responses):
        self.responses = responses

    def __call__(self, prompts, num_responses, tools=None):
        assert len(prompts) * num_responses == len(self.responses)
        taken = iter(self.responses)
        return [[next(taken) for _ in range(num_responses)] for _ in prompts]


def responses_of(*texts, truncated=()):
    return [Response(text=text, truncated=text in truncated, num_tokens=len(text)) for text in texts]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("chat", [False, True])
def test_perplexity_equals_a_loop_over_tokens(tiny, chat, batch_size):
    model, tokenizer = tiny
    prompts = conversational(PROMPTS) if chat else PROMPTS
    values = perplexity(model, tokenizer, prompts, RESPONSES, batch_size=batch_size)
    assert values[2] is None
    for prompt, response, value in zip(prompts, RESPONSES, values, strict=True):
        if value is not None:
            assert value == pytest.approx(looped_perplexity(model, tokenizer, prompt, response), rel=1e-4)
    assert len(set(values)) == len(values)


def test_perplexity_with_tools(tiny):
    prompts = conversational(PROMPTS[:3])
    values = perplexity(*tiny, prompts, ["Paris."] * 3, tools=[TOOLS, json.dumps(TOOLS), None])
    assert values[0] == pytest.approx(looped_perplexity(*tiny, prompts[0], "Paris.", TOOLS), rel=1e-4)
    assert values[1] == pytest.approx(looped_perplexity(*tiny, prompts[1], "Paris.", TOOLS), rel=1e-4)
    assert values[2] == pytest.approx(looped_perplexity(*tiny, prompts[2], "Paris."), rel=1e-4)
    assert values[0] != pytest.approx(looped_perplexity(*tiny, prompts[0], "Paris."), rel=1e-2)


def test_perplexity_shows_its_progress(tiny, capsys):
    # Another test may have switched it off, for the whole process.
    enable_progress_bar()
    perplexity(*tiny, PROMPTS, RESPONSES, batch_size=3)
    assert "Computing perplexities: 100%" in capsys.readouterr().err


def test_perplexity_restores_the_mode_and_leaves_no_gradient(tiny):
    model, tokenizer = tiny
    model.train()
    first = perplexity(model, tokenizer, PROMPTS[:1], RESPONSES[:1])
    assert model.training
    model.eval()
    assert perplexity(model, tokenizer, PROMPTS[:1], RESPONSES[:1]) == first
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert perplexity(model, tokenizer, [], []) == []


def test_distinct_n():
    assert distinct_n(["a b a b"], 1) == 0.5
    assert distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["The cat", "the  CAT"], 2) == 0.5
    assert distinct_n(["a b", "c d"], 2) == 1.0  # `b c` would span two texts.
    assert distinct_n(["", "word"], 2) == 0.0
    assert distinct_n([], 1) == 0.0


@pytest.mark.parametrize("chat", [False, True])
def test_report(tiny, chat):
    model, tokenizer = tiny
    constraints = [{"kind": "word_count", "args": '{"max": 2}'}]
    dataset = Dataset.from_dict(
        {
            "prompt": conversational(PROMPTS[:3]) if chat else PROMPTS[:3],
            "constraints": [constraints] * 3,
            "seen": [True, False, True],
        }
    )
    texts = ["one two", "one two three", "one", "one", "", "a b c d e f"]
    generator = CannedGenerator(responses_of(*texts, truncated=["a b c d e f"]))
    report = evaluate_policy(
        generator, VerifiableJudge(), dataset, model, tokenizer, num_responses=2, group_column="seen"
    )
    assert report.prompt_scores == [7.75, 10, 1]
    assert report.score_mean == pytest.approx(6.25)
    assert report.score_stderr == pytest.approx(statistics.stdev([7.75, 10, 1]) / math.sqrt(3))
    assert (report.num_prompts, report.num_responses, report.num_unscored) == (3, 6, 0)
    assert report.length_mean == pytest.approx(sum(map(len, texts)) / 6)
    assert report.distinct_1 == pytest.approx(9 / 13)
    assert report.distinct_2 == pytest.approx(7 / 8)
    assert report.empty_rate == pytest.approx(1 / 6)
    assert report.truncated_rate == pytest.approx(1 / 6)
    prompts = [prompt for prompt in dataset["prompt"] for _ in range(2)]
    values = perplexity(model, tokenizer, prompts, texts)
    assert report.perplexity_median == pytest.approx(statistics.median(v for v in values if v is not None), rel=1e-4)

    assert list(report.groups) == ["True", "False"]
    assert report.groups["True"].prompt_scores == [7.75, 1]
    assert report.groups["True"].num_responses == 4
    assert report.groups["False"].score_mean == 10
    assert report.groups["False"].score_stderr is None
    assert report.groups["False"].truncated_rate == 0
    assert report.groups["False"].groups == {}


def test_judge_is_called_like_a_reward_function(tiny):
    calls = []

    def judge(**kwargs):
        calls.append(kwargs)
        return [1.0] * len(kwargs["completions"])

    dataset = Dataset.from_dict({"prompt": conversational(PROMPTS[:2]), "topic": ["travel", "writing"]})
    evaluate_policy(CannedGenerator(responses_of("a", "b", "c", "d")), judge, dataset, *tiny, num_responses=2)
    (call,) = calls
    assert set(call) == {"prompts", "completions", "topic"}
    assert call["topic"] == ["travel", "travel", "writing", "writing"]
    assert call["prompts"][1] == conversational(PROMPTS)[0]
    assert call["completions"][2] == [{"role": "assistant", "content": "c"}]


def test_tools_reach_generator_judge_and_perplexity(tiny):
    model, tokenizer = tiny
    judged = []

    def judge(completions, tools, **kwargs):
        judged.extend((completion[0]["content"], tool) for completion, tool in zip(completions, tools, strict=True))
        return [1.0] * len(completions)

    prompts = conversational(PROMPTS[:1] * 2)
    tools = [json.dumps(TOOLS), None]
    generator = TransformersGenerator(model, tokenizer, max_new_tokens=8, temperature=0)
    report = evaluate_policy(generator, judge, Dataset.from_dict({"prompt": prompts, "tools": tools}), *tiny)
    expected = [row[0].text for row in generator(prompts, 1, tools)]
    assert judged == list(zip(expected, tools, strict=True)) and expected[0] != expected[1]
    values = perplexity(model, tokenizer, prompts, expected, tools=tools)
    assert report.perplexity_median == pytest.approx(statistics.median(values), rel=1e-4)
    assert values != pytest.approx(perplexity(model, tokenizer, prompts, expected), rel=1e-2)


def test_unscored_responses_are_counted_and_left_out(tiny):
    dataset = Dataset.from_dict({"prompt": PROMPTS[:3]})
    generator = CannedGenerator(responses_of(*"abcdef"))
    verdicts = [Verdict(4.0), Verdict(None), float("nan"), None, 8, 6.0]
    report = evaluate_policy(generator, lambda **_: verdicts, dataset, *tiny, num_responses=2)
    assert report.prompt_scores == [4, None, 7]
    assert report.score_mean == 5.5
    assert report.num_unscored == 3
    assert report.num_responses == 6
    none = evaluate_policy(generator, lambda **_: [None] * 6, dataset, *tiny, num_responses=2)
    assert (none.score_mean, none.score_stderr, none.num_unscored) == (None, None, 6)


def test_all_empty_responses_have_no_perplexity(tiny):
    dataset = Dataset.from_dict({"prompt": PROMPTS[:2]})
    report = evaluate_policy(CannedGenerator(responses_of("", " ")), lambda **_: [1, 1], dataset, *tiny)
    assert report.perplexity_median is None
    assert (report.empty_rate, report.distinct_1, report.score_mean) == (1, 0, 1)


def test_perplexity_is_the_base_models_when_the_policy_has_an_adapter(tmp_path):
    torch.manual_seed(0)
    path = tiny_model_dir(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    base = AutoModelForCausalLM.from_pretrained(path)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(r=4, init_lora_weights=False))
    dataset = Dataset.from_dict({"prompt": PROMPTS[:2]})
    generator = CannedGenerator(responses_of(RESPONSES[0], RESPONSES[1]))
    of_base, of_policy = (
        evaluate_policy(generator, lambda **_: [1, 2], dataset, m, tokenizer) for m in (base, policy)
    )
    assert of_policy.perplexity_median == pytest.approx(of_base.perplexity_median, rel=1e-5)
    with_adapter = perplexity(policy, tokenizer, PROMPTS[:2], RESPONSES[:2])
    assert statistics.median(with_adapter) != pytest.approx(of_base.perplexity_median, rel=1e-3)


def test_errors(tiny):
    dataset = Dataset.from_dict({"prompt": PROMPTS[:2]})
    generator = CannedGenerator(responses_of("a", "b"))
    with pytest.raises(ValueError, match="no column `seen`. Its columns: prompt"):
        evaluate_policy(generator, lambda **_: [1, 2], dataset, *tiny, group_column="seen")
    with pytest.raises(ValueError, match="no column `prompt`"):
        evaluate_policy(generator, lambda **_: [1, 2], dataset.rename_column("prompt", "text"), *tiny)
    with pytest.raises(ValueError, match="`dataset` is empty"):
        evaluate_policy(generator, lambda **_: [], dataset.select([]), *tiny)
    with pytest.raises(ValueError, match="gave 1 for 2"):
        evaluate_policy(generator, lambda **_: [1], dataset, *tiny)


def test_paired_difference():
    mean, stderr = paired_difference([1, 2, None, 3], [2, 4, 9, 3])
    assert mean == pytest.approx(1)
    assert stderr == pytest.approx(1 / math.sqrt(3))
    assert paired_difference([1, None], [3, 2]) == (2, None)
    # Prompts of very different difficulty do not blur a change that is the same for all of them.
    assert paired_difference([1, 5, 9], [1.5, 5.5, 9.5]) == (0.5, 0)
    with pytest.raises(ValueError, match="got 1 and 2 scores"):
        paired_difference([1], [1, 2])
    with pytest.raises(ValueError, match="No prompt has a score in both"):
        paired_difference([None, 1], [1, None])


def test_comparison_table_shows_the_paired_change(tiny):
    dataset = Dataset.from_dict({"prompt": PROMPTS[:3], "kind": ["x", "y", "y"]})
    generator = CannedGenerator(responses_of(*"abc"))
    before = evaluate_policy(generator, lambda **_: [1, 2, 3], dataset, *tiny, group_column="kind")
    after = evaluate_policy(generator, lambda **_: [2, 3, 4], dataset, *tiny, group_column="kind")
    lines = comparison_table(before, after).splitlines()
    assert lines[0].split() == ["before", "after", "change"]
    assert lines[2].split() == "score, all prompts (3) 2.00 ± 0.58 3.00 ± 0.58 1.00 ± 0.00".split()
    assert lines[3].split() == "score, x (1) 1.00 2.00 1.00".split()
    assert lines[4].split() == "score, y (2) 2.50 ± 0.50 3.50 ± 0.50 1.00 ± 0.00".split()
    assert lines[-1].startswith("perplexity under the base model") and lines[-1].endswith("0.00")
