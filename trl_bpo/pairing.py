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


"""Preference pairs out of scored responses."""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from datasets import Dataset, Features, List, Value

from .prompts import pair_id, prompt_id


PAIR_RULES = ("uniform", "all", "adjacent", "best_worst")

_CONSUMED = ("responses", "scores", "truncated", "verdicts")


@dataclass(frozen=True)
class PairReport:
    """
    What became of the responses and of the candidate pairs.

    Every response is counted once: `responses` is the sum of `unscored`, `empty`, `duplicate_responses`, `unused` and of
    the responses in candidate pairs. Every candidate pair is counted once, too: it is one of the `pairs`, or it counts
    as `ties`, `below_margin` or `truncated_chosen`.

    Args:
        prompts (`int`):
            Number of prompts.
        responses (`int`):
            Number of responses.
        unscored (`int`):
            Responses with a visible character, but without a finite score.
        empty (`int`):
            Responses without a visible character.
        duplicate_responses (`int`):
            Exact copies of an earlier scored response to the same prompt.
        unused (`int`):
            Usable responses that the pair rule puts in no pair: the middle one of an odd number, for example.
        ties (`int`):
            Candidate pairs whose scores are equal.
        below_margin (`int`):
            Candidate pairs whose scores differ by less than `min_margin`.
        truncated_chosen (`int`):
            Candidate pairs whose better response was cut off at the token limit.
        pairs (`int`):
            Pairs in the dataset.
        prompts_without_pair (`int`):
            Prompts that gave no pair.
        pairs_per_prompt (`dict[int, int]`):
            For each number of pairs, the number of prompts that gave so many.
        longer_chosen_share (`float`):
            Share of the pairs whose chosen response has more characters than the rejected one. Far from one half, the
            scores prefer a length.
    """

    prompts: int
    responses: int
    unscored: int
    empty: int
    duplicate_responses: int
    unused: int
    ties: int
    below_margin: int
    truncated_chosen: int
    pairs: int
    prompts_without_pair: int
    pairs_per_prompt: dict[int, int]
    longer_chosen_share: float


@dataclass(frozen=True)
class _PairOptions:
    rule: str
    min_margin: float
    allow_truncated_chosen: bool


