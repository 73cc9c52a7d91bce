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
What gradient features of preference pairs cost, beside a plain training pass over the same tokens and beside other tools.

| method | data | what it does |
| --- | --- | --- |
| `floor` | pairs | plain batched forward and backward of the sum of `log pi(y | x)` into `param.grad`; no features |
| `ours` | pairs | [`~trl_bpo.gradients.response_gradients`] of each response once, then `g(y-) - g(y+)` of each pair |
| `packed` | pairs | [`~trl_bpo.gradients.pair_gradients`]: both answers of a pair behind one copy of the prompt |
| `per_pair_disjoint` | pairs | as LESS does: one `loss.backward()` a pair, `param.grad` read, sketched and zeroed |
| `ours_k4`, `per_pair` | k4 | `ours` and `per_pair_disjoint` where 4 answers a prompt make all 6 pairs |
| `bergson` | pairs | bergson's own collector, one row a response, projected to 16 x 16 a module, written to disk |

Every run is a process of its own; the methods alternate over the rounds. `per_pair*` take the DPO loss and our sketch, so
that only the way of computing differs, and, as a stock forward does, the logits of all positions (`--per_pair_head` has
the cheaper head). Time is CPU-seconds of the process on a CPU and synchronised wall seconds on a GPU, without loading and
after a warm-up on one pair. Ratios are of medians. That the methods compute the same features is checked.

Without a dataset the tokens are random, in the shape of HH-RLHF harmless: prompts of 125 tokens in the mean, answers of 41
and 51, drawn between half and one and a half times that with the mean kept. The answers of two pairs behind the prompt of
the first make the four of `k4`.

