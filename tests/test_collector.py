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
import textwrap

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from openai_server import OpenAIServer
from tiny import tiny_model_dir, tiny_reward_model_dir

from trl_bpo import OpenAIJudge, RewardModelJudge, Verdict
from trl_bpo.collector import BPODataCollector
from trl_bpo.generation import Response, TransformersGenerator


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather"}}]
USER = {"role": "user", "content": "What is the capital of France?"}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Italy?"}],
]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return TransformersGenerator(tiny_model_dir(tmp_path_factory.mktemp("model")), max_new_tokens=8)


def length_reward(completions, **kwargs):
    return [
        float(len(completion if isinstance(completion, str) else completion[0]["content"]))
        for completion in completions
    ]


def counting(prompts, num_responses, tools=None):
    return [[Response(f"{prompt} {n}" * (n + 1), n == 3, n) for n in range(num_responses)] for prompt in prompts]


def test_real_generator_and_reward_model(generator, tmp_path):
    judge = RewardModelJudge(tiny_reward_model_dir(tmp_path))
    dataset = Dataset.from_dict({"prompt": CONVERSATIONS, "source": ["a", "b", "c"]})
    collector = BPODataCollector(generator, judge, num_responses=4, allow_truncated_chosen=True)
    pairs = collector.collect(dataset)
    assert len(pairs) == 6 and sorted(pairs["source"]) == ["a", "a", "b", "b", "c", "c"]
    assert pairs[0]["chosen"][0]["role"] == "assistant"
    assert all(row["score_chosen"] > row["score_rejected"] for row in pairs)
    assert set(pairs["judge"]) == {tmp_path.name}
    # The scores belong to the responses that they stand beside.
    row = pairs[5]
    (again,) = judge(prompts=[row["prompt"]], completions=[row["chosen"]])
    assert row["score_chosen"] == pytest.approx(again, abs=1e-5)
    report = collector.report
    assert report.responses == 12 and 12 <= report.generated_tokens <= 96 and report.unscored == 0
    assert report.pairs.pairs == 6 and set(report.seconds) == {"generate", "score", "pair"}


def test_real_generator_and_openai_client(generator, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "anything")

    def answer(request):
        response = [line for line in request["messages"][1]["content"].splitlines() if line.startswith('"')][1]
        # The judge does not like every answer enough to rate it.
        length = len(json.loads(response))
        return json.dumps({"rating": length % 10 + 1}) if length % 4 else "No idea."

    dataset = Dataset.from_dict({"prompt": ["The sea", "The wind", "How do I sort"]})
    with OpenAIServer(answer) as server:
        judge = OpenAIJudge("grader", base_url=server.base_url, num_reasks=0)
        collector = BPODataCollector(generator, judge, num_responses=6, pair_rule="all", allow_truncated_chosen=True)
        scored = collector.score(collector.generate(dataset))
    assert len(server.requests) == 18
    assert set(scored["judge"]) == {"grader"}
    for row in scored:
        for response, score, verdict in zip(row["responses"], row["scores"], row["verdicts"], strict=True):
            length = len(response)
            assert (score, verdict) == (
                (length % 10 + 1, json.dumps({"rating": length % 10 + 1})) if length % 4 else (None, "No idea.")
            )
    pairs = collector.pair(scored)
    assert collector.report.pairs.unscored == collector.report.unscored > 0
    assert len(pairs) == collector.report.pairs.pairs > 0
    assert isinstance(pairs[0]["chosen"], str)


def test_stages_can_be_saved_and_resumed(tmp_path):
    dataset = Dataset.from_dict({"prompt": ["a", "b"]})
    generated = BPODataCollector(counting, num_responses=4).generate(dataset)
    assert generated["truncated"] == [[False, False, False, True]] * 2
    generated.save_to_disk(tmp_path / "generated")
    scored = BPODataCollector(judge=length_reward).score(load_from_disk(tmp_path / "generated"))
    assert scored["judge"] == ["length_reward"] * 2 and scored["verdicts"] == [[None] * 4] * 2
    scored.save_to_disk(tmp_path / "scored")
    step_by_step = BPODataCollector().pair(load_from_disk(tmp_path / "scored"))
    at_once = BPODataCollector(counting, length_reward, num_responses=4).collect(dataset)
    resumed = BPODataCollector(judge=length_reward).collect(load_from_disk(tmp_path / "generated"))
    paired = BPODataCollector().collect(scored)
    assert step_by_step.to_list() == at_once.to_list() == resumed.to_list() == paired.to_list()
    # The best response of each prompt was truncated.
    assert at_once["chosen"] == ["a 2a 2a 2", "b 2b 2b 2"] and at_once["rejected"] == ["a 0", "b 0"]


