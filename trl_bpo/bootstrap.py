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

"""How sure a comparison of training runs is: bootstrap over seeds and prompts, and Holm's correction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


# Resamples that are held in memory at once.
_CHUNK = 500


@dataclass(frozen=True)
class Contrast:
    """
    Difference of two arms on the same seeds and prompts.

    Args:
        mean (`float`):
            Mean difference, scores minus baseline.
        low (`float`):
            Lower end of its interval.
        high (`float`):
            Upper end of its interval.
        p_value (`float`):
            Two-sided p-value of no difference, never 0.
        num_seeds (`int`):
            Seeds that were compared. With 1 the interval holds for this one pair of runs, not for the arms.
        num_prompts (`int`):
            Prompts with a score in both arms for at least one seed.
        num_missing (`int`):
            Cells of seeds x prompts that were left out because one of the two arms has no score there.
    """

    mean: float
    low: float
    high: float
    p_value: float
    num_seeds: int
    num_prompts: int
    num_missing: int


def _check(level: float, num_resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level}. Pass the coverage of the interval as a fraction, such as 0.95.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` is {num_resamples}. Pass at least 1; 10,000 is usual.")


def _counts(rng: np.random.Generator, num_resamples: int, size: int) -> np.ndarray:
    # How often each of `size` units is drawn in each resample: rows sum to `size`.
    draws = rng.integers(size, size=(num_resamples, size)) + size * np.arange(num_resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=num_resamples * size).reshape(num_resamples, size).astype(float)


def _chunks(num_resamples: int) -> list[int]:
    full, rest = divmod(num_resamples, _CHUNK)
    return [_CHUNK] * full + [rest] * bool(rest)


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, num_resamples: int = 10_000, seed: int = 42
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of a mean.

    Args:
        values (`Sequence[float]`):
            Independent values, such as the scores of one run, one a prompt.
        level (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.
        num_resamples (`int`, *optional*, defaults to `10_000`):
            Number of resamples.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the resampling.

    Returns:
        `tuple[float, float]`: Lower and upper end.

    Raises:
        `ValueError`: If there is no value or one is NaN, or an option is out of range.
    """
    _check(level, num_resamples)
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or not sample.size:
        raise ValueError(f"`values` has the shape {sample.shape}. Pass a flat sequence with at least one value.")
    missing = int(np.isnan(sample).sum())
    if missing:
        raise ValueError(f"`values` has {missing} NaN. Leave them out, and report how many there were.")
    rng = np.random.default_rng(seed)
    draws = [_counts(rng, size, sample.size) @ sample / sample.size for size in _chunks(num_resamples)]
    return _percentiles(np.concatenate(draws), level)


