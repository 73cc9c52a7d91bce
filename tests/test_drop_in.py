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

"""
What DPOTrainer can do, BPOTrainer can: each capability once without selection, where every bit of the training has to be
that of DPOTrainer, and once with it.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pairs import IdentityProjection, config, conversational, pairs, relative_error
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from PIL import Image
from recording import RecordingTrainer
from tiny import tiny_config, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    EarlyStoppingCallback,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_bpo import BPOConfig, BPOTrainer
from trl_bpo.capture import target_modules


TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "description": "The weather of a city"}}])

# Ten pairs: five steps an epoch without selection, and three, the last with one pair, with half of them.
pool = partial(pairs, 5, 2)


def lora(**kwargs):
    return LoraConfig(r=4, target_modules="all-linear", **kwargs)


def load(tiny_dir, moved_by=0.0):
    """The tiny model, or another one near it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(moved_by * torch.randn(parameter.shape, generator=generator))
    return model


@dataclass
class Case:
    """
    A capability of DPOTrainer.

    `options` are those of its configuration; `arguments` makes what else the trainer takes, from the folder of the model
    and anew for each trainer; `check` is what the capability itself promises, after training, of any of the trainers.
    With selection, `refused` is the beginning of the error where the two do not go together, `steps` the number of steps
    where it is not that of an ordinary run over the budget.
    """

    options: dict[str, Any] = field(default_factory=dict)
    peft: Callable | None = lora
    data: Callable = pool
    arguments: Callable[[str], dict[str, Any]] = lambda tiny_dir: {}
    mixin: type | None = None
    train: Callable = lambda trainer: trainer.train()
    check: Callable[[Any], None] = lambda trainer: None
    steps: int | None = None
    refused: str | None = None

    def trainer(self, cls, config_cls, tiny_dir, path, **options):
        if self.mixin is not None:
            cls = type(cls.__name__, (self.mixin, cls), {})
        arguments = {
            "model": tiny_dir,
            "args": config(path, config_cls, **{**self.options, **options}),
            "train_dataset": self.data(),
            **self.arguments(tiny_dir),
        }
        if self.peft is not None:
            arguments["peft_config"] = self.peft()
        return cls(**arguments)


# What a capability promises


def logged(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


def check_dora(trainer):
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert sum("lora_magnitude_vector" in name for name in trained) == 14


def check_checkpointing(expected):
    def check(trainer):
        assert trainer.model.is_gradient_checkpointing is expected

    return check


def check_adapter_was_copied(trainer):
    # DPOTrainer keeps the adapter as it was passed for the reference.
    assert isinstance(trainer.model, PeftModel) and set(trainer.model.peft_config) == {"default", "ref"}
    parameters = dict(trainer.model.named_parameters())
    copies = {name: value for name, value in parameters.items() if ".ref." in name}
    assert copies and not any(parameter.requires_grad for parameter in copies.values())
    assert any(
        not torch.equal(value, parameters[name.replace(".ref.", ".default.")]) for name, value in copies.items()
    )


def check_reference_stayed(trainer):
    expected = load(trainer.model.config._name_or_path, moved_by=0.02)
    for parameter, value in zip(trainer.ref_model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, value)


def check_reference_was_synced(trainer):
    # With a mixing factor of 1 it is the policy, and the last step was one that synchronises.
    assert trainer.state.global_step % 2 == 0
    for parameter, value in zip(trainer.ref_model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(parameter, value)


class CountsReferencePasses:
    """Writes down where the trainer asks for log-probabilities of the reference: before training, or at which step."""

    def __init__(self, *args, **kwargs):
        self.reference_passes = []
        super().__init__(*args, **kwargs)

    def compute_ref_log_probs(self, model, inputs):
        self.reference_passes.append(self.state.global_step if self.is_in_train else None)
        return super().compute_ref_log_probs(model, inputs)


def check_reference_was_computed_once(trainer):
    # Five batches of training and two of evaluation, all before training. Selections take it from the dataset.
    assert trainer.reference_passes == [None] * 7
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.train_dataset.column_names)
    assert len(logged(trainer, "eval_loss")) == 2


def check_bf16(trainer):
    assert trainer.accelerator.mixed_precision == "bf16"
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def check_bf16_weights(trainer):
    # PEFT keeps adapters in float32.
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16, torch.float32}


