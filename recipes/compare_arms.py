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


"""The arms of `compare.py`: which pairs each trains on, how one is trained and evaluated, and what it costs."""

import copy
import math
import re
import shutil
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from compare_tasks import Task, load_policy, make_generator
from datasets import Dataset, load_from_disk
from transformers.trainer_utils import get_last_checkpoint
from trl import get_peft_config

from trl_bpo import BPOTrainer, BreadthSelector
from trl_bpo.bootstrap import bootstrap_interval
from trl_bpo.bpo_config import GRADIENT_STRATEGIES, POLICY_STRATEGIES
from trl_bpo.evaluation import evaluate_policy
from trl_bpo.strategies import draw_scores


# What an arm trains on: which prompts, which of their pairs. `all` prompts, those that `breadth` selection keeps, or a
# `random` subset of them; the pairs by a `depth_strategy`, `all` of them, or `none`.
ARMS = {
    "sft": ("all", "none"),
    "full": ("all", "all"),
    "flipped_labels": ("all", "all"),
    "random": ("all", "random_once"),
    "random_redraw": ("all", "random"),
    "random_prompts": ("random", "all"),
    "breadth_only": ("breadth", "all"),
    "depth_only": ("all", "gradient"),
    "bpo": ("breadth", "gradient"),
    "breadth_random_redraw": ("breadth", "random"),
    "equal_per_prompt": ("all", "equal_per_prompt"),
    "best_worst_per_prompt": ("all", "best_worst_per_prompt"),
    "random_in_cluster": ("all", "gradient_random"),
    "random_like_depth": ("all", "random_like_gradient"),
    "farthest": ("all", "gradient_farthest"),
    "k_centre": ("all", "gradient_k_centre"),
    "gradient_norm": ("all", "gradient_norm"),
    "loss": ("all", "loss"),
    "implicit_reward_margin_high": ("all", "implicit_reward_margin_high"),
    "implicit_reward_margin_low": ("all", "implicit_reward_margin_low"),
    "score_margin_high": ("all", "score_margin_high"),
    "score_margin_low": ("all", "score_margin_low"),
    "embedding": ("all", "embedding"),
    "longest": ("all", "longest"),
}
# The implicit rewards are all zero at step 0.
_WAIT = ("loss", "implicit_reward_margin_high", "implicit_reward_margin_low")
_OWN_OPTIONS = ("fraction", "breadth_fraction", "breadth_clusters", "lora_r", "match_compute")
_SWAPPED = (
    *("chosen", "rejected", "chosen_ids", "rejected_ids", "chosen_truncated", "rejected_truncated"),
    *("score_chosen", "score_rejected", "ref_chosen_logps", "ref_rejected_logps"),
)