def paired_contrast(
    scores: np.ndarray,
    baseline: np.ndarray,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 42,
) -> Contrast:
    """
    Difference of two arms, paired over seeds and over prompts, by a bootstrap on both levels.

    The model is a crossed one: the difference on a seed and a prompt is the mean difference, plus an effect of the
    seed (the training run), plus an effect of the prompt, plus a rest. A resample draws seeds with replacement and,
    apart from them, prompts with replacement, and averages the differences on the drawn rows and columns. So the
    interval speaks of new seeds and of new prompts like these. It is conditional on all that the runs share: the pool,
    the models, the settings and the judge, whose systematic errors it does not see. Prompts count as independent of
    each other; near-duplicates among them make it too narrow. The rest is resampled along both ways, which counts it
    up to three times: where it dominates, the interval is wider than needed.

    The plain percentile bootstrap is too narrow with few seeds, in two ways, and both are corrected. The variance of
    `n` resampled seeds is `(n - 1) / n` of what it should be, hence the effects of the seeds are stretched by
    `sqrt(n / (n - 1))`. And a variance from few seeds is itself uncertain, which Student's t accounts for: in each
    resample the seeds' part is divided by an independent `sqrt(chi2 / (n - 1))` with `n - 1` degrees of freedom. With
    2 or 3 seeds the interval is therefore very wide, as it should be. With one seed nothing is known about other
    seeds, and only prompts are resampled.

    Args:
        scores (`np.ndarray` of shape `(num_seeds, num_prompts)`):
            Scores of the arm. NaN where a prompt has none; such a cell is left out of both arms and counted in
            `num_missing`. This assumes that a score is missing for reasons that have nothing to do with its value.
        baseline (`np.ndarray` of shape `(num_seeds, num_prompts)`):
            Scores of the other arm, with the same seeds in rows and the same prompts in columns.
        level (`float`, *optional*, defaults to `0.95`):
            Coverage of the interval.
        num_resamples (`int`, *optional*, defaults to `10_000`):
            Number of resamples.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the resampling.

    Returns:
        [`Contrast`]: The difference. Its p-value is twice the smaller share of resamples on one side of 0, the resample
        of the data itself counted among them, so that it agrees with the interval and is at least
        `2 / (num_resamples + 1)`.

    Raises:
        `ValueError`: If the shapes differ or are not two-dimensional, a seed has no prompt with both scores, or an
            option is out of range.
    """
    _check(level, num_resamples)
    scores, baseline = np.asarray(scores, dtype=float), np.asarray(baseline, dtype=float)
    if scores.shape != baseline.shape or scores.ndim != 2 or not scores.size:
        raise ValueError(
            f"`scores` and `baseline` have the shapes {scores.shape} and {baseline.shape}. Pass two arrays of the same "
            "shape (num_seeds, num_prompts), with the same seeds in rows and the same prompts in columns."
        )
    difference = scores - baseline
    present = ~np.isnan(difference)
    empty = np.flatnonzero(~present.any(axis=1))
    if empty.size:
        raise ValueError(
            f"Row {empty[0]} has no prompt with a score in both `scores` and `baseline`. Leave this seed out of both."
        )
    num_missing = int((~present).sum())
    scored = present.any(axis=0)
    difference, present = difference[:, scored], present[:, scored]
    num_seeds, num_prompts = difference.shape

    mean = float(difference[present].mean())
    seed_effects = np.nanmean(difference, axis=1, keepdims=True) - mean
    seed_part = np.where(present, seed_effects, 0.0)
    rest = np.where(present, difference - seed_effects, 0.0)
    rng = np.random.default_rng(seed)
    draws = []
    for size in _chunks(num_resamples):
        seeds, prompts = _counts(rng, size, num_seeds), _counts(rng, size, num_prompts)
        cells, seed_sum, rest_sum = (
            np.einsum("bp,bp->b", seeds @ matrix, prompts) for matrix in (present.astype(float), seed_part, rest)
        )
        if num_seeds > 1:
            seed_sum = seed_sum * math.sqrt(num_seeds) / np.sqrt(rng.chisquare(num_seeds - 1, size))
        # Where many scores are missing, a resample may hit missing cells alone; it has no mean.
        hit = cells > 0
        draws.append((seed_sum + rest_sum)[hit] / cells[hit])
    sample = np.concatenate(draws)
    low, high = _percentiles(sample, level)
    tail = 1 + min(int((sample <= 0).sum()), int((sample >= 0).sum()))
    return Contrast(
        mean=mean,
        low=low,
        high=high,
        p_value=min(1.0, 2 * tail / (1 + sample.size)),
        num_seeds=num_seeds,
        num_prompts=num_prompts,
        num_missing=num_missing,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Holm's step-down correction: p-values that keep the chance of any false finding among all of them.

    Args:
        p_values (`Sequence[float]`):
            P-values of one family of tests.

    Returns:
        `list[float]`: The adjusted p-values, in the order of `p_values`.

    Raises:
        `ValueError`: If a p-value is not between 0 and 1.
    """
    values = np.asarray(p_values, dtype=float)
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if wrong.size:
        raise ValueError(f"`p_values` has {values[wrong[0]]} at position {wrong[0]}. Pass values between 0 and 1.")
    order = np.argsort(values, kind="stable")
    factors = np.arange(values.size, 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1)
    return adjusted.tolist()


def non_inferior(contrast: Contrast, margin: float) -> bool:
    """
    Whether an arm is worse than its baseline by less than a margin, as far as its interval tells.

    Args:
        contrast ([`Contrast`]):
            Difference of the arm to its baseline, higher being better.
        margin (`float`):
            The largest loss that counts as none, set before the scores are seen.

    Returns:
        `bool`: `True` if the lower end of the interval lies above `-margin`.

    Raises:
        `ValueError`: If the margin is not positive.
    """
    if not margin > 0:
        raise ValueError(f"`margin` is {margin}. Pass the tolerated loss as a positive number.")
    return contrast.low > -margin


def seed_deviation(scores: np.ndarray) -> float:
    """
    Standard deviation of an arm's mean score from seed to seed.

    Args:
        scores (`np.ndarray` of shape `(num_seeds, num_prompts)`):
            Scores of the arm, NaN where a prompt has none.

    Returns:
        `float`: The standard deviation over seeds (with `num_seeds - 1` in the denominator), NaN with one seed.

    Raises:
        `ValueError`: If the array is not two-dimensional, or a seed has no score.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"`scores` has the shape {scores.shape}. Pass an array of shape (num_seeds, num_prompts).")
    empty = np.flatnonzero(np.isnan(scores).all(axis=1))
    if empty.size:
        raise ValueError(f"Row {empty[0]} of `scores` has no score. Leave this seed out.")
    means = np.nanmean(scores, axis=1)
    return float(means.std(ddof=1)) if means.size > 1 else math.nan
