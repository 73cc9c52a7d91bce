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


"""Folders of runs to explain: selections by features or scores that a test chooses, saved as a training saves them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from pairs import config
from pairs import pairs as random_pairs

from trl_bpo import BPOTrainer, BreadthSelector, DepthSelector
from trl_bpo.manifest import write_json
from trl_bpo.run_folder import RunFolder
from trl_bpo.selection_state import list_selections, save_selection
from trl_bpo.strategies import RULE_OF_STRATEGY


def hashed(kind, number):
    """An id of 64 characters that begins with the kind and the number."""
    return f"{kind}{number:05d}".ljust(64, "0")


def real_run(model, encoder, folder):
    """Breadth by a real encoder, on prompts with repeats, then a training with three selections."""
    rows = list(random_pairs(40, 2))
    # One row again, and one prompt with a third pair.
    rows += [rows[5], {**rows[0], "chosen": " red", "rejected": " blue"}]
    breadth = BreadthSelector(0.4, encoder, n_clusters=5).select(Dataset.from_list(rows))
    breadth.save(folder / "_breadth")
    kept = breadth.kept.select_columns(["prompt", "chosen", "rejected"])
    options = {"reselect_every_steps": 3, "max_steps": 8, "per_device_train_batch_size": 4}
    args = config(folder, depth_fraction=0.3, depth_clusters=4, **options)
    BPOTrainer(model, args=args, train_dataset=kept).train()
    return RunFolder(folder)


def save_selections(
    folder, measures, strategy="gradient", scope="per_cluster", floor=0, fraction=0.5, prompts=None, ids=None, of=3
):
    """
    Selections at the steps 0, 5, ... by what `measures` has for each: features if it has two axes, scores if one. `of`
    pairs a prompt. Returns the run and the selections.
    """
    n = len(measures[0])
    pair_ids = ids or [hashed("a", (7 * i) % n) for i in range(n)]
    prompt_ids = [hashed("b", i // of) for i in range(n)]
    texts = prompts or [f"What about {i}?" for i in range(-(-n // of))]
    pairs = Dataset.from_dict({"pair_id": pair_ids, "prompt_id": prompt_ids, "chosen": ["x"] * n})
    target, selections, steps = folder / "_selections", [], []
    for number, measured in enumerate(measures):
        rule = RULE_OF_STRATEGY.get(strategy, "nearest")
        selector = DepthSelector(fraction, n_clusters=4, scope=scope, rule=rule, min_pairs_per_prompt=floor)
        if measured.ndim == 2:
            selection = selector.select(measured, pair_ids, prompt_ids, number)
        else:
            selection = selector.select_by_score(measured, pair_ids, prompt_ids)
        parameters = {"depth_fraction": fraction, "depth_strategy": strategy, "depth_scope": scope}
        parameters |= {"min_pairs_per_prompt": floor, "normalize_gradients": True}
        steps.append(5 * number)
        save_selection(target, steps[-1], selection, pairs, selection.metrics, {}, parameters)
        list_selections(target, steps)
        selections.append(selection)
    table = {"pair_id": pair_ids, "prompt_id": prompt_ids, "prompt": [texts[i // of] for i in range(n)]}
    pq.write_table(pa.table(table), target / "pool.parquet")
    return RunFolder(folder), selections


def save_breadth(folder, table, **parameters):
    """A breadth selection as the table of its prompts, which lacks the coordinates."""
    (folder / "_breadth").mkdir(parents=True)
    pq.write_table(pa.table(table), folder / "_breadth" / "prompts.parquet")
    parameters = {"fraction": 0.5, "scope": "per_cluster", **parameters}
    write_json(folder / "_breadth" / "manifest.json", {"parameters": parameters})


def largest_remainder(ids, clusters, n_keep):
    """How many each cluster may keep, worked out in fractions of integers."""
    sizes = {label: list(clusters).count(label) for label in set(clusters)}
    quotas = {label: n_keep * size // len(ids) for label, size in sizes.items()}
    first = {label: min(one for one, own in zip(ids, clusters, strict=True) if own == label) for label in sizes}
    order = sorted(sizes, key=lambda label: (-(n_keep * sizes[label] % len(ids)), first[label]))
    for label in order[: n_keep - sum(quotas.values())]:
        quotas[label] += 1
    return quotas


def nearest(ids, clusters, distances, n_keep):
    """
    What the nearest to the centres are, by distances alone: of each row whether it is kept, its rank, and rank and
    distance of the last kept of its cluster.
    """
    quotas = largest_remainder(ids, clusters, n_keep)
    found = [None] * len(ids)
    for label, quota in quotas.items():
        rows = [row for row in range(len(ids)) if clusters[row] == label]
        rows.sort(key=lambda row: (distances[row], ids[row]))
        cut = (quota - 1, distances[rows[quota - 1]]) if quota else (None, None)
        for rank, row in enumerate(rows):
            found[row] = (rank < quota, rank, *cut)
    return found


def random_features(n, seed=0, dim=5):
    """Features of pairs."""
    return np.random.default_rng(seed).standard_normal((n, dim))