def pair_indices(m: int, rule: str) -> list[tuple[int, int]]:
    """
    Which ranks a rule pairs.

    Args:
        m (`int`):
            Number of responses. Rank 0 is the best of them.
        rule (`str`):
            One of `PAIR_RULES`:

            - `"uniform"`: rank `i` with rank `i + ceil(m / 2)`. The `floor(m / 2)` pairs are disjoint, so that no two
              pairs of a prompt share a response; the middle one of an odd number is unused.
            - `"all"`: every response with every other, `m * (m - 1) / 2` pairs.
            - `"adjacent"`: every response with the next best, `m - 1` pairs.
            - `"best_worst"`: the best with the worst, one pair.

    Returns:
        `list[tuple[int, int]]`: Pairs of ranks, the better one first. None for fewer than two responses.

    Raises:
        `ValueError`: If the rule is unknown.
    """
    if rule not in PAIR_RULES:
        raise ValueError(f"Unknown pair rule `{rule}`. Choose one of {', '.join(f'`{name}`' for name in PAIR_RULES)}.")
    if m < 2:
        return []
    if rule == "uniform":
        half = (m + 1) // 2
        return [(rank, rank + half) for rank in range(m // 2)]
    if rule == "all":
        return list(combinations(range(m), 2))
    if rule == "adjacent":
        return [(rank, rank + 1) for rank in range(m - 1)]
    return [(0, m - 1)]


def _pair_row(
    responses: list[str], scores: list[float | None], truncated: list[bool], options: _PairOptions
) -> tuple[list[tuple[int, int]], Counter]:
    """Give the pairs of one prompt as positions in `responses`, the chosen one first, and what became of the rest."""
    counts: Counter = Counter(responses=len(responses))
    usable: dict[int, float] = {}
    seen: set[str] = set()
    for position, (text, score) in enumerate(zip(responses, scores, strict=True)):
        if not text or not text.strip():
            counts["empty"] += 1
        elif score is None or not math.isfinite(score):
            counts["unscored"] += 1
        elif text in seen:
            counts["duplicate_responses"] += 1
        else:
            seen.add(text)
            usable[position] = score

    # The hash breaks ties by what the responses say, not by where they stand in the list.
    hashes = {position: hashlib.sha256(responses[position].encode()).hexdigest() for position in usable}
    ranked = sorted(usable, key=lambda position: (-usable[position], hashes[position]))
    candidates = [(ranked[better], ranked[worse]) for better, worse in pair_indices(len(ranked), options.rule)]
    counts["unused"] = len(ranked) - len({position for pair in candidates for position in pair})
    pairs = []
    for chosen, rejected in candidates:
        margin = usable[chosen] - usable[rejected]
        if margin == 0:
            counts["ties"] += 1
        elif margin < options.min_margin:
            counts["below_margin"] += 1
        elif truncated[chosen] and not options.allow_truncated_chosen:
            counts["truncated_chosen"] += 1
        else:
            counts["longer_chosen"] += len(responses[chosen]) > len(responses[rejected])
            pairs.append((chosen, rejected))
    return pairs, counts


def _explode(rows: dict[str, list], options: _PairOptions, columns: list[str]) -> dict[str, list]:
    """Turn a batch of rows with responses into rows with pairs."""
    result: dict[str, list] = {name: [] for name in columns}
    for values in zip(*rows.values(), strict=True):
        row = dict(zip(rows, values, strict=True))
        responses, scores, prompt, tools = row["responses"], row["scores"], row["prompt"], row.get("tools")
        truncated = row.get("truncated", [False] * len(responses))
        for chosen, rejected in _pair_row(responses, scores, truncated, options)[0]:
            texts = [responses[chosen], responses[rejected]]
            if not isinstance(prompt, str):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            pair = row | {
                "pair_id": pair_id(prompt, texts[0], texts[1], tools),
                "prompt_id": prompt_id(prompt, tools),
                "chosen": texts[0],
                "rejected": texts[1],
                "score_chosen": scores[chosen],
                "score_rejected": scores[rejected],
                "chosen_truncated": truncated[chosen],
                "rejected_truncated": truncated[rejected],
            }
            for name in columns:
                result[name].append(pair[name])
    return result


def _pair_features(dataset: Dataset) -> Features:
    # The types are given, not guessed, as a batch without any pair has nothing to guess from.
    features = {name: feature for name, feature in dataset.features.items() if name not in _CONSUMED}
    text: Any = Value("string")
    if not isinstance(features["prompt"], Value):
        text = List({"role": Value("string"), "content": Value("string")})
    added = {
        "pair_id": Value("string"),
        "prompt_id": Value("string"),
        "chosen": text,
        "rejected": text,
        "score_chosen": Value("float64"),
        "score_rejected": Value("float64"),
    }
    if "truncated" in dataset.column_names:
        added |= {"chosen_truncated": Value("bool"), "rejected_truncated": Value("bool")}
    # A prompt id is the same wherever it is computed, so it may be there already.
    taken = [name for name in added if name in features and name != "prompt_id"]
    if taken:
        names = ", ".join(f"`{name}`" for name in taken)
        raise ValueError(f"`dataset` has columns that the pairs would overwrite: {names}. Rename or remove them.")
    return Features({**features, **added})


def _advice(counts: Counter[str]) -> str:
    remedies = {
        "unscored": "See in the column `verdicts` what the judge answered.",
        "ties": "See in the column `verdicts` whether the judge tells responses apart.",
        "below_margin": "Lower `min_margin`.",
        "truncated_chosen": "Raise `max_new_tokens`, or set `allow_truncated_chosen`.",
        "empty": "Look at the `responses`: the policy wrote nothing.",
        "duplicate_responses": "Sample at a higher temperature: the responses are the same.",
    }
    return remedies[max(remedies, key=lambda name: counts[name])]


def build_pairs(
    dataset: Dataset, rule: str = "uniform", min_margin: float = 0.0, allow_truncated_chosen: bool = False
) -> tuple[Dataset, PairReport]:
    """
    Build preference pairs from scored responses.

    A response is usable if it has a finite score and a visible character and is no exact copy of an earlier usable one.
    The usable ones of a prompt are ranked by their scores, and equal scores by a hash of the text, so that their order
    in the list does not matter. The rule then says which ranks are paired.

    Args:
        dataset ([`~datasets.Dataset`]):
            One row a prompt. Columns in: `prompt`, in TRL's standard or conversational format; `responses`
            (`list[str]`); `scores` (`list[float | None]`); optionally `truncated` (`list[bool]`) and `tools`.
        rule (`str`, *optional*, defaults to `"uniform"`):
            Which ranks are paired, see [`pair_indices`].
        min_margin (`float`, *optional*, defaults to `0.0`):
            Smallest difference between the scores of a pair. Pairs with equal scores are never kept.
        allow_truncated_chosen (`bool`, *optional*, defaults to `False`):
            Whether a response that was cut off at the token limit may be the chosen one of a pair.

    Returns:
        `tuple[Dataset, PairReport]`: The pairs, and what became of the responses. Columns out: `pair_id`, `prompt_id`,
        `prompt`, `chosen` and `rejected` (messages where the prompt is conversational), `score_chosen`,
        `score_rejected`, `chosen_truncated` and `rejected_truncated` if the input has `truncated`, and all other
        columns of the input, repeated for each pair, without `responses`, `scores`, `truncated` and `verdicts`.

    Raises:
        `ValueError`: If the rule is unknown, `min_margin` is negative, a column is missing or would be overwritten, a
            row has not one score a response, or no pair results.
    """
    pair_indices(0, rule)
    if not min_margin >= 0:
        raise ValueError(f"`min_margin` must be at least 0, got {min_margin}.")
    for column in ("prompt", "responses", "scores"):
        if column not in dataset.column_names:
            raise ValueError(f"`dataset` has no column `{column}`. Its columns: {', '.join(dataset.column_names)}.")
    features = _pair_features(dataset)
    options = _PairOptions(rule, min_margin, allow_truncated_chosen)
    counts: Counter = Counter()
    histogram: Counter = Counter()
    columns = [name for name in ("responses", "scores", "truncated") if name in dataset.column_names]
    for index, row in enumerate(dataset.select_columns(columns)):
        num_responses = len(row["responses"])
        for column in columns:
            if len(row[column]) != num_responses:
                raise ValueError(
                    f"Row {index} has {num_responses} `responses` but {len(row[column])} `{column}`. Each response "
                    "needs one, which may be `None` in `scores`."
                )
        truncated = row.get("truncated", [False] * num_responses)
        pairs, row_counts = _pair_row(row["responses"], row["scores"], truncated, options)
        counts.update(row_counts)
        histogram[len(pairs)] += 1
    num_pairs = sum(number * prompts for number, prompts in histogram.items())
    if num_pairs == 0:
        raise ValueError(
            f"No pair could be built from {len(dataset)} prompts with {counts['responses']} `responses`: "
            f"{counts['unscored']} without a score, {counts['empty']} empty, {counts['duplicate_responses']} copies; "
            f"{counts['ties']} candidate pairs with equal scores, {counts['below_margin']} below `min_margin`, "
            f"{counts['truncated_chosen']} with a truncated better response. {_advice(counts)}"
        )
    names = ("responses", "unscored", "empty", "duplicate_responses", "unused")
    report = PairReport(
        prompts=len(dataset),
        **{name: counts[name] for name in (*names, "ties", "below_margin", "truncated_chosen")},
        pairs=num_pairs,
        prompts_without_pair=histogram[0],
        pairs_per_prompt=dict(sorted(histogram.items())),
        longer_chosen_share=counts["longer_chosen"] / num_pairs,
    )
    paired = dataset.map(
        _explode,
        fn_kwargs={"options": options, "columns": list(features)},
        batched=True,
        remove_columns=dataset.column_names,
        features=features,
        desc="Building pairs",
    )
    return paired, report
