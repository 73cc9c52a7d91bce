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
Breadth: which prompts stand for the others (stage 1 of BPO).

Columns in: the prompt column, `tools` if there is one. Columns out, beside all that came in:

| column | type | meaning |
| --- | --- | --- |
| `prompt_id` | string | SHA-256 of the canonical JSON of prompt and tools |
| `breadth_cluster` | int64 | K-means cluster of the prompt |
| `breadth_distance` | float64 | Euclidean distance of its unit-length embedding to the centre of that cluster |
| `breadth_rank` | int64 | rank by that distance within the cluster, 0 is the nearest |
| `breadth_selected` | bool | whether the row is kept |
| `breadth_dropped` | string | why it is not: `duplicate`, `near_duplicate` or `distance`; None for a row that is kept |

Cluster, distance and rank of a near duplicate are those of the prompt that it repeats.
"""

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, IterableDataset, Value, concatenate_datasets
from safetensors.numpy import save_file
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from .clustering import (
    METRICS,
    SCOPES,
    Clustering,
    budget,
    check_fraction,
    check_n_clusters,
    cluster,
    nearest_to_centre,
)
from .columns import on_disk
from .embedding import DEFAULT_ENCODER, EmbeddingRows, embed_texts, encoder_fingerprint, require_sentence_transformers
from .ids import dense_ranks, id_column, read_column
from .manifest import public_name, sha256_of_ids, write_json, write_manifest
from .near_duplicates import check_near_duplicates, near_duplicates
from .processes import Attempts, main_process_first, meanwhile, on_main_process
from .prompts import EXCERPT_CHARACTERS, prompt_id, render_prompt
from .rows import Rows, RowsOf


logger = logging.getLogger(__name__)

_SAMPLE_ROWS = 4096
# Prompts that one process embeds at a time. What is embedded when a run is killed is lost up to a shard a process.
_SHARD_ROWS = 16_384
_PARAMETERS = (
    *(
        "fraction",
        "encoder",
        "n_clusters",
        "scope",
        "metric",
        "near_duplicate_threshold",
        "prompt_column",
        "batch_size",
    ),
    "seed",
)

# Two rows of one prompt are duplicates only if they agree on these as well.
_CONTENT_COLUMNS = ("responses", "scores", "completion", "chosen", "rejected", "label")


@dataclass(frozen=True)
class BreadthSelection:
    """
    Result of a breadth selection.

    Attributes:
        dataset ([`~datasets.Dataset`]):
            All rows that came in, in their order, with the `breadth_*` columns.
        rows (`int`):
            Rows that came in.
        prompts (`int`):
            Distinct prompts among them.
        prompts_kept (`int`):
            Distinct prompts kept.
        duplicates (`int`):
            Rows dropped because they repeat an earlier row.
        near_duplicates (`int`):
            Distinct prompts dropped because they nearly repeat another one. The others are the `n` of the budget
            `round(fraction * n)`.
        over_long (`int`):
            Distinct prompts that exceed the encoder's maximum length and were embedded by their last tokens.
        n_clusters (`int`):
            Number of clusters.
        variance_explained (`float`):
            Share of the variance of the embeddings that the clusters explain.
        by_prompt (`pyarrow.Table`):
            One row a distinct prompt, in the order of their ids: `prompt_id`, `prompt` (its first 200 characters), `rows`
            that it has, `duplicates` among them, `breadth_cluster`, `breadth_distance`, `breadth_rank`,
            `breadth_selected`, and `x`, `y`, the first two principal components of its embedding.
        embedding_sample (`np.ndarray` of shape `(m, d)`, float32):
            Embeddings of a random sample of up to 4,096 distinct prompts.
        parameters (`dict[str, Any]`):
            Keyword arguments of the [`BreadthSelector`].
    """

    dataset: Dataset
    rows: int
    prompts: int
    prompts_kept: int
    duplicates: int
    near_duplicates: int
    over_long: int
    n_clusters: int
    variance_explained: float
    by_prompt: pa.Table = field(repr=False)
    embedding_sample: np.ndarray = field(repr=False)
    parameters: dict[str, Any]

    @property
    def kept(self) -> Dataset:
        """The rows that were kept, without `breadth_dropped`."""
        kept = self.dataset.select(np.flatnonzero(read_column(self.dataset, "breadth_selected").to_numpy()))
        return kept.remove_columns("breadth_dropped")

    @property
    def dropped(self) -> Dataset:
        """The rows that were not; `breadth_dropped` says why."""
        return self.dataset.select(np.flatnonzero(~read_column(self.dataset, "breadth_selected").to_numpy()))

    def save(self, path: str | Path) -> None:
        """
        Save what `trl-bpo report` and `trl-bpo explain` read, as the folder `_breadth` of a run: `prompts.parquet` (the
        table `by_prompt`), `metrics.json`, `sample.safetensors` (the `embedding_sample`) and `manifest.json`, which holds
        the parameters that make the selection again and digests of what came in and out. The rows are not saved.

        Args:
            path (`str` or `Path`):
                The folder, created if need be.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: folder / name for name in ("prompts.parquet", "sample.safetensors")}
        pq.write_table(self.by_prompt, files["prompts.parquet"])
        save_file({"embeddings": self.embedding_sample}, files["sample.safetensors"])
        counts = (
            *("rows", "prompts", "prompts_kept", "duplicates", "near_duplicates", "over_long", "n_clusters"),
            "variance_explained",
        )
        write_json(folder / "metrics.json", {name: getattr(self, name) for name in counts})
        ids = self.by_prompt["prompt_id"]
        kept = ids.filter(self.by_prompt["breadth_selected"])
        write_manifest(
            folder / "manifest.json",
            "breadth",
            inputs={"prompts": sha256_of_ids(ids), "num_prompts": self.prompts, "num_rows": self.rows},
            parameters={**self.parameters, "encoder": public_name(self.parameters["encoder"])},
            outputs={"kept": sha256_of_ids(kept), "num_kept": self.prompts_kept, **files},
        )


