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

"""
What [`BPOTrainer`] costs beside [`~trl.DPOTrainer`]: a step while nothing is selected anew, and a selection.

**Steps.** Trainings on the very same rows in the same order, each in a process of its own, take turns after every
optimizer step. A step is timed from the end of the one before, so that drawing and collating the batch, callbacks and
logging are in it. That the trainings log the same losses and gradient norms is checked. What a trainer adds to the work of
the model does not grow with it, so `step_over_dpo` is measured where it weighs most and where many steps average out the
noise: one pair a step, and a model of two narrow layers and 1,024 tokens. `step_over_dpo_model` is that of the model itself, over few steps.

| method | trainer | trains on |
| --- | --- | --- |
| `bpo` | `BPOTrainer` | four fifths of a pool, selected before the first step; no selection after that |
| `dpo` | `DPOTrainer` | the selected pairs, in the order in which `bpo` draws them |
| `off` | `BPOTrainer` with `depth_fraction=1.0` | the same |
| `dpo_again` | `DPOTrainer` | the same; its ratio to `dpo` is that of the noise |

**Selection.** `select_pairs()` of a new trainer, so all that the first selection of a run takes: gradient pass, reference
where the loss needs it, store on disk, features of the pairs, K-means and metrics. It alternates with a plain forward and
backward of the sum of `log pi(y | x)` of each distinct response once, through the same model in batches of as many tokens
(the `floor` of `gradient_features.py`). Two pools:

| pool | pairs |
| --- | --- |
| `pairs` | one pair a prompt, whose responses the trainer may put behind one copy of the prompt |
| `k4` | 4 answers a prompt in all 6 pairs, so that a backward pass a response is cheaper |

`selection_over_floor` is the greater of both. Time is CPU-seconds of the process on a CPU and synchronised wall seconds on
a GPU. A ratio is the median of those of the single steps, or rounds. Without gradient checkpointing, which costs all steps
alike.

Without a dataset the texts are random words, in the shape of HH-RLHF harmless: prompts of about 125 tokens in the mean,
answers of 41 and 51.

```bash
python recipes/benchmarks/trainer_overhead.py
python recipes/benchmarks/trainer_overhead.py --dataset_name pairs.jsonl.gz
```
"""

import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from gradient_features import device_name, option, run_floor
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, TrlParser

from trl_bpo import BPOConfig, BPOTrainer, DepthSelector, pair_features, quickstart
from trl_bpo.formats import load_rows, prepare_dataset
from trl_bpo.pair_features import PairFeatures
from trl_bpo.responses import unique_responses


STEP_RATIOS = {"step_over_dpo": "bpo", "off_over_dpo": "off", "dpo_again_over_dpo": "dpo_again"}
METHODS = ["dpo", *STEP_RATIOS.values()]
POOLS = ("pairs", "k4")
# What the selection before the first step keeps. What a step costs does not depend on it.
FRACTION = 0.8
# Where the time of a selection goes. What is left is the tokens of the responses, the store and the features of the pairs.
PARTS = {
    "choice of path": (PairFeatures, "_choose_path"),
    "hashes of weights": (pair_features, "tensors_hash"),
    "gradient pass": (pair_features, "gradient_pass"),
    "reference pass": (pair_features, "reference_pass"),
    "clustering": (DepthSelector, "select"),
}


@dataclass
class BenchmarkArguments:
    model_name_or_path: str | None = option(None, "Model. If None, the quickstart's SmolLM2-135M-Instruct.")
    dataset_name: str | None = option(
        None, "Pairs in place of random words: a JSON, Parquet or CSV file, or a Hub id."
    )
    max_length: int = option(512, "Tokens to which the prompt and answer of a dataset are cut.")
    num_steps: int = option(400, "Steps with the small model, of one pair each.")
    num_model_steps: int = option(10, "Steps with the model.")
    num_pairs: int = option(16, "Number of pairs of the pools that are selected from, at least 4.")
    repeats: int = option(3, "Rounds of selections.")
    batch_tokens: int | None = option(None, "Tokens a batch, padding included. If None, 512 on a CPU, 16384 on a GPU.")
    lora_r: int = option(16, "Rank of the LoRA adapters, which are on all linear layers.")
    loss_type: str = option("sigmoid", "Loss. For most others than `sigmoid`, a selection takes a reference pass too.")
    floor_head: str = option(
        "completion",
        "LM head of the floor: `completion` (plain, on completion tokens; the faster on a CPU) or `fused` (of TRL, which "
        "on a GPU takes completion tokens alone). Try both on a GPU.",
        choices=["completion", "fused"],
    )
    device: str | None = option(None, "cpu or cuda. If None, cuda where there is one.")
    threads: int = option(1, "Threads of torch.")
    seed: int = option(0, "Seed of texts, adapters, order and sketch.")

    def __post_init__(self) -> None:
        if self.num_pairs < 4:
            raise ValueError(f"`num_pairs` must be at least 4, got {self.num_pairs}: so many warm up.")
        if min(self.num_steps, self.num_model_steps) < 2:
            raise ValueError("`num_steps` and `num_model_steps` must be at least 2: one step has no spread.")


