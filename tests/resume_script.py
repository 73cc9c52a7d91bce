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
What `test_resume_property.py` trains, in its own process and in processes that are killed.

Each process that may be killed is forked from a server that has imported everything already, so that many can be
started.
"""

import gc
import json
import multiprocessing
import os
import signal
import time
import zipfile
from collections import Counter
from multiprocessing.connection import wait

from features_script import free_port
from pairs import config, pairs


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["trl_bpo", "peft", "matplotlib.figure", "matplotlib.backends.backend_agg"])

STRATEGIES = [
    "random",
    "random_once",
    "longest",
    "gradient_norm",
    "loss",
    "implicit_reward_margin_high",
    "equal_per_prompt",
]

# Where a training may be killed. Each moment is passed just before what it is named after, "after" just after it.
MOMENTS = {
    "batch": ["batch", "backward"],
    "step": ["optimizer", "after optimizer", "after step", "after epoch"],
    "selection": ["selection", "selection batch", "after selection"],
    "checkpoint": ["checkpoint", "weights", "optimizer state", "random state", "trainer state"],
    "checkpoint written": ["after trainer state", "after checkpoint"],
    "end": ["end", "curated dataset", "after end"],
}


def draw_case(rng, num_processes=1):
    """
    Draw the options of a training.

    `pool` are the arguments of `pairs`, `lora` says whether an adapter is trained and `dropout` how much there is of it;
    the others are those of `BPOConfig`. Left out is what a [`~trl.DPOTrainer`] does not resume exactly: `sync_ref_model`,
    since no checkpoint has the reference model, and dropout together with persistent workers or precomputed reference
    log-probabilities. To start the workers, or to compute those anew and not read them from the disk, takes a number
    from the random state.
    """
    while True:
        case = {
            "pool": {"prompts": rng.randint(3, 9), "per_prompt": rng.randint(1, 4), "seed": rng.randrange(1000)},
            "depth_fraction": rng.choice([0.3, 0.5, 0.75, 0.9]),
            "per_device_train_batch_size": rng.choice([1, 2, 2, 3, 3]),
            "gradient_accumulation_steps": rng.choice([1, 1, 2, 3]),
            "dataloader_drop_last": rng.random() < 0.25,
            "num_train_epochs": rng.choice([1, 2, 2, 3, 4]),
        }
        pairs_a_batch = case["per_device_train_batch_size"] * num_processes
        budget = round(case["depth_fraction"] * case["pool"]["prompts"] * case["pool"]["per_prompt"])
        batches = budget // pairs_a_batch if case["dataloader_drop_last"] else -(-budget // pairs_a_batch)
        steps_per_epoch = -(-batches // case["gradient_accumulation_steps"])
        steps = steps_per_epoch * case["num_train_epochs"]
        # Mostly epochs in which a selection finds room.
        if budget >= pairs_a_batch and 4 <= steps <= 12 and (steps_per_epoch > 2 or rng.random() < 0.2):
            break
    if rng.random() < 0.3:
        del case["num_train_epochs"]
        case["max_steps"] = steps = rng.randint(3, steps)
    if rng.random() < 0.7:
        # More often than not within an epoch.
        case["reselect_every_steps"] = rng.randint(1, rng.choice([max(1, steps_per_epoch - 1), min(7, steps - 1)]))
    else:
        case["reselect_every_epochs"] = rng.randint(0, 2)
    case |= {"save_strategy": "steps", "save_steps": rng.randint(1, 3)}
    if rng.random() < 0.2:
        case["save_strategy"] = "epoch"
    if rng.random() < 0.3:
        case["save_total_limit"] = rng.randint(1, 2)
    case |= {"seed": rng.randrange(1000), "data_seed": rng.choice([None, 7])}
    case |= {"loss_type": rng.choice(["sigmoid", "ipo"]), "lora": rng.random() < 0.7}
    case["dropout"] = rng.choice([0.0, 0.2])
    case["precompute_ref_log_probs"] = rng.random() < 0.5 and not case["dropout"]
    if rng.random() < 0.35:
        case |= {"dataloader_num_workers": 1, "dataloader_prefetch_factor": rng.randint(1, 3)}
        case["dataloader_persistent_workers"] = rng.random() < 0.5 and not case["dropout"]
    case["precondition_gradients"] = rng.random() < 0.25
    # A selection has several batches, in which it may be killed.
    case["gradient_batch_tokens"] = rng.choice([80, 200, 4096])
    if rng.random() < 0.3:
        case["first_selection_step"] = rng.randint(1, min(4, steps - 1))
    if rng.random() < 0.3:
        case["depth_strategy"] = rng.choice(STRATEGIES)
    return case


def make_trainer(trainer_class, model_dir, output_dir, case, pool_dir=None, **kwargs):
    from datasets import load_from_disk
    from peft import LoraConfig

    options = dict(case)
    pool, lora, dropout = options.pop("pool"), options.pop("lora"), options.pop("dropout")
    if not lora:
        options |= {"model_init_kwargs": {"attention_dropout": dropout}, "learning_rate": 1e-3}
    return trainer_class(
        model_dir,
        args=config(output_dir, disable_dropout=not dropout, **options),
        train_dataset=load_from_disk(pool_dir) if pool_dir else pairs(**pool),
        peft_config=LoraConfig(r=2, lora_dropout=dropout) if lora else None,
        **kwargs,
    )


def outcome(trainer):
    """What is there after a training, but for the weights, as JSON."""
    timed = ("num_tokens", "total_flos", "train_", "bpo/selection_time_share")
    logged = [
        {name: value for name, value in entry.items() if not name.startswith(timed)}
        for entry in trainer.state.log_history
    ]
    found = {"steps": trainer.state.global_step, "logged": logged}
    found |= {"metrics": trainer.selection.metrics, "curated": trainer.curated_dataset.to_dict()}
    return {name: json.dumps(value, sort_keys=True) for name, value in found.items()}


def weights(trainer):
    return {name: p.detach().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}


def last_checkpoint(output_dir, num_processes):
    """
    The last checkpoint that is complete.

    `Trainer` writes `trainer_state.json` last. The other processes write their random state, and nothing else, and the
    main process does not wait for them.
    """
    ranks = [""] if num_processes == 1 else [f"_{rank}" for rank in range(num_processes)]
    folders = sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        # The directory of a zip archive is at its end.
        if all(zipfile.is_zipfile(folder / f"rng_state{rank}.pth") for rank in ranks):
            return str(folder)
    return None


def train(model_dir, folder, process, kill_at):
    """
    Train in this process, from the last checkpoint where there is one, on what `folder / "case.json"` says.

    Each selection and each batch leaves a line in `trace-*.log`, with its rows, and each moment one in `moments-*.log`.
    `kill_at` is the process and the line of the latter at which this process kills itself.
    """
    import numpy as np
    import torch
    from recording import RecordingTrainer
    from transformers import TrainerCallback, TrainerState
    from transformers import trainer as trainer_module

    gc.freeze()
    # A group of its own, with the processes that load its data.
    os.setsid()
    # Otherwise those would come from a new server, which first imports everything.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    rank, num_processes, port = process
    output = os.open(folder / f"output-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if num_processes > 1:
        # As `torch.distributed.run` sets them.
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_processes), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_processes)}
    files = {
        name: os.open(folder / f"{name}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for name in ("trace", "moments")
    }
    passed = Counter()

    def note(name, *line):
        os.write(files[name], (json.dumps(line) + "\n").encode())

    def reach(name):
        step = trainer.state.global_step
        passed[name, step] += 1
        moment = (name, step, passed[name, step])
        note("moments", *moment)
        if kill_at == (rank, moment):
            os.killpg(0, signal.SIGKILL)

    def reaching(name):
        def callback(self, *args, **kwargs):
            reach(name)

        return callback

    class Reaching(TrainerCallback):
        on_pre_optimizer_step = reaching("optimizer")
        on_optimizer_step = reaching("after optimizer")
        on_step_end = reaching("after step")
        on_epoch_end = reaching("after epoch")
        on_train_end = reaching("end")

    class TracedTrainer(RecordingTrainer):
        selecting = False

        def select_pairs(self):
            reach("selection")
            self.selecting = True
            selection = super().select_pairs()
            self.selecting = False
            step, rows = self.selections[-1]
            note("trace", "selection", step, sorted(rows))
            reach("after selection")
            return selection

        def compute_loss(self, *args, **kwargs):
            reach("batch")
            loss = super().compute_loss(*args, **kwargs)
            note("trace", "batch", *self.batches[-1])
            reach("backward")
            return loss

        def _save_checkpoint(self, *args):
            reach("checkpoint")
            super()._save_checkpoint(*args)
            reach("after checkpoint")

        def save_model(self, *args, **kwargs):
            reach("weights")
            super().save_model(*args, **kwargs)

        def _save_optimizer_and_scheduler(self, *args):
            reach("optimizer state")
            super()._save_optimizer_and_scheduler(*args)

        def _save_rng_state(self, *args):
            reach("random state")
            super()._save_rng_state(*args)

        def curated_card_data(self):
            reach("curated dataset")
            return super().curated_card_data()

    class TracedState(TrainerState):
        def save_to_json(self, path):
            reach("trainer state")
            super().save_to_json(path)
            reach("after trainer state")

    trainer_module.TrainerState = TracedState
    case = json.loads((folder / "case.json").read_text())
    checkpoint = last_checkpoint(folder / "output", num_processes)
    note("trace", "start", int(checkpoint.rpartition("-")[2]) if checkpoint else 0)
    trainer = make_trainer(
        TracedTrainer, model_dir, folder / "output", case, pool_dir=folder / "pool", callbacks=[Reaching()]
    )
    trainer.model.register_forward_pre_hook(lambda *_: reach("selection batch") if trainer.selecting else None)
    trainer.train(resume_from_checkpoint=checkpoint)
    reach("after end")
    (folder / f"outcome-{rank}.json").write_text(json.dumps(outcome(trainer)))
    np.savez(folder / f"weights-{rank}.npz", **weights(trainer))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Training:
    """A training in a folder of its own, which may be killed and started again."""

    def __init__(self, model_dir, folder, case, num_processes):
        self.model_dir, self.folder, self.num_processes = model_dir, folder, num_processes
        self.folder.mkdir(parents=True)
        (self.folder / "case.json").write_text(json.dumps(case))
        # Several processes share what is precomputed for a dataset that is on the disk.
        pairs(**case["pool"]).save_to_disk(self.folder / "pool")

    def start(self, kill_at=None):
        port = free_port()
        processes = [
            _CONTEXT.Process(target=train, args=(self.model_dir, self.folder, (r, self.num_processes, port), kill_at))
            for r in range(self.num_processes)
        ]
        for process in processes:
            process.start()
        return processes

    def finish(self):
        """Run to the end."""
        processes, end = self.start(), time.monotonic() + 240
        waiting = {process.sentinel: process for process in processes}
        while waiting and time.monotonic() < end:
            for sentinel in wait(list(waiting), timeout=end - time.monotonic()):
                process = waiting.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    end = time.monotonic() + 10  # the others may wait for it forever
        self._end(processes)
        exit_codes = [process.exitcode for process in processes]
        if any(exit_codes):
            logs = [(self.folder / f"output-{rank}.log").read_text()[-3000:] for rank in range(self.num_processes)]
            raise AssertionError(f"exit codes {exit_codes}\n" + "\n".join(logs))
        return self

    def kill_itself(self, rank, moment, delay):
        """Have the process `rank` kill itself at a moment, and kill the others a little later."""
        processes = self.start((rank, tuple(moment)))
        processes[rank].join(240)
        time.sleep(delay)
        self._end(processes)
        return processes[rank].exitcode == -signal.SIGKILL

    def kill(self, n_more, delay):
        """Kill all processes from outside, a little after `n_more` lines of trace are there."""
        before = len(self.trace(0))
        processes, end = self.start(), time.monotonic() + 240
        while len(self.trace(0)) < before + n_more and time.monotonic() < end and processes[0].is_alive():
            time.sleep(0.001)
        time.sleep(delay)
        self._end(processes)
        return processes[0].exitcode == -signal.SIGKILL

    @staticmethod
    def _end(processes):
        for process in processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in processes:
            process.kill()
            process.join()

    def resumes_from(self):
        checkpoint = last_checkpoint(self.folder / "output", self.num_processes)
        return int(checkpoint.rpartition("-")[2]) if checkpoint else 0

    def trace(self, rank):
        return _lines(self.folder / f"trace-{rank}.log")

    def moments(self, rank):
        return _lines(self.folder / f"moments-{rank}.log")
