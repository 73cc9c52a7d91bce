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


"""Ids of rows, and other columns, without a Python object a row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


if TYPE_CHECKING:
    from datasets import Dataset


# What stands for ids: texts, in Python or in Arrow, or integers that are ordered as the texts are.
Ids: TypeAlias = Sequence[str] | np.ndarray | pa.Array | pa.ChunkedArray


def read_column(dataset: "Dataset", name: str) -> pa.ChunkedArray:
    """
    A column of a dataset. Memory: none where the dataset is on the disk and all of its rows are in their order, else that of
    the column in Arrow.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Name of the column.

    Returns:
        `pyarrow.ChunkedArray`: Its values, in the order of the rows.
    """
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def id_column(dataset: "Dataset", name: str) -> pa.ChunkedArray:
    """
    A column of ids, or of other texts, that may be longer than 2 GB. Memory: that of the texts and 8 bytes a row, so about 70
    for digests of SHA-256.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        name (`str`):
            Name of the column.

    Returns:
        `pyarrow.ChunkedArray`: The ids.
    """
    # Offsets of 64 bits: those of 32 end at 33 million digests.
    return read_column(dataset, name).cast(pa.large_string())


def dense_ranks(ids: Ids) -> np.ndarray:
    """
    Number ids by their order: equal ones get the same number.

    Args:
        ids (`Sequence[str]`, `np.ndarray`, `pyarrow.Array` or `pyarrow.ChunkedArray`):
            The ids. Integers are numbers already, and come back as they are.

    Returns:
        `np.ndarray` of shape `(n,)`, int64: Number of each, from 0.
    """
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        return ids.astype(np.int64, copy=False)
    if not isinstance(ids, pa.Array | pa.ChunkedArray):
        ids = pa.array(ids, pa.large_string())
    return pc.rank(ids, sort_keys="ascending", tiebreaker="dense").to_numpy().astype(np.int64) - 1


def id_at(ids: Ids, row: int) -> str:
    """
    One id as text.

    Args:
        ids (`Sequence[str]`, `np.ndarray`, `pyarrow.Array` or `pyarrow.ChunkedArray`):
            The ids.
        row (`int`):
            Which one.

    Returns:
        `str`: It.
    """
    one: Any = ids[row]
    return one.as_py() if isinstance(one, pa.Scalar) else str(one)
