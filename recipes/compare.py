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


# /// script
# dependencies = [
#     "trl_bpo[embeddings,report]",
# ]
# ///

"""
Which way to choose pairs is worth its budget: trains every arm with the same seeds on the same pool, evaluates each on the
same held-out prompts, and draws tables and curves.

What arms share is done once: candidates, scores, the reference's log-probabilities. Every run is a file, so the same command
again goes on where it was killed; started in several processes or on several machines with one `--output_dir`, it shares the
runs out.

# The smallest task, on two cores, from nothing to the pictures
```bash
OMP_NUM_THREADS=1 python recipes/compare.py --config recipes/configs/compare_small.yaml
```
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


_PACKAGES = ("trl", "transformers", "datasets", "accelerate", "peft", "torch", "scikit-learn", "sentence-transformers")


@dataclass
class CompareArguments:
    r"""
    Arguments of this script, beside those of [`~trl_bpo.BPOConfig`], which all arms share, and [`~trl.ModelConfig`].

    Parameters:
        > Parameters that control what is compared

        arms (`list[str]`):
            Arms, each with what it has different: `bpo`, `bpo fraction=0.1 depth_clusters=8`. See `compare_arms.py`.
        fraction (`float`, *optional*, defaults to `0.25`):
            Share of the pool's pairs that an arm trains on: the budget.
        breadth_fraction (`float`, *optional*):
            Share of the prompts that breadth selection keeps. If `None`, the square root of the share of the pairs.
        num_seeds (`int`, *optional*, defaults to `10`):
            Seeds of each arm.
        seed_offset (`int`, *optional*, defaults to `0`):
            The first seed.
        margin_selection_step (`int`, *optional*, defaults to `10`):
            `first_selection_step` of the arms that go by implicit rewards, which are zero at step 0.
        baseline (`str`, *optional*, defaults to `"random_redraw"`):
            Arm to which the others are compared.
        preregistered (`str`, *optional*, defaults to `"bpo"`):
            The one arm whose difference to the baseline was written down before the runs, at the budget `fraction`.
        highlighted (`list[str]`, *optional*):
            Arms that the curves show in colour.

        > Parameters that control the task

        task (`str`, *optional*, defaults to `"tiny"`):
            `tiny` (a policy of a million parameters, trained here, and instructions that a program grades),
            `instructions` (SmolLM2-135M-Instruct and the quickstart's instructions) or `prompts` (any policy and
            prompts, and two reward models).
        num_demonstrations (`int`, *optional*, defaults to `16000`):
            Demonstrations that the policy of `tiny` is trained on.
        num_train_prompts (`int`, *optional*, defaults to `600`):
            Prompts of the pool.
        num_eval_prompts (`int`, *optional*, defaults to `1000`):
            Held-out prompts whose answers make up the score.
        dataset_name, eval_dataset_name (`str`, *optional*):
            Prompts of the task `prompts`: Hub ids or files.
        judge_model, eval_judge_model (`str`, *optional*):
            Reward models of the task `prompts`: the one that scores candidates, and the one that only evaluates.
        encoder (`str`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            Sentence encoder of the task `prompts`.

        > Parameters that control candidates and evaluation

        num_responses (`int`, *optional*, defaults to `8`):
            Candidates a prompt.
        pair_rule (`str`, *optional*, defaults to `"uniform"`):
            How candidates are paired.
        max_new_tokens (`int`, *optional*, defaults to `48`):
            Token limit of a response.
        generation_batch_size (`int`, *optional*, defaults to `256`):
            Responses that are generated together.
        eval_responses (`int`, *optional*, defaults to `2`):
            Answers to each held-out prompt.
        eval_batch_size (`int`, *optional*, defaults to `64`):
            Answers in a forward pass for the perplexity.

        > Parameters that control the script

        num_workers (`int`, *optional*, defaults to `1`):
            Processes that share the runs out on this machine; each takes one GPU, if there are any.
        results_dir (`str`, *optional*):
            Folder to which tables, pictures and the list of runs are written as well. `output_dir` has them in any case.
        name (`str`, *optional*, defaults to `"compare"`):
            Name of these files.
        report_only (`bool`, *optional*, defaults to `False`):
            Only draw tables and curves from the runs that are there.
    """

    arms: list[str] = field(default_factory=list, metadata={"help": "Arms, each with what it has different."})
    fraction: float = field(default=0.25, metadata={"help": "Share of the pool's pairs that an arm trains on."})
    breadth_fraction: float | None = field(default=None, metadata={"help": "Share of the prompts that breadth keeps."})
    num_seeds: int = field(default=10, metadata={"help": "Seeds of each arm."})
    seed_offset: int = field(default=0, metadata={"help": "The first seed."})
    margin_selection_step: int = field(
        default=10, metadata={"help": "`first_selection_step` of the arms that go by implicit rewards."}
    )
    baseline: str = field(default="random_redraw", metadata={"help": "Arm to which the others are compared."})
    preregistered: str = field(default="bpo", metadata={"help": "The arm that was named before the runs."})
    highlighted: list[str] | None = field(default=None, metadata={"help": "Arms that the curves show in colour."})
    task: str = field(
        default="tiny",
        metadata={"help": "What is learned, by whom.", "choices": ["tiny", "instructions", "prompts"]},
    )
    num_demonstrations: int = field(default=16000, metadata={"help": "Demonstrations of the task `tiny`."})
    num_train_prompts: int = field(default=600, metadata={"help": "Prompts of the pool."})
    num_eval_prompts: int = field(default=1000, metadata={"help": "Held-out prompts."})
    dataset_name: str | None = field(default=None, metadata={"help": "Prompts to train on, for the task `prompts`."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Prompts to evaluate on."})
    judge_model: str | None = field(default=None, metadata={"help": "Reward model that scores candidates."})
    eval_judge_model: str | None = field(default=None, metadata={"help": "Reward model that only evaluates."})
    encoder: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "Sentence encoder of the task `prompts`."}
    )
    num_responses: int = field(default=8, metadata={"help": "Candidates a prompt."})
    pair_rule: str = field(default="uniform", metadata={"help": "How candidates are paired."})
    max_new_tokens: int = field(default=48, metadata={"help": "Token limit of a response."})
    generation_batch_size: int = field(default=256, metadata={"help": "Responses that are generated together."})
    eval_responses: int = field(default=2, metadata={"help": "Answers to each held-out prompt."})
    eval_batch_size: int = field(default=64, metadata={"help": "Answers in a forward pass for the perplexity."})
    num_workers: int = field(default=1, metadata={"help": "Processes that share the runs out on this machine."})
    results_dir: str | None = field(default=None, metadata={"help": "Folder for a copy of tables, pictures and runs."})
    name: str = field(default="compare", metadata={"help": "Name of these files."})
    report_only: bool = field(default=False, metadata={"help": "Only draw tables and curves."})


def commit() -> str:
    """
    The commit of the checkout.

    Returns:
        `str`: Its hash, with `+` where files differ from it; `unknown` outside of a checkout.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    result = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if result.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return result.stdout.strip() + ("+" if changed else "")


def run_all(script_args: CompareArguments, training_args: Any, model_args: Any) -> None:
    """
    Do the runs that are not there yet and that no other process has claimed.

    Args:
        script_args ([`CompareArguments`]):
            Arguments of the script.
        training_args ([`~trl_bpo.BPOConfig`]):
            What all arms share.
        model_args ([`~trl.ModelConfig`]):
            Adapter and type of the policy.
    """
    from compare_arms import device_name, parse_arm, run_arm, with_references
    from compare_tasks import make_pool, make_task
    from transformers import AutoTokenizer

    arms = [parse_arm(label, training_args) for label in script_args.arms]
    folder = Path(training_args.output_dir)
    runs = folder / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "prepare.lock"):
        task = make_task(script_args, model_args, folder)
        pool = make_pool(task, script_args, folder)
        pool = with_references(task, pool, training_args, model_args, folder)
    counts = json.loads((folder / "pool.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    prompt_tokens = sum(
        len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        if isinstance(prompt, list)
        else len(tokenizer(prompt)["input_ids"])
        for prompt in task.prompts["prompt"]
    )
    counts["generated_and_prompt_tokens"] = counts["generated_tokens"] + prompt_tokens * script_args.num_responses
    about = {
        "task": script_args.task,
        "device": device_name(),
        "commit": commit(),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    seeds = range(script_args.seed_offset, script_args.seed_offset + script_args.num_seeds)
    # Seeds before arms, so that what is there after half of the time can be compared.
    todo = [(arm, seed) for seed in seeds for arm in arms if seed == seeds[0] or arm.name != "sft"]
    while todo:
        waiting = []
        for arm, seed in todo:
            slug = f"{arm.slug}-seed{seed}"
            path, target = runs / f"{slug}.json", None
            if path.exists():
                continue
            if (other := arm.options.get("match_compute")) is not None:
                matched = runs / f"{parse_arm(other, training_args).slug}-seed{seed}.json"
                if not matched.exists():
                    waiting.append((arm, seed))
                    continue
                target = json.loads(matched.read_text())["flops"]
            try:
                with FileLock(runs / f"{slug}.lock", timeout=0):
                    if path.exists():
                        continue
                    work = folder / "work" / slug
                    record = run_arm(
                        arm, task, pool, counts, seed, training_args, script_args, model_args, work, target
                    )
                    partial = path.with_suffix(".partial")
                    partial.write_text(json.dumps({**record, **about}) + "\n")
                    partial.replace(path)
                    print(
                        f"{time.strftime('%H:%M:%S')} {slug}: {record['score']:.3f} in {record['seconds']} s",
                        flush=True,
                    )
            except Timeout:
                # Another process is at it. Its result is needed at the end, and it may be killed before it has one.
                waiting.append((arm, seed))
        todo = waiting
        if todo:
            time.sleep(2)


def report(script_args: CompareArguments, training_args: Any) -> None:
    """
    Write the list of runs, the tables and the pictures, of the arms that were asked for.

    Args:
        script_args ([`CompareArguments`]):
            Arguments of the script.
        training_args ([`~trl_bpo.BPOConfig`]):
            What all arms share; its `output_dir` has the runs.
    """
    from compare_arms import parse_arm

    from trl_bpo.comparison import power_verdict, summarize
    from trl_bpo.comparison_report import contrast_table, plot_contrasts, plot_curves
    from trl_bpo.runs import save_runs

    output_dir = training_args.output_dir
    slugs = {parse_arm(label, training_args).slug for label in script_args.arms}
    paths = sorted(Path(output_dir, "runs").glob("*.json"))
    runs = [json.loads(path.read_text()) for path in paths if path.stem.rpartition("-seed")[0] in slugs]
    if not runs:
        raise ValueError(f"There is no run in {output_dir}/runs yet.")
    main_budget = next(
        (run["budget"] for run in runs if abs(run["budget"] / run["pool_pairs"] - script_args.fraction) < 1e-3), None
    )
    labels = {run["label"] for run in runs}
    texts = []
    if {"sft", "full", "random"} <= labels:
        flipped = "flipped_labels" if "flipped_labels" in labels else None
        verdict = power_verdict(runs, "sft", "full", "random", flipped_label=flipped, budget=main_budget)
        texts.append(f"Power: {verdict}")
    summaries = None
    if script_args.baseline in labels and len(labels) > 1:
        preregistered = script_args.preregistered if script_args.preregistered in labels else None
        summaries = summarize(
            runs,
            script_args.baseline,
            preregistered_label=preregistered,
            preregistered_budget=main_budget if preregistered else None,
            # Holm multiplies the smallest p-value, which is one over the resamples, by the number of arms.
            num_resamples=100_000,
        )
        texts.append(contrast_table(summaries, script_args.baseline))
    text = "\n\n".join(texts) + "\n"
    print(text)
    for folder in [output_dir] + ([script_args.results_dir] if script_args.results_dir else []):
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_runs(runs, folder, script_args.name)
        Path(folder, f"{script_args.name}.md").write_text(text)
        highlighted = [label for label in script_args.highlighted or [] if label in labels] or None
        plot_curves(runs, Path(folder, f"{script_args.name}_curves.png"), highlighted=highlighted)
        if summaries is not None:
            plot_contrasts(
                summaries,
                Path(folder, f"{script_args.name}_contrasts.png"),
                script_args.baseline,
                preregistered_label=preregistered,
            )


def main(script_args: CompareArguments, training_args: Any, model_args: Any) -> None:
    if not script_args.report_only:
        helpers = []
        for worker in range(1, script_args.num_workers):
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(worker)}
            helpers.append(subprocess.Popen([sys.executable, *sys.argv, "--num_workers", "0"], env=environment))
        run_all(script_args, training_args, model_args)
        for helper in helpers:
            helper.wait()
        if script_args.num_workers == 0:
            return
    report(script_args, training_args)


def make_parser() -> Any:
    from trl import ModelConfig, TrlParser

    from trl_bpo import BPOConfig

    return TrlParser((CompareArguments, BPOConfig, ModelConfig))


if __name__ == "__main__":
    script_args, training_args, model_args = make_parser().parse_args_and_config()
    main(script_args, training_args, model_args)
