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

r"""
What the random projection does to real gradients, and to what is selected by them, as a function of its dimension.

The gradients of all responses over all LoRA weights are computed once and compared with their projections. Until the end
they lie unprojected in the temporary folder (`TMPDIR`), 4 bytes a weight and a response: 9.8 GB for 1,000 responses and
the default model.

```bash
python recipes/benchmarks/projection.py \
    --dataset_name pairs.jsonl \
    --num_pairs 500 \
    --dims 256 512 1024 2048 4096 8192 16384 \
    --seeds 3
```

For vectors x and y of unit length at the cosine c, the variance of the projected inner product over the random draw is
`(1 + c^2 - 2 sum_i x_i^2 y_i^2) / dim`. The bound that errors are compared with leaves the sum out: sigma is
`sqrt((1 + c^2) / dim)` for an inner product, and so `sqrt(2 / dim)` for a squared norm and for a squared distance, each
relative to its unprojected value.
"""

import json
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm
from trl import ScriptArguments, TrlParser

from trl_bpo import BPOConfig, BPOTrainer, DepthSelector, quickstart
from trl_bpo.capture import target_modules
from trl_bpo.formats import drop_duplicate_pairs, load_rows, prepare_dataset
from trl_bpo.gradients import response_gradients
from trl_bpo.projection import SparseProjection
from trl_bpo.responses import PairResponses, unique_responses


FRACTION = 0.25
KMEANS_SEEDS = range(42, 52)
# Rows that are sketched together, about as many as a batch of the gradient pass has.
BATCH = 32