```bash
python recipes/benchmarks/gradient_features.py
python recipes/benchmarks/gradient_features.py --dataset_name pairs.jsonl.gz --bergson_python other/bin/python
```
"""

import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


# The interpreter of bergson need not have the product installed.
if sys.argv[1:3] != ["--worker", "bergson"]:
    from trl import TrlParser
    from trl.data_utils import common_prefix_length
    from trl.trainer.utils import add_fused_lm_head

    from trl_bpo import quickstart
    from trl_bpo.capture import target_modules
    from trl_bpo.formats import load_rows, prepare_dataset
    from trl_bpo.gradients import pair_gradients, response_gradients
    from trl_bpo.projection import SparseProjection
    from trl_bpo.responses import PairResponses, length_batches, pad_batch, unique_responses


METHODS = {
    "floor": "pairs",
    "ours": "pairs",
    "packed": "pairs",
    "per_pair_disjoint": "pairs",
    "ours_k4": "k4",
    "per_pair": "k4",
    "bergson": "pairs",
}
RATIOS = {
    "ours_over_floor": ("ours", "floor"),
    "packed_over_floor": ("packed", "floor"),
    "per_pair_over_ours": ("per_pair", "ours_k4"),
    "per_pair_over_ours_disjoint": ("per_pair_disjoint", "ours"),
    "bergson_over_ours": ("bergson", "ours"),
    "bergson_over_packed": ("bergson", "packed"),
}
# What must agree: the features of the pairs, or the sum of those of all responses.
CHECKS = [
    ("ours", "packed", "pairs"),
    ("ours", "per_pair_disjoint", "pairs"),
    ("ours_k4", "per_pair", "pairs"),
    ("ours", "floor", "total"),
]
BETA = 0.1


def option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class BenchmarkArguments:
    model_name_or_path: str | None = option(None, "Model. If None, the quickstart's SmolLM2-135M-Instruct.")
    dataset_name: str | None = option(
        None, "Pairs in place of random tokens: a JSON, Parquet or CSV file, or a Hub id."
    )
    max_length: int = option(512, "Tokens to which the prompt and answer of a dataset are cut.")
    num_pairs: int = option(32, "Number of pairs, at least 4.")
    repeats: int = option(3, "Rounds over all methods.")
    methods: list[str] | None = option(None, "Methods to run. If None, all.", choices=list(METHODS))
    batch_tokens: int | None = option(None, "Tokens a batch, padding included. If None, 512 on a CPU, 16384 on a GPU.")
    projection_dim: int = option(2048, "Dimension of our sketch.")
    lora_r: int = option(8, "Rank of the LoRA adapters, which are on all linear layers.")
    floor_head: str = option(
        "completion",
        "LM head of the floor: `completion` (plain, on completion tokens; the faster on a CPU) or `fused` (of TRL, which "
        "on a GPU takes completion tokens alone). Try both on a GPU.",
        choices=["completion", "fused"],
    )
    per_pair_head: str = option(
        "all",
        "LM head of the per-pair passes: on `all` tokens, as in a stock forward, or on `completion` tokens.",
        choices=["all", "completion"],
    )
    bergson_python: str = option(sys.executable, "Python interpreter in which bergson is installed.")
    device: str | None = option(None, "cpu or cuda. If None, cuda where there is one.")
    threads: int = option(1, "Threads of torch.")
    seed: int = option(0, "Seed of tokens, adapters and sketch.")

    def __post_init__(self) -> None:
        if self.num_pairs < 4:
            raise ValueError(f"`num_pairs` must be at least 4, got {self.num_pairs}: less makes no prompt of k4.")


def load_model(job: dict[str, Any], fused_head: bool) -> Any:
    dtype = torch.float32 if job["device"] == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(job["model_name_or_path"], dtype=dtype)
    if fused_head:
        add_fused_lm_head(model)
    config = LoraConfig(r=job["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(job["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # B starts at zero, which would make the gradients of A zero.
            if "lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.to(job["device"]).eval()


def log_probs(model: Any, batch: dict[str, torch.Tensor], head: str) -> torch.Tensor:
    """Log-probability of each completion token of a padded batch, and what zeros are where there is none."""
    batch = {key: value.to(model.device) for key, value in batch.items()}
    mask = batch.pop("completion_mask")[:, 1:].bool()
    labels = batch["input_ids"][:, 1:]
    if head == "fused":
        masked = F.pad(labels.masked_fill(~mask, -100), (1, 0), value=-100)
        return model(**batch, labels=masked, use_cache=False, fused_lm_head=True).log_probs
    if head == "all":
        logits = model(**batch, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return -losses.view(labels.shape) * mask
    lm = model.get_base_model()
    hidden = lm.base_model(**batch, use_cache=False).last_hidden_state[:, :-1][mask]
    losses = F.cross_entropy(lm.get_output_embeddings()(hidden).float(), labels[mask], reduction="none")
    return torch.zeros(mask.shape, device=model.device).masked_scatter(mask, -losses)


def sketch_gradients(model: Any, projection: Any) -> torch.Tensor:
    """Sketch of what is in `param.grad`, in the same buckets as the features."""
    sketch = torch.zeros(1, projection.dim, device=model.device)
    for name, module in target_modules(model).items():
        gradient = module.weight.grad.float()
        # The sketch takes a gradient by its factors. Those of a LoRA weight are itself and the identity of its rank.
        identity = torch.eye(min(gradient.shape), device=model.device)
        wide = len(gradient) <= gradient.shape[1]
        inputs, grad_outputs = (gradient, identity) if wide else (identity, gradient.T)
        sketch += projection.weight_gradient(name, inputs[None], grad_outputs[None])
    return sketch.cpu()


def run_floor(model: Any, responses: Any, projection: Any, job: dict[str, Any]) -> dict[str, torch.Tensor]:
    for batch in length_batches(responses.input_ids, job["batch_tokens"]):
        inputs = pad_batch(responses, batch, job["pad_token_id"])
        log_probs(model, inputs, job["floor_head"]).sum().backward()
    return {}


def run_ours(model: Any, responses: Any, projection: Any, job: dict[str, Any]) -> dict[str, torch.Tensor]:
    options = {key: job[key] for key in ("pad_token_id", "batch_tokens")}
    features, _ = response_gradients(model, responses, projection, disable_tqdm=True, **options)
    return {"pairs": features[responses.rejected] - features[responses.chosen], "responses": features}


def run_packed(model: Any, responses: Any, projection: Any, job: dict[str, Any]) -> dict[str, torch.Tensor]:
    # The derivatives of the DPO loss of a pair up to a positive factor, which normalising the features takes away.
    def weigh(pairs: list[int], pieces: list[torch.Tensor], _: Any) -> list[torch.Tensor]:
        return [torch.full_like(piece, -1.0 if i % 2 == 0 else 1.0) for i, piece in enumerate(pieces)]

    options = {key: job[key] for key in ("pad_token_id", "batch_tokens")}
    return {"pairs": pair_gradients(model, responses, projection, weigh, packed=True, disable_tqdm=True, **options)}


def run_per_pair(model: Any, responses: Any, projection: Any, job: dict[str, Any]) -> dict[str, torch.Tensor]:
    features = torch.zeros(len(responses.chosen), projection.dim)
    for row, pair in enumerate(zip(responses.chosen.tolist(), responses.rejected.tolist(), strict=True)):
        inputs = pad_batch(responses, list(pair), job["pad_token_id"])
        chosen, rejected = log_probs(model, inputs, job["per_pair_head"]).sum(dim=1)
        # The policy is its own reference: the margin is zero, and the sigmoid cannot saturate.
        margin = chosen - rejected
        (-F.logsigmoid(BETA * (margin - margin.detach()))).backward()
        features[row] = sketch_gradients(model, projection)
        model.zero_grad()
    return {"pairs": features}


RUNS = {
    "floor": run_floor,
    "ours": run_ours,
    "packed": run_packed,
    "per_pair_disjoint": run_per_pair,
    "ours_k4": run_ours,
    "per_pair": run_per_pair,
}


def prepare_bergson(model: Any, job: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    # The steps of bergson's own build worker.
    from bergson.collection import collect_gradients
    from bergson.config.config import IndexConfig
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import create_processor, extract_peft_target_modules

    targets = extract_peft_target_modules(model)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    index = tempfile.mkdtemp(dir=job["folder"])
    config = IndexConfig(run_path=f"{index}/index", projection_dim=16, token_batch_size=job["batch_tokens"])
    config.partial_run_path.mkdir()
    processor = create_processor(model, config, targets)

    def run(responses: dict[str, Any]) -> None:
        lengths = [len(ids) for ids in responses["input_ids"]]
        starts = zip(responses["input_ids"], responses["starts"], strict=True)
        labels = [[-100] * start + ids[start:] for ids, start in starts]
        data = Dataset.from_dict({"input_ids": responses["input_ids"], "labels": labels, "length": lengths})
        # Its budget is a hard limit, where ours lets a longer response be a batch of its own.
        batches = allocate_batches(lengths, max(job["batch_tokens"], *lengths))
        collect_gradients(model, data, processor, config, batches=batches, target_modules=targets)

    return run


def memory(device: str, peak: bool) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def worker(method: str, job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    responses = job[METHODS[method]]
    model = load_model(job, fused_head=method != "bergson")
    loaded = memory(job["device"], peak=False)
    run: Callable[[dict[str, Any]], Any]
    if method == "bergson":
        run = prepare_bergson(model, job)
    else:
        projection = SparseProjection(job["projection_dim"], seed=job["seed"])

        def run(responses: dict[str, Any]) -> dict[str, torch.Tensor]:
            indices = {key: np.asarray(responses[key]) for key in ("chosen", "rejected")}
            return RUNS[method](model, PairResponses(**{**responses, **indices}), projection, job)

    def synchronize() -> None:
        if job["device"] != "cpu":
            torch.cuda.synchronize()

    pair = responses["chosen"][0], responses["rejected"][0]
    warm_up = {key: [responses[key][index] for index in pair] for key in ("input_ids", "starts")}
    run({**warm_up, "chosen": [0], "rejected": [1]})
    model.zero_grad()
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    arrays = run(responses)
    synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = memory(job["device"], peak=True)
    if method != "bergson":
        if method == "floor":
            arrays["total"] = sketch_gradients(model, projection)
        if method == "ours":
            arrays["total"] = arrays["responses"].sum(dim=0, keepdim=True)
        np.savez(Path(job["folder"]) / f"{method}.npz", **{key: value.numpy() for key, value in arrays.items()})
    print(json.dumps({"cpu": cpu, "wall": wall, "peak": peak, "loaded": loaded, "device": device_name(job["device"])}))


def random_pairs(args: BenchmarkArguments, vocab_size: int) -> list[tuple[list[int], ...]]:
    generator = np.random.default_rng(args.seed)

    def texts(mean: int) -> list[list[int]]:
        lengths = generator.integers(mean // 2, 3 * mean // 2 + 1, args.num_pairs)
        surplus = int(lengths.sum()) - mean * args.num_pairs
        lengths -= surplus // args.num_pairs
        lengths[: surplus % args.num_pairs] -= 1
        return [generator.integers(vocab_size, size=length).tolist() for length in lengths]

    return list(zip(texts(125), texts(41), texts(51), strict=True))


def dataset_pairs(args: BenchmarkArguments, tokenizer: Any) -> list[tuple[list[int], ...]]:
    def encode(text: Any, prompt: bool = False) -> list[int]:
        if isinstance(text, str):
            return tokenizer(text)["input_ids"]
        return tokenizer.apply_chat_template(text, add_generation_prompt=prompt, return_dict=False)

    pairs = []
    # Tokens, and where the completion starts, as DPOTrainer has them.
    for row in prepare_dataset(load_rows(args.dataset_name), start_from="pairs").dataset:
        prompt = encode(row["prompt"], prompt=True)
        end = tokenizer.eos_token if isinstance(row["chosen"], str) else []
        chosen, rejected = (encode(row["prompt"] + row[column] + end) for column in ("chosen", "rejected"))
        start = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
        chosen, rejected = chosen[: args.max_length], rejected[: args.max_length]
        # Answers that are equal where they are cut, which may be before they begin, have no feature.
        if chosen != rejected:
            pairs.append((prompt[:start], chosen[start:], rejected[start:]))
        if len(pairs) == args.num_pairs:
            return pairs
    raise ValueError(f"`{args.dataset_name}` has only {len(pairs)} pairs that fit `max_length`. Lower `num_pairs`.")


def make_job(args: BenchmarkArguments, folder: str) -> dict[str, Any]:
    job = asdict(args) | {"folder": folder, "device": args.device or ("cuda" if torch.cuda.is_available() else "cpu")}
    job["batch_tokens"] = args.batch_tokens or (512 if job["device"] == "cpu" else 16384)
    job["model_name_or_path"] = args.model_name_or_path or quickstart.export_policy(f"{folder}/policy")
    config = AutoConfig.from_pretrained(job["model_name_or_path"]).get_text_config()
    job["pad_token_id"] = config.pad_token_id or 0
    if args.dataset_name is None:
        pairs = random_pairs(args, config.vocab_size)
    else:
        pairs = dataset_pairs(args, AutoTokenizer.from_pretrained(job["model_name_or_path"]))
    fours = [(prompt, [*two, *more]) for (prompt, *two), (_, *more) in zip(pairs[::2], pairs[1::2], strict=False)]
    fours = [(prompt, answers) for prompt, answers in fours if len(set(map(tuple, answers))) == 4]
    if not fours:
        raise ValueError(
            f"`{args.dataset_name}` has no two pairs of four different answers for k4. Raise `num_pairs`."
        )
    k4 = [
        (prompt, *two)
        for prompt, answers in fours[: args.num_pairs // 4]
        for two in itertools.combinations(answers, 2)
    ]
    for name, rows in {"pairs": pairs, "k4": k4}.items():
        columns = zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*rows, strict=True), strict=True)
        responses = unique_responses(Dataset.from_dict(dict(columns)))
        job[name] = {key: list(map(int, v)) if key != "input_ids" else v for key, v in asdict(responses).items()}
    return job


def run_worker(method: str, args: BenchmarkArguments, job_path: Path) -> dict[str, Any]:
    command = [args.bergson_python if method == "bergson" else sys.executable, __file__, "--worker", method, job_path]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The run of `{method}` failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: str, methods: list[str], exact: bool) -> dict[str, float]:
    """Check that methods give the same features, each scaled to unit length: a benchmark of different things is none."""
    errors, cosines = [0.0], [1.0]
    for reference, method, key in CHECKS:
        if reference in methods and method in methods:
            a, b = (np.load(Path(folder) / f"{name}.npz")[key].astype(float) for name in (reference, method))
            a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
            errors.append(float(np.linalg.norm(a - b, axis=1).max()))
            cosines.append(float((a * b).sum(axis=1).min()))
            print(f"{method} against {reference}: relative error <= {errors[-1]:.1e}, cosine >= {cosines[-1]:.7f}")
            # Half precision is told, not judged. Written so that NaN fails too.
            if exact and not (errors[-1] < 1e-3 and cosines[-1] > 0.9999):
                raise RuntimeError(f"`{method}` and `{reference}` do not compute the same features.")
    return {"max_relative_error": max(errors), "min_cosine": min(cosines)}


def main(args: BenchmarkArguments) -> None:
    methods = [method for method in METHODS if args.methods is None or method in args.methods]
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bergson') is None)"
    if "bergson" in methods and subprocess.run([args.bergson_python, "-c", probe]).returncode:
        print(f"bergson: absent in {args.bergson_python}")
        methods.remove("bergson")
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(args, folder)
        job_path = Path(folder) / "job.json"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        clock = "cpu" if job["device"] == "cpu" else "wall"
        for repeat, method in itertools.product(range(args.repeats), methods):
            results[method].append(run_worker(method, args, job_path))
            print(f"round {repeat + 1}/{args.repeats} {method}: {results[method][-1][clock]:.2f} s", flush=True)
        report: dict[str, Any] = compare(folder, methods, exact=job["device"] == "cpu")

    device = results[methods[0]][0]["device"]
    tokens = {name: sum(map(len, job[name]["input_ids"])) for name in ("pairs", "k4")}
    print(f"\n{device}, {args.threads} torch threads, {job['batch_tokens']} tokens a batch")
    for name, count in tokens.items():
        print(f"{name}: {len(job[name]['chosen'])} pairs of {len(job[name]['starts'])} responses, {count:,} tokens")
    medians = {
        m: {key: median(run[key] for run in runs) for key in (clock, "wall", "peak", "loaded")}
        for m, runs in results.items()
    }
    seconds, peaks = ({m: values[key] for m, values in medians.items()} for key in (clock, "peak"))
    print(
        f"\n| method | {'CPU' if clock == 'cpu' else 'GPU'} s | wall s | tokens/s | peak MiB | above the loaded model |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for m, values in medians.items():
        print(
            f"| {m} | {seconds[m]:.2f} | {values['wall']:.2f} | {tokens[METHODS[m]] / seconds[m]:.0f} | "
            f"{peaks[m] / 2**20:.0f} | {(peaks[m] - values['loaded']) / 2**20:.0f} |"
        )
    print("\n| ratio of medians | value | least to greatest over the rounds |\n| --- | --- | --- |")
    spread = {}
    keys = dict.fromkeys(RATIOS, clock) | {"memory_over_floor": "peak"}
    for name, (upper, lower) in {**RATIOS, "memory_over_floor": ("ours", "floor")}.items():
        report[name] = None
        if upper in methods and lower in methods:
            key = keys[name]
            report[name] = medians[upper][key] / medians[lower][key]
            rounds = [a[key] / b[key] for a, b in zip(results[upper], results[lower], strict=True)]
            spread[name] = min(rounds), max(rounds)
            print(f"| {name} | {report[name]:.3f} | {min(rounds):.3f} to {max(rounds):.3f} |")
    print(json.dumps({**report, "spread": spread, "seconds": seconds, "peak_bytes": peaks, "device": device}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")))
    else:
        (benchmark_args,) = TrlParser(BenchmarkArguments).parse_args_and_config()
        main(benchmark_args)
