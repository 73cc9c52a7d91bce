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
K-means that trains on a sample and assigns in a stream: as many rows as there are on the disk, on a GPU where there is one.

Sums over rows are exact: what is added is rounded to a grid so fine that no sum of all rows needs more than the 53 bits of a
float64. So neither the number of threads nor the order of the rows changes a bit of the centres.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .rows import Rows


# Training rows a cluster. With this many the inertia is within half a percent of that of all rows.
_ROWS_PER_CLUSTER = 256
_MIN_TRAINING_ROWS = 32_768
_MAX_TRAINING_BYTES = 2**31
# Lloyd's algorithm starts on a small part of the training rows, where an iteration costs little, and ends on all of them.
_SEEDING_ROWS_PER_CLUSTER = 16
_STAGES = (32, 64, 128, _ROWS_PER_CLUSTER)
_MAX_ITERATIONS = 25
_TOLERANCE = 1e-3
# Small enough on a CPU that the distances to the centres stay in its cache.
_ROWS_A_BLOCK = {"cpu": 2048, "cuda": 65_536}


class _Shifted:
    # Distances are worked out from inner products, which lose their digits where all rows lie far from the origin.
    def __init__(self, rows: Rows, shift: np.ndarray) -> None:
        self.rows = rows
        self.shift = shift
        self.shape = rows.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.rows[index].astype(np.float32) - self.shift


@dataclass(frozen=True)
class KMeansFit:
    """
    Result of [`fit_kmeans`].

    Attributes:
        labels (`np.ndarray` of shape `(n,)`, int64):
            Centre that each row is nearest to.
        distances (`np.ndarray` of shape `(n,)`, float64):
            Euclidean distance to it.
        variance_explained (`float`):
            `1 - inertia / total sum of squares` over the rows; 0.0 if all rows coincide.
    """

    labels: np.ndarray
    distances: np.ndarray
    variance_explained: float


def _grid(n: int, largest: float) -> float:
    # The sum of `n` numbers as large as the largest one takes 48 bits. A row far out may take a few more.
    return 2.0 ** (48 - np.ceil(np.log2(max(n, 2))) - np.ceil(np.log2(max(largest, 1e-30))))


@contextmanager
def _one_thread() -> Iterator[int]:
    # A product that threads share may round in another way with another number of them.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield n_threads
    finally:
        torch.set_num_threads(n_threads)


def _kmeans_plusplus(rows: torch.Tensor, n_clusters: int, seed: int) -> np.ndarray:
    # Greedy k-means++ as scikit-learn has it (2 + log(k) trials a centre, of which the best stays), in float32 and where
    # the rows are: three times as fast on a CPU.
    rng = np.random.default_rng(seed)
    squares = (rows * rows).sum(dim=1)
    # A distance is at most twice the largest norm.
    grid = _grid(len(rows), 4.0 * float(squares.max()))
    trials = torch.from_numpy(rng.integers(len(rows), size=1)).to(rows.device)
    to_chosen = torch.full_like(squares, torch.inf)
    centres = []
    while True:
        to_trials = torch.addmm(squares, rows[trials], rows.T, alpha=-2.0).add_(squares[trials, None]).clamp_(min=0.0)
        torch.minimum(to_trials, to_chosen, out=to_trials)
        best = (to_trials.double() * grid).round_().sum(dim=1).argmin()
        centres.append(trials[best])
        if len(centres) == n_clusters:
            return rows[torch.stack(centres)].cpu().numpy()
        to_chosen = to_trials[best]
        # A row is drawn by its squared distance to the nearest centre.
        cumulated = (to_chosen.double() * grid).round_().cumsum(dim=0)
        draws = torch.from_numpy(rng.random(2 + int(np.log(n_clusters)))).to(rows.device)
        trials = torch.searchsorted(cumulated, draws * cumulated[-1], right=True).clamp_(max=len(rows) - 1)


