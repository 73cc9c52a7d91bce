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


"""What `compare.py` compares arms on: the policy, prompts to train and to evaluate on, the judges, and the pool of pairs."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from tiny_task import HELD_OUT, TRAINED, build_policy, make_demonstrations, make_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bpo import BPODataCollector, TransformersGenerator, VerifiableJudge
from trl_bpo.formats import drop_duplicate_pairs, load_rows
from trl_bpo.judging import Judge
from trl_bpo.quickstart import POLICY_NAME, encoder_path, export_policy, load_prompts
from trl_bpo.splits import check_no_overlap, normalize_prompt


TASKS = ("tiny", "instructions", "prompts")


@dataclass
class Task:
    """
    A policy, prompts and judges.

    Args:
        model (`str`):
            Path or id of the policy before training.
        name (`str`):
            What the policy is called in the results.
        prompts (`Dataset`):
            Prompts to train on: `prompt`, what the judge needs, and `source`.
        evaluation (`Dataset`):
            Prompts to evaluate on: the same columns, and `group`.
        primary (`str`):
            Value of `group` whose prompts make up the score.
        judge (`Judge`):
            Scores the candidates.
        evaluation_judge (`Judge`):
            Scores the answers to the prompts to evaluate on.
        encoder (`str`):
            Sentence encoder for what goes by embeddings.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the policy's weights.
    """

    model: str
    name: str
    prompts: Dataset
    evaluation: Dataset
    primary: str
    judge: Judge
    evaluation_judge: Judge
    encoder: str
    dtype: str = "float32"


def _tiny(args: Any, model_args: Any, folder: Path) -> Task:
    # Ten in eleven of the prompts to evaluate on are of the families that are trained on, and make up the score.
    evaluation = make_prompts(args.num_eval_prompts, TRAINED, zipf=False, seed=1)
    held_out = make_prompts(max(1, args.num_eval_prompts // 4), HELD_OUT, zipf=False, seed=2)
    rows = [{**row, "group": "families trained on"} for row in evaluation]
    rows += [{**row, "group": "families held out"} for row in held_out]
    without = {normalize_prompt(row["prompt"]) for row in rows}
    prompts = make_prompts(args.num_train_prompts, TRAINED, zipf=True, seed=3, without=without)
    model = folder / "policy"
    if not model.exists():
        build_policy(model, make_demonstrations(args.num_demonstrations, seed=4, without=without))
    judge = VerifiableJudge()
    return Task(
        str(model),
        "tiny-llama-0.7M",
        prompts,
        Dataset.from_list(rows),
        "families trained on",
        judge,
        judge,
        encoder_path(),
    )


def _instructions(args: Any, model_args: Any, folder: Path) -> Task:
    evaluation = load_prompts("heldout")
    groups = ["kinds trained on" if seen else "kinds held out" for seen in evaluation["seen"]]
    evaluation = evaluation.add_column("group", groups)
    prompts = load_prompts("train").select(range(min(args.num_train_prompts, len(load_prompts("train")))))
    prompts = prompts.add_column("source", [row["constraints"][0]["kind"] for row in prompts])
    judge = VerifiableJudge()
    policy = export_policy(folder / "policy")
    return Task(policy, POLICY_NAME, prompts, evaluation, "kinds trained on", judge, judge, encoder_path())


def _prompts(args: Any, model_args: Any, folder: Path) -> Task:
    from trl_bpo import RewardModelJudge

    if model_args.model_name_or_path is None:
        raise ValueError("`task=prompts` needs `model_name_or_path`.")
    for name in ("dataset_name", "eval_dataset_name", "judge_model", "eval_judge_model"):
        if getattr(args, name) is None:
            raise ValueError(f"`task=prompts` needs `{name}`.")
    if args.judge_model == args.eval_judge_model:
        raise ValueError(
            "`judge_model` and `eval_judge_model` are the same: what chose the pairs would grade its own work. Name "
            "another `eval_judge_model`."
        )
    prompts = load_rows(args.dataset_name, "train").select_columns(["prompt"])
    evaluation = load_rows(args.eval_dataset_name, "train").select_columns(["prompt"])
    prompts = prompts.shuffle(seed=0).select(range(min(args.num_train_prompts, len(prompts))))
    evaluation = evaluation.shuffle(seed=0).select(range(min(args.num_eval_prompts, len(evaluation))))
    return Task(
        model_args.model_name_or_path,
        Path(model_args.model_name_or_path).name,
        prompts.add_column("source", ["prompts"] * len(prompts)),
        evaluation.add_column("group", ["all"] * len(evaluation)),
        "all",
        RewardModelJudge(args.judge_model, cache_dir=str(folder / "answers")),
        RewardModelJudge(args.eval_judge_model),
        args.encoder,
    )


def make_task(args: Any, model_args: Any, folder: Path) -> Task:
    """
    Prepare a task. What takes long is kept in the folder.

    Args:
        args (`CompareArguments`):
            Arguments of the script.
        model_args ([`~trl.ModelConfig`]):
            Type of the policy's weights, and for the task `prompts` the policy.
        folder (`Path`):
            Folder of the task.

    Returns:
        [`Task`]: The task.

    Raises:
        `ValueError`: If prompts to train and to evaluate on overlap, or an argument is missing.
    """
    make = {"tiny": _tiny, "instructions": _instructions, "prompts": _prompts}[args.task]
    task = replace(make(args, model_args, folder), dtype=model_args.dtype or "auto")
    check_no_overlap(task.prompts, task.evaluation)
    return task


def load_policy(task: Task) -> tuple[Any, Any]:
    """
    Load the policy before training and its tokenizer.

    Args:
        task ([`Task`]):
            The task.

    Returns:
        `tuple`: Model, on the accelerator if there is one, and tokenizer.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = AutoModelForCausalLM.from_pretrained(task.model, dtype=task.dtype, device_map=device)
    return policy, AutoTokenizer.from_pretrained(task.model)


