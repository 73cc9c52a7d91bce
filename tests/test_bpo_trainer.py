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

import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from pairs import config, conversational, pairs
from peft import LoraConfig
from recording import RecordingTrainer
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_bpo import BPOConfig, BPOTrainer
from trl_bpo.prompts import pair_id, prompt_id


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather of a city"}}]


def make(tiny_dir, path, dataset=None, cls=BPOTrainer, peft=True, eval_dataset=None, **kwargs):
    return cls(
        tiny_dir,
        args=config(path, **kwargs),
        train_dataset=pairs() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if peft else None,
    )


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def history(trainer):
    """Logged metrics without those that measure time."""
    timed = ("runtime", "per_second", "time_share")
    return [{k: v for k, v in log.items() if not k.endswith(timed)} for log in trainer.state.log_history]


# Without selection


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"gradient_accumulation_steps": 2, "loss_type": "ipo", "dataset": "messages"}])
def test_without_selection_it_trains_bit_for_bit_like_dpo(tiny_dir, tmp_path, peft, kwargs):
    kwargs = dict(kwargs)
    dataset = conversational(pairs()) if kwargs.pop("dataset", None) else pairs()
    runs = []
    for cls, config_cls, extra in ((BPOTrainer, BPOConfig, {"depth_fraction": 1.0}), (DPOTrainer, DPOConfig, {})):
        trainer = cls(
            tiny_dir,
            args=config(tmp_path / cls.__name__, config_cls, **extra, **kwargs),
            train_dataset=dataset,
            peft_config=LoraConfig(r=4) if peft else None,
        )
        before = weights(trainer)
        result = trainer.train()
        assert not equal(weights(trainer), before)
        runs.append((result.training_loss, history(trainer), weights(trainer)))
    assert runs[0][:2] == runs[1][:2]
    assert equal(runs[0][2], runs[1][2])
    assert not list((tmp_path / "BPOTrainer").glob("_*"))


def test_without_selection_there_is_nothing_to_ask_for(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, depth_fraction=1.0)
    for ask in (trainer.select_pairs, lambda: trainer.curated_dataset):
        with pytest.raises(ValueError, match="`depth_fraction"):
            ask()


def test_without_selection_streaming_works(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, pairs().to_iterable_dataset(), depth_fraction=1.0, max_steps=2)
    assert trainer.train().global_step == 2


# Selection in training


def test_trains_on_selected_pairs_alone(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, cls=RecordingTrainer, depth_fraction=0.4)
    before = weights(trainer)
    trainer.train()
    # 7 of 18 pairs: four steps an epoch, the last with one pair; a selection at the start of each.
    assert trainer.state.global_step == 8 and [step for step, _ in trainer.selections] == [0, 4]
    assert [len(rows) for _, rows in trainer.batches] == [2, 2, 2, 1] * 2
    for (step, selected), end in zip(trainer.selections, (4, 8), strict=True):
        assert len(selected) == 7
        assert sorted(row for at, rows in trainer.batches for row in rows if step <= at < end) == sorted(selected)
    assert trainer.selections[0][1] != trainer.selections[1][1]
    changed = weights(trainer)
    assert all(not torch.equal(changed[name], before[name]) for name in before if "lora" in name)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"reselect_every_steps": 1}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
        ({"reselect_every_steps": 3}, [0, 3, 6, 9]),
        ({"reselect_every_steps": 5}, [0, 5, 10]),
        ({"reselect_every_steps": 100}, [0]),
        ({"reselect_every_epochs": 2}, [0, 8]),
        ({"reselect_every_epochs": 0}, [0]),
        ({"reselect_every_epochs": 0, "reselect_every_steps": 6}, [0, 6]),
    ],
)
def test_selects_anew_exactly_on_schedule(tiny_dir, tmp_path, accumulation, schedule, expected):
    trainer = make(
        tiny_dir,
        tmp_path,
        # 8 or 16 pairs a budget make four steps an epoch.
        pairs(8, 2 * accumulation),
        cls=RecordingTrainer,
        num_train_epochs=3,
        gradient_accumulation_steps=accumulation,
        **schedule,
    )
    trainer.train()
    assert trainer.state.global_step == 12
    assert [step for step, _ in trainer.selections] == expected
    assert {len(rows) for _, rows in trainer.selections} == {8 * accumulation}
    assert len(trainer.batches) == 12 * accumulation
    for step, rows in trainer.batches:
        assert len(rows) == 2 and set(rows) <= trainer.active(step)
    if len(expected) < 12:
        # Within a selection every pair is used equally often, up to one pass that was cut short.
        for start, end in zip(expected, [*expected[1:], 12], strict=True):
            counts = Counter(row for step, rows in trainer.batches for row in rows if start <= step < end)
            assert max(counts.values()) - min(counts[row] for row in trainer.active(start)) <= 1


