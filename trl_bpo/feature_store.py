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
Gradient features on disk, written as they are computed.

A store is a folder of parts, one a process, since file systems of clusters do not bear two writers of one file. A part is
appended to and never written twice:

- `part-00000.json`, its header: what the features are of and how they were made.
- `part-00000.features`, the features, row by row.
- `part-00000.rows`, one record for each of them: which row it is, its scale, and the numbers that came with it. A record
  is written when its features are on the disk, so a row with a record is a row that is done.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor


# Features are forced to the disk at most this often; a killed run loses what it did since.
_FLUSH_SECONDS = 2.0
DTYPES = ("float32", "float16")


def tensors_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """
    Hash of named tensors, such as the weights of a model, computed where they lie.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`):
            Name and tensor. Of a sharded one, the local part is hashed.

    Returns:
        `str`: Hexadecimal digest of names, shapes, types and checksums.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        # ZeRO-3 leaves an empty tensor behind, with the local part as an attribute.
        local = tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.dtype.itemsize]
        # A sum of integers is exact in any order, so it is the same on every device.
        checksum = local.detach().view(integers).sum(dtype=torch.int64).item()
        digest.update(f"{name} {tuple(tensor.shape)} {local.dtype} {checksum}\n".encode())
    return digest.hexdigest()


def rows_hash(rows: Iterable[Sequence[Any]]) -> str:
    """
    Hash of what the rows of a store stand for, in their order.

    Args:
        rows (`Iterable[Sequence[Any]]`):
            Numbers that identify each row.

    Returns:
        `str`: Hexadecimal digest.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row), *row], dtype=np.int64).tobytes())
    return digest.hexdigest()