@dataclass
class ProjectionArguments(ScriptArguments):
    """Arguments of this script. `dataset_name` is a Hub id, a folder, or a JSON, Parquet or CSV file of pairs."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model whose gradients are projected. If None, the one of the quickstart."}
    )
    num_pairs: int = field(default=500, metadata={"help": "Pairs, the first that fit into `max_length`."})
    dims: list[int] = field(
        default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192, 16384], metadata={"help": "Dimensions to measure."}
    )
    seeds: int = field(default=3, metadata={"help": "Projections drawn a dimension."})
    max_length: int = field(default=256, metadata={"help": "Tokens to which prompt and answer are cut."})


class RecordingProjection(SparseProjection):
    """Projects nothing, and keeps every entry of the gradient of one response."""

    def __init__(self, modules: dict[str, nn.Linear]) -> None:
        super().__init__(dim=1)
        self.columns, numel = {}, 0
        for name, module in modules.items():
            self.columns[name] = slice(numel, numel + module.weight.numel())
            numel += module.weight.numel()
        self.gradient = torch.zeros(numel)

    def weight_gradient(
        self, name: str, inputs: torch.Tensor, grad_outputs: torch.Tensor, scale: None = None
    ) -> torch.Tensor:
        (gradient,) = torch.bmm(grad_outputs.transpose(1, 2), inputs)
        self.gradient[self.columns[name]] = gradient.flatten().cpu()
        return gradient.new_zeros(1, 1)


def make_trainer(args: ProjectionArguments, folder: Path) -> BPOTrainer:
    # The trainer of the product tokenises, adapts and places the model, so that these are the gradients of a real run.
    if args.dataset_name is None:
        raise ValueError("`dataset_name` is required: preference pairs on the Hub, in a folder or in a file.")
    rows = load_rows(args.dataset_name, args.dataset_train_split, args.dataset_config)
    dataset = drop_duplicate_pairs(prepare_dataset(rows, start_from="pairs").dataset)
    model_name = args.model_name_or_path or str(quickstart.export_policy(folder / "policy"))
    config = BPOConfig(
        str(folder),
        depth_fraction=FRACTION,
        max_length=args.max_length,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        report_to="none",
    )
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(config.seed)
    trainer = BPOTrainer(model_name, args=config, train_dataset=dataset, peft_config=lora)
    # At zero, where training starts from, B would leave A without a gradient, and half of the weights out.
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return trainer


def take(responses: PairResponses, rows: list[int]) -> PairResponses:
    ids, starts = [responses.input_ids[row] for row in rows], [responses.starts[row] for row in rows]
    return PairResponses(ids, starts, chosen=np.empty(0, dtype=int), rejected=np.empty(0, dtype=int))


def store_gradients(model: Any, responses: PairResponses, path: Path, **options: Any) -> dict[str, slice]:
    recorder = RecordingProjection(target_modules(model))
    n, numel = len(responses.input_ids), len(recorder.gradient)
    if shutil.disk_usage(path.parent).free < 4 * n * numel:
        raise ValueError(f"{4 * n * numel / 1e9:.1f} GB do not fit into {path.parent}. Point `TMPDIR` elsewhere.")
    with path.open("wb") as file:
        # One response at a time: on a CPU that costs no more, there is no padding, and no order to keep track of.
        for row in tqdm(range(n), desc="Unprojected gradients"):
            response_gradients(model, take(responses, [row]), recorder, disable_tqdm=True, **options)
            recorder.gradient.numpy().tofile(file)
    return recorder.columns


def project(
    path: Path, columns: dict[str, slice], n: int, args: ProjectionArguments
) -> tuple[np.ndarray, dict[int, list[torch.Tensor]], Counter]:
    # One pass over the store: inner products of the unprojected rows, and their sketches for each dimension and seed.
    gram = np.zeros((n, n))
    sketches = {dim: [torch.zeros(n, dim) for _ in range(args.seeds)] for dim in args.dims}
    seconds: Counter = Counter()
    for name, part in tqdm(columns.items(), desc="Projections"):
        block = torch.from_numpy(np.memmap(path, np.float32, "r").reshape(n, -1)[:, part].copy())
        gram += (block @ block.T).double().numpy()
        for dim in args.dims:
            start = time.process_time()
            for seed, sketch in enumerate(sketches[dim]):
                projection = SparseProjection(dim, seed)
                for rows, total in zip(block.split(BATCH), sketch.split(BATCH), strict=True):
                    total += projection._sketch_last_dim(name, rows, dim)
            seconds[dim] += (time.process_time() - start) / args.seeds
    return gram, sketches, seconds


def distortion(gram: np.ndarray, sketches: list[np.ndarray], dim: int) -> dict[str, float]:
    # The inner products of unit vectors, the squared norms and the squared distances of each pair of rows.
    def geometry(products: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        squares = np.diag(products)
        cosines = products / np.sqrt(np.outer(squares, squares))
        return cosines[upper], squares, (squares[:, None] + squares - 2 * products)[upper]

    upper = np.triu_indices(len(gram), 1)
    cosines, squares, distances = geometry(gram)
    scale = np.sqrt(np.outer(squares, squares))[upper]
    apart = distances > 1e-6 * scale  # Two features that coincide have no relative error.
    products = [sketch.astype(np.float64) @ sketch.T.astype(np.float64) for sketch in sketches]
    projected = [geometry(product) for product in products]
    norm_errors = np.stack([p_squares / squares - 1 for _, p_squares, _ in projected])
    squared_distance_errors = np.stack([p_distances[apart] / distances[apart] - 1 for _, _, p_distances in projected])
    errors = {
        "product": np.stack([(product - gram)[upper] / scale for product in products]),
        "cosine": np.stack([p_cosines - cosines for p_cosines, _, _ in projected]),
        "distance": np.sqrt(1 + squared_distance_errors) - 1,
    }
    sigmas = errors["product"] / np.sqrt((1 + cosines**2) / dim)
    figures = {
        "bound": np.sqrt(2 / dim),
        "squared_norm_bias": norm_errors.mean(),
        "squared_norm_std": norm_errors.std(),
    }
    for name, error in errors.items():
        figures |= {f"{name}_rms": np.sqrt((error**2).mean()), f"{name}_max": np.abs(error).max()}
    figures["product_rms_in_sigma"] = np.sqrt((sigmas**2).mean())
    figures["product_within_4_sigma"] = (np.abs(sigmas) <= 4).mean()
    figures["distance_within_4_sigma"] = (np.abs(squared_distance_errors) <= 4 * np.sqrt(2 / dim)).mean()
    return {name: float(value) for name, value in figures.items()}


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


def variance_explained(x: np.ndarray, labels: np.ndarray) -> float:
    centres = np.stack([x[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    return float(1 - ((x - centres[labels]) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum())


def selections(features: np.ndarray, ids: dict[str, list[str]], n_clusters: int | None = None) -> list[Any]:
    seeds = KMEANS_SEEDS if n_clusters is None else KMEANS_SEEDS[:1]
    return [DepthSelector(FRACTION, n_clusters=n_clusters, seed=seed).select(features, **ids) for seed in seeds]


def compare_selections(
    pair_gram: np.ndarray, per_pair: dict[int, list[np.ndarray]], ids: dict[str, list[str]]
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    # K-means and the distances to its centres depend on inner products alone, so the coordinates that the Gram matrix
    # gives stand for the unprojected gradients, which are far too wide to be clustered.
    norms = np.sqrt(np.diag(pair_gram))
    values, vectors = np.linalg.eigh(pair_gram / np.outer(norms, norms))
    unprojected = vectors * np.sqrt(values.clip(min=0))
    kept, (kept_by_one,) = selections(unprojected, ids), selections(unprojected, ids, n_clusters=1)
    reference = {
        "variance_explained": np.mean([variance_explained(unprojected, s.clusters) for s in kept]),
        "jaccard_other_kmeans_seed": np.mean([jaccard(a.selected, b.selected) for a, b in combinations(kept, 2)]),
        "jaccard_chance": FRACTION / (2 - FRACTION),
    }
    figures = {}
    for dim, draws in per_pair.items():
        projected = [(a, b) for features in draws for a, b in zip(selections(features, ids), kept, strict=True)]
        # K-means with one cluster has no local optima, so what differs there is the projection's doing alone.
        by_one = [selections(features, ids, n_clusters=1)[0] for features in draws]
        figures[dim] = {
            "jaccard": np.mean([jaccard(a.selected, b.selected) for a, b in projected]),
            "jaccard_one_cluster": np.mean([jaccard(s.selected, kept_by_one.selected) for s in by_one]),
            "variance_explained": np.mean([variance_explained(unprojected, a.clusters) for a, _ in projected]),
        }
    return reference, figures


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(str(v) if isinstance(v, int) else f'{v:.4g}' for v in row.values())} |")


def print_report(report: dict[str, Any]) -> None:
    print("{responses} responses of {weights:,} weights; gradient pass {pass_seconds:.0f} CPU s".format(**report))
    for kind, title in {
        "responses": "Distortion of the gradients of the responses",
        "pairs": "Distortion of the gradients of the pairs",
        "selection": f"{FRACTION:.0%} of {report['pairs']} pairs, kept by projected and by unprojected gradients",
    }.items():
        print_table(title, [{"dim": dim, **figures[kind]} for dim, figures in report["dims"].items()])
    print(
        "\nUnprojected: variance explained {variance_explained:.4g}; Jaccard with another seed of K-means "
        "{jaccard_other_kmeans_seed:.4g}, by chance {jaccard_chance:.4g}".format(**report)
    )
    print(json.dumps(report))


def main(args: ProjectionArguments) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, Path(folder))
        model = trainer.accelerator.unwrap_model(trainer.model)
        pool = trainer.train_dataset.select(range(min(args.num_pairs, len(trainer.train_dataset))))
        responses = unique_responses(pool, args.max_length, trainer.args.truncation_mode)
        n, options = len(responses.input_ids), {"pad_token_id": trainer.processing_class.pad_token_id}
        path, start = Path(folder) / "gradients.bin", time.process_time()
        columns = store_gradients(model, responses, path, **options)
        pass_seconds = time.process_time() - start
        gram, sketches, seconds = project(path, columns, n, args)

    # What is measured is what the product computes: batch by batch, as the backward pass runs.
    first, dim = list(range(min(8, n))), args.dims[0]
    expected, _ = response_gradients(
        model, take(responses, first), SparseProjection(dim, 0), disable_tqdm=True, **options
    )
    error = ((sketches[dim][0][first] - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
    if error > 1e-5:
        raise RuntimeError(f"The stored gradients and `response_gradients` give sketches {error:.1e} apart.")

    # The gradient of a pair is that of the rejected less that of the chosen response, up to a factor.
    active = np.flatnonzero(responses.chosen != responses.rejected)
    difference = np.eye(n)[responses.rejected[active]] - np.eye(n)[responses.chosen[active]]
    pair_gram = difference @ gram @ difference.T
    ids = {f"{column}s": [str(value) for value in pool.select(active)[column]] for column in ("pair_id", "prompt_id")}
    per_response = {dim: [sketch.numpy() for sketch in draws] for dim, draws in sketches.items()}
    per_pair = {
        dim: [sketch[responses.rejected[active]] - sketch[responses.chosen[active]] for sketch in draws]
        for dim, draws in per_response.items()
    }
    reference, figures = compare_selections(pair_gram, per_pair, ids)
    report = {
        "model": args.model_name_or_path or quickstart.POLICY_NAME,
        "pairs": len(active),
        "pairs_without_gradient": len(pool) - len(active),
        "responses": n,
        "tokens": sum(map(len, responses.input_ids)),
        "weights": max(part.stop for part in columns.values()),
        "seeds": args.seeds,
        "pass_seconds": pass_seconds,
        "sketch_error": error,
        **reference,
        "dims": {
            dim: {
                "responses": distortion(gram, per_response[dim], dim),
                "pairs": distortion(pair_gram, per_pair[dim], dim),
                "selection": {"bytes_per_pair": 4 * dim, "projection_seconds": seconds[dim], **figures[dim]},
            }
            for dim in args.dims
        },
    }
    print_report(report)


if __name__ == "__main__":
    (script_args,) = TrlParser(ProjectionArguments).parse_args_and_config()
    main(script_args)
