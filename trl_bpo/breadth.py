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
| `breadth_dropped` | string | why it is not: `duplicate` or `distance`; None for a row that is kept |
"""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset, Value
from safetensors.numpy import save_file
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from .clustering import SCOPES, budget, check_fraction, check_n_clusters, cluster, nearest_to_centre
from .embedding import DEFAULT_ENCODER, embed_texts, require_sentence_transformers
from .manifest import public_name, sha256_of_ids, write_json, write_manifest
from .prompts import EXCERPT_CHARACTERS, prompt_id, render_prompt


logger = logging.getLogger(__name__)

_SAMPLE_ROWS = 4096
_PARAMETERS = ("fraction", "encoder", "n_clusters", "scope", "prompt_column", "batch_size", "seed")

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
            Distinct prompts among them: the `n` of the budget `round(fraction * n)`.
        prompts_kept (`int`):
            Distinct prompts kept.
        duplicates (`int`):
            Rows dropped because they repeat an earlier row.
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
    over_long: int
    n_clusters: int
    variance_explained: float
    by_prompt: pa.Table = field(repr=False)
    embedding_sample: np.ndarray = field(repr=False)
    parameters: dict[str, Any]

    @property
    def kept(self) -> Dataset:
        """The rows that were kept, without `breadth_dropped`."""
        kept = self.dataset.select(np.flatnonzero(self.dataset["breadth_selected"]))
        return kept.remove_columns("breadth_dropped")

    @property
    def dropped(self) -> Dataset:
        """The rows that were not; `breadth_dropped` says why."""
        return self.dataset.select(np.flatnonzero(~np.asarray(self.dataset["breadth_selected"])))

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
        counts = ("rows", "prompts", "prompts_kept", "duplicates", "over_long", "n_clusters", "variance_explained")
        write_json(folder / "metrics.json", {name: getattr(self, name) for name in counts})
        ids = self.by_prompt["prompt_id"]
        kept = ids.filter(self.by_prompt["breadth_selected"])
        write_manifest(
            folder / "manifest.json",
            "breadth",
            inputs={"prompts": sha256_of_ids(ids.to_pylist()), "num_prompts": self.prompts, "num_rows": self.rows},
            parameters={**self.parameters, "encoder": public_name(self.parameters["encoder"])},
            outputs={"kept": sha256_of_ids(kept.to_pylist()), "num_kept": self.prompts_kept, **files},
        )


# Static functions with plain arguments: a `self` in the closure would change the fingerprint and so disable the cache
# of `datasets` (trl#6213).
def _identify(row: dict, prompt_column: str) -> dict[str, str]:
    tools = row.get("tools")
    content = {column: row[column] for column in _CONTENT_COLUMNS if column in row}
    identity = prompt_id(row[prompt_column], tools)
    canonical = json.dumps([identity, content], sort_keys=True, default=str)
    return {"prompt_id": identity, "_row_id": hashlib.sha256(canonical.encode()).hexdigest()}


def _embed(batch: dict[str, list], encoder: str, prompt_column: str, batch_size: int) -> dict[str, Any]:
    tools = batch.get("tools") or [None] * len(batch[prompt_column])
    texts = [render_prompt(prompt, tool) for prompt, tool in zip(batch[prompt_column], tools, strict=True)]
    embeddings, over_long = embed_texts(texts, encoder, batch_size)
    excerpts = [text[:EXCERPT_CHARACTERS] for text in texts]
    return {"_embedding": embeddings, "_over_long": over_long, "_excerpt": excerpts}


def _plane(embeddings: np.ndarray) -> np.ndarray:
    # Where the prompts lie on a map. Its axes mean nothing by themselves.
    n_components = min(2, *embeddings.shape)
    plane = np.zeros((len(embeddings), 2), dtype=np.float32)
    if len(embeddings) == 1:
        return plane
    with threadpool_limits(limits=1):
        plane[:, :n_components] = PCA(n_components, svd_solver="covariance_eigh").fit_transform(embeddings)
    return plane


class BreadthSelector:
    """
    Keep the prompts that represent the others best: stage 1 of BPO (arXiv 2411.10914).

    The prompts are embedded, clustered by K-means, and those nearest to the centres are kept: exactly
    `round(fraction * n)` of the `n` distinct prompts, at least one. Exact duplicates count once. A dataset with several
    rows a prompt (preference pairs, say) keeps all distinct rows of the prompts that are kept. Neither the encoder, nor
    the number of clusters, the distance and the scope are specified by the paper.

    Breadth selection runs before responses are sampled and judged, so it saves labels. Cost: one forward of the encoder
    a distinct prompt, and K-means; the embeddings are cached by `datasets.map`. Memory: `n * d * 8` bytes for the
    embeddings (d = 384 for the default encoder).

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
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt, as text or as messages.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts that are embedded at once.
        seed (`int`, *optional*, defaults to `42`):
            Seed of K-means.

    Raises:
        `ValueError`: If `fraction`, `scope` or `n_clusters` is out of range.
        `ImportError`: If sentence-transformers is not installed.

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
        prompt_column: str = "prompt",
        batch_size: int = 64,
        seed: int = 42,
    ) -> None:
        check_fraction("fraction", fraction)
        if scope not in SCOPES:
            raise ValueError(f"`scope` must be one of {SCOPES}, got {scope!r}.")
        require_sentence_transformers("`BreadthSelector`")
        self.fraction = fraction
        self.encoder = encoder
        self.n_clusters = n_clusters
        self.scope = scope
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
        self._check(dataset)
        dataset = dataset.map(
            _identify, fn_kwargs={"prompt_column": self.prompt_column}, desc="Hashing prompts for breadth selection"
        )
        ids = np.asarray(dataset["prompt_id"])
        row_ids = np.asarray(dataset["_row_id"])
        dataset = dataset.remove_columns("_row_id")
        distinct, first_rows, inverse = np.unique(ids, return_index=True, return_inverse=True)
        if self.n_clusters is not None:
            check_n_clusters("n_clusters", self.n_clusters, len(distinct))

        columns = [column for column in (self.prompt_column, "tools") if column in dataset.column_names]
        embedded = dataset.select(first_rows).select_columns(columns)
        embedded = embedded.map(
            _embed,
            batched=True,
            fn_kwargs={"encoder": self.encoder, "prompt_column": self.prompt_column, "batch_size": self.batch_size},
            remove_columns=columns,
            desc="Embedding prompts",
        ).with_format("numpy")
        over_long = int(np.sum(embedded["_over_long"]))
        embeddings = np.asarray(embedded["_embedding"][:])
        clustering = cluster(embeddings, distinct.tolist(), self.n_clusters, self.seed)
        n_keep = budget(self.fraction, len(distinct))
        selected = nearest_to_centre(clustering, distinct.tolist(), n_keep, self.scope)

        duplicate = np.ones(len(dataset), dtype=bool)
        duplicate[np.unique(row_ids, return_index=True)[1]] = False
        kept = selected[inverse] & ~duplicate
        reasons = [
            None if keep else "duplicate" if copy else "distance" for keep, copy in zip(kept, duplicate, strict=True)
        ]
        annotations = {
            "breadth_cluster": clustering.labels[inverse],
            "breadth_distance": clustering.distances[inverse],
            "breadth_rank": clustering.ranks[inverse],
            "breadth_selected": kept,
            "breadth_dropped": reasons,
        }
        dataset = dataset.remove_columns([name for name in annotations if name in dataset.column_names])
        for name, values in annotations.items():
            # A column of nothing but None would have no type.
            feature = Value("string") if name == "breadth_dropped" else None
            dataset = dataset.add_column(name, values, feature=feature)
        x, y = _plane(embeddings).T
        by_prompt = {
            "prompt_id": distinct,
            "prompt": embedded.with_format("arrow")["_excerpt"][:],
            "rows": np.bincount(inverse),
            "duplicates": np.bincount(inverse[duplicate], minlength=len(distinct)),
            "breadth_cluster": clustering.labels,
            "breadth_distance": clustering.distances,
            "breadth_rank": clustering.ranks,
            "breadth_selected": selected,
            "x": x,
            "y": y,
        }
        in_sample = np.random.default_rng(self.seed).permutation(len(distinct))[:_SAMPLE_ROWS]
        selection = BreadthSelection(
            dataset=dataset,
            rows=len(dataset),
            prompts=len(distinct),
            prompts_kept=n_keep,
            duplicates=int(duplicate.sum()),
            over_long=over_long,
            n_clusters=clustering.n_clusters,
            variance_explained=clustering.variance_explained,
            by_prompt=pa.table(by_prompt),
            embedding_sample=embeddings[np.sort(in_sample)].astype(np.float32),
            parameters={name: getattr(self, name) for name in _PARAMETERS},
        )
        logger.info(
            "Breadth: kept %d of %d distinct prompts (%d rows of %d; %d duplicates dropped; %d over-long prompts "
            "embedded by their last tokens).",
            n_keep,
            len(distinct),
            kept.sum(),
            len(dataset),
            selection.duplicates,
            over_long,
        )
        return selection

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
        for row, prompt in enumerate(dataset[self.prompt_column]):
            if not prompt or not isinstance(prompt, str | list):
                raise ValueError(
                    f"Row {row} has an empty `{self.prompt_column}`. Drop such rows first, for example with "
                    f"`dataset.filter(lambda row: row['{self.prompt_column}'])`."
                )