def test_ragged_epochs_that_are_cut_by_a_selection(tiny_dir, tmp_path):
    # 9 pairs are five steps an epoch, the last with one pair.
    trainer = make(tiny_dir, tmp_path, cls=RecordingTrainer, num_train_epochs=3, reselect_every_steps=7)
    trainer.train()
    assert trainer.state.global_step == 15
    assert [step for step, _ in trainer.selections] == [0, 7, 14]
    assert [len(rows) for _, rows in trainer.batches] == [2, 2, 2, 2, 1] * 3
    for step, rows in trainer.batches:
        assert set(rows) <= trainer.active(step)


def test_steps_and_schedule_are_those_of_the_budget(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, depth_fraction=0.5, reselect_every_steps=2, num_train_epochs=2)
    trainer.train()
    twin = DPOTrainer(
        tiny_dir,
        args=config(tmp_path / "dpo", DPOConfig),
        train_dataset=pairs().select(range(9)),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    twin.train()
    assert trainer.state.max_steps == twin.state.max_steps == 10

    def column(trainer, name):
        return [log[name] for log in trainer.state.log_history if name in log]

    assert column(trainer, "learning_rate") == column(twin, "learning_rate")
    assert column(trainer, "epoch") == column(twin, "epoch")


def test_max_steps_and_dropped_last_batch(tiny_dir, tmp_path):
    trainer = make(
        tiny_dir, tmp_path, cls=RecordingTrainer, max_steps=7, dataloader_drop_last=True, reselect_every_epochs=1
    )
    trainer.train()
    assert [step for step, _ in trainer.selections] == [0, 4]
    assert [len(rows) for _, rows in trainer.batches] == [2] * 7


@pytest.mark.parametrize("workers", [0, 1])
def test_selections_are_seen_by_workers(tiny_dir, tmp_path, workers):
    trainer = make(
        tiny_dir,
        tmp_path,
        cls=RecordingTrainer,
        reselect_every_steps=2,
        max_steps=6,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )
    trainer.train()
    assert [step for step, _ in trainer.selections] == [0, 2, 4]
    for step, rows in trainer.batches:
        assert set(rows) <= trainer.active(step)


def test_the_seed_decides(tiny_dir, tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = make(tiny_dir, tmp_path / name, cls=RecordingTrainer, seed=seed)
        trainer.train()
        runs.append((trainer.batches, weights(trainer)))
    assert runs[0][0] == runs[1][0] and equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_training_twice_starts_anew(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, cls=RecordingTrainer, num_train_epochs=1)
    trainer.train()
    trainer.train()
    assert [step for step, _ in trainer.selections] == [0, 0]
    for step, rows in trainer.batches[5:]:
        assert set(rows) <= trainer.selections[1][1], step


# What a selection leaves behind


def test_metrics_are_logged(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, depth_clusters=3)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "bpo/active_pairs" in log]
    assert [log["step"] for log in logs] == [1, 6]  # the first step after each selection
    for log in logs:
        assert {name for name in log if name.startswith("bpo/")} - {"bpo/overlap"} == {
            *("bpo/active_pairs", "bpo/pairs_per_prompt_mean", "bpo/pairs_per_prompt_max", "bpo/prompts_without_pair"),
            *("bpo/zero_gradients", "bpo/not_finite", "bpo/n_clusters", "bpo/cluster_entropy"),
            *("bpo/variance_explained", "bpo/variance_explained_gaussian", "bpo/norm_kept_over_dropped"),
            *("bpo/unique_pairs", "bpo/selection_time_share"),
        }
        assert log["bpo/active_pairs"] == 9 and log["bpo/n_clusters"] == 3
    assert "bpo/overlap" not in logs[0] and 0 <= logs[1]["bpo/overlap"] <= 1


def test_each_selection_is_saved(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, cls=RecordingTrainer)
    trainer.train()
    folder = tmp_path / "_selections"
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == [
        *("index.json", "pool.parquet", "sample.safetensors", "step-000000.json", "step-000000.parquet"),
        *(f"step-000000/{name}" for name in ("card.json", "manifest.json", "train.parquet")),
        *("step-000005.json", "step-000005.parquet"),
        *(f"step-000005/{name}" for name in ("card.json", "manifest.json", "train.parquet")),
    ]
    for step, selected in trainer.selections:
        kept = load_dataset(str(folder / f"step-{step:06d}"), split="train", cache_dir=str(tmp_path / "cache"))
        assert kept.select_columns(pairs().column_names).to_list() == pairs().select(sorted(selected)).to_list()
        rows = Dataset.from_parquet(str(folder / f"step-{step:06d}.parquet"), cache_dir=str(tmp_path / "cache"))
        assert set(np.flatnonzero(rows["depth_selected"])) == selected
        assert rows["pair_id"] == trainer.train_dataset["pair_id"]
        metrics = json.loads((folder / f"step-{step:06d}.json").read_text())
        assert metrics["step"] == step and metrics["active_pairs"] == 9


@pytest.mark.parametrize("kind", ["standard", "conversational"])
def test_curated_dataset(tiny_dir, tmp_path, kind):
    source = pairs().add_column("source", [f"row {i}" for i in range(18)])
    source = conversational(source) if kind == "conversational" else source
    trainer = make(tiny_dir, tmp_path, source, cls=RecordingTrainer)
    with pytest.raises(ValueError, match="Nothing has been selected yet"):
        _ = trainer.curated_dataset
    trainer.train()
    rows = sorted(trainer.selections[-1][1])
    saved = load_dataset(str(tmp_path / "_curated_dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    for curated in (trainer.curated_dataset, saved):
        # The texts are those that came in: TRL's end-of-sequence token is not among them.
        assert curated.select_columns(source.column_names).to_list() == source.select(rows).to_list()
        assert all(curated["depth_selected"])
        assert set(curated.column_names) == {
            *source.column_names,
            *("prompt_id", "pair_id", "depth_cluster", "depth_distance", "depth_rank", "depth_selected"),
        }
        example = curated[0]
        assert example["prompt_id"] == prompt_id(source[rows[0]]["prompt"])
        assert example["pair_id"] == pair_id(*(source[rows[0]][column] for column in ("prompt", "chosen", "rejected")))
    assert (tmp_path / "_curated_dataset" / "README.md").is_file()


def test_curated_dataset_can_be_selected_from_again(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path / "first")
    trainer.train()
    again = make(tiny_dir, tmp_path / "again", trainer.curated_dataset)
    again.train()
    assert set(again.curated_dataset["pair_id"]) < set(trainer.curated_dataset["pair_id"])
    assert again.curated_dataset.column_names == trainer.curated_dataset.column_names


def test_nothing_of_the_data_is_pushed_with_the_model(tiny_dir, tmp_path):
    make(tiny_dir, tmp_path).train()
    # `Trainer.push_to_hub` leaves out what begins with an underscore.
    assert {entry.name for entry in tmp_path.iterdir() if not entry.name.startswith("_")} <= {"README.md"}


# Selection without training


def test_select_pairs_leaves_training_alone(tiny_dir, tmp_path):
    runs = []
    for calls in (0, 2):
        trainer = make(tiny_dir, tmp_path / str(calls), disable_dropout=False)
        selections = [trainer.select_pairs() for _ in range(calls)]
        if selections:
            assert np.array_equal(selections[0].selected, selections[1].selected)
            assert trainer.selection is selections[-1] and len(trainer.curated_dataset) == 9
        trainer.train()
        runs.append((history(trainer), weights(trainer)))
    assert runs[0][0] == runs[1][0] and equal(runs[0][1], runs[1][1])


def test_looking_at_a_batch_before_training(tiny_dir, tmp_path):
    # As everybody does who wants to know what the model will see.
    trainer = make(tiny_dir, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 4
    trainer.train()
    next(iter(trainer.get_train_dataloader()))
    assert len(trainer.curated_dataset) == 9


class SelectsOnTheWay(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        assert self.trainer.select_pairs() is not self.trainer.selection


def test_selecting_in_training_changes_nothing(tiny_dir, tmp_path):
    trainers = [make(tiny_dir, tmp_path / name, cls=RecordingTrainer, reselect_every_steps=3) for name in "ab"]
    trainers[1].add_callback(SelectsOnTheWay(trainers[1]))
    for trainer in trainers:
        trainer.train()
    assert trainers[1].batches == trainers[0].batches
    assert trainers[1].curated_dataset.to_dict() == trainers[0].curated_dataset.to_dict()


class LooksAtABatch(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        next(iter(self.trainer.get_train_dataloader()))


def test_looking_at_a_batch_in_training(tiny_dir, tmp_path):
    trainers = [make(tiny_dir, tmp_path / name, cls=RecordingTrainer, reselect_every_steps=3) for name in "ab"]
    trainers[1].add_callback(LooksAtABatch(trainers[1]))
    for trainer in trainers:
        trainer.train()
    assert trainers[1].batches == trainers[0].batches


class OutOfMemoryOnce(RecordingTrainer):
    out_of_memory_at = 3

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step == self.out_of_memory_at and self._train_batch_size == 4:
            raise RuntimeError("CUDA out of memory.")
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("schedule", [{"reselect_every_steps": 2}, {"reselect_every_epochs": 0}], ids=str)
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_training_that_starts_over_with_a_smaller_batch(tiny_dir, tmp_path, at, schedule):
    trainer = make(
        tiny_dir,
        tmp_path,
        cls=OutOfMemoryOnce,
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        **schedule,
    )
    trainer.out_of_memory_at = at
    trainer.train()
    size, every = trainer._train_batch_size, schedule.get("reselect_every_steps", 100)
    before, expected = range(0, at + 1, every), range(0, trainer.state.max_steps, every)
    assert size < 4 and [step for step, _ in trainer.selections] == [*before, *expected]
    again, selections = trainer.batches[at:], trainer.selections[len(before) :]
    for step, rows in again:
        assert set(rows) <= [selected for at, selected in selections if at <= step][-1]
    assert sum(len(rows) for _, rows in again) == 18
    for log in trainer.state.log_history:
        if "bpo/unique_pairs" in log:
            assert log["bpo/unique_pairs"] == len({row for step, rows in again if step < log["step"] for row in rows})


def test_a_resumed_training_that_starts_over_with_a_smaller_batch(tiny_dir, tmp_path):
    kwargs = {"per_device_train_batch_size": 4, "reselect_every_epochs": 0}
    make(tiny_dir, tmp_path, save_strategy="steps", save_steps=4, **kwargs).train()
    trainer = make(tiny_dir, tmp_path, cls=OutOfMemoryOnce, auto_find_batch_size=True, **kwargs)
    trainer.out_of_memory_at = 5
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    # Both times it goes on with the selection of the checkpoint.
    assert trainer.selections == [] and trainer._train_batch_size < 4
    kept = set(np.flatnonzero(trainer.selection.selected))
    assert trainer.batches and all(set(rows) <= kept for _, rows in trainer.batches)


def test_selection_does_not_depend_on_row_order(tiny_dir, tmp_path):
    order = np.random.default_rng(0).permutation(18)
    ids = []
    for name, dataset in (("a", pairs()), ("b", pairs().select(order))):
        trainer = make(tiny_dir, tmp_path / name, dataset)
        selected = np.flatnonzero(trainer.select_pairs().selected)
        ids.append({trainer.train_dataset[int(row)]["pair_id"] for row in selected})
    assert ids[0] == ids[1]


@pytest.mark.parametrize("kwargs", [{"gradient_checkpointing": False}, {"gradient_batch_tokens": 40}], ids=str)
def test_selection_does_not_depend_on(tiny_dir, tmp_path, kwargs):
    runs = []
    for name, options in (("a", {}), ("b", kwargs)):
        trainer = make(tiny_dir, tmp_path / name, cls=RecordingTrainer, **options)
        trainer.train()
        runs.append(trainer.selections)
    assert [step for step, _ in runs[0]] == [0, 5]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": True, "loss_type": "ipo", "peft": False},
        {"loss_type": "ipo"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1], "normalize_gradients": False},
        {"f_divergence_type": "js_divergence"},
        {"sync_ref_model": True, "ref_model_sync_steps": 2, "loss_type": "ipo", "peft": False},
        {"bf16": True},
        {"depth_scope": "overall", "projection_dim": 16, "depth_clusters": 2},
        {"gradient_dtype": "float16", "depth_feature": "chosen"},
        {"max_length": 24, "truncation_mode": "keep_start"},
    ],
    ids=str,
)
def test_trains_with(tiny_dir, tmp_path, kwargs):
    trainer = make(tiny_dir, tmp_path, cls=RecordingTrainer, **kwargs)
    before = weights(trainer)
    trainer.train()
    assert [step for step, _ in trainer.selections] == [0, 5]
    assert all(np.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    assert not equal(weights(trainer), before)


# The pool


def test_pairs_that_the_length_filter_drops_are_not_in_the_pool(tiny_dir, tmp_path):
    long = {"prompt": "sea " * 60, "chosen": " a", "rejected": " b"}
    dataset = Dataset.from_list([long, *pairs().to_list()[:9], long, *pairs().to_list()[9:]])
    trainer = make(tiny_dir, tmp_path, dataset, cls=RecordingTrainer, max_length=50)
    trainer.train()
    assert len(trainer.train_dataset) == 18 and len(trainer.selections[-1][1]) == 9
    kept = trainer.curated_dataset
    expected = trainer.train_dataset.select(sorted(trainer.selections[-1][1]))
    assert kept["pair_id"] == expected["pair_id"]
    assert kept["prompt"] == expected["prompt"] and long["prompt"] not in kept["prompt"]


def test_every_pair_filtered_out(tiny_dir, tmp_path):
    dataset = Dataset.from_list(
        [{"prompt": "sea " * 60, "chosen": " a", "rejected": " b", "chosen_truncated": True}] * 2
    )
    for rows in (dataset, dataset.remove_columns("chosen_truncated")):
        with pytest.raises(ValueError, match="every row was filtered out"):
            make(tiny_dir, tmp_path, rows, max_length=10)


def test_implicit_prompts(tiny_dir, tmp_path):
    explicit = pairs()
    implicit = explicit.map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )
    messages = conversational(explicit).map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )
    trainer = make(tiny_dir, tmp_path / "text", implicit)
    trainer.train()
    curated = trainer.curated_dataset
    assert {row["prompt"] + row["chosen"] for row in curated} <= set(implicit["chosen"])
    trainer = make(tiny_dir, tmp_path / "messages", messages)
    trainer.train()
    expected = {prompt_id(prompt) for prompt in conversational(explicit)["prompt"]}
    assert set(trainer.train_dataset["prompt_id"]) == expected and len(expected) == 6
    assert trainer.curated_dataset[0]["prompt"][-1]["role"] == "user"


def test_prompt_as_text_beside_answers_as_conversations(tiny_dir, tmp_path):
    # As in UltraFeedback: DPOTrainer cannot tokenise such rows by itself.
    rows = conversational(pairs()).to_list()
    dataset = Dataset.from_list(
        [
            {
                "prompt": r["prompt"][0]["content"],
                "chosen": r["prompt"] + r["chosen"],
                "rejected": r["prompt"] + r["rejected"],
            }
            for r in rows
        ]
    )
    trainer = make(tiny_dir, tmp_path, dataset)
    trainer.train()
    assert trainer.curated_dataset[0]["prompt"] in [row["prompt"] for row in rows]


@pytest.mark.parametrize("as_json", [True, False])
def test_tools_are_part_of_the_prompt(tiny_dir, tmp_path, as_json):
    rows = conversational(pairs(6, 2)).to_list()
    for index, row in enumerate(rows):
        # Each prompt once with tools and once without.
        row["tools"] = (json.dumps(TOOLS) if as_json else TOOLS) if index % 2 else None
    trainer = make(tiny_dir, tmp_path, Dataset.from_list(rows))
    assert len(set(trainer.train_dataset["prompt_id"])) == 12
    assert trainer.train_dataset["prompt_id"][1] == prompt_id(rows[1]["prompt"], TOOLS)
    lengths = [len(ids) for ids in trainer.train_dataset["prompt_ids"]]
    assert all(with_tools > without + 20 for without, with_tools in zip(lengths[::2], lengths[1::2], strict=True))
    trainer.train()
    assert len(trainer.curated_dataset) == 6


def test_ids_that_come_with_the_data_are_used(tiny_dir, tmp_path):
    dataset = (
        pairs()
        .add_column("prompt_id", [f"p{i // 3}" for i in range(18)])
        .add_column("pair_id", [f"x{i}" for i in range(18)])
    )
    trainer = make(tiny_dir, tmp_path, dataset)
    trainer.train()
    assert set(trainer.curated_dataset["pair_id"]) < {f"x{i}" for i in range(18)}
    assert len(set(trainer.train_dataset["prompt_id"])) == 6


def test_ids_that_are_numbers(tiny_dir, tmp_path):
    dataset = pairs().add_column("prompt_id", [i // 3 for i in range(18)]).add_column("pair_id", list(range(18)))
    trainer = make(tiny_dir, tmp_path, dataset, save_strategy="steps", save_steps=5)
    trainer.train()
    assert len(set(trainer.train_dataset["prompt_id"])) == 6 and len(set(trainer.train_dataset["pair_id"])) == 18


def test_floor_for_every_prompt(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, depth_fraction=0.4, min_pairs_per_prompt=1)
    trainer.train()
    curated = trainer.curated_dataset
    assert len(curated) == 7 and len(set(curated["prompt_id"])) == 6
    with pytest.raises(ValueError, match="`min_pairs_per_prompt=2` needs 12 pairs"):
        make(tiny_dir, tmp_path, depth_fraction=0.5, min_pairs_per_prompt=2)


def test_warns_when_most_prompts_stay_without_a_pair(tiny_dir, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_bpo"):
        make(tiny_dir, tmp_path, depth_fraction=0.1)
    assert "leaves most prompts without a pair" in caplog.text


def test_pairs_without_a_gradient_are_counted_and_left_out(tiny_dir, tmp_path):
    rows = pairs().to_list()
    for row in rows[:4]:
        row["rejected"] = row["chosen"]
    trainer = make(tiny_dir, tmp_path, Dataset.from_list(rows), cls=RecordingTrainer)
    trainer.train()
    for _, selected in trainer.selections:
        assert len(selected) == 9 and not selected & {0, 1, 2, 3}
    logged = [log["bpo/zero_gradients"] for log in trainer.state.log_history if "bpo/zero_gradients" in log]
    assert logged == [4, 4]


def test_fewer_gradients_than_the_budget(tiny_dir, tmp_path, caplog):
    rows = pairs().to_list()
    for row in rows[5:]:
        row["rejected"] = row["chosen"]
    trainer = make(tiny_dir, tmp_path, Dataset.from_list(rows), cls=RecordingTrainer, reselect_every_steps=3)
    trainer.train()
    assert "Only 5 pairs could be selected, fewer than the budget of 9" in caplog.text
    # An epoch is as long as the budget says, so the pairs that are left are used more than once.
    assert trainer.state.global_step == 10
    assert {row for _, rows in trainer.batches for row in rows} == {0, 1, 2, 3, 4}
    assert len(trainer.curated_dataset) == 5


# Truncated responses


@pytest.mark.parametrize("kind", ["standard", "conversational"])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_truncated_responses_get_no_end_of_turn(tiny_dir, tmp_path, kind, fraction):
    dataset = pairs(2, 2).add_column("chosen_truncated", [True, False, True, False])
    dataset = dataset.add_column("rejected_truncated", [False, False, True, None])
    dataset = conversational(dataset) if kind == "conversational" else dataset
    trainer = make(tiny_dir, tmp_path, dataset, eval_dataset=dataset, depth_fraction=fraction)
    plain = DPOTrainer(tiny_dir, args=config(tmp_path, DPOConfig), train_dataset=dataset)
    tokenizer = trainer._tokenizer
    end = tokenizer("<|im_end|>\n" if kind == "conversational" else "<|im_end|>")["input_ids"]
    for prepared in (trainer.train_dataset, trainer.eval_dataset):
        for row, expected in zip(prepared, plain.train_dataset, strict=True):
            for side in ("chosen", "rejected"):
                ids, whole = row[f"{side}_ids"], expected[f"{side}_ids"]
                assert whole[-len(end) :] == end
                assert ids == (whole[: -len(end)] if row[f"{side}_truncated"] else whole)
    trainer.train()


# Errors


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"train_sampling_strategy": "group_by_length"},
            "`train_sampling_strategy='group_by_length'` does not go with",
        ),
        ({"ignore_data_skip": True}, "`ignore_data_skip=True` does not go with selection"),
        ({"depth_feature": "difference"}, r"`depth_feature` must be one of \('pair', 'sum', 'chosen'\)"),
        ({"gradient_dtype": "int8"}, r"`gradient_dtype` must be one of \('float32', 'float16'\)"),
        ({"gradient_layers": [1, 2]}, r"`gradient_layers` names layer 2, .* are \[0, 1\]"),
        ({"depth_clusters": 19}, r"`depth_clusters=19` asks for more clusters than there are rows \(18\)"),
        ({"min_pairs_per_prompt": -1}, "`min_pairs_per_prompt` must not be negative"),
    ],
)
def test_options_that_do_not_go_with_selection(tiny_dir, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_dir, tmp_path, **kwargs)


@pytest.mark.parametrize(
    "kwargs", [{"use_weighting": True}, {"ld_alpha": 0.5}, {"train_sampling_strategy": "sequential"}]
)
def test_options_that_go_without_selection(tiny_dir, tmp_path, kwargs):
    assert make(tiny_dir, tmp_path, depth_fraction=1.0, max_steps=1, **kwargs).train().global_step == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(("depth_fraction", value, r"`depth_fraction` must be in \(0, 1\]") for value in (0.0, -1.0, 1.5)),
        ("depth_scope", "nearest", "`depth_scope` must be one of"),
        ("reselect_every_epochs", -1, "`reselect_every_epochs` must not be negative"),
        ("reselect_every_steps", 0, "`reselect_every_steps` must be at least 1"),
        ("depth_clusters", 0, "`depth_clusters` must be at least 1"),
        ("projection_dim", 0, "`projection_dim` must be at least 1"),
        ("gradient_batch_tokens", 0, "`gradient_batch_tokens` must be at least 1"),
    ],
)
def test_config_errors(tmp_path, option, value, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **{option: value})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (pairs().select([]), "`train_dataset` is empty"),
        (pairs().to_iterable_dataset(), "streaming dataset cannot be selected from"),
        (pairs().remove_columns("chosen"), r"no \['chosen'\] column"),
        (pairs().rename_column("rejected", "image"), r"no \['rejected'\] column"),
        (pairs().add_column("images", [None] * 18), "Vision-language pairs"),
    ],
)
def test_datasets_that_cannot_be_selected_from(tiny_dir, tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_dir, tmp_path, dataset)


