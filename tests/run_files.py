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

"""A run folder without a training: written by the functions that a training writes it with, from random features."""

import json

import numpy as np
import pyarrow as pa
from datasets import Dataset

from trl_bpo import BreadthSelection, DepthSelector
from trl_bpo.card import CuratedCardData
from trl_bpo.clustering import cluster
from trl_bpo.manifest import write_json
from trl_bpo.report import statistics
from trl_bpo.run_folder import step_name
from trl_bpo.selection_state import list_selections, save_feature_sample, save_pool, save_selection


def save_breadth(folder, prompts, n_kept):
    """A breadth selection of prompts by random embeddings."""
    rng = np.random.default_rng(len(prompts))
    embeddings = rng.standard_normal((len(prompts), 6)).astype(np.float32)
    ids = [f"{i:064x}" for i in range(len(prompts))]
    clustering = cluster(embeddings, ids, 3)
    selected = np.zeros(len(prompts), dtype=bool)
    selected[np.lexsort((clustering.distances, clustering.ranks))[:n_kept]] = True
    table = pa.table(
        {
            "prompt_id": ids,
            "prompt": [prompt[:200] for prompt in prompts],
            "rows": np.ones(len(prompts), dtype=int),
            "duplicates": np.zeros(len(prompts), dtype=int),
            "breadth_cluster": clustering.labels,
            "breadth_distance": clustering.distances,
            "breadth_rank": clustering.ranks,
            "breadth_selected": selected,
            "x": embeddings[:, 0],
            "y": embeddings[:, 1],
        }
    )
    BreadthSelection(
        dataset=Dataset.from_dict({"prompt": prompts}),
        rows=len(prompts),
        prompts=len(prompts),
        prompts_kept=n_kept,
        duplicates=0,
        near_duplicates=0,
        over_long=0,
        n_clusters=3,
        variance_explained=clustering.variance_explained,
        by_prompt=table,
        embedding_sample=embeddings,
        parameters={"fraction": n_kept / len(prompts), "encoder": "org/encoder", "scope": "per_cluster", "seed": 42},
    ).save(folder / "_breadth")


def save_pairs(folder, prompts, steps=(0, 5), strategy="gradient", scores=True, n_pairs=3):
    """Selections of pairs by random features, or by random scores where `strategy` goes by a score."""
    n = n_pairs * len(prompts)
    rng = np.random.default_rng(n)
    pair_ids = [f"{i:064x}" for i in range(1000, 1000 + n)]
    columns = {
        "pair_id": pair_ids,
        "prompt_id": [f"{i // n_pairs:064x}" for i in range(n)],
        "prompt": [prompts[i // n_pairs] for i in range(n)],
        "chosen": ["good"] * n,
        "rejected": ["bad"] * n,
    }
    if scores:
        columns |= {
            "score_chosen": rng.integers(6, 11, n).astype(float),
            "score_rejected": rng.integers(1, 6, n).astype(float),
        }
    pairs = Dataset.from_dict(columns)
    lengths = rng.integers(1, 30, (2, n))
    tokenized = Dataset.from_dict(
        {f"{side}_ids": [[1] * k for k in row] for side, row in zip(("chosen", "rejected"), lengths, strict=True)}
    )
    target = folder / "_selections"
    pool = save_pool(target, pairs, tokenized, with_texts=False)
    for number in range(len(steps)):
        features = np.random.default_rng(number).standard_normal((n, 5)).astype(np.float32)
        selector = DepthSelector(0.5, n_clusters=3)
        if strategy == "gradient":
            selection = selector.select(features, pair_ids, columns["prompt_id"])
            save_feature_sample(target, features, True, 0)
        else:
            selection = selector.select_by_score(features[:, 0], pair_ids, columns["prompt_id"])
        parameters = {
            "depth_fraction": 0.5,
            "depth_strategy": strategy,
            "depth_scope": "per_cluster",
            "min_pairs_per_prompt": 0,
        }
        inputs = {"pool": "ab" * 32, "model": "org/model"}
        manifest = save_selection(target, steps[number], selection, pairs, selection.metrics, inputs, parameters)
    card = CuratedCardData(
        pretty_name="Pairs",
        num_pairs=manifest["outputs"]["num_kept"],
        num_prompts=len(prompts),
        statistics=statistics(pool, selection.selected),
    )
    write_json(target / step_name(steps[-1]) / "card.json", card.to_dict())
    list_selections(target, list(steps))
    return pairs


def save_scores(folder, prompts):
    """Responses with their scores: ties, one that could not be read, and one that is empty."""
    (folder / "_collected").mkdir(parents=True, exist_ok=True)
    n = len(prompts)
    scores = [[5.0, 5.0, None, 7.0], *([[1.0, 2.0, 3.0, None]] * (n - 1))]
    responses = [["a", "b", "c", "d"], *([["a", "b", "c", " "]] * (n - 1))]
    Dataset.from_dict({"prompt": prompts, "responses": responses, "scores": scores}).to_parquet(
        folder / "_collected" / "scores.parquet"
    )


def save_run(folder, prompts, **kwargs):
    """A whole run."""
    save_breadth(folder, prompts, len(prompts) // 2)
    save_scores(folder, prompts)
    save_pairs(folder, prompts, **kwargs)
    stages = [
        {"stage": "rows", "rows": len(prompts), "note": "as they came", "seconds": 3.0, "tokens": None, "cost": None},
        {"stage": "prompts kept (breadth)", "rows": 1, "note": "", "seconds": 1.2, "tokens": None, "cost": None},
        {"stage": "scores", "rows": 4 * len(prompts), "note": "judged", "seconds": 90.0, "tokens": 12345, "cost": 1.5},
    ]
    (folder / "_funnel.json").write_text(json.dumps(stages))
