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
Breadth selection of a million prompts, beside the K-means of scikit-learn and of faiss.

    python recipes/benchmarks/breadth_scale.py
    python recipes/benchmarks/breadth_scale.py --rows 100000 --clusters 300 --peer_python venv/bin/python
    python recipes/benchmarks/breadth_scale.py --rows 0 --prompts alpaca_52k.jsonl.gz

Vectors: a mixture of more components than clusters, of unequal sizes, with a scatter such that K-means explains about a third
of the variance as it does of sentence embeddings, at unit length, float32, in a file. Each method runs in a process of its
own, in turns:

- `trl_bpo`: [`cluster`] and [`nearest_to_centre`] on the memory-mapped file, the whole selection, ids and ranks included.
- `minibatch`: `sklearn.cluster.MiniBatchKMeans` with its defaults, and `predict` of all rows.
- `minibatch_10k`: the same with batches of 10,240 rows, which takes more time for a better end.
- `faiss`: `faiss.Kmeans` with its defaults (25 iterations over 256 rows a cluster), and the assignment of all rows.

Time is that of the clustering and the assignment of all rows, without imports and reading (the peers are given the whole array
in memory, before the clock starts). Inertia is evaluated alike for all: the squared distances of the rows to the mean of those
with the same label. Memory is the largest resident size of the process, mapped pages of the file included. The growth is
fitted to times from 10,000 rows up, at a fixed number of clusters.

With `--prompts`, breadth selection of real prompts end to end: its overhead is all time that is not spent in
`SentenceTransformer.encode`, over the time that is.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


METHODS = ("trl_bpo", "minibatch", "minibatch_10k", "faiss")
ROWS_AT_A_TIME = 50_000


def write_mixture(path: Path, n: int, d: int, n_clusters: int) -> None:
    rng = np.random.default_rng(0)
    components = int(2.5 * n_clusters)
    # Variance is spread over the dimensions unevenly, as that of embeddings is.
    means = rng.standard_normal((components, d), dtype=np.float32) * np.linspace(2.0, 0.3, d, dtype=np.float32)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    weights = np.arange(1, components + 1) ** -0.7
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (n, d))
    scatter = (1.1 / np.sqrt(d) * np.linspace(1.5, 0.5, d)).astype(np.float32)
    for start in range(0, n, ROWS_AT_A_TIME):
        own = rng.choice(components, min(ROWS_AT_A_TIME, n - start), p=weights / weights.sum())
        part = means[own] + rng.standard_normal((len(own), d), dtype=np.float32) * scatter
        rows[start : start + len(own)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    rows.flush()


def run_worker(method: str, path: str, n: int, n_clusters: int, seed: int, labels_path: str) -> None:
    rows = np.load(path, mmap_mode="r")[:n]
    if method == "trl_bpo":
        import pyarrow as pa

        from trl_bpo.clustering import budget, cluster, nearest_to_centre

        # Texts, as the ids of prompts are; digests would be as long.
        ids = pa.array([f"{number:064x}" for number in np.random.default_rng(1).permutation(n).tolist()])
        started = time.perf_counter()
        clustering = cluster(rows, ids, n_clusters, seed)
        nearest_to_centre(clustering, ids, budget(0.1, n))
        seconds, labels = time.perf_counter() - started, clustering.labels
    elif method == "faiss":
        import faiss

        rows = np.array(rows)
        started = time.perf_counter()
        kmeans = faiss.Kmeans(rows.shape[1], n_clusters, seed=seed + 1)
        kmeans.train(rows)
        labels = kmeans.index.search(rows, 1)[1][:, 0]
        seconds = time.perf_counter() - started
    else:
        from sklearn.cluster import MiniBatchKMeans

        rows = np.array(rows)
        batch = {} if method == "minibatch" else {"batch_size": 10_240}
        started = time.perf_counter()
        labels = MiniBatchKMeans(n_clusters, n_init=1, random_state=seed, **batch).fit(rows).labels_
        seconds = time.perf_counter() - started
    np.save(labels_path, labels)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "peak_gb": peak_gb}))


def inertia_of(rows: np.ndarray, labels: np.ndarray) -> float:
    sums, counts = np.zeros((labels.max() + 1, rows.shape[1])), np.bincount(labels)
    squares = 0.0
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part, own = rows[start : start + ROWS_AT_A_TIME].astype(np.float64), labels[start : start + ROWS_AT_A_TIME]
        order = np.argsort(own, kind="stable")
        present, first = np.unique(own[order], return_index=True)
        sums[present] += np.add.reduceat(part[order], first)
        squares += float((part**2).sum())
    # What the means explain, taken from the whole.
    return squares - float(((sums**2).sum(axis=1) / np.maximum(counts, 1)).sum())