def test_a_plain_dpo_config_is_refused(tiny_dir, tmp_path):
    with pytest.raises(TypeError, match="`args` must be a `BPOConfig`, got `DPOConfig`"):
        BPOTrainer(tiny_dir, args=config(tmp_path, DPOConfig), train_dataset=pairs())


def test_no_dataset(tiny_dir, tmp_path):
    with pytest.raises((ValueError, TypeError), match="train_dataset"):
        BPOTrainer(tiny_dir, args=config(tmp_path))


def test_nothing_trainable_to_select_by(tiny_dir, tmp_path):
    from peft import PromptTuningConfig, TaskType

    with pytest.raises(ValueError, match="no trainable `nn.Linear`"):
        BPOTrainer(
            tiny_dir,
            args=config(tmp_path),
            train_dataset=pairs(),
            peft_config=PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2),
        )


def test_broken_weights_stop_the_selection(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path)
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match="features of 18 of 18 pairs are not finite"):
        trainer.train()


# As a part of TRL


def test_evaluation(tiny_dir, tmp_path):
    trainer = make(
        tiny_dir,
        tmp_path,
        cls=RecordingTrainer,
        eval_dataset=pairs(3, 1, seed=5),
        eval_strategy="steps",
        eval_steps=2,
        reselect_every_steps=3,
    )
    trainer.train()
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluated] == [2, 4, 6, 8, 10]
    assert not any("bpo/" in name for log in evaluated for name in log)
    assert [step for step, _ in trainer.selections] == [0, 3, 6, 9]
    assert "eval_loss" in trainer.evaluate(pairs(2, 1, seed=6))