def make_generator(
    model: Any, tokenizer: Any, args: Any, seed: int, cache_dir: str | None = None
) -> TransformersGenerator:
    """
    What samples a policy, for candidates and for evaluation alike.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        args (`CompareArguments`):
            Arguments of the script.
        seed (`int`):
            Seed of the sampling.
        cache_dir (`str`, *optional*):
            Folder in which answers are kept.

    Returns:
        [`~trl_bpo.TransformersGenerator`]: The generator.
    """
    return TransformersGenerator(
        model,
        tokenizer,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.generation_batch_size,
        seed=seed,
        cache_dir=cache_dir,
    )


def make_pool(task: Task, args: Any, folder: Path) -> Dataset:
    """
    Candidates, scores and pairs of all prompts, once for all arms. Killed, it goes on with the candidates that it has.

    Args:
        task ([`Task`]):
            The task.
        args (`CompareArguments`):
            Arguments of the script.
        folder (`Path`):
            Folder of the task; the pool is kept in it, with its counts in `pool.json`.

    Returns:
        [`~datasets.Dataset`]: The pairs.
    """
    path = folder / "pool"
    if not path.exists():
        policy, tokenizer = load_policy(task)
        collector = BPODataCollector(
            make_generator(policy, tokenizer, args, seed=5, cache_dir=str(folder / "answers")),
            task.judge,
            num_responses=args.num_responses,
            pair_rule=args.pair_rule,
        )
        pairs = collector.collect(task.prompts)
        pool = drop_duplicate_pairs(pairs)
        report = collector.report
        counts = {
            "prompts": len(task.prompts),
            "responses": report.responses,
            "generated_tokens": report.generated_tokens,
            "unscored": report.unscored,
            "pairs": len(pool),
            "duplicate_pairs": len(pairs) - len(pool),
            "ties": report.pairs.ties,
            "longer_chosen_share": report.pairs.longer_chosen_share,
        }
        (folder / "pool.json").write_text(json.dumps(counts, indent=2) + "\n")
        partial = folder / "pool.partial"
        pool.save_to_disk(partial)
        os.replace(partial, path)
    return load_from_disk(str(path))