def run_apart(python: str, arguments: list[str]) -> dict[str, float]:
    command = [python, __file__, "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments[:1])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def has_module(python: str, name: str) -> bool:
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0


def compare(args: argparse.Namespace, folder: Path) -> dict:
    path = folder / "rows.npy"
    write_mixture(path, args.rows, args.dim, args.clusters)
    rows = np.load(path, mmap_mode="r")
    methods = [name for name in METHODS if name != "faiss" or has_module(args.peer_python, "faiss")]
    if "faiss" not in methods:
        print("faiss is not installed: name an interpreter that has it with --peer_python.")
    runs: dict[str, list[dict]] = {name: [] for name in methods}
    for repeat in range(args.repeats):
        for name in methods:
            labels_path = folder / f"{name}.npy"
            python = sys.executable if name == "trl_bpo" else args.peer_python
            run = run_apart(
                python, [name, str(path), str(args.rows), str(args.clusters), str(repeat), str(labels_path)]
            )
            run["inertia"] = inertia_of(rows, np.load(labels_path))
            runs[name].append(run)
            print(
                f"{name:<14} {run['seconds']:7.1f} s {run['peak_gb']:6.2f} GB  inertia {run['inertia']:.6g}",
                flush=True,
            )
    summary = {name: {key: statistics.median(run[key] for run in own) for key in own[0]} for name, own in runs.items()}
    ours = summary["trl_bpo"]
    peers = {name: one for name, one in summary.items() if name != "trl_bpo"}
    best = min(one["inertia"] for one in summary.values())
    good = [one["seconds"] for one in peers.values() if one["inertia"] <= 1.01 * best]
    result = {
        "n": args.rows,
        "d": args.dim,
        "n_clusters": args.clusters,
        "methods": summary,
        "peak_gb": ours["peak_gb"],
        "inertia_over_best_peer": ours["inertia"] / min(one["inertia"] for one in peers.values()),
        # No peer may come within a percent of the best inertia: then there is nothing to be slower than.
        "time_over_best_peer": ours["seconds"] / min(good) if good else None,
        "time_over": {name: ours["seconds"] / one["seconds"] for name, one in peers.items()},
    }
    total = inertia_of(rows, np.zeros(args.rows, dtype=np.int64))
    print(f"K-means explains {1 - best / total:.3f} of the variance.")
    for name, one in peers.items():
        print(
            f"ours over {name}: time {result['time_over'][name]:.3f}, inertia {ours['inertia'] / one['inertia']:.4f}, "
            f"memory {ours['peak_gb'] / one['peak_gb']:.2f}"
        )
    sizes = [size for size in (10_000, 31_623, 100_000, 316_228, 1_000_000) if size <= args.rows]
    seconds = []
    for size in sizes:
        arguments = ["trl_bpo", str(path), str(size), str(args.growth_clusters), "0", str(folder / "growth.npy")]
        seconds.append(statistics.median(run_apart(sys.executable, arguments)["seconds"] for _ in range(args.repeats)))
        print(f"{size:>9,} rows, {args.growth_clusters} clusters: {seconds[-1]:.2f} s", flush=True)
    if len(sizes) > 1:
        result["exponent"] = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        result["exponent_of_last"] = float(np.log(seconds[-1] / seconds[-2]) / np.log(sizes[-1] / sizes[-2]))
        result["growth"] = dict(zip(sizes, seconds, strict=True))
    return result


def select_prompts(args: argparse.Namespace) -> dict:
    from datasets import disable_progress_bars, load_dataset
    from sentence_transformers import SentenceTransformer

    from trl_bpo import BreadthSelector, quickstart

    disable_progress_bars()
    encoder = args.encoder or quickstart.encoder_path()
    dataset = load_dataset("json", data_files=args.prompts, split="train").select_columns(args.prompt_columns)
    dataset = dataset.select(range(min(len(dataset), args.max_prompts or len(dataset))))
    dataset = dataset.map(lambda row: {"prompt": "\n\n".join(filter(None, row.values()))})
    dataset = dataset.select_columns("prompt")
    in_encoder, encode = [], SentenceTransformer.encode

    def timed(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        embeddings = encode(*arguments, **options)
        in_encoder.append(time.perf_counter() - started)
        return embeddings

    SentenceTransformer.encode = timed
    selector = BreadthSelector(0.1, encoder)
    # Loads the encoder, and what else is loaded once.
    selector.select(dataset.select(range(64)))
    in_encoder.clear()
    started = time.perf_counter()
    selection = selector.select(dataset)
    seconds = time.perf_counter() - started
    overhead = (seconds - sum(in_encoder)) / sum(in_encoder)
    print(
        f"{selection.prompts} distinct prompts: {seconds:.0f} s, of which {sum(in_encoder):.0f} s in the encoder: "
        f"overhead {overhead:.3f}"
    )
    return {
        "prompts": selection.prompts,
        "overhead": overhead,
        "seconds": seconds,
        "seconds_in_encoder": sum(in_encoder),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="vectors; 0 leaves this part out")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--growth_clusters", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has scikit-learn and faiss")
    parser.add_argument("--prompts", help="JSON lines of prompts for the part on real text")
    parser.add_argument(
        "--prompt_columns", nargs="+", default=["instruction", "input"], help="columns whose texts make a prompt"
    )
    parser.add_argument("--max_prompts", type=int)
    parser.add_argument("--encoder", help="sentence-transformers model; that of the quickstart if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        result = compare(args, Path(folder)) if args.rows else {}
        if args.prompts:
            result |= select_prompts(args)
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, file, n, k, number, output = sys.argv[2:]
        run_worker(name, file, int(n), int(k), int(number), output)
    else:
        main()
