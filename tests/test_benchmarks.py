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


"""Benchmarks from files in the layout of the published ones: what is kept, what is dropped, and that it is counted."""

import gzip
import json
import os
from pathlib import Path

import pytest
from openai_server import OpenAIServer, completion, error
from tiny import tiny_model_dir

from trl_bpo import OpenAIGenerator, TransformersGenerator
from trl_bpo.benchmarks import (
    alpaca_eval_outputs,
    answer_prompts,
    draw,
    drop_seen,
    load_alpaca_eval,
    load_hh_rlhf,
    load_prompts,
    load_safe_rlhf,
    load_ultrafeedback,
    safe_rlhf_rubrics,
)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def user(text):
    return [{"role": "user", "content": text}]


def transcript(*turns):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[number % 2]}: {turn}" for number, turn in enumerate(turns))


def test_alpaca_eval(tmp_path):
    rows = [
        {"instruction": f"Do {row}.", "output": f"Done {row}.", "dataset": f"set {row % 2}", "generator": "gpt"}
        for row in range(4)
    ]
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps(rows))
    benchmark = load_alpaca_eval(str(path))
    assert benchmark.dataset["prompt"][1] == user("Do 1.")
    assert list(benchmark.dataset["group"]) == ["set 0", "set 1"] * 2
    assert benchmark.dataset["reference"][3] == "Done 3."
    with pytest.raises(ValueError, match="no column `ref`"):
        load_alpaca_eval(str(path), reference_column="ref")
    # What the package of that name reads: a JSON list, in the order of the instructions.
    outputs = alpaca_eval_outputs(benchmark.dataset, ["a", "b", None, "d"], "new")
    assert outputs[1] == {"instruction": "Do 1.", "output": "b", "generator": "new", "dataset": "set 1"}
    assert [row["output"] for row in outputs] == ["a", "b", "", "d"]


def test_hh_rlhf(tmp_path):
    rows = [
        {"chosen": transcript("Hi", "Hello.", "Why?", "So."), "rejected": transcript("Hi", "Hello.", "Why?", "No.")},
        {"chosen": transcript("Hi", "Hello.", "Why?", "Other."), "rejected": transcript("Hi", "x")},
        {"chosen": transcript("", "What?"), "rejected": transcript("", "No.")},
        {"chosen": "\n\nHuman: Hi\n\nHuman: Hi again\n\nAssistant: Yes", "rejected": transcript("Hi", "x")},
    ]
    benchmark = load_hh_rlhf(write(tmp_path / "test.jsonl.gz", rows))
    assert benchmark.dataset.to_dict() == {
        "prompt": [[*user("Hi"), {"role": "assistant", "content": "Hello."}, *user("Why?")]],
        "group": [None],
    }
    assert benchmark.dropped == {
        "prompt that was there before": 1,
        "empty prompt": 1,
        "turns that do not alternate": 1,
    }
    with pytest.raises(ValueError, match="Row 1 .* no transcript"):
        load_hh_rlhf(write(tmp_path / "odd.jsonl", [rows[0], {"chosen": "What?", "rejected": "x"}]))


def test_hh_rlhf_with_the_folders_of_the_original(tmp_path):
    for name, prompt in (("helpful-base", "Help!"), ("harmless-base", "Harm!"), ("helpful-online", "No.")):
        for split in ("train", "test"):
            row = {"chosen": transcript(f"{prompt} {split}", "Yes."), "rejected": transcript("x", "y")}
            write(tmp_path / name / f"{split}.jsonl.gz", [row])
    benchmark = load_hh_rlhf(str(tmp_path))
    found = [(prompt[0]["content"], group) for prompt, group in zip(*benchmark.dataset[:].values(), strict=True)]
    assert found == [("Help! test", "helpful-base"), ("Harm! test", "harmless-base")]


@pytest.mark.parametrize("load", [load_safe_rlhf, load_ultrafeedback])
def test_prompts_of_pairs(load, tmp_path):
    rows = [{"prompt": f"What is {row // 2}?", "chosen": f"It is {row}.", "rejected": "x"} for row in range(6)]
    benchmark = load(write(tmp_path / "pairs.jsonl", rows))
    assert list(benchmark.dataset["prompt"]) == [user(f"What is {number}?") for number in range(3)]
    assert benchmark.dropped == {"prompt that was there before": 3}
    with pytest.raises(ValueError, match="no column `prompt`"):
        load(write(tmp_path / "other.jsonl", [{"question": "What?"}]))
    with pytest.raises(ValueError, match="no usable prompt"):
        load(write(tmp_path / "empty.jsonl", [{"prompt": " "}]))
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path / "missing.jsonl"))


def test_prompts_of_your_own_keep_their_columns(tmp_path):
    rows = [
        {"prompt": "One", "constraints": [{"type": "x"}], "group": "a"},
        {"prompt": user("Two"), "constraints": [], "group": "b"},
    ]
    texts = load_prompts(write(tmp_path / "texts.jsonl", rows[:1]))
    assert texts.dataset.to_dict() == {"prompt": [user("One")], "constraints": [[{"type": "x"}]], "group": ["a"]}
    messages = load_prompts(write(tmp_path / "messages.jsonl", [{"prompt": user("Two")}]))
    assert messages.dataset.to_dict() == {"group": [None], "prompt": [user("Two")]}


