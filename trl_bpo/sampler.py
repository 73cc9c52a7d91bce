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

"""The sampler that yields the active pairs of a pool."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Sampler


class ActivePairsSampler(Sampler[int]):
    """
    Yields the rows of the pool that the last selection kept, in a random order that is drawn anew for each pass.

    The pool stays the training dataset and the length stays the budget, so optimizer, schedule and step count never
    notice a re-selection. A selection opens a stream of passes over its rows; each iteration takes the next `len(self)`
    positions of it from `start` on. The order depends on the seed, the number of the selection and the position alone,
    not on global random state, so a resumed run finds its place.

    Args:
        num_samples (`int`):
            Rows an iteration yields: the budget of the selection.
        seed (`int`):
            Seed of the order.

    Attributes:
        start (`int`):
            Position in the stream at which the next iteration begins.
        already_drawn (`int`):
            Rows of the epoch that an earlier iterator has drawn: the next iteration yields that many fewer.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.start = 0
        self.already_drawn = 0
        self._rows = np.arange(0)
        self._selection = 0
        # An iterator that reads ahead and the trainer that counts may stand in two passes.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def set_rows(self, rows: np.ndarray, selection: int) -> None:
        """
        Set the rows that the next iterations yield.

        Args:
            rows (`np.ndarray` of shape `(num_active,)`, int64):
                Rows of the pool.
            selection (`int`):
                Number of the selection, which changes the order.
        """
        self._rows = rows
        self._selection = selection
        self._order.cache_clear()

    def _draw_order(self, pass_index: int) -> np.ndarray:
        seeds = np.random.SeedSequence([self.seed, self._selection, pass_index])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        return self._rows[torch.randperm(len(self._rows), generator=generator).numpy()]

    def rows_at(self, start: int, count: int) -> np.ndarray:
        """
        Rows at consecutive positions of the stream.

        Args:
            start (`int`):
                First position.
            count (`int`):
                Number of positions.

        Returns:
            `np.ndarray` of shape `(count,)`, int64: Rows of the pool.
        """
        pass_index, offset = divmod(start, len(self._rows))
        parts = []
        while count > 0:
            parts.append(self._order(pass_index)[offset : offset + count])
            count -= len(parts[-1])
            pass_index, offset = pass_index + 1, 0
        return np.concatenate(parts) if parts else self._rows[:0]

    def __iter__(self) -> Iterator[int]:
        yield from self.rows_at(self.start, self.num_samples - self.already_drawn).tolist()

    def __len__(self) -> int:
        return self.num_samples
