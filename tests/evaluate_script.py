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
The evaluation of test_evaluate_recipe.py, once without interruption and once killed over and over.

    python tests/evaluate_script.py --folder FOLDER --port PORT --kills 6

The models are those in `FOLDER/base` and `FOLDER/model`.

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


sys.path.append(str(Path(__file__).parent.parent / "recipes"))

import bpo  # noqa: F401  What the recipe imports late is there before the fork.
from evaluate import EvaluationArguments, main

import trl_bpo  # noqa: F401
from trl_bpo import mt_bench, openai_judge, reward_model_judge, win_rate_report  # noqa: F401


CONCURRENCY = 4
NUM_PROMPTS = 24
BENCHMARKS = ("ultrafeedback", "prompts")


def evaluate(base_url: str, folder: Path) -> None:
    main(
        EvaluationArguments(
            model_name_or_path=[str(folder.parent / "model")],
            base_model_name_or_path=str(folder.parent / "base"),
            benchmark=[f"{name}={folder.parent / name}.jsonl" for name in BENCHMARKS],
            output_dir=str(folder),
            max_new_tokens=8,
            generation_batch_size=4,
            judge_model="judge",
            judge_base_url=base_url,
            judge_concurrency=CONCURRENCY,
        )
    )


def start(base_url: str, folder: Path) -> int:
    # A thread would not survive the fork, and what it has locked would stay locked.
    assert threading.active_count() == 1
    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        with open(folder.parent / "stderr", "w") as stderr:
            os.dup2(stderr.fileno(), 2)
            os.dup2(stderr.fileno(), 1)
            evaluate(base_url, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def files(folder: Path) -> list[Path]:
    return list((folder / "_answers").rglob("answers-*.jsonl"))


def stored(folder: Path) -> dict[str, list[str]]:
    """The keys of all answers and of all verdicts, read without the code that is tested."""
    keys: dict[str, list[str]] = {"answers": [], "verdicts": []}
    for path in files(folder):
        kind = path.relative_to(folder / "_answers").parts[0]
        for line in path.read_bytes().split(b"\n"):
            try:
                keys[kind].extend(json.loads(line)["keys"])
            except ValueError:
                continue
    return keys


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kills", type=int, required=True)
    args = parser.parse_args()
    base_url = f"http://127.0.0.1:{args.port}/v1"
    for name in BENCHMARKS:
        rows = [{"prompt": "What is " * (1 + row % 3) + f"{row} of {name}?"} for row in range(NUM_PROMPTS)]
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    whole, killed = args.folder / "whole", args.folder / "killed"
    if (code := wait(start(base_url, whole))) != 0:
        raise RuntimeError(f"The evaluation ended with {code}: {(args.folder / 'stderr').read_text()[-2000:]}")
    size = sum(path.stat().st_size for path in files(whole))
    draw, begin, attempts = random.Random(0), time.time(), []
    # The moments are spread over the whole evaluation, by how much of it is done.
    for moment in sorted(draw.uniform(0.02 * size, 0.97 * size) for _ in range(args.kills)):
        child = start(base_url, killed)
        while (
            sum(path.stat().st_size for path in files(killed)) < moment
            and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        attempts.append({"exit": wait(child), "stored": stored(killed)})
    code = wait(start(base_url, killed))
    attempts.append({"exit": code, "stored": stored(killed)})
    results = [json.loads((folder / "results.json").read_text()) if code == 0 else None for folder in (whole, killed)]
    rows = [[path.read_text() for path in sorted((folder / "answers").glob("*"))] for folder in (whole, killed)]
    json.dump({"begin": begin, "attempts": attempts, "results": results, "rows": rows}, sys.stdout)


if __name__ == "__main__":
    run()