class OutOfMemoryOnce:
    """Has no room for batches of four pairs, and finds out in the second epoch of two steps."""

    def compute_loss(self, *args, **kwargs):
        if self._train_batch_size == 4 and self.state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(*args, **kwargs)


def check_smaller_batches(trainer):
    assert trainer._train_batch_size == 3


def check_evaluated(trainer):
    steps = [log["step"] for log in trainer.state.log_history if "eval_loss" in log]
    assert steps == list(range(2, trainer.state.global_step + 1, 2))
    assert len(logged(trainer, "eval_rewards/margins")) == len(steps)
    # Another dataset, that has not been prepared.
    assert trainer.evaluate(pairs(2, 1, seed=6), metric_key_prefix="test")["test_loss"] > 0


def check_evaluated_on_each(trainer):
    assert len(logged(trainer, "eval_seen_loss")) == len(logged(trainer, "eval_new_loss")) == 2
    assert logged(trainer, "eval_seen_loss") != logged(trainer, "eval_new_loss")


def mean_of_logits(prediction):
    return {"mean_of_logits": float(prediction.predictions.mean())}


def check_metrics_were_computed(trainer):
    assert len(set(logged(trainer, "eval_mean_of_logits"))) == 2


# The number of tokens grows, so the lowest is that of the first evaluation, while the last model is another.
FIRST_IS_BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "num_tokens",
    "greater_is_better": False,
}


def check_best_was_loaded(trainer):
    best = Path(trainer.args.output_dir) / "checkpoint-2"
    assert trainer.state.global_step > 2 and trainer.state.best_model_checkpoint == str(best)
    saved = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)
    last = AutoModelForCausalLM.from_pretrained(best.with_name(f"checkpoint-{trainer.state.global_step}"))
    for parameter, first, end in zip(*(m.parameters() for m in (trainer.model, saved, last)), strict=True):
        assert torch.equal(parameter, first) and not torch.equal(parameter, end)


def check_stopped_early(trainer):
    assert trainer.state.global_step == 4 < trainer.state.max_steps


def check_steps(expected):
    def check(trainer):
        assert trainer.state.global_step == expected

    return check


def check_long_prompts_were_dropped(trainer):
    assert len(trainer.train_dataset) == 10
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(10)])
    assert batch["input_ids"].shape[1] == 24


def check_mean_of_losses(trainer):
    assert trainer.loss_types == ["sigmoid", "bco_pair"] and trainer.loss_weights == [0.7, 0.3]


class Halves(torch.optim.lr_scheduler.LambdaLR):
    """Halves the learning rate at every step."""

    def __init__(self, optimizer):
        super().__init__(optimizer, lambda step: 0.5**step)


def with_optimizer(tiny_dir):
    model = load(tiny_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "optimizers": (optimizer, Halves(optimizer))}


def check_own_optimizer(trainer):
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert logged(trainer, "learning_rate") == [0.1 * 0.5**step for step in range(trainer.state.global_step)]


def check_first_step_was_logged(trainer):
    steps = [log["step"] for log in trainer.state.log_history if "loss" in log]
    assert steps == [1, *range(4, trainer.state.global_step + 1, 4)]


