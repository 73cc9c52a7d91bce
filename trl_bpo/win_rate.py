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


"""How often the answers of one model are better than those of another to the same prompts, and how sure that is."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .bootstrap import bootstrap_interval
from .judging import Judge, judge_responses
from .openai_pairwise_judge import OpenAIPairwiseJudge
from .prompts import without_none


@dataclass(frozen=True)
class WinRate:
    """
    How the answers of a model compare with those of a baseline.

    With the two exchanged everything is mirrored: wins are losses, an outcome `x` is `1 - x`, and so are the win rate
    and the ends of its interval.

    Args:
        wins (`int`):
            Prompts where the answer is the better one.
        ties (`int`):
            Prompts where neither is, where a pairwise judge contradicts itself when the two are exchanged, or where both
            are the same.
        losses (`int`):
            Prompts where the baseline's answer is the better one.
        unjudged (`int`):
            Prompts without an outcome: an answer is missing, or the judge gave no verdict that can be used. They count
            for nothing else.
        win_rate (`float`, *optional*):
            Wins and half of the ties, as a share of the judged prompts; `None` if there is none.
        interval (`tuple[float, float]`, *optional*):
            Bootstrap interval of the win rate.
        length_mean (`float`, *optional*):
            Mean number of characters of an answer, over the prompts that both have answered.
        baseline_length_mean (`float`, *optional*):
            The same of the baseline.
        longer_win_share (`float`, *optional*):
            Of the prompts with a winner and answers of different lengths, the share won by the longer one; `None` if
            there is none. Far above one half, the judge may reward length, or the longer answers are better.
        outcomes (`list[float | None]`):
            For each prompt 1 for a win, 0.5 for a tie, 0 for a loss, `None` where it is unjudged.
        lengths (`list[int | None]`):
            Number of characters of each answer, `None` where it is missing.
        baseline_lengths (`list[int | None]`):
            The same of the baseline.
        groups (`dict[str, WinRate]`):
            The same for each group of prompts, in the order of their first appearance.
    """

    wins: int
    ties: int
    losses: int
    unjudged: int
    win_rate: float | None
    interval: tuple[float, float] | None
    length_mean: float | None
    baseline_length_mean: float | None
    longer_win_share: float | None
    outcomes: list[float | None]
    lengths: list[int | None]
    baseline_lengths: list[int | None]
    groups: dict[str, "WinRate"] = field(default_factory=dict)


def score_answers(
    judge: Judge,
    prompts: Sequence[Sequence[str | list[dict]]],
    answers: Sequence[Sequence[str | None]],
    columns: dict[str, list] | None = None,
) -> list[list[float | None]]:
    """
    Score the answers of several models in one call of the judge.

    The same answer to the same prompt is judged once, so that equal answers have equal scores under any judge.

    Args:
        judge (`Callable`):
            Judge in the form of a TRL reward function.
        prompts (`Sequence[Sequence[str | list[dict]]]`):
            For each model its prompts. They differ where a prompt holds earlier answers of the model.
        answers (`Sequence[Sequence[str | None]]`):
            For each model its answers, in the same order; `None` where one is missing.
        columns (`dict[str, list]`, *optional*):
            Further columns for the judge, one value a prompt, the same for all models.

    Returns:
        `list[list[float | None]]`: For each model its scores; `None` where there is no answer or no usable score.
    """
    places: dict[str, int] = {}
    shown: list[tuple[int, Any, str]] = []
    keys: list[list[str | None]] = []
    for model_prompts, model_answers in zip(prompts, answers, strict=True):
        keys.append([])
        for row, (prompt, answer) in enumerate(zip(model_prompts, model_answers, strict=True)):
            if answer is None:
                keys[-1].append(None)
                continue
            key = json.dumps([row, without_none(prompt), answer], sort_keys=True)
            keys[-1].append(key)
            if key not in places:
                places[key] = len(shown)
                shown.append((row, prompt, answer))
    verdicts = judge_responses(
        judge,
        [prompt for _, prompt, _ in shown],
        [[answer] for _, _, answer in shown],
        {name: [values[row] for row, _, _ in shown] for name, values in (columns or {}).items()},
    )
    return [[None if key is None else verdicts[places[key]][0].score for key in row] for row in keys]


def outcomes_from_scores(
    scores: Sequence[float | None], baseline_scores: Sequence[float | None]
) -> list[float | None]:
    """
    Who won, by the scores of the two answers to each prompt.

    Args:
        scores (`Sequence[float | None]`):
            Scores of the answers.
        baseline_scores (`Sequence[float | None]`):
            Scores of the baseline's answers to the same prompts.

    Returns:
        `list[float | None]`: 1 for the higher score, 0 for the lower, 0.5 for equal ones, `None` where one is missing.
    """
    return [
        None if score is None or other is None else 0.5 * ((score > other) - (score < other)) + 0.5
        for score, other in zip(scores, baseline_scores, strict=True)
    ]


def outcomes_from_comparisons(
    judge: OpenAIPairwiseJudge,
    prompts: Sequence[str | list[dict]],
    answers: Sequence[str | None],
    baseline_answers: Sequence[str | None],
    tools: list | None = None,
) -> list[float | None]:
    """
    Who won, by showing the two answers to each prompt side by side, in both orders.

    Equal answers are a tie and are not shown.

    Args:
        judge ([`OpenAIPairwiseJudge`]):
            The judge.
        prompts (`Sequence[str | list[dict]]`):
            Prompts.
        answers (`Sequence[str | None]`):
            Answers; `None` where one is missing.
        baseline_answers (`Sequence[str | None]`):
            Answers of the baseline.
        tools (`list`, *optional*):
            Tool schemas of each prompt.

    Returns:
        `list[float | None]`: 1 for a win in both orders, 0 for a loss in both, 0.5 for a tie or a contradiction, `None`
        where an answer or a usable verdict is missing.
    """
    pairs = list(zip(answers, baseline_answers, strict=True))
    outcomes: list[float | None] = [None if first is None or first != second else 0.5 for first, second in pairs]
    rows = [row for row, (first, second) in enumerate(pairs) if None not in (first, second) and outcomes[row] is None]

    def completion(row: int, text: Any) -> Any:
        return text if isinstance(prompts[row], str) else [{"role": "assistant", "content": text}]

    if rows:
        shares = judge.compare(
            [prompts[row] for row in rows],
            [[completion(row, text) for text in pairs[row]] for row in rows],
            None if tools is None else [tools[row] for row in rows],
        )
        for row, share in zip(rows, shares, strict=True):
            outcomes[row] = share
    return outcomes


def interval_of(
    values: Sequence[float | None], units: Sequence[Any] | None = None, **options: Any
) -> tuple[float, float] | None:
    """
    Bootstrap interval of the mean of values, some of which may be missing.

    Args:
        values (`Sequence[float | None]`):
            Values; those that are `None` are left out.
        units (`Sequence`, *optional*):
            What each value belongs to. Values of one unit, such as the two turns of a question, are not independent: the
            interval is that of the units' means. By default, each value is a unit.
        options:
            `level`, `num_resamples` and `seed` of [`~bootstrap.bootstrap_interval`].

    Returns:
        `tuple[float, float]` or `None`: The interval, `None` without a value.
    """
    members: dict[Any, list[float]] = {}
    for unit, value in zip(range(len(values)) if units is None else units, values, strict=True):
        if value is not None:
            members.setdefault(unit, []).append(value)
    if not members:
        return None
    return bootstrap_interval([statistics.fmean(unit) for unit in members.values()], **options)


def tally(
    outcomes: Sequence[float | None],
    answers: Sequence[str | None],
    baseline_answers: Sequence[str | None],
    *,
    groups: Sequence[str | None] | None = None,
    units: Sequence[Any] | None = None,
    **options: Any,
) -> WinRate:
    """
    Add outcomes up.

    Args:
        outcomes (`Sequence[float | None]`):
            Outcome of each prompt, such as [`outcomes_from_scores`] gives.
        answers (`Sequence[str | None]`):
            The answers, for their lengths.
        baseline_answers (`Sequence[str | None]`):
            Those of the baseline.
        groups (`Sequence[str | None]`, *optional*):
            Group of each prompt, to break the result down by.
        units (`Sequence`, *optional*):
            What each prompt belongs to, see [`interval_of`].
        options:
            `level`, `num_resamples` and `seed` of [`~bootstrap.bootstrap_interval`].

    Returns:
        [`WinRate`]: The result.
    """
    lengths = [None if answer is None else len(answer) for answer in answers]
    baseline_lengths = [None if answer is None else len(answer) for answer in baseline_answers]
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups or []):
        if group is not None:
            members.setdefault(group, []).append(row)

    def part(rows: Sequence[int]) -> WinRate:
        said = [outcomes[row] for row in rows]
        counts = {outcome: said.count(outcome) for outcome in (1.0, 0.5, 0.0)}
        judged = sum(counts.values())
        answered = [
            (own, other)
            for own, other in ((lengths[row], baseline_lengths[row]) for row in rows)
            if own is not None and other is not None
        ]
        # Whether the longer one has won, where there are a winner and a longer one.
        longer = [
            (own > other) == (outcomes[row] == 1.0)
            for row, own, other in ((row, lengths[row], baseline_lengths[row]) for row in rows)
            if outcomes[row] in (0.0, 1.0) and own is not None and other is not None and own != other
        ]
        return WinRate(
            wins=counts[1.0],
            ties=counts[0.5],
            losses=counts[0.0],
            unjudged=len(said) - judged,
            win_rate=(2 * counts[1.0] + counts[0.5]) / (2 * judged) if judged else None,
            interval=interval_of(said, None if units is None else [units[row] for row in rows], **options),
            length_mean=statistics.fmean(own for own, _ in answered) if answered else None,
            baseline_length_mean=statistics.fmean(other for _, other in answered) if answered else None,
            longer_win_share=statistics.fmean(longer) if longer else None,
            outcomes=said,
            lengths=[lengths[row] for row in rows],
            baseline_lengths=[baseline_lengths[row] for row in rows],
        )

    whole = part(range(len(outcomes)))
    return replace(whole, groups={name: part(rows) for name, rows in members.items()})


def win_rate(
    judge: Judge | OpenAIPairwiseJudge,
    prompts: Sequence[str | list[dict]],
    answers: Sequence[str | None],
    baseline_answers: Sequence[str | None],
    *,
    columns: dict[str, list] | None = None,
    groups: Sequence[str | None] | None = None,
    **options: Any,
) -> WinRate:
    """
    Win rate of answers over the answers of a baseline to the same prompts.

    Args:
        judge (`Callable`):
            An [`OpenAIPairwiseJudge`], which sees the two answers to a prompt side by side, in both orders; or any judge
            in the form of a TRL reward function, which scores each answer alone. Then the higher score wins.
        prompts (`Sequence[str | list[dict]]`):
            Prompts in TRL's standard or conversational format.
        answers (`Sequence[str | None]`):
            Answer to each prompt; `None` where one is missing.
        baseline_answers (`Sequence[str | None]`):
            Answer of the baseline to each prompt.
        columns (`dict[str, list]`, *optional*):
            Further columns for the judge, one value a prompt.
        groups (`Sequence[str | None]`, *optional*):
            Group of each prompt, to break the result down by.
        options:
            `level`, `num_resamples` and `seed` of [`~bootstrap.bootstrap_interval`].

    Returns:
        [`WinRate`]: The result.

    Raises:
        `ValueError`: If there is no prompt, or the numbers of prompts and answers differ.

    Example:

    ```python
    >>> judge = OpenAIPairwiseJudge("gpt-4.1-mini", cache_dir="answers")
    >>> result = win_rate(judge, ["What is the capital of France?"], ["Paris."], ["Lyon."])
    >>> result.win_rate
    1.0
    ```
    """
    if not len(prompts) == len(answers) == len(baseline_answers) or not len(prompts):
        raise ValueError(
            f"`prompts`, `answers` and `baseline_answers` must be of the same length and not empty, got {len(prompts)}, "
            f"{len(answers)} and {len(baseline_answers)}."
        )
    if isinstance(judge, OpenAIPairwiseJudge):
        tools = (columns or {}).get("tools")
        outcomes = outcomes_from_comparisons(judge, prompts, answers, baseline_answers, tools)
    else:
        outcomes = outcomes_from_scores(*score_answers(judge, [prompts] * 2, [answers, baseline_answers], columns))
    return tally(outcomes, answers, baseline_answers, groups=groups, **options)
