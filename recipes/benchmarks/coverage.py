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
What is kept of a set of prompts: how far all of them lie from the nearest that is kept, by BPO's breadth selection and by others.

    python recipes/benchmarks/coverage.py alpaca_52k.jsonl.gz --cache embeddings.npy

| method | keeps |
| --- | --- |
| `bpo` | the nearest to the centres of sqrt(n / 2) clusters, in proportion to their sizes: the default |
| `bpo_overall` | the nearest to the centres, wherever they lie |
| `bpo_one_each` | the one nearest to the centre of each of as many clusters as prompts are kept |
| `random` | prompts at random, five draws |
| `farthest_point` | always the prompt farthest from those kept (greedy k-centre) |
| `semhash` | the representatives of semhash, `self_find_representative` |

Columns: mean, 95th percentile and largest Euclidean distance of all prompts to the nearest one kept (unit vectors: 0 is the
same direction, 1.41 a right angle), the share of those kept whose nearest other one kept is nearer than a cosine of 0.9, and
seconds. Low distances say that the prompts are covered, high ones that what is kept is typical and leaves out the rare: which
is better for a training, no distance says.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


ROWS_AT_A_TIME = 2048


def embed(args: argparse.Namespace) -> np.ndarray:
    from datasets import load_dataset

    from trl_bpo import quickstart
    from trl_bpo.embedding import embed_texts

    rows = load_dataset("json", data_files=args.prompts, split="train").select_columns(args.prompt_columns)
    texts = list(dict.fromkeys("\n\n".join(filter(None, row.values())) for row in rows))[: args.max_prompts]
    return embed_texts(texts, args.encoder or quickstart.encoder_path())[0]


def nearest(rows: np.ndarray, kept: np.ndarray, others: bool = False) -> np.ndarray:
    # Cosine of each row to the nearest of those kept; of those kept themselves to the nearest other one.
    found = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        cosines = rows[start : start + ROWS_AT_A_TIME] @ kept.T
        if others:
            own = np.arange(len(cosines))
            cosines[own, start + own] = -1.0
        found[start : start + ROWS_AT_A_TIME] = cosines.max(axis=1)
    return found


def measure(embeddings: np.ndarray, rows: np.ndarray, seconds: float) -> dict[str, float]:
    kept = embeddings[rows]
    distances = np.sqrt(np.maximum(2.0 - 2.0 * nearest(embeddings, kept), 0.0))
    return {
        "mean": float(distances.mean()),
        "p95": float(np.quantile(distances, 0.95)),
        "max": float(distances.max()),
        "near_duplicates": float((nearest(kept, kept, others=True) >= 0.9).mean()),
        "seconds": seconds,
    }


def selections(embeddings: np.ndarray, n_keep: int, peer_python: str) -> Iterator[tuple[str, np.ndarray, float]]:
    from trl_bpo.clustering import cluster, nearest_to_centre
    from trl_bpo.rules import k_centre

    ids = np.arange(len(embeddings))
    for name, n_clusters, scope in (
        ("bpo", None, "per_cluster"),
        ("bpo_overall", None, "overall"),
        ("bpo_one_each", n_keep, "per_cluster"),
    ):
        started = time.perf_counter()
        clustering = cluster(embeddings, ids, n_clusters)
        if name == "bpo_one_each":
            # In proportion to the sizes, large clusters would keep more than one and small ones none.
            rows = np.flatnonzero(clustering.ranks == 0)
        else:
            rows = np.flatnonzero(nearest_to_centre(clustering, ids, n_keep, scope))
        yield name, rows, time.perf_counter() - started
    for seed in range(5):
        yield "random", np.random.default_rng(seed).permutation(len(ids))[:n_keep], 0.0
    started = time.perf_counter()
    yield "farthest_point", np.flatnonzero(k_centre(embeddings, ids, n_keep) < n_keep), time.perf_counter() - started
    if subprocess.run([peer_python, "-c", "import semhash"], capture_output=True).returncode != 0:
        print("semhash is not installed: name an interpreter that has it with --peer_python.")
        return
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "embeddings.npy", embeddings)
        command = [peer_python, __file__, "--worker", folder, str(n_keep)]
        seconds = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        yield "semhash", np.load(Path(folder) / "rows.npy"), seconds


def run_semhash(folder: str, n_keep: int) -> None:
    from semhash import SemHash

    embeddings = np.load(Path(folder) / "embeddings.npy")
    records = [str(row) for row in range(len(embeddings))]
    started = time.perf_counter()
    semhash = SemHash.from_embeddings(embeddings, records=records, model=None)
    found = semhash.self_find_representative(selection_size=n_keep, candidate_limit=len(records)).selected
    seconds = time.perf_counter() - started
    np.save(Path(folder) / "rows.npy", np.asarray([int(record) for record in found]))
    print(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="JSON lines of prompts")
    parser.add_argument("--prompt_columns", nargs="+", default=["instruction", "input"])
    parser.add_argument("--max_prompts", type=int)
    parser.add_argument("--encoder", help="sentence-transformers model; that of the quickstart if not given")
    parser.add_argument("--cache", help="file for the embeddings, read if it is there")
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter that has semhash")
    args = parser.parse_args()
    if args.cache and Path(args.cache).is_file():
        embeddings = np.load(args.cache)
    else:
        embeddings = embed(args)
        if args.cache:
            np.save(args.cache, embeddings)
    n_keep = round(args.fraction * len(embeddings))
    runs: dict[str, list[dict[str, float]]] = {}
    print(f"{n_keep} of {len(embeddings)} prompts\n\n| method | mean | 95 % | max | near duplicates | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, rows, seconds in selections(embeddings, n_keep, args.peer_python):
        runs.setdefault(name, []).append({"kept": len(rows), **measure(embeddings, rows, seconds)})
    for name, own in runs.items():
        cells = [f"{np.mean([run[key] for run in own]):.3f}" for key in ("mean", "p95", "max", "near_duplicates")]
        if len(own) > 1:
            cells[0] += f" ± {np.std([run['mean'] for run in own]):.4f}"
        print(f"| {name} | {' | '.join(cells)} | {own[0]['seconds']:.1f} |")
    print(json.dumps({"n": len(embeddings), "n_keep": n_keep, "methods": runs}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_semhash(sys.argv[2], int(sys.argv[3]))
    else:
        main()