class Events(TrainerCallback):
    """Writes down every event with its step."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.events.append((name, state.global_step))
        return super().__getattribute__(name)


def events(trainer):
    return [callback.events for callback in trainer.callback_handler.callbacks if isinstance(callback, Events)]


def check_events(trainer):
    (seen,) = events(trainer)
    steps = trainer.state.global_step
    assert [step for name, step in seen if name == "on_step_end"] == list(range(1, steps + 1))
    names = {name for name, _ in seen}
    assert {"on_init_end", "on_train_begin", "on_epoch_begin", "on_epoch_end", "on_log", "on_train_end"} <= names


class PaddingCollator(DataCollatorForPreference):
    """Pads to a length of its own, and counts its batches."""

    n_batches = 0

    def __call__(self, features, return_tensors=None):
        self.n_batches += 1
        return super().__call__(features, return_tensors)


def check_own_collator(trainer):
    assert (
        type(trainer.data_collator) is PaddingCollator and trainer.data_collator.n_batches >= trainer.state.max_steps
    )
    assert trainer.data_collator([trainer.train_dataset[0]])["input_ids"].shape[1] == 64


def check_padding(trainer):
    assert not trainer.padding_free


# Data in the forms that TRL takes


def with_long_prompts():
    long = {"prompt": "sea " * 60, "chosen": " a", "rejected": " b"}
    # Answers that are cut, but not alike.
    rows = [{**row, "chosen": row["chosen"] + " sea" * 20} for row in pool().to_list()]
    return Dataset.from_list([long, *rows[:4], long, *rows[4:]])


def implicit(dataset):
    def merge(row):
        return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}

    return dataset.map(merge, remove_columns="prompt")


def with_tools():
    return conversational(pool()).add_column("tools", [TOOLS if row % 2 else None for row in range(10)])


def check_tools_are_in_the_prompt(trainer):
    lengths = [len(ids) for ids in trainer.train_dataset["prompt_ids"]]
    assert all(second > first + 20 for first, second in zip(lengths[::2], lengths[1::2], strict=True))


def with_images():
    rng = np.random.default_rng(0)
    rows = [{**row, "prompt": f"<image>{row['prompt']}"} for row in pool().to_list()]
    images = [[Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))] for _ in rows]
    return Dataset.from_list([{**row, "images": of_row} for row, of_row in zip(rows, images, strict=True)])


def vision_language_model():
    """A random Llava that sees four patches of an image, and its processor."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    text, token = tiny_config(tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=token))
    return {"model": model, "processing_class": processor}


EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}


def with_evaluation(**kwargs):
    return lambda tiny_dir: {"eval_dataset": pairs(3, 1, seed=5), **kwargs}