def test_report_of_truncation(caplog):
    collector = BPODataCollector(counting, num_responses=4)
    collector.generate(Dataset.from_dict({"prompt": ["a", "b"]}))
    assert (collector.report.responses, collector.report.truncated, collector.report.generated_tokens) == (8, 2, 12)
    assert "2 of 8 responses were cut off" in caplog.text


def test_columns_reach_generator_and_judge():
    seen = {}

    def generate(prompts, num_responses, tools=None):
        seen["generator_tools"] = tools
        return [[Response("x", False, 1), Response("y", False, 1)] for _ in prompts]

    def judge(prompts, completions, **columns):
        seen.update(columns, completions=completions)
        return [Verdict(1.0, "fine"), None] * 2

    tools = [json.dumps(TOOLS), None]
    dataset = Dataset.from_dict(
        {"prompt": CONVERSATIONS[:2], "tools": tools, "answer": ["Paris", "Rome"], "completions": [[], []]}
    )
    scored = BPODataCollector(generate, judge, num_responses=2).score(
        BPODataCollector(generate, num_responses=2).generate(dataset)
    )
    assert seen == {
        "generator_tools": tools,
        "tools": [tools[0], tools[0], None, None],
        "answer": ["Paris", "Paris", "Rome", "Rome"],
        "completions": [[{"role": "assistant", "content": text}] for text in ("x", "y", "x", "y")],
    }
    assert scored["scores"] == [[1.0, None]] * 2 and scored["verdicts"] == [["fine", None]] * 2
    assert scored["completions"] == [[], []]


def test_scores_that_are_not_finite_count_as_unscored():
    def judge(completions, **columns):
        return [float("nan"), 1.0, float("inf"), None, 2.0]

    dataset = Dataset.from_dict({"prompt": ["a"], "responses": [["v", "w", "x", "y", "z"]]})
    collector = BPODataCollector(judge=judge)
    scored = collector.score(dataset)
    assert scored["scores"] == [[None, 1.0, None, None, 2.0]]
    assert scored["verdicts"] == [["nan", None, "inf", None, None]]
    collector.pair(scored)
    assert collector.report.unscored == collector.report.pairs.unscored == 3


def test_name_of_a_callable_object():
    class Grader:
        def __call__(self, prompts, completions, **columns):
            return [1.0] * len(prompts)

    dataset = Dataset.from_dict({"prompt": ["a"], "responses": [["x", "y"]]})
    assert BPODataCollector(judge=Grader()).score(dataset)["judge"] == ["Grader"]


def test_empty_responses_are_not_judged():
    judged = []

    def judge(prompts, completions, **columns):
        judged.extend(zip(prompts, completions, columns["source"], strict=True))
        return [float(len(completion)) for completion in completions]

    dataset = Dataset.from_dict(
        {"prompt": ["a", "b"], "responses": [["", "x", " \n", "xyz"], ["", ""]], "source": ["s", "t"]}
    )
    collector = BPODataCollector(judge=judge)
    scored = collector.score(dataset)
    assert judged == [("a", "x", "s"), ("a", "xyz", "s")]
    assert scored["scores"] == [[None, 1.0, None, 3.0], [None, None]]
    assert scored["verdicts"][1] == ["empty response"] * 2
    collector.pair(scored)
    assert collector.report.unscored == 0 and collector.report.pairs.empty == 4