# Static functions with plain arguments: a `self` in the closure would change the fingerprint and so disable the cache
# of `datasets` (trl#6213).
def _identify(row: dict, prompt_column: str) -> dict[str, str]:
    tools = row.get("tools")
    content = {column: row[column] for column in _CONTENT_COLUMNS if column in row}
    identity = prompt_id(row[prompt_column], tools)
    canonical = json.dumps([identity, content], sort_keys=True, default=str)
    return {
        "prompt_id": identity,
        "_row_id": hashlib.sha256(canonical.encode()).hexdigest(),
        "_excerpt": render_prompt(row[prompt_column], tools)[:EXCERPT_CHARACTERS],
    }


def _embed(
    batch: dict[str, list], encoder: str, prompt_column: str, batch_size: int, content: str | None
) -> dict[str, Any]:
    tools = batch.get("tools") or [None] * len(batch[prompt_column])
    texts = [render_prompt(prompt, tool) for prompt, tool in zip(batch[prompt_column], tools, strict=True)]
    embeddings, over_long = embed_texts(texts, encoder, batch_size, content)
    return {"_embedding": embeddings, "_over_long": over_long}


def _is_empty(prompts: pa.Array) -> np.ndarray:
    if pa.types.is_string(prompts.type) or pa.types.is_large_string(prompts.type):
        lengths = pc.binary_length(prompts)
    elif pa.types.is_list(prompts.type) or pa.types.is_large_list(prompts.type):
        lengths = pc.list_value_length(prompts)
    else:
        return np.ones(len(prompts), dtype=bool)
    return pc.equal(lengths, 0).fill_null(True).to_numpy(zero_copy_only=False)


def _plane(embeddings: Rows, sample: np.ndarray) -> np.ndarray:
    # Where the prompts lie on a map. Its axes mean nothing by themselves.
    n_components = min(2, *sample.shape)
    plane = np.zeros((embeddings.shape[0], 2), dtype=np.float32)
    if len(plane) == 1:
        return plane
    with threadpool_limits(limits=1):
        pca = PCA(n_components, svd_solver="covariance_eigh").fit(sample)
        for start in range(0, len(plane), _SAMPLE_ROWS):
            part = slice(start, start + _SAMPLE_ROWS)
            plane[part, :n_components] = pca.transform(embeddings[part])
    return plane


@dataclass(frozen=True)
class _Places:
    # What the main process works out of the embeddings: a clustering of those prompts that nearly repeat none before them,
    # and for each distinct prompt its place in there, or that of the one it repeats.
    clustering: Clustering
    place: np.ndarray
    selected: np.ndarray
    plane: np.ndarray
    sample: np.ndarray