class StoreMismatchError(ValueError):
    """
    A folder holds features of other rows, of another model or made with other options.

    Attributes:
        folder (`Path`):
            The folder.
        differing (`list[str]`):
            Names of what differs.
    """

    # Sent between processes, an exception is made anew from its message before its attributes are set.
    def __init__(self, message: str, folder: Path = Path(), differing: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.folder = folder
        self.differing = list(differing)


class FeatureStore:
    """
    Features of `n_rows` rows, each of which may be computed already or not.

    Memory: one record a row, about 30 bytes.

    Args:
        folder (`str` or `Path`):
            Folder of the store. It is made, or what it holds is taken up.
        header (`dict[str, Any]`):
            What the features are of and how they were made: hashes, options, seed. Anything that JSON holds.
        n_rows (`int`):
            Number of rows.
        dim (`int`):
            Numbers a feature. May be 0.
        scalars (`Sequence[str]`, *optional*, defaults to `()`):
            Names of further numbers of each row, kept in float64.
        dtype (`str`, *optional*, defaults to `"float32"`):
            `"float32"`, or `"float16"` for half of the space: each row is scaled by its largest entry, and an entry is
            then off by up to 0.05 % of itself or 3e-8 of that largest one.
        part (`int`, *optional*, defaults to `0`):
            Which part this process writes: its rank.
        n_needed (`int`, *optional*):
            Number of rows that will be written at all. If `None`, every one.

    Raises:
        `StoreMismatchError`: If the folder holds features of other rows, of another model or made with other options.
        `OSError`: If the disk has no room for the rows that are missing.
    """

    def __init__(
        self,
        folder: str | Path,
        header: dict[str, Any],
        n_rows: int,
        dim: int,
        *,
        scalars: Sequence[str] = (),
        dtype: str = "float32",
        part: int = 0,
        n_needed: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.n_rows, self.dim, self.scalars = n_rows, dim, tuple(scalars)
        self._dtype = np.dtype(dtype)
        self._record = np.dtype([("row", "<i8"), ("scale", "<f4"), *((name, "<f8") for name in scalars)])
        shape = {"format": 1, "n_rows": n_rows, "dim": dim, "dtype": dtype, "scalars": list(scalars)}
        # As JSON gives it back.
        self._header = json.loads(json.dumps({**shape, **header}))
        self._own = self.folder / f"part-{part:05d}"
        self._descriptors: dict[Path, int] = {}
        # Where each row lies: its part and its place in it.
        self._parts: list[Path] = [self._own]
        self._part_of = np.full(n_rows, -1, dtype=np.int32)
        self._place = np.full(n_rows, -1, dtype=np.int64)
        self._records = np.zeros(n_rows, dtype=self._record)
        self._pending: list[np.ndarray] = []
        self._n_written = 0
        self._flushed = time.monotonic()

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._own.with_suffix(".json")
        if path.is_file() and not self._check(path):
            path.unlink()
        if path.is_file():
            records = self._load(self._own)
            self._n_written = len(records)
            self._take(0, records)
        # Where the folder is shared, these rows take no more room, and a run of fewer processes goes on from them.
        self.read_other_parts()
        n_missing = (n_rows if n_needed is None else n_needed) - int(self.done.sum())
        needed = n_missing * (self._row_bytes + self._record.itemsize)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"The gradient features need {needed / 1e9:.2f} GB more in {self.folder}, where {free / 1e9:.2f} GB are "
                "free. Free space; or delete that folder, and lower `projection_dim` or set `gradient_dtype='float16'`.",
            )
        if not path.is_file():
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self._header, indent=2) + "\n")
            os.replace(temporary, path)
        self._files = [
            os.open(self._own.with_suffix(suffix), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            for suffix in (".features", ".rows")
        ]
        self._drop_incomplete()

    @property
    def _row_bytes(self) -> int:
        return self.dim * self._dtype.itemsize

    @property
    def feature_dtype(self) -> np.dtype:
        """Type of the features as they are read."""
        return np.dtype(np.float32) if self._dtype == np.float16 else self._dtype

    @property
    def done(self) -> np.ndarray:
        """Whether each row is there, bool of shape `(n_rows,)`."""
        return self._part_of >= 0

    def _check(self, path: Path) -> bool:
        # Whether the part with this header can be taken up. One without a row is nothing to lose.
        found = json.loads(path.read_text())
        differing = [name for name in {**self._header, **found} if found.get(name) != self._header.get(name)]
        rows = path.with_suffix(".rows")
        if not differing:
            return True
        if rows.is_file() and rows.stat().st_size >= self._record.itemsize:
            what = "; ".join(f"{name} {found.get(name)!r} there, {self._header.get(name)!r} now" for name in differing)
            raise StoreMismatchError(
                f"The gradient features in {self.folder} are not those of this run: {what}. Start again with what they "
                "were made with, or delete that folder to compute them anew.",
                self.folder,
                differing,
            )
        return False

    def _load(self, part: Path) -> np.ndarray:
        if not part.with_suffix(".rows").is_file():
            return np.zeros(0, dtype=self._record)
        records = np.fromfile(part.with_suffix(".rows"), dtype=self._record)
        if self.dim > 0:
            records = records[: os.path.getsize(part.with_suffix(".features")) // self._row_bytes]
        return records

    def _take(self, part: int, records: np.ndarray) -> None:
        rows, places = records["row"], np.arange(len(records))
        new = self._part_of[rows] < 0
        rows, places = rows[new], places[new]
        self._part_of[rows], self._place[rows], self._records[rows] = part, places, records[new]

    def read_other_parts(self) -> None:
        """Take up the rows that other processes have written to the same folder and this one has not."""
        for header in sorted(self.folder.glob("part-*.json")):
            part = header.with_suffix("")
            if part == self._own or not self._check(header):
                continue
            if part not in self._parts:
                self._parts.append(part)
            self._take(self._parts.index(part), self._load(part))

    def write(self, rows: Sequence[int], features: np.ndarray, **scalars: np.ndarray) -> None:
        """
        Add rows.

        Args:
            rows (`Sequence[int]`):
                Which rows they are.
            features (`np.ndarray` of shape `(len(rows), dim)`):
                Their features.
            **scalars (`np.ndarray` of shape `(len(rows),)`):
                Their further numbers, by name.

        Raises:
            `OSError`: If they cannot be written, as on a full disk. What was done before stays.
        """
        features = np.asarray(features)
        records = np.zeros(len(rows), dtype=self._record)
        records["row"], records["scale"] = rows, 1.0
        if self._dtype == np.float16 and self.dim > 0:
            largest = np.abs(features).max(axis=1)
            # Not finite stays not finite, for the one who reads it to refuse.
            records["scale"] = np.where(largest > 0, largest, 1.0)
            features = features / records["scale"][:, None]
        for name in self.scalars:
            records[name] = scalars[name]
        try:
            _write_all(self._files[0], features.astype(self._dtype).tobytes())
        except OSError as error:
            raise self._failed(error) from error
        self._pending.append(records)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _drop_incomplete(self) -> None:
        # What a killed run or a full disk left behind the last row that is done would shift all that is appended.
        for file, size in zip(self._files, (self._row_bytes, self._record.itemsize), strict=True):
            os.ftruncate(file, size * self._n_written)

    def _failed(self, error: OSError) -> OSError:
        self._pending.clear()
        self._drop_incomplete()
        return OSError(
            error.errno,
            f"{error.strerror}: the gradient features cannot be written to {self.folder}, which holds "
            f"{int(self.done.sum())} of {self.n_rows} rows. Make room there and start again: it goes on from there.",
        )

    def flush(self) -> None:
        """
        Force what was written to the disk, and count it as done.

        Raises:
            `OSError`: If that fails, as on a full disk. What was done before stays.
        """
        if self._pending:
            records = np.concatenate(self._pending)
            try:
                os.fsync(self._files[0])
                _write_all(self._files[1], records.tobytes())
                os.fsync(self._files[1])
            except OSError as error:
                raise self._failed(error) from error
            self._pending.clear()
            rows = records["row"]
            self._part_of[rows] = 0
            self._place[rows] = np.arange(self._n_written, self._n_written + len(rows))
            self._records[rows] = records
            self._n_written += len(rows)
        self._flushed = time.monotonic()

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """
        Features of rows that are done.

        Args:
            rows (`Sequence[int]` or `np.ndarray`):
                Which rows.

        Returns:
            `np.ndarray` of shape `(len(rows), dim)`: Their features, float32, or float64 where they are stored so.
        """
        self.flush()
        features = np.empty((len(rows), self.dim), dtype=self._dtype)
        for feature, row in zip(features, rows, strict=True):
            part = self._parts[self._part_of[row]]
            if part not in self._descriptors:
                self._descriptors[part] = os.open(part.with_suffix(".features"), os.O_RDONLY)
            # Not mapped into memory: mapped pages count as the process's own.
            chunk = os.pread(self._descriptors[part], self._row_bytes, int(self._place[row]) * self._row_bytes)
            feature[:] = np.frombuffer(chunk, dtype=self._dtype)
        if self._dtype != np.float16:
            return features
        return features.astype(np.float32) * self._records["scale"][np.asarray(rows, dtype=np.int64), None]

    def scalar(self, name: str) -> np.ndarray:
        """
        A further number of every row.

        Args:
            name (`str`):
                Its name.

        Returns:
            `np.ndarray` of shape `(n_rows,)`: Its values, 0 for a row that is not done.
        """
        self.flush()
        return self._records[name]

    def close(self) -> None:
        """Flush, and close the files. What was written can still be read, which opens files that another call closes."""
        try:
            self.flush()
        finally:
            for file in (*self._files, *self._descriptors.values()):
                os.close(file)
            self._files.clear()
            self._descriptors.clear()


def _write_all(file: int, data: bytes) -> None:
    # A write may take a part only, as the last one before a disk is full does.
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
