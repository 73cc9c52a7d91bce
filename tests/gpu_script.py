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


"""What `test_gpu.py` runs in each process: a training with selections, and what this process saw of it."""

import json
import os
import sys
from pathlib import Path


# The middle of an epoch, and its end, which comes after three steps.
RESELECT_EVERY_STEPS = 2

ZERO = {
    "zero_allow_untested_optimizer": True,
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
}


def shard(kind):
    """Options of the trainer for a kind of sharding. Accelerate reads that of FSDP from the environment."""
    if kind == "fsdp2":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        }
    if kind.startswith("zero"):
        # Without a threshold so small a model would not be sharded at all.
        zero = {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0}
        return {"deepspeed": {**ZERO, "zero_optimization": zero}}
    return {}


def main(kind, peft, model_dir, folder):
    options = shard(kind)

    import torch
    from pairs import config, pairs
    from peft import LoraConfig
    from recording import RecordingTrainer

    trainer = RecordingTrainer(
        model_dir,
        # With 100 tokens a batch there are nine batches of responses, so one of two processes has one more than the
        # other. With 9 pairs a budget the shares of an epoch are uneven as well.
        args=config(
            folder,
            gradient_batch_tokens=100,
            reselect_every_steps=RESELECT_EVERY_STEPS,
            learning_rate=1e-3,
            use_cpu=not torch.cuda.is_available(),
            # A process that waits for another one fails after this many seconds.
            ddp_timeout=120,
            **options,
        ),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if peft == "lora" else None,
    )
    distances = []
    select_pairs = trainer.select_pairs

    def noted():
        selection = select_pairs()
        distances.append(selection.distances.tolist())
        return selection

    trainer.select_pairs = noted
    trainer.train()
    accelerator = trainer.accelerator
    result = {
        "num_processes": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type),
        "steps": trainer.state.global_step,
        "selections": [(step, sorted(rows)) for step, rows in trainer.selections],
        "distances": distances,
        "batches": trainer.batches,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "curated": trainer.curated_dataset["pair_id"][:],
    }
    (folder / f"process-{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
