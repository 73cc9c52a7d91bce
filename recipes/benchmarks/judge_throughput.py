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
#     "trl_bpo[openai]",
# ]
# ///

r"""
How fast [`OpenAIJudge`] gets its verdicts, what that takes of the CPU, and whether its memory grows.

The server is a process of its own, answers after a fixed latency, and turns away with 429 what is above `n` requests at a
time. Every measurement is a process of its own, too, which has imported everything and asked `n` requests before. The sides
take turns in `repeats` rounds, in the opposite order every other round; a ratio is the median of those of the rounds, with
the lowest and the highest in `spread`.

| side | what it is |
| --- | --- |
| `judge` | `OpenAIJudge` with a `cache_dir`, called with the columns of a dataset on disk |
| `bare` | `AsyncOpenAI` under a semaphore with `asyncio.gather`, with as many connections as requests at a time; it sends the very requests of the judge, built beforehand, and keeps nothing |
| `curator` | Bespoke Curator, which keeps the answers on disk as well; with `--peer_python`, a Python that has `bespokelabs-curator` |
| `loop` | one request after the other with `OpenAI`; a few requests, from which its rate is extrapolated |

- `of_ideal_8`, `of_ideal_64`, `of_ideal_256`: requests per second of the judge over `n / latency`, at `latency` seconds.
- `cpu_over_bare_client`: CPU time of the judge's process for a request over that of the bare client's, at 64 requests at a
  time and `short_latency`.
- `memory_growth`: peak of the private memory (`RssAnon`: what no file backs) of a process that judges the greater of
  `memory_requests` over that of one that judges the smaller, at 256 at a time. Nearly all of it is the imports, so
  `memory_bytes_per_request` is what there is more per request.

```bash
python recipes/benchmarks/judge_throughput.py
python recipes/benchmarks/judge_throughput.py --scale smoke --peer_python ../curator/bin/python
```
"""

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from datasets import Dataset, disable_progress_bars
from transformers import HfArgumentParser


WORKER = Path(__file__).with_name("judge_throughput_worker.py")
# Small enough for seconds; the figures mean nothing then.
SMOKE = {
    "latency": 0.4,
    "waves": 2,
    "cpu_requests": 256,
    "memory_requests": [100, 1000],
    "repeats": 1,
    "loop_requests": 2,
}
CPU_CONCURRENCY, MEMORY_CONCURRENCY = 64, 256


@dataclass
class BenchmarkArguments:
    scale: Literal["full", "smoke"] = field(
        default="full", metadata={"help": "`smoke` takes seconds and replaces the sizes below."}
    )
    latency: float = field(
        default=4.0, metadata={"help": "Seconds of an answer where requests per second are measured."}
    )
    short_latency: float = field(default=0.2, metadata={"help": "Seconds of an answer for CPU and memory."})
    concurrency: list[int] = field(default_factory=lambda: [8, 64, 256], metadata={"help": "Requests at a time, `n`."})
    waves: int = field(default=10, metadata={"help": "Requests per second are measured over `waves * n` requests."})
    cpu_requests: int = field(default=4000, metadata={"help": "Requests for the CPU time."})
    memory_requests: list[int] = field(
        default_factory=lambda: [1000, 100_000], metadata={"help": "Fewer and more requests for the memory."}
    )
    loop_requests: int = field(default=5, metadata={"help": "Requests of the loop."})
    repeats: int = field(default=3, metadata={"help": "Rounds."})
    peer_python: str | None = field(
        default=None,
        metadata={"help": "Python of an environment with `bespokelabs-curator`. If None, it is left out."},
    )


def make_dataset(path: Path, num_rows: int) -> None:
    """Texts of random words: prompts of 400 characters, responses of 600."""
    rng = random.Random(0)
    words = " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(20_000))

    def rows() -> Iterator[dict[str, str]]:
        for row in range(num_rows):
            prompt, completion = rng.randrange(len(words) - 400), rng.randrange(len(words) - 600)
            yield {
                "prompt": f"{row} {words[prompt : prompt + 400]}",
                "completion": words[completion : completion + 600],
            }

    Dataset.from_generator(rows, cache_dir=str(path / "cache")).save_to_disk(path)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    port_file = folder / "port"
    process = subprocess.Popen([sys.executable, str(WORKER), "serve", json.dumps({"port_file": str(port_file)})])
    try:
        while not port_file.exists():
            if process.poll() is not None:
                raise RuntimeError("The server has not started.")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        process.terminate()
        process.wait()


