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


"""What `test_strategies.py` runs in each of two processes: a training by each strategy, and what this process saw of it."""

import sys
from pathlib import Path

import torch
from pairs import config, pairs
from peft import LoraConfig
from recording import RecordingTrainer
from torch import nn
from transformers import TrainerCallback


STRATEGIES = ("implicit_reward_margin_high", "random", "embedding", "gradient_norm", "gradient_random")


class Events(TrainerCallback):
    """Notes each selection that it is told of, and the batches that were trained on by then."""

    def __init__(self):
        self.trainer = None
        self.noted = []

    def on_selection(self, args, state, control, selection, pair_ids, **kwargs):
        self.noted.append((state.global_step, len(self.trainer.batches), selection, pair_ids.to_pylist()))


def make(model_dir, encoder, folder, strategy, **kwargs):
    events = Events()
    trainer = RecordingTrainer(
        model_dir,
        # With 9 pairs a budget, two processes wrap around at the end of an epoch, and selections cut epochs in two. With
        # 100 tokens a batch one process has more of them than the other.
        args=config(
            folder,
            depth_strategy=strategy,
            depth_encoder=encoder,
            gradient_batch_tokens=100,
            reselect_every_steps=2,
            learning_rate=5e-2,
            **{"max_steps": 5, **kwargs},
        ),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[events],
    )
    events.trainer = trainer
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return trainer


def run(trainer):
    trainer.train()
    events = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Events))
    measures = [
        (selection.distances if selection.scores is None else selection.scores).tolist()
        for _, _, selection, _ in events.noted
    ]
    return {
        "num_processes": trainer.accelerator.num_processes,
        "selections": trainer.selections,
        "measures": measures,
        "events": [(step, n_batches, pair_ids) for step, n_batches, _, pair_ids in events.noted],
        "weights": {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()},
    }


def main(model_dir, encoder, folder):
    torch.set_num_threads(1)
    trainers = {strategy: make(model_dir, encoder, folder / strategy, strategy) for strategy in STRATEGIES}
    results = {strategy: run(trainer) for strategy, trainer in trainers.items()}
    accelerator = trainers["random"].accelerator
    torch.save(results, folder / f"process-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
