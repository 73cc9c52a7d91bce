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
The collections of test_kill_collection.py, each once without interruption and once killed over and over.

    python tests/collect_script.py --folder FOLDER --port PORT --kills 20

Importing takes seconds, so this process imports everything, and every attempt is a fork of it that is killed with
SIGKILL. At the end it prints a JSON object: what the attempts left behind.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from datasets import Dataset
from tiny import tiny_model_dir

from trl_bpo import BPODataCollector, OpenAIJudge, TransformersGenerator
from trl_bpo.openai_generator import OpenAIGenerator


CONCURRENCY = 8
NUM_RESPONSES = 4
NUM_PROMPTS = {"openai": 60, "transformers": 24}


def collect(kind: str, base_url: str, folder: Path) -> None:
    cache_dir = str(folder / "answers")
    api = {"base_url": base_url, "max_concurrency": CONCURRENCY, "cache_dir": cache_dir}
    if kind == "openai":
        generator = OpenAIGenerator("policy", max_new_tokens=32, **api)
    else:
        model = tiny_model_dir(folder / "model")
        generator = TransformersGenerator(model, max_new_tokens=8, batch_size=12, cache_dir=cache_dir)
    collector = BPODataCollector(
        generator, OpenAIJudge("judge", **api), num_responses=NUM_RESPONSES, allow_truncated_chosen=True
    )
    prompts = [
        [{"role": "user", "content": "What is " * (1 + row % 3) + f"{row}?"}] for row in range(NUM_PROMPTS[kind])
    ]
    rows = collector.collect(Dataset.from_dict({"prompt": prompts})).to_list()
    (folder / "rows.json").write_text(json.dumps(rows))


def start(kind: str, base_url: str, folder: Path) -> int:
    # A thread would not survive the fork, and what it has locked would stay locked.
    assert threading.active_count() == 1
    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        with open(folder / "stderr", "w") as stderr:
            os.dup2(stderr.fileno(), 2)
            collect(kind, base_url, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "answers").glob("answers-*.jsonl"))


def stored(folder: Path) -> list[str]:
    """The keys of all answers in the folder, read without the code that is tested."""
    lines = [line for path in (folder / "answers").glob("answers-*.jsonl") for line in path.read_bytes().split(b"\n")]
    keys = []
    for line in lines:
        try:
            keys.extend(json.loads(line)["keys"])
        except ValueError:
            continue
    return keys


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_through(kind: str, base_url: str, folder: Path) -> list[dict]:
    folder.mkdir()
    if (code := wait(start(kind, base_url, folder))) != 0:
        raise RuntimeError(f"The collection ended with {code}: {(folder / 'stderr').read_text()[-2000:]}")
    return json.loads((folder / "rows.json").read_text())


def run_with_kills(kind: str, base_url: str, folder: Path, size: int, kills: int, draw: random.Random) -> dict:
    folder.mkdir()
    attempts = []
    # The moments are spread over the whole collection, by how much of it is done.
    for moment in sorted(draw.uniform(0.0, 0.97 * size) for _ in range(kills)):
        attempt = {"start": time.time()}
        child = start(kind, base_url, folder)
        # One that is past the moment from the start is killed while it starts.
        while size_of(folder) < moment and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        attempts.append({**attempt, "exit": wait(child), "kill": time.time(), "stored": stored(folder)})
    attempt = {"start": time.time()}
    code = wait(start(kind, base_url, folder))
    attempts.append({**attempt, "exit": code, "kill": None, "stored": stored(folder)})
    rows = json.loads((folder / "rows.json").read_text()) if code == 0 else (folder / "stderr").read_text()[-2000:]
    return {"attempts": attempts, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kind", choices=sorted(NUM_PROMPTS), required=True)
    parser.add_argument("--kills", type=int, required=True)
    args = parser.parse_args()
    base_url = f"http://127.0.0.1:{args.port}/v1"
    whole = run_through(args.kind, base_url, args.folder / "whole")
    size = size_of(args.folder / "whole")
    killed = run_with_kills(args.kind, base_url, args.folder / "killed", size, args.kills, random.Random(0))
    json.dump({"whole": whole, "concurrency": CONCURRENCY, **killed}, sys.stdout)


if __name__ == "__main__":
    main()
