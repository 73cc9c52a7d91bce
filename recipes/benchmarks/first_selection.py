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
# requires-python = ">=3.11"
# dependencies = [
#     "trl_bpo[quickstart]",
# ]
# ///

r"""
What steps before the first selection change: the share of LoRA's A in the gradients, and what is selected.

A fresh adapter has `B = 0`. Then the gradient of A vanishes, and the features are those of B alone. This trains on a
random subset, as `first_selection_step` does, and selects from all pairs before each of the steps in `at`.

```bash
python recipes/benchmarks/first_selection.py \
    --dataset_name pairs.jsonl \
    --learning_rates 5e-6 1e-4 \
    --at 0 1 10 30 100
```

Per selection: `share_of_a`, the share of A in the squared gradients of the sum of the losses of 8 pairs;
`variance_explained` and that of the Gaussian; `jaccard_first` and `jaccard_previous`, the overlap of what is kept with the
selection at step 0 and with the one before. `jaccard_kmeans_seed` is the overlap of two seeds of K-means at one step,
`jaccard_chance` that of two random selections.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import ScriptArguments, TrlParser

from trl_bpo import BPOConfig, BPOTrainer, DepthSelector, quickstart
from trl_bpo.formats import drop_duplicate_pairs, load_rows, prepare_dataset
from trl_bpo.pair_features import remove_stores


FRACTION = 0.25
KMEANS_SEEDS = (42, 43, 44)


@dataclass
class FirstSelectionArguments(ScriptArguments):
    """Arguments of this script. `dataset_name` is a Hub id, a folder, or a JSON, Parquet or CSV file of pairs."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Policy. If None, the one of the quickstart."}
    )
    num_pairs: int = field(default=300, metadata={"help": "Pairs, the first ones."})
    pairs_per_step: int = field(default=8, metadata={"help": "Pairs an optimizer step."})
    max_length: int = field(default=256, metadata={"help": "Tokens to which prompt and answer are cut."})
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-6, 1e-4], metadata={"help": "Learning rates, constant after the first step."}
    )
    at: list[int] = field(default_factory=lambda: [0, 1, 10, 30, 100], metadata={"help": "Steps to select at."})


class SelectAlongTheWay(TrainerCallback):
    """Selects before some steps, and lets training go on as it would."""

    def __init__(self, trainer: BPOTrainer, at: list[int]) -> None:
        self.trainer, self.at, self.rows, self.kept = trainer, at, [], []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before each optimizer step."""
        if state.global_step not in self.at:
            return
        trainer = self.trainer
        features, pool = trainer._pair_features()[:], trainer._pool
        remove_stores(trainer._features_path, trainer.accelerator)
        seeds = [
            DepthSelector(FRACTION, seed=seed).select(features, pool.pair_ids, pool.prompt_ids)
            for seed in KMEANS_SEEDS
        ]
        first, kept = (self.kept or [seeds[0].selected])[0], seeds[0].selected
        others = [jaccard(seeds[i].selected, seeds[j].selected) for i, j in ((0, 1), (0, 2), (1, 2))]
        self.rows.append(
            {
                "learning_rate": args.learning_rate,
                "step": state.global_step,
                "share_of_a": share_of_a(trainer),
                "variance_explained": seeds[0].metrics["variance_explained"],
                "variance_explained_gaussian": seeds[0].metrics["variance_explained_gaussian"],
                "jaccard_first": jaccard(first, kept),
                "jaccard_previous": jaccard((self.kept or [kept])[-1], kept),
                "jaccard_kmeans_seed": float(np.mean(others)),
            }
        )
        self.kept.append(kept)
        trainer.accelerator.print(json.dumps(self.rows[-1]))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


def share_of_a(trainer: BPOTrainer) -> float:
    model = trainer.model
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(8)])
    metrics = {mode: dict(values) for mode, values in trainer._metrics.items()}
    loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
    trainer._metrics["train"].clear()
    trainer._metrics["train"].update(metrics["train"])
    squares = {"lora_A": 0.0, "lora_B": 0.0}
    for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        squares["lora_A" if "lora_A" in name else "lora_B"] += gradient.double().square().sum().item()
    return squares["lora_A"] / sum(squares.values())


def main(args: FirstSelectionArguments) -> None:
    if args.dataset_name is None:
        raise ValueError("`dataset_name` is required: preference pairs on the Hub, in a folder or in a file.")
    rows = load_rows(args.dataset_name, args.dataset_train_split, args.dataset_config)
    dataset = drop_duplicate_pairs(prepare_dataset(rows, start_from="pairs").dataset)
    dataset = dataset.select(range(min(args.num_pairs, len(dataset))))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model_name = args.model_name_or_path or str(quickstart.export_policy(Path(folder) / "policy"))
        for learning_rate in args.learning_rates:
            config = BPOConfig(
                str(Path(folder) / f"{learning_rate}"),
                depth_fraction=FRACTION,
                depth_strategy="random_once",
                reselect_every_epochs=0,
                max_length=args.max_length,
                max_steps=max(args.at) + 1,
                per_device_train_batch_size=args.pairs_per_step,
                gradient_checkpointing=False,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                model_init_kwargs={"dtype": "float32"},
                bf16=False,
                report_to="none",
                save_strategy="no",
                logging_steps=50,
            )
            lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = BPOTrainer(model_name, args=config, train_dataset=dataset, peft_config=lora)
            callback = SelectAlongTheWay(trainer, args.at)
            trainer.add_callback(callback)
            trainer.train()
            results += callback.rows
    print(json.dumps({"jaccard_chance": FRACTION / (2 - FRACTION), "pairs": len(dataset), "selections": results}))


if __name__ == "__main__":
    (script_args,) = TrlParser(FirstSelectionArguments).parse_args_and_config()
    main(script_args)