def test_model_card_and_tags(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "2411.10914" in card and "wang2025bpo" in card and "bpo" in trainer.model.model_tags


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the default precision of TRL needs an accelerator")
def test_default_arguments(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = BPOTrainer(tiny_dir, train_dataset=pairs())
    assert isinstance(trainer.args, BPOConfig)
    assert trainer.args.output_dir == f"{Path(tiny_dir).name}-BPO" and trainer.args.depth_fraction == 0.5


def test_arguments_by_position(tiny_dir, tmp_path):
    trainer = BPOTrainer(tiny_dir, None, config(tmp_path), None, pairs(), pairs(2, 1))
    assert len(trainer.train_dataset) == 18 and len(trainer.eval_dataset) == 2


def test_overridden_methods_have_the_signature_of_the_parent():
    # A method that the parent renamed or dropped would silently no longer be called.
    overridden = {
        *(
            "__init__",
            "train",
            "_prepare_dataset",
            "_get_train_sampler",
            "num_examples",
            "get_batch_samples",
            "_save_checkpoint",
        ),
        *("_load_optimizer_and_scheduler", "create_model_card"),
    }
    functions = {name: value for name, value in vars(BPOTrainer).items() if inspect.isfunction(value)}
    assert {name for name in functions if hasattr(DPOTrainer, name)} == overridden
    for name in overridden:
        own, parent = (inspect.signature(getattr(cls, name)).parameters for cls in (BPOTrainer, DPOTrainer))
        named = [key for key, value in own.items() if value.kind not in (value.VAR_POSITIONAL, value.VAR_KEYWORD)]
        if len(named) == len(own):
            assert named == list(parent), name
        else:  # the rest is handed on
            assert named == list(parent)[: len(named)], name
    # What it hands on goes by position or by name, whatever it is; only that there is nothing more is certain.
    assert list(inspect.signature(DPOTrainer.train).parameters) == [
        *("self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    ]
    told = inspect.getdoc(BPOTrainer).partition("and why:")[2].partition("Each selection is saved")[0]
    assert set(re.findall(r"`(\w+)`(?:, `(\w+)`)?:", told)) and overridden == {
        name for line in re.findall(r"^- (.*?):", told, flags=re.M) for name in re.findall(r"`(\w+)`", line)
    }


def test_what_is_relied_on_is_there(tiny_dir, tmp_path):
    # Attributes of the parents that have no signature to compare.
    trainer = make(tiny_dir, tmp_path, max_steps=1)
    trainer.train()
    for name in ("_metrics", "_tokenizer", "_train_batch_size", "beta", "use_weighting", "precompute_ref_logps"):
        assert hasattr(trainer, name), name
    assert trainer.callback_handler.train_dataloader.total_batch_size == 2


def test_the_published_script_of_trl_with_two_names_replaced(tiny_dir, tmp_path):
    source = (Path(find_spec("trl").origin).parent / "scripts" / "dpo.py").read_text()
    replaced = source.replace("DPOTrainer", "BPOTrainer").replace("DPOConfig", "BPOConfig")
    names = r"\b(BPOTrainer|BPOConfig), |, (BPOTrainer|BPOConfig)\b"
    replaced, count = re.subn(
        r"^( +)from trl import (.*)$", lambda m: import_from_both(m, names), replaced, flags=re.M
    )
    assert count == 2
    script = tmp_path / "bpo.py"
    script.write_text(replaced)
    for split, dataset in (("train", pairs()), ("test", pairs(2, 2, seed=1))):
        dataset.to_parquet(tmp_path / "data" / f"{split}.parquet")
    command = [
        *(sys.executable, str(script), "--dataset_name", str(tmp_path / "data"), "--model_name_or_path", tiny_dir),
        *("--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "False", "--report_to", "none"),
        *("--learning_rate", "1e-2", "--num_train_epochs", "2", "--per_device_train_batch_size", "2"),
        *("--eval_strategy", "epoch", "--use_peft", "--lora_r", "4", "--depth_fraction", "0.4"),
        *("--reselect_every_steps", "3", "--dtype", "float32"),
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "_selections", "_curated_dataset"} <= names
    assert len(list((tmp_path / "out" / "_selections").glob("step-*.json"))) == 3
    saved = load_dataset(str(tmp_path / "out" / "_curated_dataset"), cache_dir=str(tmp_path / "cache"))
    assert len(saved["train"]) == 7


def import_from_both(match, names):
    # `from trl import A, BPOTrainer` becomes an import of each from where it lives.
    indent, imported = match.groups()
    own = re.search(r"BPO\w+", imported)[0]
    return f"{indent}from trl import {re.sub(names, '', imported)}\n{indent}from trl_bpo import {own}"


def test_copies_and_empty_prompts_are_named(tiny_dir, tmp_path, caplog):
    rows = pairs().to_list()
    make(tiny_dir, tmp_path, dataset=Dataset.from_list(rows + rows[:2]))
    assert "2 of 20 pairs repeat an earlier one" in caplog.text
    without = [{"chosen": f"a {i}", "rejected": f"b {i}", "question": "?"} for i in range(6)]
    make(tiny_dir, tmp_path, dataset=Dataset.from_list(without))
    assert "6 of 6 pairs have an empty prompt" in caplog.text


def test_what_is_logged_is_of_one_selection_and_of_the_selected_pairs(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, reselect_every_steps=2, logging_steps=1000)
    trainer.train()
    assert trainer.num_examples(trainer.get_train_dataloader()) == 9
    assert trainer.num_examples(trainer.get_eval_dataloader(trainer.train_dataset)) == 18
    logged = trainer.state.log_history[-1]
    for name, value in trainer.selection.metrics.items():
        assert logged[f"bpo/{name}"] == value


def test_a_curated_dataset_that_cannot_be_saved_does_not_cost_the_model(tiny_dir, tmp_path, caplog):
    trainer = make(tiny_dir, tmp_path)
    # A file stands where the folder should be.
    (tmp_path / "_curated_dataset").write_text("")
    trainer.train()
    assert "could not be saved" in caplog.text and len(trainer.curated_dataset) == 9
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_judge_column_of_another_kind_is_left_alone(tiny_dir, tmp_path):
    dataset = pairs().map(lambda row: {"judge": {"name": "somebody"}})
    trainer = make(tiny_dir, tmp_path, dataset=dataset)
    trainer.select_pairs()
    assert trainer.curated_card_data().judge is None
