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


"""Prompts that nearly repeat others, found through the approximate nearest neighbours of usearch."""

import numpy as np
from tqdm.auto import tqdm

from .rows import Rows


_ROWS_A_BLOCK = 1024


def check_near_duplicates(threshold: float) -> None:
    """
    Refuse early what [`near_duplicates`] cannot work with.

    Args:
        threshold (`float`):
            Its threshold.

    Raises:
        `ValueError`: If it is not in (0, 1].
        `ImportError`: If usearch is not installed.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(
            f"`near_duplicate_threshold` must be in (0, 1], got {threshold}: a cosine similarity, such as 0.95."
        )
    try:
        import usearch.index  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "`near_duplicate_threshold` requires the `usearch` package. Install it with `pip install 'trl_bpo[dedup]'`."
        ) from error


def near_duplicates(embeddings: Rows, threshold: float) -> np.ndarray:
    """
    Find the rows that nearly repeat an earlier one.

    One row after the other stays unless its similarity to one that stays reaches the threshold. So no two that stay are
    near duplicates, but for the few that the index misses, and a chain of small steps does not make one group. The index
    holds the rows that stay. It is built by one thread, since more would make another one each time. Memory:
    `m * (4 * d + 200)` bytes for the `m` rows that stay.

    Args:
        embeddings ([`Rows`] of shape `(n, d)`):
            Embeddings of unit length, in an order that their content gives.
        threshold (`float`):
            Cosine similarity from which two rows are near duplicates.

    Returns:
        `np.ndarray` of shape `(n,)`, int64: Of each row the earlier one that it repeats, or the row itself if it stays.
    """
    from usearch.index import Index

    n, d = embeddings.shape
    # Products round: a row is to repeat its copy at a threshold of 1.
    threshold -= 1e-6
    index = Index(ndim=d, metric="ip", dtype="f32")
    original = np.arange(n)
    for start in tqdm(range(0, n, _ROWS_A_BLOCK), desc="Finding near duplicates", disable=n <= _ROWS_A_BLOCK):
        part = embeddings[start : start + _ROWS_A_BLOCK]
        repeats = np.full(len(part), -1)
        if len(index):
            found = index.search(part, 1, threads=1)
            earlier = found.keys.reshape(-1).astype(np.int64)
            near = np.einsum("ij,ij->i", part, embeddings[earlier]) >= threshold
            repeats[near] = earlier[near]
        # Those of one block among each other.
        near = part @ part.T >= threshold
        for row in range(len(part)):
            if repeats[row] < 0:
                copies = row + 1 + np.flatnonzero(near[row, row + 1 :])
                repeats[copies[repeats[copies] < 0]] = start + row
        stay = np.flatnonzero(repeats < 0)
        index.add(start + stay, part[stay], threads=1)
        original[start : start + len(part)] = np.where(repeats < 0, start + np.arange(len(part)), repeats)
    return original