class _Lloyd:
    """Lloyd's algorithm over rows that are read block by block."""

    def __init__(self, n: int, largest: float, device: str, spherical: bool) -> None:
        self.device = device
        self.spherical = spherical
        self.grid = _grid(n, largest)

    def _over_blocks(self, work: Callable, rows: Rows) -> Iterator[tuple]:
        size = _ROWS_A_BLOCK[self.device]
        blocks = (slice(start, min(rows.shape[0], start + size)) for start in range(0, rows.shape[0], size))

        def read_and_work(block: slice) -> tuple:
            part = np.array(rows[block], dtype=np.float32)
            return block, *work(torch.from_numpy(part).to(self.device))

        if self.device != "cpu" or torch.get_num_threads() == 1:
            yield from map(read_and_work, blocks)
            return
        # One thread a block.
        with _one_thread() as n_threads, ThreadPoolExecutor(n_threads) as executor:
            # Not all at once, as each holds a block and its distances.
            waiting: deque[Future] = deque()
            for block in blocks:
                waiting.append(executor.submit(read_and_work, block))
                if len(waiting) > n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _nearest(self, part: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The squared distance to each centre, without that to the origin, which is the same for all of them.
        return torch.addmm((centres**2).sum(dim=1), part, centres.T, alpha=-2.0).min(dim=1)

    def step(self, rows: Rows, centres: np.ndarray) -> tuple[np.ndarray, float]:
        """The means of the rows nearest to each centre, and the inertia that they had."""
        k, inertia = len(centres), 0.0
        old = torch.from_numpy(centres).to(self.device)
        sums = torch.zeros(centres.shape, dtype=torch.float64, device=self.device)
        counts = torch.zeros(k, dtype=torch.int64, device=self.device)
        farthest: list[tuple[float, int]] = []

        def work(part: torch.Tensor) -> tuple:
            nearest, labels = self._nearest(part, old)
            squares = nearest + (part * part).sum(dim=1)
            return (
                labels,
                part.double().mul_(self.grid).round_(),
                float(squares.sum(dtype=torch.float64)),
                squares.max(dim=0),
            )

        for block, labels, on_grid, inertia_of_block, (square, row) in self._over_blocks(work, rows):
            sums.index_add_(0, labels, on_grid)
            counts += torch.bincount(labels, minlength=k)
            inertia += inertia_of_block
            farthest.append((float(square), block.start + int(row)))
        new = (sums / self.grid / counts.clamp(min=1)[:, None]).cpu().numpy()
        # An empty cluster starts again from a row that lies far from all centres.
        for empty, (_, row) in zip(np.flatnonzero(counts.cpu().numpy() == 0), sorted(farthest)[::-1], strict=False):
            new[empty] = rows[row : row + 1][0]
        if self.spherical:
            new /= np.maximum(np.linalg.norm(new, axis=1, keepdims=True), 1e-30)
        return new.astype(np.float32), inertia

    def run(self, rows: Rows, centres: np.ndarray) -> np.ndarray:
        """Centres after as many steps as lower the inertia by more than the tolerance."""
        before = np.inf
        for _ in range(_MAX_ITERATIONS):
            centres, inertia = self.step(rows, centres)
            if inertia >= before * (1.0 - _TOLERANCE):
                break
            before = inertia
        return centres

    def assign(self, rows: Rows, centres: np.ndarray) -> KMeansFit:
        """Where each row lies."""
        on_device = torch.from_numpy(centres).to(self.device)
        own = on_device.double()

        def work(part: torch.Tensor) -> tuple:
            labels = self._nearest(part, on_device)[1]
            part = part.double()
            squares = ((part - own[labels]) ** 2).sum(dim=1)
            return labels.cpu().numpy(), squares.cpu().numpy(), part.sum(dim=0), float((part**2).sum())

        n = rows.shape[0]
        labels, squares = np.empty(n, dtype=np.int64), np.empty(n)
        sum_of_rows, total = torch.zeros(rows.shape[1], dtype=torch.float64, device=self.device), 0.0
        for block, *found, sum_of_block, total_of_block in self._over_blocks(work, rows):
            labels[block], squares[block] = found
            sum_of_rows += sum_of_block
            total += total_of_block
        around_mean = total - float((sum_of_rows**2).sum()) / n
        # The mean of equal rows is rounded, so that their total is not exactly zero.
        coincide = around_mean <= 1e-12 * total
        return KMeansFit(labels, np.sqrt(squares), 0.0 if coincide else 1.0 - float(squares.sum()) / around_mean)


def fit_kmeans(
    rows: Rows, order: np.ndarray, n_clusters: int, seed: int = 42, spherical: bool = False, device: str | None = None
) -> KMeansFit:
    """
    Cluster rows of any number: train on a random sample of up to 256 rows a cluster (at least 32,768 rows, at most 2 GB),
    then move the centres to the means of all rows once, and assign all rows.

    The training starts from k-means++ centres and runs Lloyd's algorithm on growing parts of the sample, each until the
    inertia falls by less than a thousandth. All rows are read twice, in blocks. Memory beside the result (16 bytes a row):
    the sample in float32, and about `13 * (d + n_clusters) * 1024` bytes a thread.

    Args:
        rows ([`Rows`] of shape `(n, d)`):
            The points. They are computed with in float32.
        order (`np.ndarray` of shape `(n,)`, int64):
            Row at each place of an order that the content of the rows gives, from which the sample is drawn.
        n_clusters (`int`):
            Number of clusters.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sample and of the start.
        spherical (`bool`, *optional*, defaults to `False`):
            Whether centres are scaled to unit length. With rows of unit length the nearest centre is then that of the
            largest cosine.
        device (`str`, *optional*):
            `"cpu"` or `"cuda"`. If `None`, the GPU if there is one.

    Returns:
        [`KMeansFit`]: Where each row lies.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    n, d = rows.shape
    n_training = max(_ROWS_PER_CLUSTER * n_clusters, _MIN_TRAINING_ROWS)
    n_training = min(n, max(n_clusters, min(n_training, _MAX_TRAINING_BYTES // (4 * d))))
    drawn = np.random.default_rng(seed).permutation(n)[:n_training]
    sample = np.empty((n_training, d), dtype=np.float32)
    # A file is read in its own order.
    wanted = order[drawn]
    in_file = np.argsort(wanted, kind="stable")
    for start in range(0, n_training, _ROWS_A_BLOCK["cpu"]):
        places = in_file[start : start + _ROWS_A_BLOCK["cpu"]]
        sample[places] = rows[wanted[places]]
    if not spherical:
        shift = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        sample -= shift
        rows = _Shifted(rows, shift)
    lloyd = _Lloyd(n, float(np.abs(sample).max()), device, spherical)
    sizes = [min(n_training, size * n_training // _STAGES[-1]) for size in _STAGES]
    sizes = [size for size in sizes if size >= 4 * n_clusters] or [n_training]
    seeds = sample[: max(n_clusters, min(sizes[0], _SEEDING_ROWS_PER_CLUSTER * n_clusters))]
    with _one_thread():
        centres = _kmeans_plusplus(torch.from_numpy(seeds).to(device), n_clusters, seed)
    for size in sizes:
        centres = lloyd.run(sample[:size], centres)
    centres, _ = lloyd.step(rows, centres)
    return lloyd.assign(rows, centres)
