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
A training that selects at the steps 0 and 3 and reports to the trackers named on the command line: these keep threads and
settings of the process. Writes down what trackio has kept, which hosts the process has asked for, and what was imported with
the package.
"""

import json
import socket
import sys
from pathlib import Path

import trl_bpo.tracking  # noqa: F401


# Before the trainer: TRL imports wandb itself.
IMPORTED = sorted({"matplotlib", "tensorboard", "torch.utils.tensorboard", "trackio", "wandb"} & set(sys.modules))


def main(model: str, folder: str, trackers: list[str]) -> None:
    import torch
    from pairs import config, pairs
    from peft import LoraConfig

    from trl_bpo import BPOTrainer

    torch.set_num_threads(1)
    asked = []
    look_up = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *args, **kwargs: asked.append(str(host)) or look_up(host, *args, **kwargs)
    trainer = BPOTrainer(
        model,
        args=config(
            folder, report_to=trackers, project="pictures", run_name="run", reselect_every_steps=3, max_steps=5
        ),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4),
    )
    trainer.train()
    kept = {"asked": asked, "imported": IMPORTED}
    if "trackio" in trackers:
        from trackio.sqlite_storage import SQLiteStorage

        kept["runs"] = SQLiteStorage.get_runs("pictures")
        kept["rows"] = SQLiteStorage.get_logs("pictures", "run")
    Path(folder, "kept.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
