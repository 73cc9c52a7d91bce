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
What `test_feature_resume.py` runs in processes that it kills: a selection, or a training with several of them.

Each process is forked from a server that has imported everything already, so that many can be started.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["trl_bpo", "peft"])


def compute(model_dir, folder, process):
    """
    Select or train in this process.

    `folder / "settings.json"` has the options of the trainer, and in addition `packed`, whether the responses of a pair
    share a row; `train`, whether to train, from the last checkpoint where there is one; and of the pool `prompts` and
    `per_prompt`. Where `shared` is false, each process has files of its own, as a machine has in a cluster. `sharded` is
    `"fsdp"` or `"zero3"` for a training with sharded weights, `lora` false for full fine-tuning.

    Each batch of features that is on the disk leaves a line in `written.log`: the step, and the rows.
    """
    import numpy as np
    import torch
    from pairs import config, pairs
    from peft import LoraConfig
    from torch import nn
    from transformers.trainer_utils import get_last_checkpoint

    torch.set_num_threads(1)
    rank, num_processes, port = process
    settings = json.loads((folder / "settings.json").read_text())
    packed, shared, lora = settings.pop("packed"), settings.pop("shared"), settings.pop("lora", True)
    sharded = settings.pop("sharded", None)
    pool = pairs(settings.pop("prompts"), settings.pop("per_prompt"))
    training = settings.pop("train", False)
    if num_processes > 1:
        # As `torch.distributed.run` sets them.
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_processes), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {
            "LOCAL_RANK": str(rank if shared else 0),
            "LOCAL_WORLD_SIZE": str(num_processes if shared else 1),
        }
    if sharded == "fsdp":
        shard_with_fsdp()
    if sharded == "zero3":
        settings |= shard_with_zero3(num_processes)

    from trl_bpo import BPOTrainer, feature_store, pair_features

    log = os.open(folder / "written.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    feature_store._FLUSH_SECONDS = -1.0
    pair_features._packing_pays = lambda *_: packed
    gradient_pass = pair_features.gradient_pass

    def noted_pass(*args, write, **kwargs):
        def noted(rows, *rest):
            write(rows, *rest)
            os.write(log, (json.dumps([trainer.state.global_step, rows]) + "\n").encode())

        gradient_pass(*args, write=noted, **kwargs)

    pair_features.gradient_pass = noted_pass
    output_dir = folder / "output" if shared else folder / f"output-{rank}"
    trainer = BPOTrainer(
        model_dir,
        args=config(output_dir, **settings),
        train_dataset=pool,
        peft_config=LoraConfig(r=2, lora_dropout=0.0) if lora else None,
    )
    if sharded == "zero3":
        know_the_processes(rank, num_processes)
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    compute_pair_features = trainer._pair_features

    def kept_features():
        features = compute_pair_features()
        assert (features is None) == (rank > 0)
        if features is not None:
            assert sharded is None or pair_features.runs_in_lockstep(trainer)
            step = trainer.state.global_step
            np.savez(folder / f"features-{step}.npz", features=features[:], **stored(trainer._features_path, step))
        return features

    trainer._pair_features = kept_features
    losses_and_margins = trainer._features.losses_and_margins

    def kept_scores(store):
        scores = losses_and_margins(store)
        assert sharded is None or pair_features.runs_in_lockstep(trainer)
        np.savez(folder / f"scores-{trainer.state.global_step}-{rank}.npz", losses=scores[0], margins=scores[1])
        return scores

    trainer._features.losses_and_margins = kept_scores
    if training:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output_dir)) if output_dir.exists() else None)
        result = {"steps": trainer.state.global_step}
        if sharded is None:
            result |= {name: p.detach().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}
    else:
        selection = trainer.select_pairs()
        result = {"selected": selection.selected, "distances": selection.distances}
    np.savez(folder / f"result-{rank}.npz", **result)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def shard_with_fsdp():
    """Have Accelerate shard the model with FSDP 2, for which it wants a GPU and PyTorch does not."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ |= {
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    }
    initialise = AcceleratorState.__init__

    def initialise_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialise_with_fsdp


def shard_with_zero3(num_processes):
    """Have DeepSpeed shard the model on the CPU, where Accelerate knows only one process."""
    from transformers import TrainingArguments

    os.environ["DS_ACCELERATOR"] = "cpu"
    del os.environ["ACCELERATE_USE_CPU"]
    TrainingArguments.world_size = property(lambda self: num_processes)
    options = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
    }
    return {"deepspeed": options, "use_cpu": False}


def know_the_processes(rank, num_processes):
    from accelerate.state import AcceleratorState, PartialState

    for state in (PartialState, AcceleratorState):
        state._shared_state |= {"num_processes": num_processes, "process_index": rank, "local_process_index": rank}


def stored(features_path, step):
    """Everything that is in the parts of a store, in the order of its rows."""
    import numpy as np

    from trl_bpo.feature_store import FeatureStore

    folder = features_path / f"step-{step:06d}"
    header = json.loads((folder / "part-00000.json").read_text())
    names = ("n_rows", "dim")
    kwargs = {name: header[name] for name in (*names, "scalars", "dtype")}
    # A part that no process writes, for reading only.
    store = FeatureStore(folder, header, **kwargs, part=99)
    done = np.flatnonzero(store.done)
    found = {"done": done, "stored": store.read(done), **{name: store.scalar(name) for name in store.scalars}}
    store.close()
    for path in folder.glob("part-00099.*"):
        path.unlink()
    return found


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Run:
    """A selection or a training in a folder of its own, which may be killed and started again."""

    def __init__(self, model_dir, folder, *, packed=False, shared=True, prompts=6, per_prompt=3, **settings):
        self.model_dir, self.folder = model_dir, Path(folder)
        self.folder.mkdir(parents=True)
        self.settings = {"packed": packed, "shared": shared, "prompts": prompts, "per_prompt": per_prompt, **settings}
        (self.folder / "settings.json").write_text(json.dumps(self.settings))
        self.n_killed = 0

    def start(self, num_processes=1):
        port = free_port()
        processes = [
            _CONTEXT.Process(target=compute, args=(self.model_dir, self.folder, (rank, num_processes, port)))
            for rank in range(num_processes)
        ]
        for process in processes:
            process.start()
        return processes

    def finish(self, num_processes=1):
        """Run to the end."""
        for process in self.start(num_processes):
            process.join(240)
            assert process.exitcode == 0, process.exitcode
        return self

    def kill(self, n_written, delay=0.0, num_processes=1):
        """Start, and kill all processes once `n_written` batches are there. Gives what was there then."""
        processes, end = self.start(num_processes), time.monotonic() + 240
        while len(self.written()) < n_written and time.monotonic() < end and all(p.is_alive() for p in processes):
            time.sleep(0.001)
        time.sleep(delay)
        alive = [process.is_alive() for process in processes]
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        assert all(alive), "it was over before it was killed"
        self.n_killed += num_processes
        return len(self.written())

    def kill_at_random(self, n_batches, kills, seed):
        """Kill it several times, each time within 20 ms of one of `n_batches` batches."""
        rng = random.Random(seed)
        before = 0
        for at in sorted(rng.sample(range(1, n_batches - 8), kills)):
            before = self.kill(max(at, before + 1), rng.random() * 0.02)
        return self

    def written(self):
        """The step and the rows of each batch of features that came to be on the disk."""
        path = self.folder / "written.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