def fail(*args, **kwargs):
    raise AssertionError("Work began before the check.")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_responses": 1}, "`num_responses`"),
        ({"pair_rule": "some"}, "`some`.*`uniform`"),
        ({"min_margin": -1}, "`min_margin`"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BPODataCollector(**options)


@pytest.mark.parametrize(
    ("columns", "generator", "judge", "message"),
    [
        ({"question": ["a"]}, fail, fail, "no column `prompt`. Its columns: question"),
        ({"prompt": []}, fail, fail, "empty"),
        ({"prompt": ["a"]}, None, fail, "`generator` is needed"),
        ({"prompt": ["a"]}, fail, None, "`judge` is needed"),
        ({"prompt": ["a"], "responses": [["x", "y"]]}, None, None, "`judge` is needed"),
        ({"prompt": ["a"], "scores": [[1, 2]]}, fail, fail, "`scores` but no `responses`"),
        ({"prompt": ["a"], "chosen": ["x"], "rejected": ["y"]}, fail, fail, "overwritten: `chosen`, `rejected`"),
        ({"prompt": ["a"], "judge": ["x"]}, fail, fail, "overwritten: `judge`"),
    ],
)
def test_checks_before_any_work(columns, generator, judge, message):
    with pytest.raises(ValueError, match=message):
        BPODataCollector(generator, judge).collect(Dataset.from_dict(columns))


def test_checks_of_single_stages():
    prompts = Dataset.from_dict({"prompt": ["a"]})
    with pytest.raises(ValueError, match="`generator` is needed"):
        BPODataCollector().generate(prompts)
    with pytest.raises(ValueError, match="`judge` is needed"):
        BPODataCollector().score(prompts.add_column("responses", [["x"]]))
    with pytest.raises(ValueError, match="no column `responses`"):
        BPODataCollector(judge=fail).score(prompts)
    with pytest.raises(ValueError, match="overwritten: `responses`"):
        BPODataCollector(fail).generate(prompts.add_column("responses", [["x"]]))
    with pytest.raises(ValueError, match="one split, got `DatasetDict`"):
        BPODataCollector(fail).generate(DatasetDict({"train": prompts}))


def test_generator_with_too_few_responses():
    with pytest.raises(ValueError, match="`num_responses=8`"):
        BPODataCollector(lambda *args: [[Response("x", False, 1)]]).generate(Dataset.from_dict({"prompt": ["a"]}))


SCRIPT = """
    import json, os, sys
    from accelerate import Accelerator
    from datasets import Dataset
    from trl_bpo import OpenAIJudge
    from trl_bpo.collector import BPODataCollector
    from trl_bpo.generation import TransformersGenerator

    state = Accelerator()
    assert state.num_processes == 2
    judged = []

    def judge(prompts, completions, **columns):
        judged.extend(completions)
        # Random, so that two processes that did not share their scores would differ.
        import random
        return [random.random() for _ in prompts]

    class Generator(TransformersGenerator):
        def __call__(self, prompts, num_responses, tools=None):
            self.seen = prompts
            return super().__call__(prompts, num_responses, tools)

    prompts = sys.argv[3:]
    generator = Generator(sys.argv[1], max_new_tokens=4)
    collector = BPODataCollector(generator, judge, num_responses=4, allow_truncated_chosen=True)
    pairs = collector.collect(Dataset.from_dict({"prompt": prompts}))
    result = {"seen": generator.seen, "judged": len(judged), "pairs": pairs.to_list(), "tokens": collector.report.generated_tokens}


    def fail_on_one(prompts, completions, **columns):
        if state.process_index == 1:
            raise ValueError("Not with me.")
        return [1.0] * len(prompts)

    scored = Dataset.from_dict({"prompt": prompts, "responses": [["x", "y"]] * 3})
    # Copies of a prompt stay together, and the rows in their order.
    def tell_rank(prompts, completions, **columns):
        return [state.process_index + 1.0] * len(prompts)

    copies = Dataset.from_dict({"prompt": ["c", "a", "b", "a", "c"], "responses": [["x", "y"]] * 5})
    result["ranks"] = [row[0] for row in BPODataCollector(judge=tell_rank).score(copies)["scores"]]
    try:
        BPODataCollector(judge=fail_on_one).score(scored)
    except (ValueError, RuntimeError) as error:
        result["error"] = str(error)
    # Over an API, each process asks for its share and stores it; with three answers there, nothing is asked again.
    judge = OpenAIJudge("gpt-4.1-mini", base_url=os.environ["JUDGE_URL"], cache_dir=sys.argv[2] + "/answers")
    for name in ("first", "again"):
        collector = BPODataCollector(judge=judge)
        result[name] = list(collector.score(scored)["scores"]), vars(collector.report.judging)
    with open(f"{sys.argv[2]}/{state.process_index}.json", "w") as file:
        json.dump(result, file)
    state.wait_for_everyone()
    state.end_training()
"""


def test_two_processes(tmp_path):
    model_dir = tiny_model_dir(tmp_path / "model")
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    prompts = ["The sea", "The wind", "How do I sort"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "any"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), model_dir, str(tmp_path), *prompts]
    with OpenAIServer(
        lambda request: json.dumps({"rating": 7 if '"x"' in request["messages"][1]["content"] else 3})
    ) as server:
        run = subprocess.run(
            command, env={**env, "JUDGE_URL": server.base_url}, capture_output=True, text=True, timeout=300
        )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("Generating responses:   0%") == 1
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["seen"] == prompts[:2] and second["seen"] == prompts[2:]
    assert (first["judged"], second["judged"]) == (8, 4)
    assert first["pairs"] == second["pairs"] and first["tokens"] == second["tokens"]
    assert [row["prompt"] for row in first["pairs"]] == [prompt for prompt in prompts for _ in range(2)]
    assert first["ranks"] == second["ranks"] == [1.0, 1.0, 2.0, 1.0, 1.0]
    # What stops one stops the other.
    assert first["error"] == "Process 1 has stopped: Not with me." and second["error"] == "Not with me."
    assert len(server.requests) == 6
    for name, sent in (("first", 6), ("again", 0)):
        assert first[name] == second[name]
        scores, report = first[name]
        assert scores == [[7.0, 3.0]] * 3
        assert (report["requests"], report["sent"], report["usable"]) == (6, sent, 6)
        assert (report["prompt_tokens"], report["cost"]) == (60, pytest.approx(6 * (10 * 0.4 + 5 * 1.6) / 1e6))
