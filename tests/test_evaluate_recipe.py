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


"""The recipe for evaluations from its command line, on tiny models: what it writes, asks, refuses, and goes on from."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from mt_bench_files import write_files
from openai_server import OpenAIServer
from peft import LoraConfig, get_peft_model
from tiny import tiny_model_dir, tiny_reward_model_dir
from transformers import AutoModelForCausalLM
from trl import TrlParser

from trl_bpo import CollectionStopped


TESTS = Path(__file__).parent
# The server says that each answer took 10 and 5 tokens.
PRICES = {"judge": {"input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6}}
COST = 10 * 1e-6 + 5 * 4e-6


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    monkeypatch.syspath_prepend(str(TESTS.parent / "recipes"))
    import evaluate

    return evaluate


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, another model, and an adapter of the base that comes without a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_model_dir(folder / "base")
    other = tiny_model_dir(folder / "other", seed=1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "adapter")
    return base, other, str(folder / "adapter")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def benchmark_files(folder):
    """A small file for each benchmark, as arguments."""
    questions, judge_prompts = write_files(folder)
    rows = [{"instruction": f"Do {row}.", "output": "Done. " * row, "dataset": f"s{row % 2}"} for row in range(1, 7)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    pairs = [{"prompt": f"What is {row // 2}?", "chosen": "x", "rejected": "y"} for row in range(12)]
    talk = [f"\n\nHuman: Hi {row}\n\nAssistant: Hi.\n\nHuman: Why?\n\nAssistant: So." for row in range(6)]
    write(folder / "pairs.jsonl", pairs)
    write(folder / "hh.jsonl", [{"chosen": text, "rejected": text} for text in talk])
    return {
        "benchmark": [
            f"mt_bench={questions}",
            f"alpaca_eval={folder / 'alpaca.json'}",
            f"hh_rlhf={folder / 'hh.jsonl'}",
            f"safe_rlhf={folder / 'pairs.jsonl'}",
            f"ultrafeedback={folder / 'pairs.jsonl'}",
        ],
        "mt_bench_judge_prompts": judge_prompts,
    }


def run(recipe, output_dir, **options):
    arguments = {"output_dir": output_dir, "max_new_tokens": 8, **options}
    command = []
    for name, value in arguments.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    recipe.main(*TrlParser((recipe.EvaluationArguments,)).parse_args_and_config(command))
    return json.loads((Path(output_dir) / "results.json").read_text())


def judge(request):
    """Grades and compares by the number of characters, in the form that is asked for."""
    system, content = (message["content"] for message in request["messages"])
    if "response_format" not in request:
        return "[[C]]" if system.startswith("Compare") else f"Rating: [[{len(content) % 10 + 1}]]"
    if "rating" in json.dumps(request["response_format"]):
        return json.dumps({"reason": "", "rating": len(content) % 10 + 1})
    _, first, second = (line for line in content.splitlines() if line.startswith('"'))
    return json.dumps({"reason": "", "verdict": "A" if len(first) > len(second) else "B"})


def rates(results, benchmark):
    return {
        (rate["benchmark"], rate["model"], rate["baseline"]): rate["result"]
        for rate in results["benchmarks"][benchmark]["win_rates"]
    }


def test_all_benchmarks_with_a_scoring_judge(recipe, models, tmp_path, capsys):
    base, other, adapter = models
    with OpenAIServer(judge) as server:
        options = {
            "model_name_or_path": [other, adapter],
            "base_model_name_or_path": base,
            "judge_model": "judge",
            "judge_base_url": server.base_url,
            **benchmark_files(tmp_path),
        }
        results = run(recipe, tmp_path / "out", **options)
        sent = len(server.requests)
        printed = capsys.readouterr().out
        again = run(recipe, tmp_path / "out", **options)
        # The same command again asks for nothing.
        assert len(server.requests) == sent == results["judging"]["sent"] and again["judging"]["sent"] == 0
        for name, benchmark in results["benchmarks"].items():
            assert again["benchmarks"][name] == benchmark

    assert results["judging"]["requests"] == sent and results["judging"]["cost"] is None
    assert set(results["models"]) == {"base", "other", "adapter"}
    found = {name: (part["num_prompts"], part["dropped"]) for name, part in results["benchmarks"].items()}
    assert found == {
        "mt_bench": (4, {}),
        "alpaca_eval": (6, {}),
        "hh_rlhf": (6, {}),
        "safe_rlhf": (6, {"prompt that was there before": 6}),
        "ultrafeedback": (6, {"prompt that was there before": 6}),
    }
    against_base = {("other", "base"), ("adapter", "base")}
    for name, benchmark in results["benchmarks"].items():
        expected = {(name, *pair) for pair in against_base}
        if name == "alpaca_eval":
            expected |= {(name, model, "reference") for model in ("base", "other", "adapter")}
        if name == "safe_rlhf":
            expected = {(f"safe_rlhf, {kind}", *pair) for kind in ("helpful", "harmless") for pair in against_base}
        found = rates(results, name)
        assert set(found) == expected
        for rate in found.values():
            assert rate["wins"] + rate["ties"] + rate["losses"] == benchmark["num_prompts"] and rate["unjudged"] == 0
            assert rate["interval"][0] <= rate["win_rate"] <= rate["interval"][1]
    grades = {summary["model"]: summary for summary in results["benchmarks"]["mt_bench"]["scores"]}
    assert list(grades["adapter"]["groups"]) == ["turn 1", "turn 2", "writing", "math"]
    assert list(rates(results, "mt_bench")["mt_bench", "other", "base"]["groups"]) == [
        "turn 1",
        "turn 2",
        "writing",
        "math",
    ]

    # Every model has answered for itself.
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "answers" / "ultrafeedback.jsonl").read_text().splitlines()
    ]
    for row in rows:
        assert len(set(row["answers"].values())) == 3
        assert set(row["scores"]["ultrafeedback"]) == {"base", "other", "adapter"}
    outputs = json.loads((tmp_path / "out" / "alpaca_eval" / "adapter.json").read_text())
    assert [set(row) for row in outputs] == [{"instruction", "output", "generator", "dataset"}] * 6
    assert {row["generator"] for row in outputs} == {"adapter"}
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "results.txt").read_text() in printed
    assert "Left out of safe_rlhf: 6 x prompt that was there before." in printed


def test_all_benchmarks_with_a_pairwise_judge(recipe, models, tmp_path):
    base, other, _ = models
    with OpenAIServer(judge) as server:
        options = {
            "judge": "openai_pairwise",
            "judge_model": "judge",
            "judge_base_url": server.base_url,
            "max_prompts": 4,
            **benchmark_files(tmp_path),
        }
        results = run(recipe, tmp_path / "out", model_name_or_path=other, base_model_name_or_path=base, **options)
        # The other way around the same answers are compared, so nothing is asked and everything is mirrored.
        sent = len(server.requests)
        options["cache_dir"] = tmp_path / "out" / "_answers"
        mirrored = run(recipe, tmp_path / "back", model_name_or_path=base, base_model_name_or_path=other, **options)
        assert len(server.requests) == sent
    for name, benchmark in results["benchmarks"].items():
        assert benchmark["scores"] == [] and benchmark["num_prompts"] == 4
        found, back = rates(results, name), rates(mirrored, name)
        for (label, model, baseline), rate in found.items():
            if baseline != "reference":
                other_rate = back[label, baseline, model]
                assert (rate["wins"], rate["ties"], rate["losses"]) == tuple(
                    other_rate[k] for k in ("losses", "ties", "wins")
                )
                assert rate["win_rate"] == pytest.approx(1 - other_rate["win_rate"])
    # The longer answer wins with this judge.
    assert rates(results, "alpaca_eval")["alpaca_eval", "other", "reference"]["longer_win_share"] == 1.0
    assert rates(results, "mt_bench")["mt_bench", "other", "base"]["ties"] == 4


def test_a_copy_of_the_base_ties_with_it(recipe, models, tmp_path):
    shutil.copytree(models[0], tmp_path / "copy")
    reward = tiny_reward_model_dir(tmp_path / "reward")
    results = run(
        recipe,
        tmp_path / "out",
        model_name_or_path=tmp_path / "copy",
        base_model_name_or_path=models[0],
        benchmark=benchmark_files(tmp_path)["benchmark"],
        judge="reward_model",
        judge_model=reward,
    )
    for name, benchmark in results["benchmarks"].items():
        for (_, _, baseline), rate in rates(results, name).items():
            if baseline == "base":
                assert rate["ties"] == benchmark["num_prompts"] and rate["interval"] == [0.5, 0.5]
    # The answers to the base's prompts are found by the content of the model, so they were not generated twice.
    files = (tmp_path / "out" / "_answers" / "answers").glob("answers-*.jsonl")
    keys = [key for path in files for line in path.read_text().splitlines() for key in json.loads(line)["keys"]]
    assert len(keys) == len(set(keys)) == 4 + 4 * 6 - 6


def test_prompts_of_your_own_with_a_verifiable_judge(recipe, models, tmp_path):
    constraints = [{"kind": "word_count", "args": json.dumps({"max": 3})}]
    rows = [{"prompt": f"Say {row}.", "constraints": constraints, "group": "ab"[row % 2]} for row in range(4)]
    path = write(tmp_path / "prompts.jsonl", rows)
    write(tmp_path / "train.jsonl", [{"prompt": "Say 1.", "chosen": "a", "rejected": "b"}])
    results = run(
        recipe,
        tmp_path / "out",
        model_name_or_path=models[1],
        base_model_name_or_path=models[0],
        benchmark=f"prompts={path}",
        train_dataset_name=tmp_path / "train.jsonl",
        judge="verifiable",
    )
    assert results["benchmarks"]["prompts"]["dropped"] == {"prompt of the training": 1}
    (rate,) = rates(results, "prompts").values()
    assert {name: sum(group[key] for key in ("wins", "ties", "losses")) for name, group in rate["groups"].items()} == {
        "a": 2,
        "b": 1,
    }


def test_models_behind_a_server_and_the_price_of_all_verdicts(recipe, tmp_path):
    """One server is both models and the judge. All judges together keep to one limit, and a larger one goes on."""

    def answer(request):
        if request["model"] == "judge":
            return judge(request)
        return f"I am {request['model']} " + "and more " * len(request["messages"])

    with OpenAIServer(answer) as server:
        options = {
            "model_name_or_path": "new",
            "base_model_name_or_path": "old",
            "generator": "openai",
            "generator_base_url": server.base_url,
            "judge_model": "judge",
            "judge_base_url": server.base_url,
            "judge_concurrency": 1,
            "judge_kwargs": json.dumps({"prices": PRICES, "max_tokens": 5}),
            **benchmark_files(tmp_path),
        }
        # Eight verdicts on MT-Bench, then eighteen on AlpacaEval, of which some can be paid for.
        with pytest.raises(CollectionStopped, match="max_cost"):
            run(recipe, tmp_path / "out", judge_max_cost=30 * COST, **options)
        judged = [request for request in server.requests if request["model"] == "judge"]
        assert 8 < len(judged) <= 30
        results = run(recipe, tmp_path / "out", judge_max_cost=1.0, **options)
        asked = Counter(json.dumps([request["model"], request["messages"]]) for request in server.requests)
    judged = sum(count for request, count in asked.items() if request.startswith('["judge"'))
    assert results["judging"]["requests"] == judged
    assert results["judging"]["cost"] == pytest.approx(judged * COST)
    assert results["models"] == {"old": "old", "new": "new"}
    # No judgement was asked for twice. SafeRLHF and UltraFeedback have the same prompts here, and the same answers.
    assert max(count for request, count in asked.items() if request.startswith('["judge"')) == 1
    assert max(asked.values()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": ["mmlu"]}, "`benchmark` must be of"),
        ({"benchmark": ["prompts"]}, "needs a source"),
        ({"benchmark": ["hh_rlhf=a", "hh_rlhf=b"]}, "names one twice"),
        ({"benchmark": ["mt_bench"]}, "`mt_bench_judge_prompts`"),
        ({"judge": "openai_pairwise"}, "`base_model_name_or_path`"),
        ({"base_model_name_or_path": "m"}, "Leave it out"),
        ({"model_name_or_path": ["m", "m"]}, "names a model twice"),
        ({"max_prompts": 0}, "`max_prompts` must be"),
        ({"confidence_level": 1.0}, "`confidence_level` must be"),
        ({"generator_base_url": "http://x"}, "needs `generator='openai'`"),
        ({"judge": "reward_model", "judge_prompt_file": "x"}, "`judge_prompt_file` needs"),
        ({"judge": "reward_model", "judge_max_cost": 1.0}, "`judge_max_cost` needs"),
    ],
)
def test_options_that_do_not_go_together(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        recipe.EvaluationArguments(**{"model_name_or_path": ["m"], "output_dir": "out", **options})


def test_what_is_missing_is_said_before_any_model_is_loaded(recipe, tmp_path):
    files = benchmark_files(tmp_path)
    for options, message in (
        ({**files}, "`judge_model`"),
        ({"benchmark": f"prompts={tmp_path / 'pairs.jsonl'}", "judge": "verifiable"}, "`constraints`"),
        ({"benchmark": f"alpaca_eval={tmp_path / 'pairs.jsonl'}"}, "no column `instruction`"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recipe, tmp_path / "out", model_name_or_path="no-such-model", **options)


def test_models_of_the_same_name_keep_their_paths(recipe, tmp_path):
    paths = [str(tmp_path / run / "checkpoint-10") for run in ("a", "b")]
    for path in paths:
        Path(path).mkdir(parents=True)
    assert recipe.unique_names([*paths, "hub/model"]) == [*paths, "hub/model"]
    assert recipe.file_name(paths[0]).endswith("a-checkpoint-10")


@pytest.fixture
def server_process(tmp_path):
    """Port and log of a server in a process of its own, which outlives those that ask it."""
    port_file, log = tmp_path / "port", tmp_path / "log.jsonl"
    command = [sys.executable, TESTS / "fault_server.py", "--port-file", port_file, "--log", log, "--latency", "0.02"]
    process = subprocess.Popen(command)
    while not port_file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield port_file.read_text(), log
    process.terminate()
    process.wait()


def test_killed_over_and_over_it_asks_nothing_twice(server_process, tmp_path):
    port, log = server_process
    kills, concurrency, prompts = 6, 4, 24
    for seed, name in enumerate(("base", "model")):
        tiny_model_dir(tmp_path / name, seed)
    command = [
        sys.executable,
        TESTS / "evaluate_script.py",
        "--folder",
        tmp_path,
        "--port",
        port,
        "--kills",
        str(kills),
    ]
    # One thread, as the process forks.
    environment = {
        **os.environ,
        "OPENAI_API_KEY": "sk-none",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    attempts = found["attempts"]
    assert [attempt["exit"] for attempt in attempts] == [-signal.SIGKILL] * kills + [0]
    # The kills lie in the middle of the generation as well as of the judging.
    for kind, whole in (("answers", 4 * prompts), ("verdicts", 4 * prompts)):
        amounts = [len(attempt["stored"][kind]) for attempt in attempts]
        assert amounts == sorted(amounts) and amounts[-1] == whole
        assert any(0 < amount < whole for amount in amounts)
        # Nothing was kept, and so nothing generated or judged to its end, twice.
        assert max(Counter(attempts[-1]["stored"][kind]).values()) == 1
    # What the server was asked for again had been under way at a kill.
    records = [json.loads(line) for line in log.read_text().splitlines()]
    answered = Counter(r["content"] for r in records if r["answered"] and r["received"] >= found["begin"])
    assert sum(answered.values()) - 4 * prompts <= kills * concurrency
    # The same results as without interruption, to the last digit, and the same answers.
    whole, killed = found["results"]
    assert whole["benchmarks"] == killed["benchmarks"] and found["rows"][0] == found["rows"][1]
