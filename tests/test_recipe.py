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

"""The recipe from its command line, on a tiny model: from every shape of data to what it leaves in `output_dir`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, load_dataset
from minihub import MiniHub
from openai_server import OpenAIServer
from pairs import pairs
from tiny import tiny_reward_model_dir

from trl_bpo import CollectionStopped


RECIPE = Path(__file__).parent.parent / "recipes" / "bpo.py"
OPTIONS = {
    "use_peft": "true",
    "use_cpu": "true",
    "bf16": "false",
    "report_to": "none",
    "disable_tqdm": "true",
    "gradient_checkpointing": "false",
    "per_device_train_batch_size": "2",
    "learning_rate": "1e-2",
    "save_strategy": "no",
    "max_new_tokens": "12",
    "num_responses": "4",
}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("bpo_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    # The dataclass decorator looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(recipe, **options):
    arguments = [item for name, value in {**OPTIONS, **options}.items() for item in (f"--{name}", str(value))]
    recipe.main(*recipe.make_parser().parse_args_and_config(arguments))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_outputs(output_dir, capsys, *stages):
    for name in ("adapter_model.safetensors", "README.md", "_selections/step-000000.json"):
        assert (output_dir / name).is_file(), name
    for name in ("README.md", "pairs_per_prompt.png"):
        assert (output_dir / "_curated_dataset" / name).is_file(), name
    curated = load_dataset(str(output_dir / "_curated_dataset"), split="train")
    assert {"prompt", "chosen", "rejected", "pair_id", "prompt_id", "depth_cluster"} <= set(curated.column_names)
    printed = capsys.readouterr().out
    for stage in (*stages, "pairs kept (depth)", "training steps"):
        assert f"\n{stage} " in printed, printed
    return curated, printed


def system_multi_turn_and_tools(count):
    tools = json.dumps([{"type": "function", "function": {"name": "search", "parameters": {}}}])
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    return [
        {
            "prompt": [
                {"role": "system", "content": "Be brief."},
                *(turns if i % 2 else []),
                {"role": "user", "content": f"What about {i}?"},
            ],
            "tools": tools if i % 3 == 0 else None,
            "source": f"row {i}",
        }
        for i in range(count)
    ]


def test_from_prompts_with_an_openai_judge(recipe, tiny_dir, encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    data = write(tmp_path / "prompts.jsonl", system_multi_turn_and_tools(12))

    def rate(request):
        return json.dumps({"reason": "", "rating": len(request["messages"][-1]["content"]) % 10 + 1})

    with OpenAIServer(rate, key="sk-secret-of-the-test") as server:
        run(
            recipe,
            dataset_name=data,
            model_name_or_path=tiny_dir,
            output_dir=tmp_path / "out",
            breadth_fraction=0.5,
            breadth_encoder=encoder,
            judge_model="judge",
            judge_base_url=server.base_url,
            allow_truncated_chosen="true",
            num_train_epochs=2,
        )
        assert len(server.requests) == 6 * 4
    stages = ("prompts kept (breadth)", "responses", "scores", "pairs")
    curated, printed = check_outputs(tmp_path / "out", capsys, *stages)
    assert "of 12 distinct" in printed
    assert set(curated["source"]) <= {f"row {i}" for i in range(12)} and curated[0]["prompt"][0]["role"] == "system"
    card = (tmp_path / "out" / "_curated_dataset" / "README.md").read_text()
    assert "`judge`" in card and "breadth\\_fraction" in card or "`breadth_fraction`" in card
    # What was paid for is on disk, and the next run can start from it.
    scored = load_dataset("parquet", data_files=str(tmp_path / "out" / "_collected" / "scores.parquet"), split="train")
    assert len(scored) == 6 and len(scored[0]["scores"]) == 4
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"sk-secret-of-the-test" not in path.read_bytes(), path


def test_everything_over_an_api_and_again_without_a_request(recipe, tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    data = write(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": f"q {i}"}]} for i in range(6)])

    def answer(request):
        if "response_format" in request:
            return json.dumps({"reason": "", "rating": request["messages"][1]["content"].count("sea") % 10 + 1})
        return "sea " * (request["seed"] % 9 + 1)

    options = dict(
        dataset_name=data,
        model_name_or_path=tiny_dir,
        output_dir=tmp_path / "out",
        generator="openai",
        generator_kwargs='{"model": "policy"}',
        judge_model="gpt-4.1-mini",
        judge_max_cost=0.001,
        num_responses=6,
        num_train_epochs=1,
    )
    with OpenAIServer(answer) as server:
        options |= {"generator_base_url": server.base_url, "judge_base_url": server.base_url}
        with pytest.raises(CollectionStopped, match="raise `max_cost`"):
            run(recipe, **options)
        options["judge_max_cost"] = 1.0
        run(recipe, **options)
        asked = len(server.requests)
        _, printed = check_outputs(tmp_path / "out", capsys, "responses", "scores", "pairs")
        shutil.rmtree(tmp_path / "out" / "_selections")
        run(recipe, **options)
        assert len(server.requests) == asked
    assert "tokens, $0.00" in printed and "the longer response is the chosen one in" in printed
    card = (tmp_path / "out" / "_curated_dataset" / "README.md").read_text()
    assert "tokens, &#36;0.00" in card


def test_from_responses_with_a_reward_model(recipe, tiny_dir, tmp_path, capsys):
    reward_model = tiny_reward_model_dir(tmp_path / "reward")
    rows = [
        {"prompt": f"question {i}", "responses": [f"red {i}", "sea wind", "sort a list", "paris"]} for i in range(6)
    ]
    data = write(tmp_path / "responses.jsonl", rows)
    run(
        recipe,
        dataset_name=data,
        model_name_or_path=tiny_dir,
        output_dir=tmp_path / "out",
        to_messages="true",
        judge="reward_model",
        judge_model=reward_model,
        pair_rule="all",
        reselect_every_steps=2,
    )
    curated, _ = check_outputs(tmp_path / "out", capsys, "scores", "pairs")
    assert curated[0]["prompt"][0]["role"] == "user" and curated[0]["score_chosen"] > curated[0]["score_rejected"]
    assert len(curated) == 18
    assert (tmp_path / "out" / "_selections" / "step-000002.parquet").is_file()


def test_from_scores_that_responses_carry(recipe, tiny_dir, tmp_path, capsys):
    rows = [
        {
            "id": str(i),
            "prompt": f"question {i}",
            "responses": [{"model": "m", "text": w, "score": s} for s, w in scored],
        }
        for i in range(5)
        for scored in [[(1 + i % 2, "red blue"), (3, "green"), (5, "sea"), (5, "wind"), (None, "broken")]]
    ]
    run(
        recipe,
        dataset_name=write(tmp_path / "scores.jsonl", rows),
        model_name_or_path=tiny_dir,
        output_dir=tmp_path / "out",
    )
    _, printed = check_outputs(tmp_path / "out", capsys, "pairs")
    assert "start at scores" in printed and "5 responses without a score" in printed


def test_from_transcript_pairs_without_a_prompt(recipe, tiny_dir, tmp_path, capsys):
    context = "\n\nHuman: What about {}?\n\nAssistant:"
    rows = [
        {"chosen": context.format(i) + f" I like {row['chosen']}", "rejected": context.format(i) + row["rejected"]}
        for i, row in enumerate(pairs(8, 1))
    ]
    run(
        recipe,
        dataset_name=write(tmp_path / "hh.jsonl", rows),
        model_name_or_path=tiny_dir,
        output_dir=tmp_path / "out",
    )
    curated, _ = check_outputs(tmp_path / "out", capsys)
    assert len(curated) == 4
    assert all(row["prompt"].endswith("\n\nAssistant:") and row["chosen"].startswith(" I like") for row in curated)


def test_options_come_from_yaml_and_the_command_line(recipe, tiny_dir, tmp_path, capsys):
    pairs(8, 1).to_parquet(tmp_path / "pairs.parquet")
    config = {**OPTIONS, "dataset_name": str(tmp_path / "pairs.parquet"), "depth_fraction": 0.5, "report_to": "none"}
    config |= {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}
    config = {key: {"true": True, "false": False}.get(value, value) for key, value in config.items()}
    config |= {"max_new_tokens": 12, "num_responses": 4}
    (tmp_path / "bpo.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", tmp_path / "bpo.yaml", "--model_name_or_path", tiny_dir, "--output_dir", tmp_path / "out"]
    arguments += ["--depth_fraction", "0.25"]
    recipe.main(*recipe.make_parser().parse_args_and_config(list(map(str, arguments))))
    assert len(load_dataset(str(tmp_path / "out" / "_curated_dataset"), split="train")) == 2


def launch(arguments, launcher=("accelerate.commands.launch",), **environment):
    command = [sys.executable, "-m", *launcher, str(RECIPE)]
    command += [str(item) for name, value in {**OPTIONS, **arguments}.items() for item in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


def test_two_processes_select_what_one_selects(tiny_dir, tmp_path):
    pairs(9, 3).to_parquet(tmp_path / "pairs.parquet")
    arguments = {"dataset_name": tmp_path / "pairs.parquet", "model_name_or_path": tiny_dir, "num_train_epochs": 2}
    arguments |= {"depth_fraction": 0.4, "gradient_batch_tokens": 64}
    one = launch(arguments | {"output_dir": tmp_path / "one"})
    # `accelerate launch --cpu --num_processes 2` starts a single process; torchrun starts two.
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    two = launch(arguments | {"output_dir": tmp_path / "two"}, torchrun, ACCELERATE_USE_CPU="true")
    assert "on 1 process;" in one.stdout and "on 2 processes;" in two.stdout
    first = [
        load_dataset("parquet", data_files=str(tmp_path / name / "_selections" / "step-000000.parquet"), split="train")
        for name in ("one", "two")
    ]
    assert first[0].to_list() == first[1].to_list()
    # The steps of an epoch are fewer, so the second selection comes at another step.
    assert {path.name for path in (tmp_path / "two" / "_selections").glob("step-*.json")} == {
        "step-000000.json",
        "step-000003.json",
    }


def test_a_push_reads_back_from_the_hub(tiny_dir, tmp_path):
    pairs(6, 2).to_parquet(tmp_path / "pairs.parquet")
    with MiniHub() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "home")}
        arguments = {"dataset_name": tmp_path / "pairs.parquet", "model_name_or_path": tiny_dir}
        arguments |= {
            "output_dir": tmp_path / "out",
            "curated_dataset_hub_id": "tester/kept",
            "hub_private_repo": "true",
        }
        launch(arguments, **environment)
        read = (
            "from datasets import load_dataset; load_dataset('tester/kept', split='train').to_parquet('read.parquet')"
        )
        subprocess.run(
            [sys.executable, "-c", read], env={**os.environ, **environment}, cwd=tmp_path, check=True, timeout=300
        )
        assert hub.repos["dataset", "tester/kept"].private
        assert "pairs_per_prompt.png" in hub.files("dataset", "tester/kept")
    saved = load_dataset(str(tmp_path / "out" / "_curated_dataset"), split="train")
    assert (
        load_dataset("parquet", data_files=str(tmp_path / "read.parquet"), split="train").to_list() == saved.to_list()
    )


def test_a_push_that_fails_loses_nothing(tiny_dir, tmp_path):
    pairs(6, 2).to_parquet(tmp_path / "pairs.parquet")
    arguments = {"dataset_name": tmp_path / "pairs.parquet", "model_name_or_path": tiny_dir}
    arguments |= {"output_dir": tmp_path / "out", "curated_dataset_hub_id": "tester/kept"}
    result = launch(arguments, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_test", HF_HUB_DISABLE_TELEMETRY="1")
    assert "could not be pushed to tester/kept" in result.stderr and "hf_test" not in result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "_curated_dataset" / "README.md").is_file()


@pytest.mark.parametrize("name", ["hh_rlhf", "safe_rlhf", "ultrafeedback"])
def test_the_configurations_of_the_paper_run_with_a_local_file_and_a_small_model(
    name, recipe, tiny_dir, encoder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    context = "\n\nHuman: What about {}?\n\nAssistant:"
    rows = {
        "hh_rlhf": [{"chosen": context.format(i) + " yes", "rejected": context.format(i) + " no"} for i in range(20)],
        "safe_rlhf": [{"prompt": f"question {i}", "response_0": "a", "safer_response_id": 0} for i in range(20)],
        "ultrafeedback": [
            {"instruction": f"question {i}", "completions": [{"response": "a", "overall_score": 3.0}]}
            for i in range(20)
        ],
    }[name]
    overrides = OPTIONS | {
        "dataset_name": write(tmp_path / "rows.jsonl", rows),
        "model_name_or_path": tiny_dir,
        "output_dir": tmp_path / "out",
        "dtype": "float32",
        "breadth_fraction": 0.2,
        "breadth_encoder": encoder,
        "allow_truncated_chosen": "true",
        "num_train_epochs": 1,
        "max_length": 256,
        "depth_fraction": 0.5,
    }
    with OpenAIServer(lambda request: json.dumps({"rating": len(str(request)) % 10 + 1})) as server:
        arguments = ["--config", str(RECIPE.parent / "configs" / f"{name}.yaml")]
        for key, value in {**overrides, "judge_base_url": server.base_url}.items():
            arguments += [f"--{key}", str(value)]
        recipe.main(*recipe.make_parser().parse_args_and_config(arguments))
        assert {request["model"] for request in server.requests} == {"gpt-4.1"}
    check_outputs(tmp_path / "out", capsys, "prompts kept (breadth)", "responses", "scores", "pairs")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"question": "q"}], {}, "no `prompt` column"),
        ([], {}, "empty"),
        ([{"prompt": "q"}], {}, "needs `judge_model`"),
        ([{"prompt": "q"}], {"judge_model": "judge"}, "OPENAI_API_KEY"),
        ([{"prompt": "q"}], {"judge": "verifiable"}, "a column `constraints`"),
        ([{"prompt": "q"}], {"breadth_fraction": 0}, "`breadth_fraction` must be in \\(0, 1\\]"),
        ([{"prompt": "q"}], {"breadth_fraction": 1.5}, "`breadth_fraction` must be in \\(0, 1\\]"),
        ([{"prompt": "q"}], {"breadth_scope": "some"}, "`breadth_scope` must be one of"),
        ([{"prompt": "q"}], {"pair_rule": "some"}, "Unknown pair rule `some`.*`best_worst`"),
        ([{"prompt": "q"}], {"depth_fraction": 0}, "`depth_fraction` must be in"),
        ([{"prompt": "q"}], {"ignore_data_skip": "true"}, "`ignore_data_skip=True` does not go with selection"),
        ([{"prompt": "q"}], {"dataset_streaming": "true"}, "`dataset_streaming` does not go"),
        ([{"prompt": "q"}], {"eval_strategy": "epoch"}, "`eval_strategy` needs pairs"),
        (
            [{"prompt": "q"}],
            {"judge": "verifiable", "judge_max_cost": 1},
            "`judge_max_cost` needs a judge over an API",
        ),
        ([{"prompt": "q"}], {"judge": "reward_model", "judge_batch": "true"}, "`judge_batch` needs `judge='openai'`"),
        ([{"prompt": "q"}], {"curated_dataset_hub_id": "a/b/c"}, "a/b/c"),
        ([{"prompt": "q"}], {"prompt_column": "nope"}, "`prompt_column='nope'` is not among"),
        ([{"prompt": "q"}, {"prompt": ""}], {}, "Row 1 has an empty `prompt`"),
        (
            [{"prompt": f"q {i}", "responses": ["a", "b"], "scores": [3, 3]} for i in range(3)],
            {},
            "tie|tied|equal",
        ),
        (
            [{"prompt": f"q {i}", "responses": ["a", "b"], "scores": [None, None]} for i in range(3)],
            {"start_from": "scores"},
            "score",
        ),
        (
            [{"prompt": f"q {i}", "chosen": "a", "rejected": "b"} for i in range(3)],
            {"depth_clusters": 9},
            "`depth_clusters=9`",
        ),
    ],
)
def test_bad_input_is_one_clear_error(rows, options, message, recipe, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    data = tmp_path / "rows.parquet"
    (Dataset.from_list(rows) if rows else Dataset.from_dict({"prompt": []})).to_parquet(data)
    with pytest.raises(ValueError, match=message):
        run(recipe, dataset_name=data, model_name_or_path=tiny_dir, output_dir=tmp_path / "out", **options)


def test_copies_are_dropped_and_saved_scores_keep_their_judge(recipe, tiny_dir, tmp_path, capsys):
    rows = [{"prompt": f"p {i}", "responses": ["red", "sea"], "scores": [1, 2], "judge": "somebody"} for i in range(4)]
    data = write(tmp_path / "scores.jsonl", rows + rows[:1])
    run(recipe, dataset_name=data, model_name_or_path=tiny_dir, output_dir=tmp_path / "out", num_train_epochs=1)
    _, printed = check_outputs(tmp_path / "out", capsys, "distinct pairs")
    assert "1 exact copies dropped" in printed
    assert "| Judge | `somebody` |" in (tmp_path / "out" / "_curated_dataset" / "README.md").read_text()


def test_constraints_are_checked_before_sampling(recipe, tiny_dir, tmp_path):
    rows = [{"prompt": "p", "constraints": [{"kind": "wordcount", "args": "{}"}]}]
    with pytest.raises(ValueError, match="Row 0 of `constraints`.*Known kinds"):
        run(
            recipe,
            dataset_name=write(tmp_path / "prompts.jsonl", rows),
            model_name_or_path=tiny_dir,
            output_dir=tmp_path / "out",
            judge="verifiable",
        )
    assert not (tmp_path / "out" / "_collected").exists()


def test_the_quickstart_takes_no_data_of_yours(recipe, tmp_path):
    with pytest.raises(ValueError, match="brings its own data and model"):
        run(recipe, quickstart="true", dataset_name="mine.jsonl", output_dir=tmp_path)


def test_pairs_with_an_evaluation_split(recipe, tiny_dir, tmp_path, capsys):
    pairs(10, 1).to_parquet(tmp_path / "pairs.parquet")
    run(
        recipe,
        dataset_name=tmp_path / "pairs.parquet",
        dataset_train_split="train[:8]",
        dataset_test_split="train[8:]",
        eval_strategy="epoch",
        model_name_or_path=tiny_dir,
        output_dir=tmp_path / "out",
        num_train_epochs=1,
    )
    check_outputs(tmp_path / "out", capsys)


def test_what_is_missing_is_named(recipe, tiny_dir, tmp_path):
    with pytest.raises(ValueError, match="`dataset_name` is required"):
        run(recipe, model_name_or_path=tiny_dir, output_dir=tmp_path)
    pairs(4, 1).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match="`model_name_or_path` is required"):
        run(recipe, dataset_name=tmp_path / "pairs.parquet", output_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        run(recipe, dataset_name=tmp_path / "absent.jsonl", model_name_or_path=tiny_dir, output_dir=tmp_path)


@pytest.mark.parametrize("package", ["sentence_transformers", "openai"])
def test_a_missing_extra_comes_with_its_install_command(package, tmp_path):
    extra = {"sentence_transformers": "embeddings", "openai": "openai"}[package]
    make = {
        "sentence_transformers": "trl_bpo.BreadthSelector(0.5)",
        "openai": "trl_bpo.OpenAIJudge('judge')",
    }[package]
    code = f"import sys; sys.modules['{package}'] = None; import trl_bpo; {make}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 1
    assert f"pip install 'trl_bpo[{extra}]'" in result.stderr.splitlines()[-1]
