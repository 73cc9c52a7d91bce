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

"""From training runs to a comparison of their arms: what each arm came to, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .bootstrap import Contrast, holm, paired_contrast
from .runs import Cells, Run, index_runs


_MEANS = (
    "unique_pairs",
    "tokens",
    "steps",
    "flops",
    "judge_calls",
    "length_mean",
    "distinct_1",
    "distinct_2",
    "empty_rate",
    "truncated_rate",
    "perplexity_median",
)


@dataclass(frozen=True)
class ArmSummary:
    """
    What the runs of one arm at one budget came to.

    Args:
        label (`str`):
            Label of the arm.
        budget (`int`):
            Number of active pairs, 0 for a model that was not trained on any.
        num_seeds (`int`):
            Number of runs.
        score (`float`):
            Mean score over the runs.
        deviation (`float`, *optional*):
            Standard deviation of the score over the runs, `None` for one run.
        num_missing (`int`):
            Held-out prompts without a score, summed over the runs.
        means (`dict[str, float | None]`):
            Means over the runs of `unique_pairs`, `tokens`, `steps`, `flops`, `judge_calls`, `length_mean`,
            `distinct_1`, `distinct_2`, `empty_rate`, `truncated_rate` and `perplexity_median`. `None` where a run has
            none.
        groups (`dict[str, float | None]`):
            Mean score over the runs for each group of held-out prompts, `None` where a run has none.
        contrast ([`~bootstrap.Contrast`], *optional*):
            Difference to the baseline at the same budget, `None` for the baseline itself, and where the two share
            neither budget nor seed.
        holm_p_value (`float`, *optional*):
            P-value of the difference after Holm's correction over all exploratory differences; `None` without a
            difference and for the pre-registered one.
    """

    label: str
    budget: int
    num_seeds: int
    score: float
    deviation: float | None
    num_missing: int
    means: dict[str, float | None]
    groups: dict[str, float | None]
    contrast: Contrast | None = None
    holm_p_value: float | None = None


@dataclass(frozen=True)
class PowerVerdict:
    """
    Whether a task can tell arms apart at all.

    Args:
        gain ([`~bootstrap.Contrast`]):
            Difference of training on all pairs to not training on any.
        deviation (`float`):
            Standard deviation of the score of random selection from seed to seed.
        ratio (`float`):
            Gain divided by deviation.
        passes (`bool`):
            Whether the ratio reaches the threshold.
        flipped ([`~bootstrap.Contrast`], *optional*):
            Difference of training on all pairs with chosen and rejected swapped to not training on any; a task that
            measures preferences has it below 0.
    """

    gain: Contrast
    deviation: float
    ratio: float
    passes: bool
    flipped: Contrast | None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _budgets(cells: Cells, label: str, option: str) -> list[int]:
    budgets = sorted(budget for found, budget in cells if found == label)
    if not budgets:
        labels = ", ".join(repr(found) for found in sorted({found for found, _ in cells}))
        raise ValueError(f"`{option}` is {label!r}, but no run has this label. The labels are {labels}.")
    return budgets


def _key(cells: Cells, label: str, budget: int | None, option: str, budget_option: str = "budget") -> tuple[str, int]:
    budgets = _budgets(cells, label, option)
    if budget is None and len(budgets) == 1:
        return label, budgets[0]
    if budget not in budgets:
        raise ValueError(
            f"`{option}` is {label!r}, whose runs have the budgets {', '.join(map(str, budgets))}; "
            f"`{budget_option}={budget}` names none of them."
        )
    return label, budget


def _is_seedless(budget: int, cell: dict[int | None, Run]) -> bool:
    # Nothing was trained, so every seed would give this one run.
    return budget == 0 and len(cell) == 1


def _contrast(
    cells: Cells, key: tuple[str, int], baseline: tuple[str, int], level: float, num_resamples: int, seed: int
) -> Contrast | None:
    arm, other = cells[key], cells[baseline]
    if _is_seedless(key[1], arm):
        arm = dict.fromkeys(other, next(iter(arm.values())))
    if _is_seedless(baseline[1], other):
        other = dict.fromkeys(arm, next(iter(other.values())))
    shared = [found for found in arm if found in other]
    if not shared:
        return None
    scores, reference = (
        np.array([cell[found]["prompt_scores"] for found in shared], dtype=float) for cell in (arm, other)
    )
    return paired_contrast(scores, reference, level=level, num_resamples=num_resamples, seed=seed)


def _summary(key: tuple[str, int], runs: list[Run]) -> ArmSummary:
    scores = np.array([run["score"] for run in runs], dtype=float)
    return ArmSummary(
        label=key[0],
        budget=key[1],
        num_seeds=len(runs),
        score=float(scores.mean()),
        deviation=float(scores.std(ddof=1)) if len(runs) > 1 else None,
        num_missing=int(np.isnan(np.array([run["prompt_scores"] for run in runs], dtype=float)).sum()),
        means={field: _mean([run[field] for run in runs]) for field in _MEANS},
        groups={
            name: _mean([run["groups"][name]["score"] if name in run["groups"] else None for run in runs])
            for name in dict.fromkeys(name for run in runs for name in run["groups"])
        },
    )


def summarize(
    runs: Sequence[Run],
    baseline_label: str,
    preregistered_label: str | None = None,
    preregistered_budget: int | None = None,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 42,
) -> list[ArmSummary]:
    """
    Summarise runs by arm and budget, and contrast each arm with a baseline on the seeds that both have.

    An arm is compared to the baseline at its own budget; a baseline with one budget alone, such as training on all
    pairs, is compared to at every budget. An arm at budget 0 with a single run was not trained, so its run stands for
    every seed. Its interval then has no spread of its own over seeds, as it should be. All other arms are compared on
    shared seeds alone.

    Args:
        runs (`Sequence[dict]`):
            Runs of one task and model. The keys that are read are `label`, `task`, `model`, `budget`, `seed`, `score`,
            `prompt_scores` (a number or `None` for each held-out prompt, the same prompts in every run), `groups`
            (name -> `{"score": ...}`), and those in `means` of [`ArmSummary`].
        baseline_label (`str`):
            Label of the baseline.
        preregistered_label (`str`, *optional*):
            Label of the one arm whose difference was named before the runs. It is not corrected; all other differences
            are exploratory, and are corrected as one family over all arms and budgets.
        preregistered_budget (`int`, *optional*):
            Budget of the pre-registered difference. Needed if the arm has several; it is one test, and the arm's other
            budgets are exploratory.
        level (`float`, *optional*, defaults to `0.95`):
            Coverage of the intervals.
        num_resamples (`int`, *optional*, defaults to `10_000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the bootstrap.

    Returns:
        `list[ArmSummary]`: One summary for each label and budget, by budget and then by falling score.

    Raises:
        `ValueError`: If the runs do not fit together, a label is not among them, or it is not clear which budget was
            pre-registered.
    """
    cells = index_runs(runs)
    budgets = _budgets(cells, baseline_label, "baseline_label")
    preregistered = None
    if preregistered_label is not None:
        preregistered = _key(
            cells, preregistered_label, preregistered_budget, "preregistered_label", "preregistered_budget"
        )
    summaries = []
    for key, cell in cells.items():
        summary = _summary(key, list(cell.values()))
        budget = budgets[0] if len(budgets) == 1 else key[1]
        if key[0] != baseline_label and budget in budgets:
            contrast = _contrast(cells, key, (baseline_label, budget), level, num_resamples, seed)
            summary = replace(summary, contrast=contrast)
        summaries.append(summary)

    family = [
        index
        for index, summary in enumerate(summaries)
        if summary.contrast and (summary.label, summary.budget) != preregistered
    ]
    adjusted = holm([contrast.p_value for index in family if (contrast := summaries[index].contrast)])
    for index, p_value in zip(family, adjusted, strict=True):
        summaries[index] = replace(summaries[index], holm_p_value=p_value)
    return sorted(summaries, key=lambda summary: (summary.budget, -summary.score))


def power_verdict(
    runs: Sequence[Run],
    sft_label: str,
    full_label: str,
    random_label: str,
    flipped_label: str | None = None,
    budget: int | None = None,
    threshold: float = 3.0,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 42,
) -> PowerVerdict:
    """
    Whether the most that training can gain on a task stands out from the noise between seeds.

    Args:
        runs (`Sequence[dict]`):
            Runs of one task and model, as for [`summarize`].
        sft_label (`str`):
            Label of the model that is trained on no pairs. Its single run stands for every seed.
        full_label (`str`):
            Label of training on all pairs.
        random_label (`str`):
            Label of random selection, with at least two seeds.
        flipped_label (`str`, *optional*):
            Label of training on all pairs with chosen and rejected swapped, which must hurt.
        budget (`int`, *optional*):
            Budget of random selection. Needed if it has several.
        threshold (`float`, *optional*, defaults to `3.0`):
            The ratio of gain to deviation from which on the task counts as able to tell arms apart.
        level (`float`, *optional*, defaults to `0.95`):
            Coverage of the intervals.
        num_resamples (`int`, *optional*, defaults to `10_000`):
            Number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the bootstrap.

    Returns:
        [`PowerVerdict`]: The gain, the deviation, and their ratio.

    Raises:
        `ValueError`: If a label or the budget is not among the runs, random selection has one seed, or two arms that
            are compared share no seed.
    """
    cells = index_runs(runs)
    random = _key(cells, random_label, budget, "random_label")

    def contrast(key: tuple[str, int], baseline: tuple[str, int]) -> Contrast:
        found = _contrast(cells, key, baseline, level, num_resamples, seed)
        if found is None:
            raise ValueError(f"{key[0]!r} and {baseline[0]!r} share no seed. Run both with the same seeds.")
        return found

    deviation = _summary(random, list(cells[random].values())).deviation
    if deviation is None:
        raise ValueError(f"{random_label!r} has one seed at the budget {random[1]}. Run it with at least two.")
    gain = contrast(_key(cells, full_label, None, "full_label"), _key(cells, sft_label, None, "sft_label"))
    flipped = None
    if flipped_label is not None:
        flipped = contrast(
            _key(cells, flipped_label, None, "flipped_label"), _key(cells, sft_label, None, "sft_label")
        )
    ratio = gain.mean / deviation if deviation else math.copysign(math.inf, gain.mean)
    return PowerVerdict(gain=gain, deviation=deviation, ratio=ratio, passes=ratio >= threshold, flipped=flipped)
