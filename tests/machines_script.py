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


"""What `test_two_machines.py` launches on each machine: breadth, collection, depth and training, and what they gave."""

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset
from pairs import config, pairs
from peft import LoraConfig

from trl_bpo import BPODataCollector, BPOTrainer, BreadthSelector, TransformersGenerator, breadth, feature_store


def longest(completions, **columns):
    """Judge: the longer a response, the better."""
    return [float(len(completion)) for completion in completions]


def slow_down(seconds):
    # So that a process can be killed at a known place.
    write = feature_store.FeatureStore.write

    def slow_write(store, rows, *args, **kwargs):
        write(store, rows, *args, **kwargs)
        store.flush()
        with open(store.folder.parents[1] / f"written-{os.environ.get('RANK', 0)}.log", "a") as file:
            file.write(f"{sorted(map(int, rows))}\n")
        time.sleep(seconds)

    feature_store.FeatureStore.write = slow_write


def main(model_dir, encoder, prompts_file, folder, seconds):
    torch.set_num_threads(1)
    (Path(folder) / f"pid-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    slow_down(float(seconds))
    # Several shards of few prompts.
    breadth._SHARD_ROWS = 16
    # As in a script that parses its arguments first. They set up the processes.
    args = config(folder, gradient_batch_tokens=100, max_steps=1)
    state = PartialState()
    machines = state.num_processes
    prompts = load_dataset("parquet", data_files=prompts_file, split="train")
    selection = BreadthSelector(0.5, encoder, n_clusters=4).select(prompts)
    collector = BPODataCollector(
        generator=TransformersGenerator(model_dir, batch_size=4, max_new_tokens=4, seed=0),
        judge=longest,
        num_responses=2,
    )
    collected = collector.score(collector.generate(selection.kept))
    trainer = BPOTrainer(
        model_dir,
        args=args,
        train_dataset=pairs(12, 3),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    # One selection, before the first step.
    trainer.train()
    depth = trainer.selection
    result = {
        "machines": machines,
        "breadth": {
            name: selection.dataset[name][:] for name in ("prompt_id", "breadth_distance", "breadth_selected")
        },
        "by_prompt": selection.by_prompt.to_pydict(),
        "collected": collected.to_dict(),
        "depth": {"selected": depth.selected.tolist(), "distances": depth.distances.tolist()},
        "curated": trainer.curated_dataset["pair_id"][:],
    }
    (Path(folder) / f"result-{state.process_index}.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
