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


"""What happens at a selection in training: who is told of it, and what becomes of pairs whose features are broken."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from pairs import config, pairs
from peft import LoraConfig
from recording import RecordingTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_bpo import BPOTrainer, DepthSelection


class Listener(TrainerCallback):
    """Notes the events that it is told of, in their order."""

    def __init__(self):
        self.noted, self.arguments, self.trainer = [], [], None

    def on_step_begin(self, args, state, control, **kwargs):
        self.noted.append(("begin", state.global_step))

    def on_selection(self, args, state, control, **kwargs):
        self.noted.append(("selection", state.global_step))
        self.arguments.append((args, state, control, kwargs))
        # The trainer stands where the selection has put it.
        assert self.trainer.selection is kwargs["selection"]


class Deaf(TrainerCallback):
    """Knows nothing of selections, as all callbacks of other libraries."""


def make(tiny_dir, path, callbacks, **kwargs):
    trainer = RecordingTrainer(
        tiny_dir,
        args=config(path, **{"depth_strategy": "random", **kwargs}),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4),
        callbacks=callbacks,
    )
    for callback in callbacks:
        if isinstance(callback, Listener):
            callback.trainer = trainer
    return trainer


def test_callbacks_are_told_of_each_selection(tiny_dir, tmp_path):
    listener = Listener()
    trainer = make(tiny_dir, tmp_path, [Deaf(), listener, Deaf], depth_strategy="gradient", reselect_every_steps=3)
    trainer.train()
    # Before the first batch of its step.
    expected = [("begin", step) for step in range(10)]
    for step in (9, 6, 3, 0):
        expected.insert(step, ("selection", step))
    assert listener.noted == expected
    for (args, state, control, kwargs), (step, rows) in zip(listener.arguments, trainer.selections, strict=True):
        assert args is trainer.args and state is trainer.state and control is trainer.control
        assert kwargs.keys() == {"selection", "pair_ids"}
        assert isinstance(kwargs["selection"], DepthSelection)
        assert set(np.flatnonzero(kwargs["selection"].selected).tolist()) == rows
        assert kwargs["pair_ids"].to_pylist() == [trainer.train_dataset["pair_id"][row] for row in sorted(rows)]
        # What the selection leaves in `output_dir` is there.
        saved = Dataset.from_parquet(
            str(tmp_path / f"_selections/step-{step:06d}/train.parquet"), cache_dir=str(tmp_path / "c")
        )
        assert saved["pair_id"][:] == kwargs["pair_ids"].to_pylist()


def test_a_callback_that_is_added_later(tiny_dir, tmp_path):
    listener = Listener()
    trainer = make(tiny_dir, tmp_path, [], first_selection_step=2, max_steps=3)
    listener.trainer = trainer
    trainer.add_callback(listener)
    # A selection without training is the caller's own.
    trainer.select_pairs()
    assert not listener.noted
    trainer.train()
    assert listener.noted == [("begin", 0), ("begin", 1), ("selection", 2), ("begin", 2)]


def test_no_event_without_selection(tiny_dir, tmp_path):
    listener = Listener()
    trainer = BPOTrainer(
        tiny_dir,
        args=config(tmp_path, depth_fraction=1.0, max_steps=1),
        train_dataset=pairs(),
        callbacks=[listener],
    )
    trainer.train()
    assert listener.noted == [("begin", 0)]


class Stopping(TrainerCallback):
    def on_selection(self, args, state, control, selection, **kwargs):
        control.should_training_stop = len(kwargs["pair_ids"]) == selection.metrics["active_pairs"]


def test_a_callback_may_stop_training(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, [Stopping()], first_selection_step=1)
    trainer.train()
    assert trainer.state.global_step <= 2


# Pairs whose features are not finite

BROKEN = 3
# Where prompts are long, both responses share a row. Beside long answers that would cost more than it saves.
LONG_PROMPT = "What about the wind and the sea and the capital of France? " * 3
LONG_ANSWER = " of the sea" * 14


@pytest.fixture(scope="module")
def broken_dir(tiny_dir, tmp_path_factory):
    """A model that cannot read two tokens, as if their embeddings had overflowed."""
    path = str(tmp_path_factory.mktemp("broken"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_dir), AutoTokenizer.from_pretrained(tiny_dir)
    for text, value in (("~", float("nan")), ("^", float("inf"))):
        (token,) = tokenizer(text)["input_ids"]
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = value
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def pool(kind, with_token):
    """Fifteen pairs, of which some have such a token in one of their responses."""
    rows = pairs(15, 1).to_list()
    for index, row in enumerate(rows):
        if kind == "packed pairs":
            row["prompt"] = LONG_PROMPT + row["prompt"]
        else:
            row |= {
                "prompt": f"{index}",
                "chosen": row["chosen"] + LONG_ANSWER,
                "rejected": row["rejected"] + LONG_ANSWER,
            }
    for row, token in with_token.items():
        rows[row]["chosen" if token == "~" else "rejected"] += f" {token} red"
    return Dataset.from_list(rows)


def broken_trainer(model_dir, path, kind, with_token, peft=True, **kwargs):
    return RecordingTrainer(
        model_dir,
        args=config(path, **kwargs),
        train_dataset=pool(kind, with_token),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if peft else None,
    )


def check_left_out(trainer, caplog, what="features"):
    trainer.train()
    assert trainer.state.global_step == len(trainer.batches) and len(trainer.selections) > 1
    for _, selected in trainer.selections:
        assert len(selected) == round(0.5 * 15) and BROKEN not in selected
    assert BROKEN not in {row for _, rows in trainer.batches for row in rows}
    name = trainer.train_dataset["pair_id"][BROKEN]
    warning = f"The {what} of 1 of 15 pairs are not finite: {name} (row {BROKEN}). They are left out"
    assert caplog.text.count(warning) == len(trainer.selections)
    logs = trainer.state.log_history
    assert [log["bpo/not_finite"] for log in logs if "bpo/not_finite" in log] == [1.0] * len(trainer.selections)
    assert all(np.isfinite(log["loss"]) for log in logs if "loss" in log)
    # But for the embeddings that were broken from the start, the model is whole.
    for name, parameter in trainer.model.named_parameters():
        n_broken = int((~torch.isfinite(parameter)).any(dim=-1).sum())
        assert n_broken == (2 if "embed_tokens" in name else 0), name
    saved = [json.loads(path.read_text()) for path in trainer._features_path.parent.glob("_selections/step-*.json")]
    assert [metrics["not_finite"] for metrics in saved] == [1.0] * len(trainer.selections)


@pytest.mark.parametrize(("peft", "token"), [(True, "~"), (True, "^"), (False, "~")], ids=["lora", "inf", "full"])
@pytest.mark.parametrize("kind", ["responses", "packed pairs"])
def test_one_broken_pair_is_left_out(broken_dir, tmp_path, caplog, kind, peft, token):
    trainer = broken_trainer(broken_dir, tmp_path, kind, {BROKEN: token}, peft)
    assert trainer._features._choose_path() == kind
    check_left_out(trainer, caplog)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"loss_type": "ipo", "normalize_gradients": False}, "features"),
        ({"ld_alpha": 0.5}, "features"),
        ({"depth_strategy": "gradient_norm"}, "scores"),
        ({"depth_strategy": "loss"}, "scores"),
        ({"depth_strategy": "implicit_reward_margin_low"}, "scores"),
        ({"gradient_dtype": "float16"}, "features"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_one_broken_pair_of_other_features_and_scores(broken_dir, tmp_path, caplog, options, what):
    check_left_out(broken_trainer(broken_dir, tmp_path, "responses", {BROKEN: "~"}, **options), caplog, what)


@pytest.mark.parametrize("strategy", ["gradient", "loss"])
@pytest.mark.parametrize("kind", ["responses", "packed pairs"])
def test_many_broken_pairs_stop_training(broken_dir, tmp_path, kind, strategy):
    what = "features" if strategy == "gradient" else "scores"
    trainer = broken_trainer(broken_dir, tmp_path, kind, {1: "~", BROKEN: "^", 8: "~"}, depth_strategy=strategy)
    with pytest.raises(
        ValueError, match=rf"The {what} of 3 of 15 pairs are not finite: .*\(row 8\)\. Look for an overflow"
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.batches
