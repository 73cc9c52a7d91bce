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


"""Columns that are computed row by row, on the disk from the first row on."""

import hashlib
import os
import platform
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, Features, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import get_temporary_cache_files_directory

from .processes import Attempts, meanwhile


# Rows that are sent to the other processes at a time.
_ROWS_AT_A_TIME = 1000


def _new_file() -> str:
    handle, path = tempfile.mkstemp(suffix=".arrow", dir=get_temporary_cache_files_directory())
    os.close(handle)
    return path


def _read(path: str) -> Dataset:
    # Named by its content, so that what is computed from the same rows again is found in the cache.
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Dataset(Dataset.from_file(path).data, fingerprint=digest[:16])


def write_rows(rows: Iterable[dict[str, Any]], features: Features) -> Dataset:
    """
    Write rows to a file as they come.

    Args:
        rows (`Iterable[dict]`):
            The rows.
        features ([`~datasets.Features`]):
            Their columns.

    Returns:
        [`~datasets.Dataset`]: The rows, mapped from a file that ends with this process.
    """
    path = _new_file()
    with ArrowWriter(path=path, features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    return _read(path)


def on_disk(table: pa.Table) -> Dataset:
    """
    Move a table from memory to a file.

    Args:
        table (`pyarrow.Table`):
            The table.

    Returns:
        [`~datasets.Dataset`]: Its rows, mapped from a file that ends with this process.
    """
    path = _new_file()
    with ArrowWriter(path=path, schema=table.schema) as writer:
        writer.write_table(table)
        writer.finalize()
    return Dataset.from_file(path)


def gathered(state: Any, own: Dataset, rows: np.ndarray) -> Dataset:
    """
    Bring the rows of all processes to all of them: through the network, and to one file a machine. All processes must call
    this. Memory: 24 bytes a row of all, and 1,000 rows.

    Args:
        state ([`~accelerate.PartialState`]):
            The processes.
        own ([`~datasets.Dataset`]):
            Rows of this process from [`write_rows`], with the same columns on each. Their file is removed.
        rows (`np.ndarray` of shape `(len(own),)`):
            Which rows of the whole these are.

    Returns:
        [`~datasets.Dataset`]: The whole, in the order of its rows.

    Raises:
        `OSError`: If the rows cannot be written, for example because the disk is full, or processes of a machine do not
            share its temporary folder; on the other processes, a `RuntimeError` with the same text.
    """
    order = np.concatenate(gather_object([rows]))
    sizes = gather_object([len(own)])
    table = own.with_format("arrow")
    path = writer = None
    attempt = Attempts(state)
    if state.is_local_main_process:
        path = attempt(_new_file)
        writer = attempt(ArrowWriter, path=path, features=own.features)
    for process, size in enumerate(sizes):
        for start in range(0, size, _ROWS_AT_A_TIME):
            part: list[Any] = [None]
            if process == state.process_index:
                part = [table[start : start + _ROWS_AT_A_TIME].combine_chunks()]
            broadcast_object_list(part, from_process=process)
            if writer is not None:
                attempt(writer.write_table, part[0])
    if writer is not None:
        attempt(writer.finalize)
        if not np.array_equal(order, np.arange(len(order))):
            path = attempt(_reordered, path, np.argsort(order), own.features)

    attempt.check()
    paths = gather_object([(platform.node(), path)])
    whole = meanwhile(state, lambda: _read(_nearest(paths)))
    for file in own.cache_files:
        # A file that is open cannot be removed everywhere. This one ends with the process anyway.
        with suppress(OSError):
            os.remove(file["filename"])
    return whole


def _nearest(paths: list[tuple[str, str | None]]) -> str:
    # Of this machine, where there is one: ranks need not be in the order of the machines.
    visible = [(node != platform.node(), path) for node, path in paths if path is not None and os.path.exists(path)]
    if not visible:
        raise OSError(
            f"This process on `{platform.node()}` does not see what the first process of its machine has written. Set "
            "`TMPDIR` to a folder that all processes of a machine share."
        )
    return min(visible)[1]


def _reordered(path: str, rows: np.ndarray, features: Features) -> str:
    # In a file of its own: what is chosen by number is copied whenever columns are put beside it.
    new_path = _new_file()
    with ArrowWriter(path=new_path, features=features) as writer:
        for table in Dataset.from_file(path).select(rows).with_format("arrow").iter(_ROWS_AT_A_TIME):
            writer.write_table(table.combine_chunks())
        writer.finalize()
    os.remove(path)
    return new_path


def beside(dataset: Dataset, columns: Dataset) -> Dataset:
    """
    Put columns beside those of a dataset. Nothing is copied, but where the rows of the dataset are chosen by number (as by
    `Dataset.select`) they are written out one after the other first, by `datasets` to its cache.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        columns ([`~datasets.Dataset`]):
            As many rows in a file of their own, with other columns.

    Returns:
        [`~datasets.Dataset`]: Both.
    """
    # Else `concatenate_datasets` would write out both of them.
    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    return concatenate_datasets([dataset, columns], axis=1)