def make_trainer(job: dict[str, Any], method: str, rows: list[dict[str, Any]], callbacks: list | None = None) -> Any:
    """A trainer as a user makes it: defaults of TRL, but for what would blur the comparison or slow down a CPU."""
    on_cpu = job["device"] == "cpu"
    options = {
        "output_dir": f"{job['folder']}/{method}-{time.monotonic_ns()}",
        "max_length": job["max_length"],
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "loss_type": [job["loss_type"]],
        "gradient_checkpointing": False,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        "model_init_kwargs": {"dtype": "float32" if on_cpu else "bfloat16"},
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job["seed"],
    }
    if method == "bpo":
        options |= {"depth_fraction": FRACTION, "reselect_every_epochs": 0}
        config = BPOConfig(**options, gradient_batch_tokens=job["batch_tokens"])
    elif method == "off":
        config = BPOConfig(**options, depth_fraction=1.0, train_sampling_strategy="sequential")
    else:
        config = DPOConfig(**options, train_sampling_strategy="sequential")
    # Adapters are drawn when the trainer is made, from the global random state.
    torch.manual_seed(job["seed"])
    return (DPOTrainer if method.startswith("dpo") else BPOTrainer)(
        job["model_name_or_path"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=job["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def make_clock(device: str) -> Callable[[], float]:
    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return time.process_time if device == "cpu" else wall


class Turns(TrainerCallback):
    """Waits for its turn after each step, and sends what the step took."""

    def __init__(self, send: Callable[[Any], None], clock: Callable[[], float]) -> None:
        self.send = send
        self.clock = clock
        self.trainer: Any = None

    def wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("The benchmark has ended.")
        self.start = self.clock()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            # A sampler that yields the selected pairs begins anew each time that it is asked.
            dataset = self.trainer.train_dataset
            self.send([dataset[row]["row"] for row in self.trainer._get_train_sampler()])
            self.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.send(self.clock() - self.start)
        self.wait()


def train(method: str, job: dict[str, Any], send: Callable[[Any], None]) -> None:
    turns = Turns(send, make_clock(job["device"]))
    rows = job["rows"]
    if method != "bpo":
        rows = [rows[row] for row in job["order"]]
    turns.trainer = trainer = make_trainer(job, method, rows, [turns])
    trainer.train()
    names = ("loss", "grad_norm", "num_tokens", "logps/chosen", "logps/rejected")
    send([[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry])


def clocked(owner: Any, name: str, part: str, clock: Callable[[], float], seen: dict[str, Any]) -> None:
    function = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        start = clock()
        result = function(*args, **kwargs)
        seen[part] = seen.get(part, 0.0) + clock() - start
        if part == "choice of path":
            seen["path"] = result
        return result

    setattr(owner, name, run)


def select(job: dict[str, Any], send: Callable[[Any], None]) -> None:
    clock, seen = make_clock(job["device"]), {}
    for part, (owner, name) in PARTS.items():
        clocked(owner, name, part, clock, seen)
    warm_up = ("warm-up", job["pools"]["pairs"][:4])
    rounds = [warm_up, *(pool for _ in range(job["repeats"]) for pool in job["pools"].items())]
    for number, (pool, rows) in enumerate(rounds):
        trainer = make_trainer(job, "bpo", rows)
        responses = unique_responses(trainer.train_dataset, job["max_length"])
        model = trainer.accelerator.unwrap_model(trainer.model)

        def floor(trainer: Any = trainer, model: Any = model, responses: Any = responses) -> None:
            model.eval()
            with trainer.accelerator.autocast():
                run_floor(model, responses, None, job | {"pad_token_id": trainer.processing_class.pad_token_id})
            model.zero_grad()
            model.train()

        seconds = {}
        runs = {"floor": floor, "selection": trainer.select_pairs}
        # Which one goes first changes from round to round.
        for name in sorted(runs, reverse=number // len(POOLS) % 2 == 1):
            seen.clear()
            gc.collect()
            start = clock()
            runs[name]()
            seconds[name] = clock() - start
            if name == "selection":
                parts = dict(seen)
        tokens = sum(map(len, responses.input_ids))
        sizes = {"pairs": len(responses.chosen), "responses": len(responses.input_ids), "tokens": tokens}
        if pool in POOLS:
            send({"pool": pool, **seconds, "path": parts.pop("path"), "parts": parts, **sizes})


def worker(method: str, job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    pipe = sys.stdout

    def send(message: Any) -> None:
        print(json.dumps(message), file=pipe, flush=True)

    # Trainers print as well.
    with redirect_stdout(sys.stderr):
        if method == "select":
            select(job, send)
        else:
            train(method, job, send)


class Worker:
    """A process that is this script again."""

    def __init__(self, method: str, job: dict[str, Any]) -> None:
        path = Path(job["folder"]) / f"{method}.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        settings = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job["threads"]))
        # glibc returns large blocks to the system until it has seen larger ones freed, as those of a selection. Without
        # this a step after one has fewer page faults, and the trainer that selects would look the faster.
        settings |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
        self.errors = path.with_suffix(".err")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", method, path],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
        )

    def receive(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"A worker failed:\n{self.errors.read_text()[-4000:]}")
        return json.loads(line)

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def random_rows(args: BenchmarkArguments, n: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(args.seed)
    texts = (row["prompt"][0]["content"] for row in quickstart.load_prompts("train"))
    words = sorted({word for text in texts for word in text.lower().split() if word.isalpha()})

    def text(mean: int) -> str:
        length = generator.integers(mean // 2, 3 * mean // 2 + 1)
        return " ".join(generator.choice(words, length))

    # A word takes 1.2 tokens or so.
    columns = {"prompt": 104, "chosen": 34, "rejected": 42}
    return [{name: f" {text(mean)}" for name, mean in columns.items()} for _ in range(n)]


def load_pairs(args: BenchmarkArguments, n: int) -> list[dict[str, Any]]:
    if args.dataset_name is None:
        return random_rows(args, n)
    dataset = prepare_dataset(load_rows(args.dataset_name), start_from="pairs").dataset
    if len(dataset) < n:
        raise ValueError(
            f"`{args.dataset_name}` has only {len(dataset)} pairs, and {n} are needed. Lower `num_steps`."
        )
    return dataset.select_columns(["prompt", "chosen", "rejected"]).select(range(n)).to_list()


def make_k4(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # The answers of two pairs behind the prompt of the first.
    fours = [
        (first["prompt"], [row[column] for row in (first, second) for column in ("chosen", "rejected")])
        for first, second in zip(pairs[::2], pairs[1::2], strict=False)
    ]
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, answers in fours
        for chosen, rejected in itertools.combinations(answers, 2)
    ]


def export_small_model(model_name_or_path: str, pairs: list[dict[str, Any]], path: str) -> str:
    # A small vocabulary too, or the head would be nearly all of a step.
    texts = [json.dumps(row, ensure_ascii=False) for row in pairs]
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path).train_new_from_iterator(texts, 1024)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def time_steps(
    job: dict[str, Any], model: str, pairs: list[dict[str, Any]], running: list[Worker]
) -> dict[str, list[float]]:
    rows = [{**row, "row": number} for number, row in enumerate(pairs)]
    job = job | {"model_name_or_path": model, "rows": rows}
    workers = {"bpo": Worker("bpo", job)}
    running += workers.values()
    order = workers["bpo"].receive()
    for method in METHODS:
        if method != "bpo":
            workers[method] = Worker(method, job | {"order": order})
            running.append(workers[method])
    for method in METHODS:
        if method != "bpo" and workers[method].receive() != order:
            raise RuntimeError(f"`{method}` does not train on the rows of `bpo`.")
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for step in range(len(order)):
        # Who goes first changes from step to step.
        first = step % len(METHODS)
        for method in METHODS[first:] + METHODS[:first]:
            workers[method].go()
            seconds[method].append(workers[method].receive())
    logs = {}
    for method, process in workers.items():
        process.go()
        logs[method] = np.array(process.receive())
    for method in METHODS:
        # On a GPU two runs of one training agree to rounding only.
        tolerance = 0.0 if job["device"] == "cpu" else 0.05
        if not np.allclose(logs[method], logs["dpo"], rtol=tolerance, atol=0.0):
            raise RuntimeError(f"`{method}` and `dpo` do not log the same:\n{logs[method]}\n{logs['dpo']}")
    # The first step starts without drawing its batch, and warms up.
    return {method: values[1:] for method, values in seconds.items()}


def time_selections(job: dict[str, Any], running: list[Worker]) -> dict[str, list[dict[str, Any]]]:
    process = Worker("select", job)
    running.append(process)
    results: dict[str, list[dict[str, Any]]] = {pool: [] for pool in POOLS}
    for _ in range(job["repeats"] * len(POOLS)):
        result = process.receive()
        pool = result["pool"]
        results[pool].append(result)
        print(
            f"round {len(results[pool])}/{job['repeats']} {pool}: selection {result['selection']:.2f} s, "
            f"floor {result['floor']:.2f} s",
            flush=True,
        )
    return results


def main(args: BenchmarkArguments) -> None:
    running: list[Worker] = []
    n_steps = {"small": args.num_steps, "model": args.num_model_steps}
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        # The first step is left out.
        n_pairs = {name: round((steps + 1) / FRACTION) for name, steps in n_steps.items()}
        pairs = load_pairs(args, max(args.num_pairs, *n_pairs.values()))
        pool = pairs[: args.num_pairs]
        job = asdict(args) | {"folder": folder, "pools": {"pairs": pool, "k4": make_k4(pool)}}
        job["device"] = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        job["batch_tokens"] = args.batch_tokens or (512 if job["device"] == "cpu" else 16384)
        job["model_name_or_path"] = args.model_name_or_path or quickstart.export_policy(f"{folder}/policy")
        try:
            models = {"small": export_small_model(job["model_name_or_path"], pairs, f"{folder}/small")}
            models["model"] = job["model_name_or_path"]
            for name, model in models.items():
                seconds[name] = time_steps(job, model, pairs[: n_pairs[name]], running)
                print(f"{len(seconds[name]['dpo'])} steps of each trainer, {name}: done", flush=True)
            selections = time_selections(job, running)
        finally:
            for process in running:
                # Before the folder goes, in which they write. One that failed leaves the others waiting.
                process.process.stdin.close()
                process.process.wait()

    report: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    device = device_name(job["device"])
    print(f"\n{device}, {args.threads} torch threads, {job['batch_tokens']} tokens a batch, LoRA r = {args.lora_r}")
    print(
        "\n| step over dpo | model | median of the steps | middle half | ms a step |\n| --- | --- | --- | --- | --- |"
    )
    for model, (name, method) in itertools.product(seconds, STEP_RATIOS.items()):
        ratios = [a / b for a, b in zip(seconds[model][method], seconds[model]["dpo"], strict=True)]
        name += "_model" if model == "model" else ""
        report[name], (low, _, high) = median(ratios), quantiles(ratios, n=4)
        spread[name] = low, high
        milliseconds = 1000 * median(seconds[model][method])
        print(f"| {method} | {model} | {report[name]:.4f} | {low:.4f} to {high:.4f} | {milliseconds:.1f} |")
    print(f"\n| selection over floor | median of {args.repeats} | least to greatest | s | floor s | features from |")
    print("| --- | --- | --- | --- | --- | --- |")
    for pool, results in selections.items():
        ratios = [result["selection"] / result["floor"] for result in results]
        name = f"selection_over_floor_{pool}"
        report[name], spread[name] = median(ratios), (min(ratios), max(ratios))
        times = " | ".join(f"{median(result[key] for result in results):.2f}" for key in ("selection", "floor"))
        print(
            f"| {pool} | {report[name]:.3f} | {min(ratios):.3f} to {max(ratios):.3f} | {times} | {results[0]['path']} |"
        )
    report["selection_over_floor"] = max(report[f"selection_over_floor_{pool}"] for pool in POOLS)
    shares: dict[str, dict[str, float]] = {pool: {} for pool in POOLS}
    for pool, results in selections.items():
        print(f"\n{pool}: {results[0]['pairs']} pairs of {results[0]['responses']} responses, ", end="")
        print(f"{results[0]['tokens']:,} tokens. Parts of the selection over the floor:")
        for part in PARTS:
            shares[pool][part] = median(result["parts"].get(part, 0.0) / result["floor"] for result in results)
        rest = (r["selection"] - sum(r["parts"].values()) for r in results)
        shares[pool]["rest"] = median(value / result["floor"] for value, result in zip(rest, results, strict=True))
        print(", ".join(f"{part} {share:.3f}" for part, share in shares[pool].items()))
    paths = {pool: results[0]["path"] for pool, results in selections.items()}
    step_seconds = {
        model: {method: median(values) for method, values in times.items()} for model, times in seconds.items()
    }
    extra = {"spread": spread, "parts": shares, "paths": paths, "step_seconds": step_seconds, "device": device}
    print(json.dumps({**report, **extra}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")))
    else:
        (benchmark_args,) = TrlParser(BenchmarkArguments).parse_args_and_config()
        main(benchmark_args)
