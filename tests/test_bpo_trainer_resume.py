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

import shutil

import pytest
import torch
from pairs import config, pairs
from peft import LoraConfig
from recording import RecordingTrainer
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_bpo import BPOConfig, BPOTrainer
from trl_bpo.selection_state import FILE_NAME as STATE
from trl_bpo.selection_state import load_header, load_selection_state


def run(tiny_dir, path, resume=None, dataset=None, dropout=False, **kwargs):
    """Train with a checkpoint after every step, anew or from a checkpoint."""
    trainer = RecordingTrainer(
        tiny_dir,
        args=config(
            path,
            **{
                "num_train_epochs": 3,
                "save_strategy": "steps",
                "save_steps": 1,
                "disable_dropout": not dropout,
                **kwargs,
            },
        ),
        train_dataset=pairs() if dataset is None else dataset,
        peft_config=LoraConfig(r=2, lora_dropout=0.2 if dropout else 0.0),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def compare(resumed, whole, step):
    assert resumed.batches == [(at, rows) for at, rows in whole.batches if at >= step]
    assert resumed.selections == [(at, rows) for at, rows in whole.selections if at >= step]
    assert resumed.state.global_step == whole.state.global_step
    for (name, value), expected in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(value, expected), name
    assert resumed.curated_dataset.to_dict() == whole.curated_dataset.to_dict()


# 9 pairs a budget are five steps an epoch, the last with one pair: selections fall into the middle of an epoch, on its
# last step and on its first.
@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({"reselect_every_steps": 3}, [1, 3, 4, 5, 10, 13]),
        ({"reselect_every_steps": 7, "gradient_accumulation_steps": 2}, [2, 4, 7, 8]),
        ({"reselect_every_steps": 4, "dropout": True}, [4, 5, 8, 11]),
        ({"reselect_every_epochs": 1}, [5, 7]),
        ({"reselect_every_epochs": 2, "dataloader_drop_last": True, "dropout": True}, [3, 4, 6]),
        ({"reselect_every_epochs": 0, "loss_type": "ipo"}, [2, 8]),
    ],
    ids=str,
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny_dir, tmp_path, kwargs, steps):
    whole = run(tiny_dir, tmp_path / "whole", **kwargs)
    for step in steps:
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        compare(run(tiny_dir, tmp_path / "resumed", checkpoint, save_strategy="no", **kwargs), whole, step)