@dataclass(frozen=True)
class Arm:
    """
    An arm as it is written in the list `arms`: its name and what it has different, as `bpo fraction=0.1 depth_clusters=8`.

    Args:
        label (`str`):
            What was written, but for the fraction: arms are told apart by label and budget.
        name (`str`):
            A key of `ARMS`.
        options (`dict`):
            Options of the arm: `fraction` (of the pool's pairs), `breadth_fraction`, `breadth_clusters`, `lora_r`,
            `match_compute` (label of the arm whose total compute it takes), or any field of
            [`~trl_bpo.BPOConfig`].
    """

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The arm as the name of a file."""
        options = "".join(f"-{name}={value}" for name, value in self.options.items())
        return re.sub(r"[^A-Za-z0-9=._-]", "_", self.name + options)


def parse_arm(label: str, training_args: Any) -> Arm:
    """
    Read an arm.

    Args:
        label (`str`):
            As in the list `arms`.
        training_args ([`~trl_bpo.BPOConfig`]):
            The options that all arms share.

    Returns:
        [`Arm`]: The arm.

    Raises:
        `ValueError`: If the arm or an option is unknown.
    """
    name, *parts = label.split()
    if name not in ARMS:
        raise ValueError(f"`arms` has `{label}`, but `{name}` is none of {', '.join(ARMS)}.")
    options = {}
    for part in parts:
        key, separator, value = part.partition("=")
        if not separator or (key not in _OWN_OPTIONS and key not in vars(training_args)):
            raise ValueError(
                f"`arms` has `{label}`, but `{part}` is not `option=value` with an option of `BPOConfig` or one of "
                f"{', '.join(_OWN_OPTIONS)}."
            )
        # Spaces part the options, so a matched arm is written with underscores for its own.
        options[key] = (
            value.replace("_", " ") if key == "match_compute" and value not in ARMS else yaml.safe_load(value)
        )
    label = " ".join([name, *(part for part in parts if not part.startswith("fraction="))])
    return Arm(label, name, options)


class _PoolTrainer(BPOTrainer):
    # The pool brings its tokens and the log-probabilities of the reference along, computed once for all arms.
    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset if "chosen_ids" in dataset.column_names else super()._prepare_dataset(dataset, *args)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if "ref_chosen_logps" in dataset.column_names:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)


def _make_trainer(task: Task, args: Any, pool: Dataset, model_args: Any) -> _PoolTrainer:
    policy, tokenizer = load_policy(task)
    return _PoolTrainer(
        model=policy,
        args=args,
        train_dataset=pool,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )


def with_references(task: Task, pool: Dataset, training_args: Any, model_args: Any, folder: Path) -> Dataset:
    """
    The pool with the log-probabilities of the reference policy, which all arms share, and without over-long prompts.

    Args:
        task ([`Task`]):
            The task.
        pool (`Dataset`):
            Its pairs.
        training_args, model_args:
            Arguments of the script.
        folder (`Path`):
            Folder of the task, in which the result is kept.

    Returns:
        [`~datasets.Dataset`]: The pairs as the trainer tokenises them, with `ref_chosen_logps`, `ref_rejected_logps` and
        `num_tokens`, the tokens of both responses with their prompts.
    """
    path = folder / "references"
    if not path.exists():
        args = copy.copy(training_args)
        args.depth_fraction, args.output_dir = 1.0, str(folder / "references.work")
        trained = _make_trainer(task, args, pool, model_args).train_dataset
        lengths = [
            2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
            for row in trained.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        ]
        trained = trained.add_column("num_tokens", lengths)
        if len(trained) < len(pool):
            print(f"{len(pool) - len(trained)} of {len(pool)} pairs dropped: their prompt fills `max_length`.")
        partial = folder / "references.partial"
        trained.save_to_disk(partial)
        partial.rename(path)
    return load_from_disk(str(path))


def _select_prompts(arm: Arm, task: Task, pool: Dataset, n_active: int, script_args: Any, seed: int) -> set[str]:
    # The prompts of the pool's pairs that the arm may use.
    which, depth = ARMS[arm.name]
    ids = list(dict.fromkeys(pool["prompt_id"]))
    if which == "all":
        return set(ids)
    counts = dict(zip(*np.unique(pool["prompt_id"], return_counts=True), strict=True))
    if which == "random":
        order = [ids[index] for index in np.argsort(-draw_scores(ids, seed, 0))]
        enough = int(np.searchsorted(np.cumsum([counts[key] for key in order]), n_active)) + 1
        return set(order[:enough])
    fraction = arm.options.get("breadth_fraction", script_args.breadth_fraction or math.sqrt(n_active / len(pool)))
    if depth == "all":
        fraction = n_active / len(pool)
    while True:
        selector = BreadthSelector(
            min(1.0, fraction), task.encoder, n_clusters=arm.options.get("breadth_clusters"), seed=seed
        )
        kept = set(selector.select(task.prompts).kept["prompt_id"])
        if sum(counts.get(key, 0) for key in kept) >= n_active or fraction >= 1.0:
            return kept
        # The pairs that are asked for must be there: one more prompt in twenty, where these have too few.
        fraction *= 1.05


def _prepare(arm: Arm, task: Task, pool: Dataset, training_args: Any, script_args: Any, seed: int) -> tuple:
    # The pairs that the arm selects from, its training arguments, the number of its prompts, and its budget.
    _, depth = ARMS[arm.name]
    fraction = 1.0 if arm.name in ("full", "flipped_labels") else arm.options.get("fraction", script_args.fraction)
    n_active = max(1, round(fraction * len(pool)))
    prompts = _select_prompts(arm, task, pool, n_active, script_args, seed)
    rows = pool.select([row for row, key in enumerate(pool["prompt_id"]) if key in prompts])
    if arm.name == "flipped_labels":
        swapped = {a: b for a, b in zip(_SWAPPED[::2], _SWAPPED[1::2], strict=True) if a in rows.column_names}
        rows = rows.rename_columns({**swapped, **{b: a for a, b in swapped.items()}})
    args = copy.copy(training_args)
    args.seed = seed
    args.depth_fraction = min(1.0, n_active / len(rows))
    # What is left of a budget over the pairs of the chosen prompts is drawn at random.
    args.depth_strategy = "random_once" if depth == "all" else depth
    args.depth_encoder = task.encoder
    if depth in _WAIT and args.first_selection_step == 0:
        args.first_selection_step = script_args.margin_selection_step
    for name, value in arm.options.items():
        if name not in _OWN_OPTIONS:
            setattr(args, name, value)
    n_prompts = len(task.prompts) if ARMS[arm.name][0] == "all" else len(prompts)
    return rows, args, n_prompts, n_active


def _flops(
    task: Task, rows: Dataset, trainer: Any, num_parameters: int, counts: dict, n_prompts: int, trained_tokens: int
) -> dict[str, float]:
    # Two operations a parameter and token forward, two for the gradient of the activations, two for that of the weights,
    # which adapters spare. Attention is left out.
    share = n_prompts / counts["prompts"]
    strategy = trainer.args.depth_strategy
    tokens = sum(rows["num_tokens"])
    selection = 0.0
    by_policy = trainer.selection is not None and strategy in POLICY_STRATEGIES
    if by_policy:
        passed = tokens
        if strategy in GRADIENT_STRATEGIES:
            passed = int(trainer._features.responses.lengths.sum())
        per_token = 4 if strategy in GRADIENT_STRATEGIES else 2
        selection = float(trainer._num_selections * per_token * num_parameters * passed)
    used = int(trainer._seen.sum()) / len(rows) if trainer._pool is not None and not by_policy else 1.0
    return {
        "generation": 2.0 * num_parameters * counts["generated_and_prompt_tokens"] * share,
        "selection": selection,
        "reference": 2.0 * num_parameters * tokens * used,
        "training": (4.0 if counts["adapter"] else 6.0) * num_parameters * trained_tokens,
    }


def run_arm(
    arm: Arm,
    task: Task,
    pool: Dataset,
    counts: dict,
    seed: int,
    training_args: Any,
    script_args: Any,
    model_args: Any,
    folder: Path,
    target_flops: float | None = None,
) -> dict[str, Any]:
    """
    Train one arm with one seed and evaluate it.

    Args:
        arm ([`Arm`]):
            The arm.
        task ([`Task`]):
            The task.
        pool (`Dataset`):
            Pairs of all prompts, with the reference's log-probabilities.
        counts (`dict`):
            What the pool took: `prompts`, `responses`, `generated_and_prompt_tokens`.
        seed (`int`):
            Seed of selection, adapter and order. The same for all arms of a pair.
        training_args, script_args, model_args:
            Arguments of the script.
        folder (`Path`):
            Folder in which training leaves its files, from whose last checkpoint a killed run goes on. Deleted at the
            end.
        target_flops (`float`, *optional*):
            Total operations that the arm is to take, by training longer.

    Returns:
        `dict`: The record of the run.
    """
    started = time.perf_counter()
    model_args = replace(model_args, lora_r=arm.options.get("lora_r", model_args.lora_r))
    base, tokenizer = load_policy(task)
    num_parameters = base.num_parameters()
    record: dict[str, Any] = {"label": arm.label, "arm": arm.name, "seed": seed, "pool_pairs": len(pool)}
    counts = {**counts, "adapter": model_args.use_peft}
    if ARMS[arm.name][1] == "none":
        policy = base
        record |= {"budget": 0, "unique_pairs": 0, "tokens": 0, "steps": 0, "judge_calls": 0, "options": {}}
        phases = {"generation": 0.0, "selection": 0.0, "reference": 0.0, "training": 0.0}
    else:
        rows, args, n_prompts, n_active = _prepare(arm, task, pool, training_args, script_args, seed)
        args.output_dir = str(folder)
        trainer = _make_trainer(task, args, rows, model_args)
        if target_flops is not None:
            _match_compute(trainer, task, rows, num_parameters, counts, n_prompts, target_flops, n_active)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
        tokens = int(trainer._total_train_tokens)
        phases = _flops(task, rows, trainer, num_parameters, counts, n_prompts, tokens)
        seen = n_active if trainer._pool is None else int(trainer._seen.sum())
        record |= {
            "budget": n_active,
            "unique_pairs": seen,
            "tokens": tokens,
            "steps": trainer.state.global_step,
            "judge_calls": round(counts["responses"] * n_prompts / counts["prompts"]),
            "options": {
                "fraction": n_active / len(pool),
                **{name: value for name, value in arm.options.items() if name != "fraction"},
            },
            "selection": None if trainer.selection is None else trainer.selection.metrics,
        }
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if model_args.use_peft:
            policy = policy.merge_and_unload()
        del trainer
    # The same random numbers for every arm: what differs is the policy.
    report = evaluate_policy(
        make_generator(policy, tokenizer, script_args, seed=1_000_000 + seed),
        task.evaluation_judge,
        task.evaluation,
        base,
        tokenizer,
        num_responses=script_args.eval_responses,
        group_column="group",
        batch_size=script_args.eval_batch_size,
    )
    primary = report.groups[task.primary]
    usable = [score for score in primary.prompt_scores if score is not None]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        **record,
        "flops": sum(phases.values()),
        "flops_by_phase": phases,
        "score": statistics.fmean(usable),
        "interval": list(bootstrap_interval(usable)),
        "prompt_scores": primary.prompt_scores,
        "groups": {
            name: {"score": group.score_mean, "num_prompts": group.num_prompts}
            for name, group in report.groups.items()
        },
        "length_mean": primary.length_mean,
        "distinct_1": primary.distinct_1,
        "distinct_2": primary.distinct_2,
        "empty_rate": primary.empty_rate,
        "truncated_rate": primary.truncated_rate,
        "perplexity_median": primary.perplexity_median,
        "num_unscored": primary.num_unscored,
        "num_parameters": num_parameters,
        "model": task.name,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _match_compute(
    trainer: Any,
    task: Task,
    rows: Dataset,
    num_parameters: int,
    counts: dict,
    n_prompts: int,
    target_flops: float,
    n_active: int,
) -> None:
    # As many steps as what the other phases leave of the target pays for.
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    per_step = (4.0 if counts["adapter"] else 6.0) * num_parameters * batch * statistics.fmean(rows["num_tokens"])
    fixed = 2.0 * num_parameters * counts["generated_and_prompt_tokens"] * n_prompts / counts["prompts"]
    fixed += 2.0 * num_parameters * sum(rows["num_tokens"]) * min(1.0, n_active / len(rows))
    trainer.args.max_steps = max(1, round((target_flops - fixed) / per_step))


def device_name() -> str:
    """
    What the runs are computed on.

    Returns:
        `str`: Name of the GPU, or of the CPU.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"CPU, {line.partition(':')[2].strip()}"
    return "CPU"
