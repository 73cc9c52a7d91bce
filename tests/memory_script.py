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


"""What `test_memory.py` measures: selections of many rows, by the name of the stage."""

import gc
import hashlib
import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import disable_progress_bars, load_dataset

from trl_bpo import BPODataCollector, BreadthSelector, DepthSelector
from trl_bpo.bpo_config import BPOConfig
from trl_bpo.generation import Response
from trl_bpo.generation_requests import RequestKeys, encode_prompts
from trl_bpo.judging import Verdict
from trl_bpo.manifest import sha256_of_ids
from trl_bpo.pool import PairPool, identify_pairs
from trl_bpo.responses import length_batches, unique_responses
from trl_bpo.selection_state import save_selection
from trl_bpo.strategies import check_strategy


ROWS_AT_A_TIME = 5000


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write_rows(path, n, row_of):
    """A Parquet file, written without holding its rows."""
    writer = None
    for start in range(0, n, ROWS_AT_A_TIME):
        table = pa.Table.from_pylist([row_of(row) for row in range(start, min(n, start + ROWS_AT_A_TIME))])
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
    return load_dataset("parquet", data_files=str(path), split="train")


def pair(row):
    texts = {"prompt": f"What about {row // 4}?", "chosen": f" Yes, {row}.", "rejected": f" No, {row}."}
    return {**texts, "score_chosen": 1.0, "score_rejected": 0.5, "judge": "someone"}


def ids(n, folder):
    """A pool of pairs: their ids, checks and digest."""
    pairs = write_rows(folder / f"pairs-{n}.parquet", n, pair)
    yield
    pool = PairPool(
        identify_pairs(pairs, BPOConfig(output_dir=str(folder / "run"), report_to="none", use_cpu=True, bf16=False))
    )
    check_strategy("score_margin_high", pool.pairs)
    assert len(pool.fingerprint) == 64 and len(pool.pair_ids) == n


def responses(n, folder):
    """Responses of 40 to 59 tokens each, and their batches."""

    def tokenized(row):
        ids = np.random.default_rng(row).integers(300, 40_000, 100).tolist()
        return {
            "prompt_ids": ids[:20],
            "chosen_ids": ids[20 : 40 + row % 20],
            "rejected_ids": ids[60 : 80 + row // 20 % 20],
        }

    pairs = write_rows(folder / f"tokens-{n}.parquet", n, tokenized)
    yield
    found = unique_responses(pairs, max_length=100)
    assert len(found.input_ids) == 2 * n and found.lengths.sum() > 80 * n
    assert sum(map(len, length_batches(found.input_ids, 4096, found.lengths))) == 2 * n


def depth(n, folder):
    """A selection from features in a file, saved."""
    path = folder / f"features-{n}.npy"
    features = np.lib.format.open_memmap(path, "w+", np.float16, (n, 32))
    for start in range(0, n, ROWS_AT_A_TIME):
        features[start : start + ROWS_AT_A_TIME] = np.random.default_rng(start).standard_normal(
            (min(n - start, ROWS_AT_A_TIME), 32)
        )
    ids_of = {
        name: lambda row, name=name, of=of: digest(f"{name} {row // of}")
        for name, of in (("pair_id", 1), ("prompt_id", 4))
    }
    pairs = write_rows(folder / f"ids-{n}.parquet", n, lambda row: {name: make(row) for name, make in ids_of.items()})
    yield
    pool = PairPool(pairs)
    selection = DepthSelector(0.25, n_clusters=50, min_pairs_per_prompt=1).select(
        features, pool.pair_ids, pool.prompt_ids
    )
    assert selection.selected.sum() == n // 4
    save_selection(folder / "selections", 0, selection, pool.pairs, selection.metrics, {}, {})


def breadth(n, folder):
    """Prompts, by an encoder that costs nothing."""
    prompts = write_rows(folder / f"prompts-{n}.parquet", n, lambda row: {"prompt": f"Question {row // 2 * 2} of {n}"})

    def embed(texts, encoder, batch_size=64, content=None):
        draws = [np.random.default_rng(int(digest(text)[:8], 16)).standard_normal(32) for text in texts]
        embeddings = np.asarray(draws, dtype=np.float32)
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), [False] * len(texts)

    from trl_bpo import breadth as module

    module.embed_texts = embed
    encoder = folder / "no-encoder"
    encoder.mkdir(exist_ok=True)
    yield
    selection = BreadthSelector(0.1, str(encoder), n_clusters=20).select(prompts)
    assert len(selection.kept) == selection.prompts_kept == round(0.1 * n / 2)
    assert sha256_of_ids(selection.by_prompt["prompt_id"])
    selection.save(folder / "breadth")


def collect(n, folder):
    """Prompts to pairs, by a generator and a judge that cost nothing: called in blocks, and through `stream`."""
    prompts = write_rows(folder / f"asked-{n}.parquet", n, lambda row: {"prompt": f"Question {row}", "answer": row})

    def sample(prompt, num_responses):
        return [Response(f"{prompt}? I say {answer}.", answer == 3, 7) for answer in range(num_responses)]

    def generate(prompts, num_responses, tools=None):
        return [sample(prompt, num_responses) for prompt in prompts]

    def rate(prompts, completions, answer):
        return [
            Verdict(float(text[-2]), f"The answer to {row} is {text!r}")
            for row, text in zip(answer, completions, strict=True)
        ]

    class Streaming:
        def stream(self, *args, **columns):
            if columns:
                for text, row in zip(columns["completions"], columns["answer"], strict=True):
                    yield Verdict(float(text[-2]), f"The answer to {row} is {text!r}")
            else:
                for prompt in args[0]:
                    yield sample(prompt, args[1])

        def __call__(self, *args, **columns):
            raise AssertionError("It has `stream`.")

    yield
    for generator, judge in ((generate, rate), (Streaming(), Streaming())):
        collector = BPODataCollector(generator, judge, num_responses=4)
        pairs = collector.collect(prompts)
        assert collector.report.truncated == n and collector.report.pairs.truncated_chosen == n
        assert len(pairs) == collector.report.pairs.pairs == n


def keys(n, folder):
    """Token ids of prompts, and the keys of their responses."""
    prompts = write_rows(folder / f"words-{n}.parquet", n, lambda row: {"prompt": f"A question about {row // 2}"})[
        "prompt"
    ]
    yield
    input_ids = encode_prompts(lambda prompt: {"input_ids": list(prompt.encode())}, prompts)
    keys = RequestKeys({"seed": 42}, input_ids, [(0, 4), (4, 4)])
    assert len(keys) == n and len({key for row in (0, 1, 2) for key, _ in keys[row]}) == 6


def peak(what, n, folder):
    stage = globals()[what](n, folder)
    next(stage)
    gc.collect()
    # What was there before is not counted.
    tracemalloc.start()
    next(stage, None)
    bytes_at_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return bytes_at_peak


def main(what, numbers, folder):
    disable_progress_bars()
    # Once for nothing: what is imported and cached at the first time is no matter of the rows.
    peaks = [peak(what, n, folder) for n in (1000, *numbers)][1:]
    (folder / "peaks.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    main(sys.argv[1], [int(number) for number in sys.argv[3:]], Path(sys.argv[2]))
