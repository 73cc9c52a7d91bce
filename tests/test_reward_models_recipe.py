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


"""Two tiny reward models from the recipe's command line: what they share, what they score, and where they go on."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import BertConfig, BertModel

from trl_bpo import RewardModelJudge
from trl_bpo.splits import normalize_prompt


RECIPE = Path(__file__).parent.parent / "recipes" / "reward_models.py"
TOPICS = ["the sea", "the wind", "a poem", "Paris", "France", "a list", "numbers", "Python"]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("reward_models_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    # The dataclass decorator looks its module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory):
    """An encoder whose tokenizer has no chat template."""
    path = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.model_max_length = 64
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs and transcripts, which share ten prompts but for case and marks. The better answer is the one with "good"."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    pairs, transcripts = [], []
    for number in range(50):
        topic = f"{TOPICS[number % 8]}, number {number}"
        for word in ("sorted", "short") if number < 40 else ():
            fillers = rng.choice(["and", "the", "with"], 2)
            chosen, rejected = f"good {word} {fillers[0]}", f"bad {word} {fillers[1]} bad"
            pairs.append({"prompt": f"What about {topic}?", "chosen": chosen, "rejected": rejected})
        if number >= 30:
            start = f"\n\nHuman: what about {topic.upper()} ??\n\nAssistant:"
            transcripts.append({"chosen": f"{start} good answer", "rejected": f"{start} a bad answer, please"})
    long = {"prompt": "very long " * 100, "chosen": "good", "rejected": "bad"}
    return [
        write(folder / "standard.jsonl", [*pairs, pairs[0], long]),
        write(folder / "transcripts.jsonl", transcripts),
    ]


def arguments(files, bert_dir, tiny_dir, output_dir, **options):
    options = {
        "scorer_model_name_or_path": bert_dir,
        "evaluator_model_name_or_path": tiny_dir,
        "evaluator_kwargs": '{"use_peft": true, "lora_target_modules": "all-linear"}',
        "test_size": "0.3",
        "max_length": "96",
        "output_dir": str(output_dir),
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "disable_tqdm": "true",
        "gradient_checkpointing": "false",
        "per_device_train_batch_size": "8",
        "learning_rate": "1e-2",
        "max_steps": "12",
        "save_steps": "4",
        **options,
    }
    given = [item for name, value in options.items() for item in (f"--{name}", value)]
    return ["--dataset_name", *files, "--source_name", "standard", "transcripts", *given]


@pytest.fixture(scope="module")
def run(recipe, files, bert_dir, tiny_dir):
    def run_recipe(output_dir, **options):
        parsed = recipe.make_parser().parse_args_and_config(
            arguments(files, bert_dir, tiny_dir, output_dir, **options)
        )
        recipe.main(*parsed)
        return json.loads((output_dir / "reward_models.json").read_text())

    return run_recipe


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained")
    return output_dir, run(output_dir)


@pytest.fixture(scope="module")
def parts(recipe, files, bert_dir, tiny_dir):
    script_args, training_args, _ = recipe.make_parser().parse_args_and_config(
        arguments(files, bert_dir, tiny_dir, "unused")
    )
    pairs, _ = recipe.load_pairs(script_args, training_args.seed)
    # The recipe drops the long prompt, which leaves no room for the answers.
    pairs = pairs.filter(lambda row: len(row["prompt"][0]["content"]) < 200)
    return pairs, recipe.split_pairs(pairs, script_args.test_size, training_args.seed)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_parts_share_no_prompt_even_in_other_words_case_and_marks(parts):
    pairs, split = parts
    prompts = {name: [normalize_prompt(prompt) for prompt in part["prompt"]] for name, part in split.items()}
    sets = [set(values) for values in prompts.values()]
    assert sum(len(prompts) for prompts in sets) == len(set.union(*sets)) == 50
    assert abs(len(sets[0]) - len(sets[1])) <= 1
    # A prompt of both sources is one prompt, and a held-out one comes once.
    assert {"standard", "transcripts"} == set(split["scorer"]["source"])
    assert len(prompts["heldout"]) == len(sets[2]) == round(0.3 * 50)
    assert set.union(*sets) == {normalize_prompt(prompt) for prompt in pairs["prompt"]}


def test_results_say_what_was_measured(trained):
    output_dir, results = trained
    assert results["sources"] == {
        "standard": {"pairs": 82, "two_contexts": 0, "drawn": 82},
        "transcripts": {"pairs": 20, "two_contexts": 0, "drawn": 20},
    }
    assert results["copies_dropped"] == 1
    assert results["cut_off_dropped"] == {"standard": 1}
    assert sum(part["prompts"] for part in results["parts"].values()) == 50
    heldout = results["heldout"]
    assert heldout["all"]["pairs"] == results["parts"]["heldout"]["pairs"] == results["parts"]["heldout"]["prompts"]
    assert heldout["all"]["pairs"] == heldout["standard"]["pairs"] + heldout["transcripts"]["pairs"]
    for group in heldout.values():
        for name in ("scorer", "evaluator", "longer", "shorter", "agreement"):
            assert 0 <= group[name]["low"] <= group[name]["mean"] <= group[name]["high"] <= 1
    # The data say what both models must have learned, and what length alone gets right.
    assert heldout["all"]["scorer"]["mean"] > 0.8
    assert heldout["all"]["evaluator"]["mean"] > 0.8
    assert heldout["all"]["shorter"]["mean"] > 0.9
    assert heldout["all"]["longer"]["mean"] == pytest.approx(1 - heldout["all"]["shorter"]["mean"])
    scorer, evaluator = results["models"]["scorer"], results["models"]["evaluator"]
    assert (scorer["backbone"], scorer["max_length"], scorer["use_peft"]) == ("tiny-bert", 64, False)
    assert (evaluator["max_length"], evaluator["use_peft"]) == (96, True)
    assert scorer["pairs"] != evaluator["pairs"]
    text = (output_dir / "reward_models.json").read_text()
    assert str(output_dir.parent) not in text


@pytest.mark.parametrize("role", ["scorer", "evaluator"])
def test_the_judge_loads_a_model_and_scores_as_in_the_results(trained, parts, role):
    output_dir, results = trained
    heldout = parts[1]["heldout"]
    judge = RewardModelJudge(str(output_dir / role), max_length=results["models"][role]["max_length"])
    assert judge.__name__ == role
    chosen, rejected = (
        judge(prompts=heldout["prompt"][:], completions=heldout[answer][:]) for answer in ("chosen", "rejected")
    )
    wins = np.array(chosen) > np.array(rejected)
    assert len(wins) == results["heldout"]["all"]["pairs"]
    assert wins.mean() == pytest.approx(results["heldout"]["all"][role]["mean"])


def test_the_same_command_again_trains_nothing(trained, run):
    output_dir, results = trained
    files = [output_dir / role / "model.safetensors" for role in ("scorer", "evaluator")]
    before = [file.stat().st_mtime_ns for file in files]
    assert run(output_dir) == results
    assert [file.stat().st_mtime_ns for file in files] == before


def test_a_killed_training_goes_on_from_its_last_whole_checkpoint(trained, run, tmp_path):
    source, results = trained
    output_dir = tmp_path / "killed"
    shutil.copytree(source, output_dir)
    # Killed in the second model's training while a checkpoint was being written.
    shutil.rmtree(output_dir / "evaluator")
    checkpoints = output_dir / "_training" / "evaluator"
    shutil.rmtree(checkpoints / "checkpoint-12")
    for name in ("trainer_state.json", "optimizer.pt"):
        (checkpoints / "checkpoint-8" / name).unlink()
    kept = [output_dir / "scorer" / "model.safetensors", checkpoints / "checkpoint-4" / "trainer_state.json"]
    before = [file.stat().st_mtime_ns for file in kept]
    again = run(output_dir)
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert (checkpoints / "checkpoint-12").is_dir()
    expected = weights(source / "evaluator")
    assert weights(output_dir / "evaluator").keys() == expected.keys()
    for name, tensor in weights(output_dir / "evaluator").items():
        torch.testing.assert_close(tensor, expected[name])
    assert again["heldout"]["all"]["evaluator"] == results["heldout"]["all"]["evaluator"]


def test_a_folder_with_another_training_is_refused(trained, run):
    output_dir, _ = trained
    with pytest.raises(ValueError, match="training of the scorer with other learning_rate"):
        run(output_dir, learning_rate="1e-3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluator_kwargs": '{"learning_rat": 1}'}, "learning_rat"),
        ({"load_in_8bit": "true"}, "cannot be quantized"),
        ({"eos_token": "<|im_end|>"}, "`eos_token` do not go"),
    ],
)
def test_options_that_do_not_apply_are_refused_before_any_work(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_two_backbones_and_a_name_for_each_source_are_needed(recipe):
    with pytest.raises(ValueError, match="Name two backbones"):
        recipe.RewardModelsScriptArguments(["a", "b"], "same", "same")
    with pytest.raises(ValueError, match="`source_name`"):
        recipe.RewardModelsScriptArguments(["a", "b"], "one", "other", source_name=["c"])