def test_full_fine_tuning_with_precomputed_reference(tiny_dir, tmp_path):
    def train(path, resume=None, **kwargs):
        trainer = BPOTrainer(
            tiny_dir,
            args=config(path, loss_type="ipo", precompute_ref_log_probs=True, reselect_every_steps=3, **kwargs),
            train_dataset=pairs(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(tmp_path / "whole", save_strategy="steps", save_steps=4)
    resumed = train(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4"))
    for value, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_the_selection_of_a_checkpoint_is_restored_and_not_made_anew(tiny_dir, tmp_path):
    whole = run(tiny_dir, tmp_path / "whole", num_train_epochs=1)
    resumed = run(tiny_dir, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2", num_train_epochs=1)
    assert resumed.selections == []
    assert resumed.selection.metrics == whole.selection.metrics


def test_resuming_a_run_that_is_over(tiny_dir, tmp_path):
    whole = run(tiny_dir, tmp_path / "whole", num_train_epochs=1)
    resumed = run(tiny_dir, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-5", num_train_epochs=1)
    assert resumed.batches == []
    assert resumed.curated_dataset.to_dict() == whole.curated_dataset.to_dict()


def test_resuming_a_run_that_was_over_within_an_epoch(tiny_dir, tmp_path):
    # `Trainer` itself would train one step more, and at a boundary of the schedule select as well.
    kwargs = {"max_steps": 8, "reselect_every_steps": 4}
    whole = run(tiny_dir, tmp_path / "whole", **kwargs)
    resumed = run(tiny_dir, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-8", **kwargs)
    assert resumed.batches == resumed.selections == []
    compare(resumed, whole, 8)


def test_resuming_from_the_last_checkpoint(tiny_dir, tmp_path):
    whole = run(tiny_dir, tmp_path / "whole", reselect_every_steps=3, num_train_epochs=2)
    for step in range(7, 11):
        shutil.rmtree(tmp_path / "whole" / f"checkpoint-{step}")
    trainer = RecordingTrainer(
        tiny_dir,
        args=config(tmp_path / "whole", reselect_every_steps=3, num_train_epochs=2),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=2, lora_dropout=0.0),
    )
    trainer.train(resume_from_checkpoint=True)
    compare(trainer, whole, 6)


def test_other_pairs_are_refused(tiny_dir, tmp_path):
    run(tiny_dir, tmp_path / "whole", num_train_epochs=1)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for dataset in (pairs(seed=1), pairs().select(range(17)), pairs().select(range(17, -1, -1))):
        with pytest.raises(ValueError, match="made from other pairs than those of `train_dataset`"):
            run(tiny_dir, tmp_path / "resumed", checkpoint, dataset)


def test_another_budget_is_refused(tiny_dir, tmp_path):
    run(tiny_dir, tmp_path / "whole", num_train_epochs=1)
    with pytest.raises(ValueError, match="trained on 9 pairs, but `depth_fraction` now stands for 14"):
        run(tiny_dir, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2", depth_fraction=0.8)


@pytest.mark.parametrize(("option", "value"), [("seed", 7), ("data_seed", 3), ("depth_strategy", "longest")])
def test_another_order_is_refused(tiny_dir, tmp_path, option, value):
    run(tiny_dir, tmp_path / "whole", num_train_epochs=1)
    with pytest.raises(
        ValueError, match=rf"had `{option}=.*, this one has `{option}={value!r}`\. Resume with the value"
    ):
        run(tiny_dir, tmp_path / "resumed", tmp_path / "whole" / "checkpoint-2", **{option: value})


def test_batches_that_are_behind_are_not_collated_again(tiny_dir, tmp_path):
    kwargs = {"reselect_every_steps": 12, "first_selection_step": 1, "num_train_epochs": 3}
    whole = run(tiny_dir, tmp_path / "whole", dataset=pairs(8, 3), **kwargs)
    trainer = RecordingTrainer(
        tiny_dir, args=config(tmp_path / "resumed", **kwargs), train_dataset=pairs(8, 3), peft_config=LoraConfig(r=2)
    )
    collated, collate = [], trainer.data_collator
    trainer.data_collator = lambda examples: collated.append(len(examples)) or collate(examples)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    compare(trainer, whole, 5)
    # One is read ahead, and each selection within an epoch throws away what was.
    assert len(collated) <= len(trainer.batches) + 4


def test_a_checkpoint_of_a_run_without_selection(tiny_dir, tmp_path):
    whole = run(tiny_dir, tmp_path / "whole", num_train_epochs=2, save_steps=2)
    for step in (2, 4):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        (checkpoint / STATE).unlink()
        resumed = run(tiny_dir, tmp_path / f"resumed-{step}", checkpoint, num_train_epochs=2)
        assert resumed.state.global_step == whole.state.global_step == 10
        assert [at for at, _ in resumed.selections] == [step, 5]
        assert sum(len(rows) for at, rows in resumed.batches if at < 5) == 9 - 2 * step
        for at, rows in resumed.batches:
            assert set(rows) <= resumed.active(at)


def test_without_selection_nothing_is_saved(tiny_dir, tmp_path):
    trainer = BPOTrainer(
        tiny_dir,
        args=config(tmp_path, depth_fraction=1.0, save_strategy="steps", save_steps=4, max_steps=4),
        train_dataset=pairs(),
    )
    trainer.train()
    assert (tmp_path / "checkpoint-4").is_dir() and not (tmp_path / "checkpoint-4" / STATE).exists()


def test_the_state_is_small_and_says_what_it_is(tiny_dir, tmp_path):
    trainer = run(tiny_dir, tmp_path, num_train_epochs=1)
    selection, seen = load_selection_state(tmp_path / "checkpoint-5", 18)
    assert set(selection.selected.nonzero()[0]) == trainer.selections[0][1]
    assert set(seen.nonzero()[0]) == {row for _, rows in trainer.batches for row in rows}
    header = load_header(tmp_path / "checkpoint-5")
    assert header["selection_steps"] == [0] and header["budget"] == 9
    assert (tmp_path / "checkpoint-5" / STATE).stat().st_size < 2000


# Checkpoints of the other kind


def plain_run(tiny_dir, path, resume=None, cls=DPOTrainer, **kwargs):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, **kwargs}
    config_cls = DPOConfig if cls is DPOTrainer else BPOConfig
    trainer = cls(
        tiny_dir,
        args=config(path, config_cls, **options),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=2, lora_dropout=0.0),
    )
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def test_a_checkpoint_of_dpo_trainer(tiny_dir, tmp_path):
    plain_run(tiny_dir, tmp_path / "plain", max_steps=10)
    resumed = run(tiny_dir, tmp_path / "resumed", tmp_path / "plain" / "checkpoint-4", max_steps=10)
    assert [step for step, _ in resumed.selections] == [4, 5] and resumed.state.global_step == 10


@pytest.mark.parametrize("cls", [DPOTrainer, BPOTrainer])
def test_a_checkpoint_with_selection_goes_on_without(tiny_dir, tmp_path, cls):
    run(tiny_dir, tmp_path / "whole", max_steps=10, save_steps=2)
    options = {"depth_fraction": 1.0} if cls is BPOTrainer else {}
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert plain_run(tiny_dir, tmp_path / "plain", checkpoint, cls, max_steps=10, **options).state.global_step == 10


def test_checkpoints_of_the_other_kind_with_other_steps(tiny_dir, tmp_path):
    plain_run(tiny_dir, tmp_path / "plain")
    with pytest.raises(
        ValueError, match=r"without selection and took 18 steps, this one takes 10\. Set `max_steps=18`"
    ):
        run(tiny_dir, tmp_path / "resumed", tmp_path / "plain" / "checkpoint-4", num_train_epochs=2)
    run(tiny_dir, tmp_path / "whole", num_train_epochs=2, save_steps=2)
    with pytest.raises(ValueError, match=r"with selection and took 10 steps, this one takes 18\. Set `max_steps=10`"):
        checkpoint = tmp_path / "whole" / "checkpoint-4"
        plain_run(tiny_dir, tmp_path / "off", checkpoint, BPOTrainer, depth_fraction=1.0)


def test_training_longer_than_the_checkpoint(tiny_dir, tmp_path):
    run(tiny_dir, tmp_path / "whole", num_train_epochs=1)
    longer = run(tiny_dir, tmp_path / "longer", tmp_path / "whole" / "checkpoint-3", num_train_epochs=2)
    assert longer.state.global_step == 10 and [step for step, _ in longer.selections] == [5]


# Before the first selection


@pytest.mark.parametrize("schedule", [{}, {"reselect_every_steps": 3}])
def test_steps_before_the_first_selection(tiny_dir, tmp_path, schedule):
    whole = run(tiny_dir, tmp_path / "whole", first_selection_step=7, **schedule)
    expected = [7, 10, 13] if schedule else [7, 10]
    assert [step for step, _ in whole.selections] == expected and whole.state.global_step == 15
    # The random subset is as large as the budget, and an epoch is one pass over it.
    drawn = [row for step, rows in whole.batches if step < 5 for row in rows]
    assert len(drawn) == len(set(drawn)) == 9
    assert {row for step, rows in whole.batches if 5 <= step < 7 for row in rows} < set(drawn)
    for step, rows in whole.batches:
        assert step < 7 or set(rows) <= whole.active(step)
    for step in (3, 5, 6, 7, 8):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = run(
            tiny_dir, tmp_path / "resumed", checkpoint, first_selection_step=7, save_strategy="no", **schedule
        )
        compare(resumed, whole, step)


def test_random_pairs_are_not_those_of_the_steps_before(tiny_dir, tmp_path):
    options = {"first_selection_step": 5, "depth_strategy": "random", "num_train_epochs": 2}
    trainer = run(tiny_dir, tmp_path, **options)
    assert trainer.active(5) != {row for step, rows in trainer.batches if step < 5 for row in rows}


def test_training_that_ends_before_the_first_selection(tiny_dir, tmp_path, caplog):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = RecordingTrainer(
        tiny_dir, args=config(tmp_path, first_selection_step=7), train_dataset=pairs(), callbacks=[Stop()]
    )
    trainer.train()
    assert trainer.selections == [] and "Training ended before the first selection, at step 7" in caplog.text
    assert not (tmp_path / "_curated_dataset").exists()


def test_a_first_selection_that_is_never_reached(tiny_dir, tmp_path):
    with pytest.raises(ValueError, match=r"`first_selection_step=15` is not reached: training takes 15 steps"):
        run(tiny_dir, tmp_path, first_selection_step=15)


# What is counted


@pytest.mark.parametrize("drop_last", [False, True])
def test_unique_pairs_are_those_that_were_trained_on(tiny_dir, tmp_path, drop_last):
    kwargs = {"reselect_every_steps": 3, "gradient_accumulation_steps": 2, "dataloader_drop_last": drop_last}
    whole = run(tiny_dir, tmp_path / "whole", **kwargs)

    def check(trainer):
        for log in trainer.state.log_history:
            if "bpo/unique_pairs" in log:
                assert log["bpo/unique_pairs"] == len(
                    {row for step, rows in whole.batches if step < log["step"] for row in rows}
                )

    check(whole)
    for step in (2, 4):
        check(run(tiny_dir, tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{step}", **kwargs))