CASES = {
    # What is trained
    "lora": Case(),
    "dora": Case(peft=lambda: lora(use_dora=True), check=check_dora),
    "rslora-with-dropout": Case({"disable_dropout": False}, lambda: lora(use_rslora=True, lora_dropout=0.2)),
    "lora-beside-trained-norms": Case(peft=lambda: lora(modules_to_save=["norm"])),
    "full": Case(peft=None),
    "model-as-an-object": Case(arguments=lambda tiny_dir: {"model": load(tiny_dir)}),
    "peft-model": Case(
        {"loss_type": "ipo"},
        None,
        arguments=lambda tiny_dir: {"model": get_peft_model(load(tiny_dir), lora(init_lora_weights=False))},
        check=check_adapter_was_copied,
    ),
    "prompt-tuning": Case(
        peft=lambda: PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2),
        refused="PeftModelForCausalLM has no trainable `nn.Linear`",
    ),
    # The reference
    "reference-of-its-own": Case(
        {"loss_type": "ipo"},
        None,
        arguments=lambda tiny_dir: {"ref_model": load(tiny_dir, moved_by=0.02)},
        check=check_reference_stayed,
    ),
    "reference-of-its-own-for-lora": Case(
        {"loss_type": "ipo"},
        arguments=lambda tiny_dir: {"ref_model": load(tiny_dir, moved_by=0.02)},
        check=check_reference_stayed,
    ),
    "synced-reference": Case(
        {"loss_type": "ipo", "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0},
        None,
        check=check_reference_was_synced,
    ),
    "synced-reference-of-its-own": Case(
        {"loss_type": "ipo", "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0},
        None,
        arguments=lambda tiny_dir: {"ref_model": load(tiny_dir, moved_by=0.02)},
        check=check_reference_was_synced,
    ),
    **{
        f"precomputed-reference-{name}": Case(
            {
                "loss_type": "ipo",
                "precompute_ref_log_probs": True,
                "eval_strategy": "epoch",
                "per_device_eval_batch_size": 2,
            },
            peft,
            arguments=with_evaluation(),
            mixin=CountsReferencePasses,
            check=check_reference_was_computed_once,
        )
        for name, peft in (("lora", lora), ("full", None))
    },
    # How it is computed
    "gradient-checkpointing": Case({"gradient_checkpointing": True}, check=check_checkpointing(True)),
    "no-gradient-checkpointing": Case({"gradient_checkpointing": False}, check=check_checkpointing(False)),
    "reentrant-checkpointing": Case({"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "bf16": Case({"bf16": True}, check=check_bf16),
    "bf16-full": Case({"bf16": True}, None, check=check_bf16),
    "bf16-weights": Case({"model_init_kwargs": {"dtype": "bfloat16"}}, check=check_bf16_weights),
    "worker": Case({"dataloader_num_workers": 1}),
    "persistent-worker": Case({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    "drop-last": Case({"dataloader_drop_last": True, "per_device_train_batch_size": 3}),
    "accumulation": Case({"gradient_accumulation_steps": 2}),
    "smaller-batches-where-memory-ends": Case(
        {"auto_find_batch_size": True, "per_device_train_batch_size": 4},
        mixin=OutOfMemoryOnce,
        check=check_smaller_batches,
    ),
    "another-optimizer": Case({"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 2}),
    "noisy-embeddings": Case({"neftune_noise_alpha": 5.0}),
    "padding-free": Case({"padding_free": True}, check=check_padding),
    "padding-to-a-multiple": Case({"pad_to_multiple_of": 32}),
    # Evaluation
    "evaluation": Case(EVALUATION, arguments=with_evaluation(), check=check_evaluated),
    "evaluation-on-several": Case(
        {"eval_strategy": "epoch"},
        arguments=lambda tiny_dir: {"eval_dataset": {"seen": pairs(2, 1), "new": pairs(3, 1, seed=5)}},
        check=check_evaluated_on_each,
    ),
    "computed-metrics": Case(
        {"eval_strategy": "epoch"},
        arguments=with_evaluation(compute_metrics=mean_of_logits),
        check=check_metrics_were_computed,
    ),
    "best-model": Case(FIRST_IS_BEST, None, arguments=with_evaluation(), check=check_best_was_loaded),
    "early-stopping": Case(
        FIRST_IS_BEST,
        arguments=lambda tiny_dir: {**with_evaluation()(tiny_dir), "callbacks": [EarlyStoppingCallback(1)]},
        check=check_stopped_early,
        steps=4,
    ),
    # Length of the training, and what is logged
    "max-steps": Case({"max_steps": 4}, check=check_steps(4), steps=4),
    "twice": Case(train=lambda trainer: (trainer.train(), trainer.train())[1]),
    "seed": Case({"seed": 7}),
    "data-seed": Case({"data_seed": 7}),
    "first-step-logged": Case({"logging_first_step": True, "logging_steps": 4}, check=check_first_step_was_logged),
    "callbacks": Case(arguments=lambda tiny_dir: {"callbacks": [Events()]}, check=check_events),
    "own-optimizer": Case(peft=None, arguments=with_optimizer, check=check_own_optimizer),
    "own-collator": Case(
        arguments=lambda tiny_dir: {"data_collator": PaddingCollator(pad_token_id=0, pad_to_multiple_of=64)},
        check=check_own_collator,
    ),
    # The loss
    "loss-ipo": Case({"loss_type": "ipo"}),
    "loss-hinge": Case({"loss_type": "hinge", "beta": 0.5}),
    "loss-weighted-sum": Case(
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.7, 0.3]}, check=check_mean_of_losses
    ),
    "loss-with-sft": Case({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}),
    "loss-length-desensitised": Case({"ld_alpha": 0.5}),
    "loss-weighted-by-policy": Case({"use_weighting": True}),
    "loss-js-divergence": Case({"f_divergence_type": "js_divergence"}),
    "loss-alpha-divergence": Case({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}),
    "loss-label-smoothing": Case({"loss_type": "robust", "label_smoothing": 0.1}),
    # The data
    "messages": Case(data=lambda: conversational(pool())),
    "implicit-prompt": Case(data=lambda: implicit(pool())),
    "implicit-prompt-messages": Case(data=lambda: implicit(conversational(pool()))),
    "tools": Case(data=with_tools, check=check_tools_are_in_the_prompt),
    "max-length": Case({"max_length": 24}, data=with_long_prompts, check=check_long_prompts_were_dropped),
    "cut-at-the-start": Case({"max_length": 24, "truncation_mode": "keep_end"}),
    # What selection does not go with
    "streaming": Case(
        {"max_steps": 4},
        data=lambda: pool().to_iterable_dataset(),
        check=check_steps(4),
        refused="A streaming dataset",
    ),
    "group-by-length": Case(
        # Else the lengths are gone before they are asked for.
        {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False},
        data=lambda: pool().map(lambda row: {"length": len(row["chosen"])}),
        refused="`train_sampling_strategy='group_by_length'` does not",
    ),
    "images": Case(
        data=with_images,
        peft=lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        arguments=lambda tiny_dir: vision_language_model(),
        refused="Vision-language pairs",
    ),
    "sequential": Case(
        {"train_sampling_strategy": "sequential"}, refused="`train_sampling_strategy='sequential'` does not"
    ),
    "no-data-skip": Case({"ignore_data_skip": True}, refused="`ignore_data_skip=True` does not"),
}
COMPILED = pytest.param(
    Case(
        # One length of the batches is one graph to compile.
        {"torch_compile": True, "gradient_checkpointing": False, "max_steps": 4, "pad_to_multiple_of": 64},
        steps=4,
    ),
    id="compiled",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(
            not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler on CPUs"
        ),
    ],
)
every_case = pytest.mark.parametrize("case", [*(pytest.param(c, id=name) for name, c in CASES.items()), COMPILED])


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def history(trainer):
    """Logged metrics without those that measure time."""
    timed = ("runtime", "per_second")
    return [{k: v for k, v in log.items() if not k.endswith(timed)} for log in trainer.state.log_history]


def state(trainer):
    """What the trainer knows of its training, without the folder it is in."""
    best = trainer.state.best_model_checkpoint
    counted = ("global_step", "max_steps", "epoch", "best_metric", "total_flos", "num_input_tokens_seen")
    return {name: getattr(trainer.state, name) for name in counted} | {"best": best and Path(best).name}


def outcome(trainer, result):
    """All numbers of a training: those that are logged, and the weights of the policy and of its reference."""
    reference = {} if trainer.ref_model is None else weights(trainer.ref_model)
    return (result.training_loss, history(trainer), state(trainer), events(trainer)), weights(trainer.model), reference


def same(first, second):
    return first[0] == second[0] and equal(first[1], second[1]) and equal(first[2], second[2])


@every_case
def test_without_selection_it_is_dpo_trainer(tiny_dir, tmp_path, case):
    runs = []
    for cls, config_cls, options in ((DPOTrainer, DPOConfig, {}), (BPOTrainer, BPOConfig, {"depth_fraction": 1.0})):
        trainer = case.trainer(cls, config_cls, tiny_dir, tmp_path / cls.__name__, **options)
        before = weights(trainer.model)
        result = case.train(trainer)
        case.check(trainer)
        runs.append(outcome(trainer, result))
        assert len(history(trainer)) > 2 and not equal(runs[-1][1], before)
    # Numbers first, since they say more of a difference than weights do.
    assert runs[1][0] == runs[0][0] and same(runs[1], runs[0])


@pytest.mark.parametrize(
    "options",
    [{"seed": 7}, {"data_seed": 7}, {"neftune_noise_alpha": 5.0}, {"ld_alpha": 0.5}, {"learning_rate": 0.011}],
    ids=str,
)
def test_the_comparison_notices(tiny_dir, tmp_path, options):
    runs = []
    for name, changed in (("plain", {}), ("changed", options)):
        trainer = CASES["lora"].trainer(
            BPOTrainer, BPOConfig, tiny_dir, tmp_path / name, depth_fraction=1.0, max_steps=3, **changed
        )
        runs.append(outcome(trainer, trainer.train()))
    assert runs[0][0] != runs[1][0] and not equal(runs[0][1], runs[1][1])


def last_run(records):
    """Of records that begin with a step, those since the step was last set back."""
    starts = [i for i in range(1, len(records)) if records[i][0] < records[i - 1][0]]
    return records[starts[-1] if starts else 0 :]


@every_case
def test_with_selection_it_does_the_same_on_half_of_the_pairs(tiny_dir, tmp_path, case):
    if case.refused:
        with pytest.raises(ValueError, match=case.refused):
            case.trainer(BPOTrainer, BPOConfig, tiny_dir, tmp_path)
        return
    trainer = case.trainer(RecordingTrainer, BPOConfig, tiny_dir, tmp_path)
    before = weights(trainer.model)
    result = case.train(trainer)
    case.check(trainer)

    args, budget = trainer.args, round(0.5 * len(trainer.train_dataset))
    size, accumulation = trainer._train_batch_size, args.gradient_accumulation_steps
    per_epoch = budget // size if args.dataloader_drop_last else math.ceil(budget / size)
    per_epoch = math.ceil(per_epoch / accumulation)
    steps = per_epoch * 2 if case.steps is None else case.steps
    assert trainer.state.global_step == steps

    # A selection an epoch, and nothing but what it selected.
    selections, batches = last_run(trainer.selections), last_run(trainer.batches)
    assert [step for step, _ in selections] == list(range(0, steps, per_epoch))
    assert {step for step, _ in batches} == set(range(steps))
    for start, selected in selections:
        assert len(selected) == budget
        trained = [row for step, rows in batches for row in rows if start <= step < start + per_epoch]
        assert len(set(trained)) == len(trained) and set(trained) <= selected
        if start + per_epoch <= steps and not args.dataloader_drop_last:
            assert set(trained) == selected

    assert np.isfinite(result.training_loss) and np.isfinite(logged(trainer, "loss")).all()
    after = weights(trainer.model)
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == trainable
    assert len(trainer.curated_dataset) == budget


# What does not fit into the table


@pytest.mark.parametrize(
    ("options", "peft", "expected"),
    [
        ({"loss_type": "sigmoid"}, lora, set()),  # the reference cancels in the direction of the gradient
        ({"loss_type": "ipo"}, lora, {0}),
        ({"loss_type": "ipo"}, None, {0}),
        ({"loss_type": "ipo", "sync_ref_model": True, "ref_model_sync_steps": 2}, None, {0, 3}),
        ({"loss_type": "ipo", "precompute_ref_log_probs": True}, lora, {None}),
    ],
    ids=["cancels", "lora", "full", "synced", "precomputed"],
)
def test_selections_ask_the_reference_where_they_have_to(tiny_dir, tmp_path, options, peft, expected):
    case = Case(options, peft, mixin=CountsReferencePasses)
    trainer = case.trainer(RecordingTrainer, BPOConfig, tiny_dir, tmp_path)
    trainer.train()
    assert [step for step, _ in trainer.selections] == [0, 3]
    assert set(trainer.reference_passes) == expected


def test_features_of_dora_are_its_gradients(tiny_dir, tmp_path):
    trainer = CASES["dora"].trainer(BPOTrainer, BPOConfig, tiny_dir, tmp_path, normalize_gradients=False)
    modules = target_modules(trainer.model)
    trainer._projection = IdentityProjection(modules)
    # Once the magnitudes have moved as well.
    trainer.train()
    features = torch.from_numpy(trainer._pair_features()[:])
    factors = [module.weight for module in modules.values()]
    for row, feature in zip(trainer.train_dataset, features, strict=True):
        loss = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, factors)])
        assert relative_error(feature, gradient) < 5e-4


def test_data_seed_decides_on_the_order_of_what_was_selected(tiny_dir, tmp_path):
    runs = []
    for data_seed in (1, 2):
        case = Case({"data_seed": data_seed, "max_steps": 3})
        trainer = case.trainer(RecordingTrainer, BPOConfig, tiny_dir, tmp_path / str(data_seed))
        trainer.train()
        runs.append((trainer.selections, trainer.batches))
    assert runs[0][0] == runs[1][0] and runs[0][1] != runs[1][1]


def test_checkpoints_of_dpo_trainer_are_resumed(tiny_dir, tmp_path):
    case = Case({"save_strategy": "steps", "save_steps": 4})
    whole = {}
    for cls, config_cls, options in ((DPOTrainer, DPOConfig, {}), (BPOTrainer, BPOConfig, {"depth_fraction": 1.0})):
        trainer = case.trainer(cls, config_cls, tiny_dir, tmp_path / cls.__name__, **options)
        whole[cls] = outcome(trainer, trainer.train())
    assert same(whole[BPOTrainer], whole[DPOTrainer])
    runs = []
    for cls, config_cls, options, source in (
        (DPOTrainer, DPOConfig, {}, DPOTrainer),
        (BPOTrainer, BPOConfig, {"depth_fraction": 1.0}, DPOTrainer),
        (BPOTrainer, BPOConfig, {"depth_fraction": 1.0}, BPOTrainer),
        (DPOTrainer, DPOConfig, {}, BPOTrainer),
    ):
        trainer = case.trainer(cls, config_cls, tiny_dir, tmp_path / f"{len(runs)}", **options)
        checkpoint = tmp_path / source.__name__ / "checkpoint-4"
        runs.append(outcome(trainer, trainer.train(resume_from_checkpoint=str(checkpoint))))
    # A resumed run logs the mean loss of its own steps alone, so it is compared with other resumed ones.
    assert all(same(run, runs[0]) for run in runs)
    assert equal(runs[0][1], whole[DPOTrainer][1])


def test_the_last_checkpoint_is_found_with_selection(tiny_dir, tmp_path):
    case = Case({"save_strategy": "steps", "save_steps": 4})
    whole = case.trainer(RecordingTrainer, BPOConfig, tiny_dir, tmp_path)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = case.trainer(RecordingTrainer, BPOConfig, tiny_dir, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert [step for step, _ in resumed.batches] == [4, 5] and resumed.batches == whole.batches[4:]
    assert equal(weights(resumed.model), weights(whole.model))


def saved_files(folder):
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("peft", [lora, None], ids=["lora", "full"])
def test_files_are_those_of_dpo_trainer(tiny_dir, tmp_path, peft):
    case = Case({"max_steps": 4, "save_strategy": "steps", "save_steps": 2}, peft)
    files = {}
    for name, cls, config_cls, options in (
        ("dpo", DPOTrainer, DPOConfig, {}),
        ("without", BPOTrainer, BPOConfig, {"depth_fraction": 1.0}),
        ("with", BPOTrainer, BPOConfig, {}),
    ):
        trainer = case.trainer(cls, config_cls, tiny_dir, tmp_path / name, **options)
        trainer.train()
        trainer.save_model()
        files[name] = saved_files(tmp_path / name)
    assert files["without"].keys() == files["dpo"].keys()
    weight_files = [name for name in files["dpo"] if name.endswith(".safetensors")]
    assert len(weight_files) == 3  # of two checkpoints and of the end
    for name in weight_files:
        assert files["without"][name].read_bytes() == files["dpo"][name].read_bytes()
    further = files["with"].keys() - files["dpo"].keys()
    assert files["dpo"].keys() <= files["with"].keys()
    assert {name for name in further if not name.startswith("_")} == {
        f"checkpoint-{n}/bpo_selection.safetensors" for n in (2, 4)
    }


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_attributes_are_those_of_dpo_trainer(tiny_dir, tmp_path, fraction):
    plain = CASES["lora"].trainer(DPOTrainer, DPOConfig, tiny_dir, tmp_path)
    trainer = CASES["lora"].trainer(BPOTrainer, BPOConfig, tiny_dir, tmp_path, depth_fraction=fraction)
    assert vars(plain).keys() <= vars(trainer).keys()
    for name, value in vars(plain).items():
        assert type(getattr(trainer, name)) is type(value) or name == "args", name
        if isinstance(value, bool | int | float | str | list | None):
            assert getattr(trainer, name) == value or name == "callbacks", name
    for option in fields(DPOConfig):
        # The folder of the logs has the time in its name.
        if option.name != "logging_dir":
            assert getattr(trainer.args, option.name) == getattr(plain.args, option.name), option.name
    assert trainer.train_dataset[0].items() >= plain.train_dataset[0].items()


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_predictions_are_those_of_dpo_trainer(tiny_dir, tmp_path, fraction):
    predictions = []
    for cls, config_cls, options in (
        (DPOTrainer, DPOConfig, {}),
        (BPOTrainer, BPOConfig, {"depth_fraction": fraction}),
    ):
        trainer = Case().trainer(cls, config_cls, tiny_dir, tmp_path / cls.__name__, **options)
        dataset = trainer._prepare_dataset(pairs(3, 1, seed=5), trainer.processing_class, trainer.args, "test")
        predictions.append(trainer.predict(dataset))
    assert np.array_equal(predictions[0].predictions, predictions[1].predictions)
    assert np.array_equal(predictions[0].label_ids, predictions[1].label_ids)
    assert predictions[0].metrics["test_loss"] == predictions[1].metrics["test_loss"]
