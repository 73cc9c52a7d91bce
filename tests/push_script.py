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
Pushes to the Hub whose endpoint the environment names, as the tests of `test_push_run.py` ask for, and writes down what
came of it. Under several processes only the training is run.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import load_dataset
from huggingface_hub import DatasetCard, HfApi
from pairs import config, pairs
from peft import LoraConfig

from trl_bpo import BPOTrainer
from trl_bpo.hub import push_run
from trl_bpo.run_folder import RunFolder


class Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []
        logging.getLogger("trl_bpo").addHandler(self)

    def emit(self, record):
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


def train(model, folder, repo_id=None, **kwargs):
    trainer = BPOTrainer(
        model,
        args=config(folder, depth_fraction=0.5, curated_dataset_hub_id=repo_id, **{"num_train_epochs": 3, **kwargs}),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=2, lora_dropout=0.0),
    )
    trainer.train()
    return trainer


def read(repo_id, *args, **kwargs):
    return load_dataset(repo_id, *args, split="train", download_mode="force_redownload", **kwargs).to_dict()


def outcome(function):
    try:
        return {"url": function()}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "is_value_error": isinstance(error, ValueError)}


def round_trip(model, folder, log):
    trainer = train(
        model,
        folder / "run",
        "tester/kept",
        curated_dataset_hub_strategy="every_selection",
        curated_dataset_hub_private_repo=True,
        curated_dataset_push_pool=True,
        curated_dataset_license="cc-by-4.0",
    )
    run = RunFolder(folder / "run")
    steps = [one.step for one in run.selections]
    loaded = {name: read("tester/kept", name) for name in ["default", "pool", *(f"step-{step:06d}" for step in steps)]}
    card = DatasetCard.load("tester/kept")
    return {
        "steps": steps,
        "saved": {f"step-{one.step:06d}": pq.read_table(one.kept_file).to_pydict() for one in run.selections},
        "loaded": loaded,
        "by_default": read("tester/kept"),
        "selected": [bool(one) for one in trainer.selection.selected],
        "metadata": card.data.to_dict(),
        "text": card.text,
        "log": list(log.lines),
    }


def existing_card(folder):
    # Somebody's own configuration and text are there, and a step of an earlier run.
    api = HfApi()
    api.create_repo("tester/existing", repo_type="dataset")
    for path, content in {
        "README.md": (folder / "existing.md").read_bytes(),
        "mine/train.parquet": (folder / "mine.parquet").read_bytes(),
        "step-000777/train-00000-of-00001.parquet": (
            folder / "run/_selections/step-000000/train.parquet"
        ).read_bytes(),
        "data/train-00001-of-00002.parquet": b"stale",
        "notes.txt": b"keep me",
    }.items():
        api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="tester/existing", repo_type="dataset")
    push_run(folder / "run", "tester/existing")
    first = api.dataset_info("tester/existing")
    push_run(folder / "run", "tester/existing")
    return {
        "mine": read("tester/existing", "mine"),
        "default": read("tester/existing"),
        "card": DatasetCard.load("tester/existing").content,
        "files": api.list_repo_files("tester/existing", repo_type="dataset"),
        "files_first": [sibling.rfilename for sibling in first.siblings],
    }


def wrong_token(model, folder):
    started = time.perf_counter()
    trained = outcome(lambda: train(model, folder / "wrong", "tester/kept", hub_token="hf_wrong"))
    return {
        "train": trained,
        "selected": (folder / "wrong" / "_selections").exists(),
        "push": outcome(lambda: push_run(folder / "run", "tester/kept", token="hf_wrong")),
        "other": outcome(lambda: push_run(folder / "run", "other/kept")),
        "seconds": time.perf_counter() - started,
    }


def faults(folder, endpoints):
    # The server fails the requests of repositories of these names, once or until it is told to stop.
    results = {}
    for endpoint in endpoints:
        once = outcome(lambda endpoint=endpoint: push_run(folder / "run", f"tester/once-{endpoint}"))
        always = outcome(lambda endpoint=endpoint: push_run(folder / "run", f"tester/always-{endpoint}"))
        readable = read(f"tester/once-{endpoint}") if "url" in once else None
        results[endpoint] = {"once": once, "always": always, "readable": readable}
    return results


def main():
    model, folder, result, endpoints = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(",")
    log = Log()
    # Waiting between attempts proves nothing.
    time.sleep = lambda seconds: None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        trainer = train(model, folder / "two", "tester/two")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
        return
    content = {"round_trip": round_trip(model, folder, log)}
    content["existing"] = existing_card(folder)
    content["wrong_token"] = wrong_token(model, folder)
    content["faults"] = faults(folder, endpoints)
    log.lines.clear()
    trainer = train(model, folder / "down", "tester/always-commit")
    content["down"] = {
        "log": list(log.lines),
        "steps": trainer.state.global_step,
        "saved": (folder / "down" / "_curated_dataset" / "README.md").is_file(),
        "pushed_later": outcome(lambda: push_run(folder / "down", "tester/later")),
    }
    api = HfApi()
    api.create_repo("tester/mixed", repo_type="dataset")
    mixed = "---\nconfigs:\n- config_name: mine\n  data_files: mine.jsonl\n---\n"
    api.upload_file(
        path_or_fileobj=mixed.encode(), path_in_repo="README.md", repo_id="tester/mixed", repo_type="dataset"
    )
    content["mixed"] = outcome(lambda: push_run(folder / "run", "tester/mixed"))
    no_pool = outcome(lambda: push_run(folder / "down", "tester/later", pool=True))
    no_run = outcome(lambda: push_run(folder, "tester/later"))
    content["refused"] = {"no_pool": no_pool, "no_run": no_run}
    result.write_text(json.dumps(content, default=str))


if __name__ == "__main__":
    PartialState()
    main()
