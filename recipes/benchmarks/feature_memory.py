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
# dependencies = ["trl_bpo"]
# ///

"""
Memory of a selection over many pairs: features are written to a store as the gradient pass writes them, put together
pair by pair, and selected from. The features are synthetic, so no model takes part.

    python recipes/benchmarks/feature_memory.py --num_pairs 100000 --projection_dim 2048

The last line is a JSON object with `peak_gb`, the peak of the resident memory over that after the imports.
"""

import json
import resource
import tempfile
import time
from dataclasses import dataclass, field

import numpy as np
from transformers import HfArgumentParser

from trl_bpo import DepthSelector
from trl_bpo.feature_store import FeatureStore
from trl_bpo.pair_features import StoredPairs


@dataclass
class BenchmarkArguments:
    num_pairs: int = field(default=100_000, metadata={"help": "Pairs, of two responses each."})
    projection_dim: int = field(default=2048, metadata={"help": "Numbers a feature."})
    gradient_dtype: str = field(default="float32", metadata={"help": "Type on disk, float32 or float16."})
    depth_fraction: float = field(default=0.25, metadata={"help": "Fraction of the pairs to keep."})
    depth_clusters: int = field(default=100, metadata={"help": "K-means clusters."})
    batch_size: int = field(default=64, metadata={"help": "Rows that are written at a time."})


def resident_gb() -> float:
    # In kilobytes on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(args: BenchmarkArguments) -> None:
    rng, base = np.random.default_rng(0), resident_gb()
    centres = rng.standard_normal((args.depth_clusters, args.projection_dim), dtype=np.float32)
    peaks, times, start = {}, {}, time.perf_counter()

    def done(stage: str) -> None:
        nonlocal start
        peaks[stage], times[stage] = resident_gb() - base, time.perf_counter() - start
        print(f"{stage:<10} peak {peaks[stage]:.2f} GB, {times[stage]:.1f} s", flush=True)
        start = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        n_rows = 2 * args.num_pairs
        store = FeatureStore(
            folder, {}, n_rows, args.projection_dim, scalars=("logp", "alignment"), dtype=args.gradient_dtype
        )
        for first in range(0, n_rows, args.batch_size):
            rows = np.arange(first, min(first + args.batch_size, n_rows))
            noise = rng.standard_normal((len(rows), args.projection_dim), dtype=np.float32)
            zeros = np.zeros(len(rows))
            store.write(rows.tolist(), centres[rows // 2 % len(centres)] + noise, logp=zeros, alignment=zeros)
        done("write")
        pairs = np.arange(n_rows).reshape(-1, 2)
        features = StoredPairs(store, pairs, np.ones(pairs.shape))[:]
        store.close()
        done("assemble")
    ids = [f"{row:08d}" for row in rng.permutation(args.num_pairs)]
    selector = DepthSelector(args.depth_fraction, n_clusters=args.depth_clusters)
    selection = selector.select(features, ids, ids)
    done("select")
    assert selection.selected.sum() == round(args.depth_fraction * args.num_pairs)
    result = {"num_pairs": args.num_pairs, "projection_dim": args.projection_dim, "peak_gb": round(peaks["select"], 3)}
    print(json.dumps({**result, "features_gb": round(features.nbytes / 1e9, 3), "seconds": times}))


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    main(arguments)
