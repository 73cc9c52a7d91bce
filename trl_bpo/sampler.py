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

    def _order(self, pass_index: int) -> np.ndarray:
        seeds = np.random.SeedSequence([self.seed, self._selection, pass_index])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        return self._rows[torch.randperm(len(self._rows), generator=generator).numpy()]

    def __iter__(self) -> Iterator[int]:
        pass_index, offset = divmod(self.start, len(self._rows))
        left = self.num_samples - self.already_drawn
        while left > 0:
            rows = self._order(pass_index)[offset : offset + left].tolist()
            yield from rows
            left -= len(rows)
            pass_index, offset = pass_index + 1, 0

    def __len__(self) -> int:
        return self.num_samples