class BreadthSelector:
    """
    Keep the prompts that represent the others best: stage 1 of BPO (arXiv 2411.10914).

    The prompts are embedded, clustered by K-means, and those nearest to the centres are kept: exactly
    `round(fraction * n)` of the `n` distinct prompts, at least one. Exact duplicates count once. A dataset with several
    rows a prompt (preference pairs, say) keeps all distinct rows of the prompts that are kept. Neither the encoder, nor
    the number of clusters, the distance and the scope are specified by the paper.

    Breadth selection runs before responses are sampled and judged, so it saves labels. Cost: one forward of the encoder
    a distinct prompt, and K-means. Embeddings are made in shards of 16,384 prompts, which `datasets.map` caches, so a run
    that is killed goes on from there if the dataset is on the disk. Memory: about 500 bytes a prompt, and what [`cluster`]
    takes; the embeddings stay on the disk where the dataset is there, else they take `n * d * 4` bytes (d = 384 for the
    default encoder).

    Under several processes (`accelerate launch`) all of them must call it at once. Each embeds its share of the shards on its
    own device, the main process clusters, and all get the same selection. They need no common disk: what is not on that of
    the main process is sent to it, and takes `n * d * 4` bytes there.

    Args:
        fraction (`float`):
            Fraction of the distinct prompts to keep, in (0, 1].
        encoder (`str`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            Sentence-transformers model id or path. Embeddings are scaled to unit length.
        n_clusters (`int`, *optional*):
            Number of clusters. If `None`, `round(sqrt(n / 2))`.
        scope (`str`, *optional*, defaults to `"per_cluster"`):
            `"per_cluster"` keeps the nearest of each cluster, in proportion to its size; `"overall"` keeps the nearest
            of all.
        metric (`str`, *optional*, defaults to `"euclidean"`):
            `"euclidean"` for K-means, `"cosine"` for spherical K-means, whose centres have unit length as the embeddings
            have. Distances are Euclidean in both; between unit vectors they rank as the cosine does.
        near_duplicate_threshold (`float`, *optional*):
            Cosine similarity, in (0, 1], from which two prompts are near duplicates: only the first by id takes part in
            the clustering and can be kept. If `None`, only exact duplicates are dropped. See [`near_duplicates`].
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt, as text or as messages.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts that are embedded at once.
        seed (`int`, *optional*, defaults to `42`):
            Seed of K-means.

    Raises:
        `ValueError`: If `fraction`, `scope`, `metric`, `near_duplicate_threshold` or `n_clusters` is out of range.
        `ImportError`: If sentence-transformers is not installed, or with `near_duplicate_threshold` usearch.

    Example:
    ```python
    >>> from datasets import load_dataset
    >>> from trl_bpo import BreadthSelector

    >>> prompts = load_dataset("trl-lib/ultrafeedback-prompt", split="train")
    >>> selection = BreadthSelector(fraction=0.1).select(prompts)
    >>> selection.kept
    ```
    """

    def __init__(
        self,
        fraction: float,
        encoder: str = DEFAULT_ENCODER,
        *,
        n_clusters: int | None = None,
        scope: str = "per_cluster",
        metric: str = "euclidean",
        near_duplicate_threshold: float | None = None,
        prompt_column: str = "prompt",
        batch_size: int = 64,
        seed: int = 42,
    ) -> None:
        check_fraction("fraction", fraction)
        if scope not in SCOPES:
            raise ValueError(f"`scope` must be one of {SCOPES}, got {scope!r}.")
        if metric not in METRICS:
            raise ValueError(f"`metric` must be one of {METRICS}, got {metric!r}.")
        if near_duplicate_threshold is not None:
            check_near_duplicates(near_duplicate_threshold)
        require_sentence_transformers("`BreadthSelector`")
        self.fraction = fraction
        self.encoder = encoder
        self.n_clusters = n_clusters
        self.scope = scope
        self.metric = metric
        self.near_duplicate_threshold = near_duplicate_threshold
        self.prompt_column = prompt_column
        self.batch_size = batch_size
        self.seed = seed

    def select(self, dataset: Dataset) -> BreadthSelection:
        """
        Annotate every row of a dataset with its cluster, distance and rank, and with whether it is kept.

        Args:
            dataset ([`~datasets.Dataset`]):
                Rows with a prompt column, in TRL's standard or conversational format.

        Returns:
            [`BreadthSelection`]: The annotated dataset, and what was kept and dropped.

        Raises:
            `ValueError`: If the dataset is streaming or empty, lacks the prompt column, has an empty prompt, or has
                fewer distinct prompts than clusters.
        """
        state = PartialState()
        self._check(dataset)
        dataset = main_process_first(state, lambda: self._identified(dataset))
        excerpts = id_column(dataset, "_excerpt")
        prompts, row_ids = dense_ranks(read_column(dataset, "prompt_id")), dense_ranks(read_column(dataset, "_row_id"))
        dataset = dataset.remove_columns(["_row_id", "_excerpt"])
        distinct, first_rows, inverse = np.unique(prompts, return_index=True, return_inverse=True)
        n = len(distinct)
        if self.n_clusters is not None:
            check_n_clusters("n_clusters", self.n_clusters, n)
        columns = [column for column in (self.prompt_column, "tools") if column in dataset.column_names]
        embedded, over_long = self._embedded(dataset.select(first_rows).select_columns(columns), state)
        places: _Places = on_main_process(state, lambda: self._place(EmbeddingRows(embedded)))
        clustering, selected = places.clustering, places.selected
        clusters, distances, ranks = (
            values[places.place] for values in (clustering.labels, clustering.distances, clustering.ranks)
        )
        near_duplicate = np.ones(n, dtype=bool)
        near_duplicate[np.unique(places.place, return_index=True)[1]] = False

        duplicate = np.ones(len(dataset), dtype=bool)
        duplicate[np.unique(row_ids, return_index=True)[1]] = False
        kept = selected[inverse] & ~duplicate
        dropped = pc.if_else(duplicate, "duplicate", "distance")
        dropped = pc.if_else(near_duplicate[inverse] & ~duplicate, "near_duplicate", dropped)
        annotations = {
            "breadth_cluster": clusters[inverse],
            "breadth_distance": distances[inverse],
            "breadth_rank": ranks[inverse],
            "breadth_selected": kept,
            "breadth_dropped": pc.if_else(kept, None, dropped),
        }
        dataset = dataset.remove_columns([name for name in annotations if name in dataset.column_names])
        for name, values in annotations.items():
            # A column of nothing but None would have no type.
            feature = Value("string") if name == "breadth_dropped" else None
            dataset = dataset.add_column(name, values, feature=feature)
        by_prompt = {
            "prompt_id": id_column(dataset, "prompt_id").take(first_rows),
            "prompt": excerpts.take(first_rows),
            "rows": np.bincount(inverse),
            "duplicates": np.bincount(inverse[duplicate], minlength=n),
            "breadth_cluster": clusters,
            "breadth_distance": distances,
            "breadth_rank": ranks,
            "breadth_selected": selected,
            "x": places.plane[:, 0],
            "y": places.plane[:, 1],
        }
        selection = BreadthSelection(
            dataset=dataset,
            rows=len(dataset),
            prompts=n,
            prompts_kept=int(selected.sum()),
            duplicates=int(duplicate.sum()),
            near_duplicates=int(near_duplicate.sum()),
            over_long=over_long,
            n_clusters=clustering.n_clusters,
            variance_explained=clustering.variance_explained,
            by_prompt=pa.table(by_prompt),
            embedding_sample=places.sample,
            parameters={name: getattr(self, name) for name in _PARAMETERS},
        )
        logger.info(
            "Breadth: kept %d of %d distinct prompts (%d rows of %d; %d duplicates dropped; %d prompts dropped as near "
            "duplicates; %d over-long prompts embedded by their last tokens).",
            selection.prompts_kept,
            n,
            kept.sum(),
            len(dataset),
            selection.duplicates,
            selection.near_duplicates,
            over_long,
        )
        return selection

    def _identified(self, dataset: Dataset) -> Dataset:
        return dataset.map(
            _identify, fn_kwargs={"prompt_column": self.prompt_column}, desc="Hashing prompts for breadth selection"
        )

    def _embedded(self, prompts: Dataset, state: PartialState) -> tuple[list[pa.ChunkedArray], int]:
        # Embeddings of all prompts on the main process, and the number of those that are over-long. The shards are the same
        # for any number of processes, so that the embeddings are, and what a killed run has embedded is in the cache.
        num_shards = -(-len(prompts) // _SHARD_ROWS)
        shards = [prompts.shard(num_shards, index, contiguous=True) for index in range(num_shards)]
        own = range(state.process_index, num_shards, state.num_processes)

        def embed() -> dict[int, Dataset]:
            # The content tells apart, in the cache of `datasets` too, what two models gave that were under one name.
            kwargs = {
                "encoder": self.encoder,
                "prompt_column": self.prompt_column,
                "batch_size": self.batch_size,
                "content": encoder_fingerprint(self.encoder),
            }
            return {
                index: shards[index].map(
                    _embed,
                    batched=True,
                    fn_kwargs=kwargs,
                    remove_columns=prompts.column_names,
                    desc="Embedding prompts" + (f", part {index + 1} of {num_shards}" if num_shards > 1 else ""),
                )
                for index in own
            }

        embedded = meanwhile(state, embed)
        over_long = {index: int(pc.sum(read_column(shard, "_over_long")).as_py()) for index, shard in embedded.items()}
        columns = {index: read_column(shard, "_embedding") for index, shard in embedded.items()}
        if state.num_processes > 1:
            over_long = dict(gather_object(list(over_long.items())))
            files = gather_object([(index, shard.cache_files) for index, shard in embedded.items()])
            # Where the processes share a disk, the main one reads what the others have written.
            found = {index: files for index, files in files if files and os.path.exists(files[0]["filename"])}
            readable = [set(found)]
            broadcast_object_list(readable, from_process=0)
            attempt = Attempts(state)

            def read(index: int) -> pa.ChunkedArray:
                files = [Dataset.from_file(file["filename"]) for file in found[index]]
                return read_column(concatenate_datasets(files), "_embedding")

            for index in range(num_shards):
                owner = index % state.num_processes
                if index in readable[0]:
                    if state.is_main_process and owner != 0:
                        columns[index] = attempt(read, index)
                    continue
                # Else they come over the network.
                sent: list[Any] = [columns.get(index) if owner == state.process_index else None]
                broadcast_object_list(sent, from_process=owner)
                if state.is_main_process and owner != 0:
                    table = pa.table({"_embedding": sent[0]})
                    columns[index] = attempt(lambda table=table: read_column(on_disk(table), "_embedding"))
            attempt.check()
        return [columns[index] for index in sorted(columns)], sum(over_long.values())

    def _place(self, embeddings: Rows) -> _Places:
        # The prompts come in the order of their ids.
        n = embeddings.shape[0]
        original = np.arange(n)
        if self.near_duplicate_threshold is not None:
            original = near_duplicates(embeddings, self.near_duplicate_threshold)
        stays = np.flatnonzero(original == np.arange(n))
        if self.n_clusters is not None:
            check_n_clusters("n_clusters", self.n_clusters, len(stays))
        rows = embeddings if len(stays) == n else RowsOf(embeddings, stays)
        clustering = cluster(rows, stays, self.n_clusters, self.seed, self.metric)
        selected = np.zeros(n, dtype=bool)
        selected[stays] = nearest_to_centre(clustering, stays, budget(self.fraction, len(stays)), self.scope)
        in_sample = np.random.default_rng(self.seed).permutation(n)[:_SAMPLE_ROWS]
        sample = embeddings[np.sort(in_sample)]
        return _Places(clustering, np.searchsorted(stays, original), selected, _plane(embeddings, sample), sample)

    def _check(self, dataset: Dataset) -> None:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "`BreadthSelector` cannot cluster a streaming dataset: it must see all prompts. Load it without "
                "`streaming=True`, or take a part with `Dataset.from_list(list(dataset.take(n)))`."
            )
        if self.prompt_column not in dataset.column_names:
            raise ValueError(
                f"The dataset has no `{self.prompt_column}` column, only {dataset.column_names}. Name the one that "
                "holds the prompt with `prompt_column`, or rename it."
            )
        if len(dataset) == 0:
            raise ValueError("The dataset is empty: there is no prompt to select.")
        start = 0
        for batch in dataset.select_columns([self.prompt_column]).with_format("arrow").iter(_SHARD_ROWS):
            empty = _is_empty(batch[self.prompt_column].combine_chunks())
            if empty.any():
                raise ValueError(
                    f"Row {start + int(empty.argmax())} has an empty `{self.prompt_column}`. Drop such rows first, for "
                    f"example with `dataset.filter(lambda row: row['{self.prompt_column}'])`."
                )
            start += len(batch)