class Sides:
    """Runs the sides against the server, each time in a process of its own."""

    def __init__(self, server: str, folder: Path, peer_python: str | None) -> None:
        self.server, self.folder, self.peer_python = server, folder, peer_python
        self.runs = 0
        self.requests = folder / "requests.json"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.server}/{path}") as response:
            return json.load(response)

    def run(self, side: str, count: int, concurrency: int, latency: float, name: str = "run") -> dict:
        self.runs += 1
        name = f"{name}{self.runs}"
        job = {
            "base_url": f"{self.server}/{name}/{latency}/{concurrency}/v1",
            "warm_url": f"{self.server}/warm{self.runs}/0.05/{concurrency}/v1",
            "dataset": str(self.folder / "dataset"),
            "requests": str(self.requests),
            "folder": str(self.folder / name),
            "count": count,
            "concurrency": concurrency,
        }
        python = self.peer_python if side == "curator" else sys.executable
        # The server checks no keys, but the clients want one.
        environment = {**os.environ, "OPENAI_API_KEY": "anything"}
        with open(self.folder / f"{name}.out", "w+") as out, open(self.folder / f"{name}.err", "w+") as err:
            process = subprocess.Popen(
                [python, str(WORKER), side, json.dumps(job)], env=environment, stdout=out, stderr=err
            )
            while True:
                try:
                    process.wait(timeout=15)
                    break
                except subprocess.TimeoutExpired:
                    print(f"  {side}: {self.get(f'{name}/stats')['answered']} of {count} requests", flush=True)
            out.seek(0)
            err.seek(0)
            if process.returncode:
                raise RuntimeError(f"{side} has failed:\n{err.read()[-3000:]}")
            result = json.loads(out.read().splitlines()[-1])
        stats = self.get(f"{name}/stats")
        result |= {
            "side": side,
            "concurrency": concurrency,
            "of_ideal": count * latency / concurrency / result["seconds"],
            "cpu_ms_per_request": 1000 * result["cpu_seconds"] / count,
            "rejected": stats["rejected"],
            "max_in_flight": stats["max_in_flight"],
        }
        print(
            f"{side:<8}{count:>7} requests, {concurrency:>3} at a time, {latency} s each: {result['seconds']:6.1f} s, "
            f"{result['of_ideal']:.3f} of the ideal, {result['cpu_ms_per_request']:.2f} ms CPU a request, "
            f"{result['peak_mb']:.0f} MB, {result['rejected']} times 429",
            flush=True,
        )
        if side == "judge" and not name.startswith("record"):
            # Nothing was asked twice.
            assert stats["answered"] == count
        return result | {"name": name}

    def record(self, count: int) -> None:
        """Have the judge ask once, so that the other sides can send its requests."""
        name = self.run("judge", count, MEMORY_CONCURRENCY, 0.05, name="record")["name"]
        self.requests.write_text(json.dumps(self.get(f"{name}/requests")))


def summary(values: list[float]) -> dict[str, Any]:
    return {"median": round(median(values), 4), "spread": [round(min(values), 4), round(max(values), 4)]}


def main(args: BenchmarkArguments) -> None:
    if args.scale == "smoke":
        args = replace(args, **SMOKE)
    disable_progress_bars()
    names = ["judge", "bare", *(["curator"] if args.peer_python else [])]
    if args.peer_python is None:
        print("Without `--peer_python`, Bespoke Curator is left out.")
    result: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        throughput_requests = {n: args.waves * n for n in args.concurrency}
        recorded = max(*throughput_requests.values(), args.cpu_requests)
        make_dataset(folder / "dataset", max(*args.memory_requests, recorded))
        with serve(folder) as server:
            sides = Sides(server, folder, args.peer_python)
            sides.record(recorded)
            runs: dict[tuple[str, str], list[dict]] = {}
            for repeat in range(args.repeats):
                order = names if repeat % 2 == 0 else names[::-1]
                for n, count in throughput_requests.items():
                    for side in order:
                        runs.setdefault((f"of_ideal_{n}", side), []).append(sides.run(side, count, n, args.latency))
                for side in order:
                    run = sides.run(side, args.cpu_requests, CPU_CONCURRENCY, args.short_latency)
                    runs.setdefault(("cpu", side), []).append(run)
            loop = sides.run("loop", args.loop_requests, 1, args.latency)
            memory = [
                sides.run("judge", count, MEMORY_CONCURRENCY, args.short_latency) for count in args.memory_requests
            ]
    others: dict[str, Any] = {side: {} for side in names[1:]}
    for (figure, side), measured in runs.items():
        if figure == "cpu":
            if side == "bare":
                continue
            pairs = zip(measured, runs["cpu", "bare"], strict=True)
            figure, values = (
                "cpu_over_bare_client",
                [run["cpu_seconds"] / bare["cpu_seconds"] for run, bare in pairs],
            )
        else:
            values = [run["of_ideal"] for run in measured]
        if side == "judge":
            result[figure], spread[figure] = summary(values)["median"], summary(values)["spread"]
        else:
            others[side][figure] = summary(values)
    small, large = memory
    extra_mb = large["peak_mb"] - small["peak_mb"]
    extra_requests = large["requests"] - small["requests"]
    result |= {
        "memory_growth": round(large["peak_mb"] / small["peak_mb"], 4),
        "spread": spread,
        "memory_bytes_per_request": round(extra_mb * 2**20 / extra_requests),
        "memory": [
            {name: round(run[name], 1) for name in ("requests", "seconds", "base_mb", "peak_mb")} for run in memory
        ],
        "cpu_ms_per_request": {
            side: round(median(run["cpu_ms_per_request"] for run in runs["cpu", side]), 3) for side in names
        },
        "rejected": {
            side: sum(run["rejected"] for (_, name), measured in runs.items() for run in measured if name == side)
            for side in names
        },
        "others": {
            **others,
            "loop_extrapolated": {
                f"of_ideal_{n}": round(loop["requests"] / loop["seconds"] * args.latency / n, 4)
                for n in args.concurrency
            },
        },
        "arguments": asdict(args),
        "cpu": cpu_name(),
        "versions": versions(args.peer_python),
    }
    print(json.dumps(result))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def versions(peer_python: str | None) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("trl_bpo", "openai", "datasets")},
    }
    if peer_python is not None:
        code = "from importlib.metadata import version; print(version('bespokelabs-curator'))"
        found["bespokelabs-curator"] = subprocess.check_output([peer_python, "-c", code], text=True).strip()
    return found


if __name__ == "__main__":
    (benchmark_args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    main(benchmark_args)