def test_prompts_of_the_training_are_left_out(tmp_path):
    benchmark = load_ultrafeedback(write(tmp_path / "p.jsonl", [{"prompt": f"What is {row}?"} for row in range(5)]))
    kept = drop_seen(benchmark, ["What is 1?", user("what is 3"), "Else?"])
    assert [prompt[0]["content"] for prompt in kept.dataset["prompt"]] == ["What is 0?", "What is 2?", "What is 4?"]
    assert kept.dropped == {"prompt of the training": 2}
    with pytest.raises(ValueError, match="No prompt of `ultrafeedback` is left"):
        drop_seen(benchmark, [f"What is {row}?" for row in range(5)])


def test_draw(tmp_path):
    benchmark = load_ultrafeedback(write(tmp_path / "p.jsonl", [{"prompt": f"What is {row}?"} for row in range(50)]))
    drawn = draw(benchmark, 10, seed=1)
    numbers = [int(prompt[0]["content"][8:-1]) for prompt in drawn.dataset["prompt"]]
    assert numbers == sorted(set(numbers)) and len(numbers) == 10 and numbers != list(range(10))
    assert drawn.dropped == {"not drawn": 40}
    assert list(draw(benchmark, 10, seed=1).dataset["prompt"]) == list(drawn.dataset["prompt"])
    assert list(draw(benchmark, 10, seed=2).dataset["prompt"]) != list(drawn.dataset["prompt"])
    assert draw(benchmark, 60) == benchmark


def test_prompts_that_are_too_long_for_the_model_have_no_answer(tmp_path):
    generator = TransformersGenerator(tiny_model_dir(tmp_path / "model"), max_new_tokens=8)
    prompts = [user("Hi"), user("word " * 600), user("Why?")]
    with pytest.raises(ValueError):
        generator(prompts, 1)
    answers = answer_prompts(generator, prompts)
    assert answers[1] is None
    assert [answers[0], answers[2]] == [row[0] for row in generator([prompts[0], prompts[2]], 1)]
    assert answer_prompts(generator, [prompts[1]]) == [None]


def test_prompts_that_the_server_rejects_have_no_answer(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")

    def answer(request):
        text = request["messages"][0]["content"]
        if text == "Too long":
            return error(400, "This model's maximum context length is 5 tokens.", "context_length_exceeded")
        # A model may have nothing to say: that is an answer.
        return completion("" if text == "Say nothing" else "Yes.")

    with OpenAIServer(answer) as server:
        generator = OpenAIGenerator("policy", base_url=server.base_url, max_concurrency=1)
        answers = answer_prompts(generator, [user("Hi"), user("Too long"), user("Say nothing")])
    assert [None if given is None else given.text for given in answers] == ["Yes.", None, ""]


def test_rubrics_of_safe_rlhf():
    rubrics = safe_rlhf_rubrics()
    assert list(rubrics) == ["helpful", "harmless"]
    texts = set()
    for single, pairwise in rubrics.values():
        assert "What?" in single.messages("What?", "That.")[1]["content"]
        assert "Other." in pairwise.messages("What?", "That.", "Other.")[1]["content"]
        texts |= {single.template, pairwise.template}
    assert len(texts) == 4


@pytest.mark.skipif("TRL_BPO_TEST_DATA" not in os.environ, reason="needs the real files in TRL_BPO_TEST_DATA")
class TestRealFiles:
    @staticmethod
    def path(name):
        return str(Path(os.environ["TRL_BPO_TEST_DATA"]) / f"{name}.jsonl.gz")

    def test_alpaca_eval(self):
        benchmark = load_alpaca_eval(self.path("alpacaeval_prompts"), "ref_gpt4_1106_preview")
        assert len(benchmark.dataset) + benchmark.dropped.get("prompt that was there before", 0) == 805
        assert len(set(benchmark.dataset["group"])) == 5

    def test_hh_rlhf(self):
        benchmark = load_hh_rlhf(self.path("hh_harmless_base_test"))
        assert len(benchmark.dataset) + sum(benchmark.dropped.values()) == 2312
        assert sum(benchmark.dropped.values()) < 50
        assert all(prompt[-1]["role"] == "user" for prompt in benchmark.dataset["prompt"])

    def test_safe_rlhf(self):
        benchmark = load_safe_rlhf(self.path("pku_saferlhf_5k"))
        assert len(benchmark.dataset) == 930 and benchmark.dropped == {"prompt that was there before": 4205}

    def test_ultrafeedback(self):
        benchmark = load_ultrafeedback(self.path("ultrafeedback_binarized_1200"))
        assert len(benchmark.dataset) + sum(benchmark.dropped.values()) == 1200
