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


"""Points of a clustering that need not be in memory."""

from typing import Any, Protocol

import numpy as np


class Rows(Protocol):
    """Points of a clustering, in memory or on the disk: an array, a memory-mapped file, or what reads like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows and of dimensions."""

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Rows of a slice or an array of indices."""


class RowsOf:
    """
    Some rows of others, read as they are needed.

    Args:
        rows ([`Rows`] of shape `(n, d)`):
            The others.
        indices (`np.ndarray` of shape `(m,)`, int64):
            Which of them.
        norms (`np.ndarray` of shape `(n,)`, *optional*):
            What each of the others is divided by.
    """

    def __init__(self, rows: Rows, indices: np.ndarray, norms: np.ndarray | None = None) -> None:
        self.rows = rows
        self.indices = indices
        self.norms = norms
        self.shape = (len(indices), rows.shape[1])

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        indices = self.indices[index]
        part = self.rows[indices]
        part = part.astype(np.promote_types(part.dtype, np.float32), copy=False)
        return part if self.norms is None else part / self.norms[indices, None].astype(part.dtype)
