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

"""What `test_distributed.py` runs in each process: several trainings, and what this process saw of them."""

import sys
from pathlib import Path

import torch
from pairs import config, pairs
from peft import LoraConfig
from recording import RecordingTrainer

from trl_bpo import DepthSelector


class FailingSelector(DepthSelector):
    """Cannot cluster, on the one process that does."""

    def select(self, *args):
        raise ValueError("no clusters today")


def make(model_dir, folder, **kwargs):
    return RecordingTrainer(
        model_dir,
        # With 100 tokens a batch there are nine batches of responses, so one process has one more than the other. With
        # 9 pairs a budget, two processes wrap around at the end of an epoch, and selections cut epochs in two.
        args=config(folder, gradient_batch_tokens=100, reselect_every_steps=2, **kwargs),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def run(trainer, **kwargs):
    features = trainer._pair_features()
    features = None if features is None else features[:]
    result = {"num_processes": trainer.accelerator.num_processes, "features": features}
    try:
        trainer.train(**kwargs)
    except ValueError as error:
        return {**result, "error": str(error)}
    return {
        **result,
        "selections": trainer.selections,
        "batches": trainer.batches,
        "steps": trainer.state.global_step,
        "curated": trainer.curated_dataset.to_dict(),
        "weights": {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()},
    }


def main(model_dir, folder):
    torch.set_num_threads(1)
    trainers = {
        "sigmoid": (make(model_dir, folder / "sigmoid", save_strategy="steps", save_steps=1), {}),
        "ipo": (make(model_dir, folder / "ipo", loss_type="ipo", max_steps=1), {}),
        "resumed": (make(model_dir, folder / "resumed"), {"resume_from_checkpoint": str(folder / "sigmoid" / "checkpoint-5")}),
        # Each process takes one of the two pairs of a batch, and each third step ends an epoch within a selection.
        "split": (make(model_dir, folder / "split", accelerator_config={"split_batches": True}), {}),
        "failing": (make(model_dir, folder / "failing"), {}),
    }  # fmt: skip
    trainers["failing"][0]._selector = FailingSelector(0.5)
    results = {name: run(trainer, **kwargs) for name, (trainer, kwargs) in trainers.items()}
    accelerator = trainers["ipo"][0].accelerator
    torch.save(results, folder / f"process-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
