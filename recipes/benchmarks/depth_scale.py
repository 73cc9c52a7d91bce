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
Depth selection of a million pairs: memory and time of [`DepthSelector`] over features on the disk.

    python recipes/benchmarks/depth_scale.py
    python recipes/benchmarks/depth_scale.py --pairs 100000 --dim 512

Features: a mixture with norms that differ, one pair in a thousand without a gradient, in half precision in the
[`FeatureStore`] that the trainer writes; four pairs a prompt; ids as digests, in Arrow. Each selection runs in a process of
its own. The main one has the default number of clusters; the growth is fitted to times from 10,000 pairs up, at a fixed
number of clusters. Memory is the largest resident size of the process, all libraries of the trainer included.
"""

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


PAIRS_AT_A_TIME = 10_000
PAIRS_PER_PROMPT = 4


def open_store(folder: Path, n: int, d: int) -> Any:
    from trl_bpo.feature_store import FeatureStore

    return FeatureStore(folder, {"benchmark": "depth_scale"}, n, d, dtype="float16")


def write_features(folder: Path, n: int, d: int) -> None:
    rng = np.random.default_rng(0)
    means = rng.standard_normal((2000, d), dtype=np.float32)
    store = open_store(folder, n, d)
    for start in range(0, n, PAIRS_AT_A_TIME):
        rows = np.arange(start, min(n, start + PAIRS_AT_A_TIME))
        own = rng.integers(len(means), size=len(rows))
        part = means[own] * 0.7 + rng.standard_normal((len(rows), d), dtype=np.float32)
        part *= rng.lognormal(0.0, 1.0, (len(rows), 1)).astype(np.float32)
        part[rows % 1000 == 0] = 0.0
        store.write(rows, part)
    store.close()


def digests(numbers: np.ndarray) -> Any:
    import pyarrow as pa

    parts = np.array_split(numbers, max(1, len(numbers) // PAIRS_AT_A_TIME))
    return pa.chunked_array(
        [[hashlib.sha256(str(one).encode()).hexdigest() for one in part.tolist()] for part in parts]
    )


def run_worker(folder: str, n_stored: int, d: int, n: int, n_clusters: int) -> None:
    from trl_bpo.depth import DepthSelector
    from trl_bpo.pair_features import StoredPairs
    from trl_bpo.rows import RowsOf

    store = open_store(Path(folder), n_stored, d)
    pairs = StoredPairs(store, np.arange(n_stored)[:, None], np.ones((n_stored, 1)))
    features = RowsOf(pairs, np.arange(n))
    pair_ids, prompt_ids = digests(np.arange(n)), digests(np.arange(n) // PAIRS_PER_PROMPT)
    started = time.perf_counter()
    selection = DepthSelector(0.25, n_clusters=n_clusters or None).select(features, pair_ids, prompt_ids)
    seconds = time.perf_counter() - started
    assert selection.selected.sum() == round(0.25 * n) and selection.metrics["zero_gradients"] == len(
        range(0, n, 1000)
    )
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "peak_gb": peak_gb, "metrics": selection.metrics}))


def run_apart(*arguments: Any) -> dict:
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--growth_clusters", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder), args.pairs, args.dim)
        print(
            f"{args.pairs:,} x {args.dim}: {sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e9:.2f} GB on disk"
        )
        whole = run_apart(folder, args.pairs, args.dim, args.pairs, 0)
        print(f"default clusters: {whole['seconds']:.1f} s, {whole['peak_gb']:.2f} GB, {whole['metrics']}", flush=True)
        sizes = [size for size in (10_000, 31_623, 100_000, 316_228, 1_000_000) if size <= args.pairs]
        seconds = []
        for size in sizes:
            runs = [run_apart(folder, args.pairs, args.dim, size, args.growth_clusters) for _ in range(args.repeats)]
            seconds.append(statistics.median(run["seconds"] for run in runs))
            print(f"{size:>9,} pairs, {args.growth_clusters} clusters: {seconds[-1]:.2f} s", flush=True)
    result = {"n": args.pairs, "d": args.dim, "peak_gb": whole["peak_gb"], "seconds": whole["seconds"]}
    if len(sizes) > 1:
        result["exponent"] = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        result["exponent_of_last"] = float(np.log(seconds[-1] / seconds[-2]) / np.log(sizes[-1] / sizes[-2]))
        result["growth"] = dict(zip(sizes, seconds, strict=True))
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        run_worker(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()
