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
Scores of responses.

A judge is any callable in the form of a TRL reward function, so TRL's own reward functions serve as judges, too.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .streams import ROWS_AT_A_TIME, streams


if TYPE_CHECKING:
    from datasets import Dataset

# What the judge does not get as a further column: it has them in another form, or they are not for it to see.
_NOT_FOR_THE_JUDGE = {"prompt", "responses", "truncated", "prompts", "completions"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What a judge says about a response.

    Args:
        score (`float`, *optional*):
            Score, the higher the better. `None` if the judge gave none that can be used.
        raw (`str`, *optional*):
            What the judge said word for word, or why there is no score.
    """

    score: float | None
    raw: str | None = None


class Judge(Protocol):
    """
    What scores responses: any callable in the form of a TRL reward function.

    It is called for the responses to 8,192 prompts at a time. What must see all responses together, as a limit of costs
    must, has a method `stream` as well: it takes the same arguments, of which each is read from the disk every time it is
    gone through, and yields one entry after the other.
    """

    def __call__(
        self, *, prompts: list[str | list[dict]], completions: list[str | list[dict]], **columns: Any
    ) -> list[float | None] | list[Verdict]:
        """
        Score responses.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompt of each response.
            completions (`list[str | list[dict]]`):
                Responses. Where the prompt is conversational, a list with one assistant message.
            columns:
                The other columns of the dataset, one value a response.

        Returns:
            `list[float | None]` or `list[Verdict]`: One entry a response; `None` where there is no usable score.
        """
        ...


def one_response_a_row(
    prompts: list[str | list[dict]], responses: list[list[str]], columns: dict[str, list] | None = None
) -> dict[str, list]:
    """
    Arguments for a judge, out of rows with several responses each.

    Args:
        prompts (`list[str | list[dict]]`):
            Prompts in TRL's standard or conversational format.
        responses (`list[list[str]]`):
            Texts of the responses of each prompt.
        columns (`dict[str, list]`, *optional*):
            Further columns, one value a prompt.

    Returns:
        `dict[str, list]`: `prompts`, `completions` and the columns, one value a response.
    """
    rows = [row for row, texts in enumerate(responses) for _ in texts]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, texts in zip(prompts, responses, strict=True)
        for text in texts
    ]
    repeated = {name: [column[row] for row in rows] for name, column in (columns or {}).items()}
    return {"prompts": [prompts[row] for row in rows], "completions": completions, **repeated}


def judge_responses(
    judge: Judge,
    prompts: list[str | list[dict]],
    responses: list[list[str]],
    columns: dict[str, list] | None = None,
) -> list[list[Verdict]]:
    """
    Have all responses of all prompts judged in one call.

    Args:
        judge (`Callable`):
            Judge in the form of a TRL reward function.
        prompts (`list[str | list[dict]]`):
            Prompts in TRL's standard or conversational format.
        responses (`list[list[str]]`):
            Texts of the responses of each prompt.
        columns (`dict[str, list]`, *optional*):
            Further columns, one value a prompt, which are repeated for each response.

    Returns:
        `list[list[Verdict]]`: A verdict for each response of each prompt. A score that is not finite becomes `None`.

    Raises:
        `ValueError`: If the judge does not give one number, `None` or [`Verdict`] a response.
    """
    rows = [row for row, texts in enumerate(responses) for _ in texts]
    if not rows:
        return [[] for _ in prompts]
    entries = judge(**one_response_a_row(prompts, responses, columns))
    if len(entries) != len(rows):
        raise ValueError(f"The judge must give one entry a response, but gave {len(entries)} for {len(rows)}.")
    verdicts: list[list[Verdict]] = [[] for _ in prompts]
    for row, entry in zip(rows, entries, strict=True):
        verdicts[row].append(_verdict(entry))
    return verdicts


def _verdict(entry: Any) -> Verdict:
    if entry is not None and not isinstance(entry, Verdict):
        try:
            entry = float(entry)
        except (TypeError, ValueError):
            raise ValueError(
                f"The judge must give a number, `None` or a `Verdict` a response, but gave {entry!r}."
            ) from None
    verdict = entry if isinstance(entry, Verdict) else Verdict(entry)
    # What is not finite can be neither ranked nor averaged.
    if verdict.score is not None and not math.isfinite(verdict.score):
        verdict = Verdict(None, verdict.raw or str(verdict.score))
    return verdict


def has_text(response: str | None) -> bool:
    """
    Whether there is anything in a response to judge.

    Args:
        response (`str`, *optional*):
            Its text.

    Returns:
        `bool`: Whether it has a visible character.
    """
    return bool((response or "").strip())


class ResponseColumn(Sequence):
    """
    A column of a dataset with several responses a row, one value a response. Read from the dataset whenever it is gone
    through. Memory: 8 bytes a row, and the row that was read by its number last.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt` and `responses`. Responses without a visible character are left out.
        name (`str`):
            Name of the column. Of `"responses"`, the values are the responses themselves, as messages where the prompt is
            conversational; those of other columns are repeated for each response.
        ends (`np.ndarray` of shape `(n,)`, int64):
            Number of responses up to each row, that row's own included.
    """

    def __init__(self, dataset: "Dataset", name: str, ends: np.ndarray) -> None:
        self._dataset = dataset.select_columns([name] if name != "responses" else ["prompt", "responses"])
        self._name = name
        self._ends = ends
        # The responses of a prompt are read one after the other, and more than once when they are compared.
        self._last: tuple[int, list] = (-1, [])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator:
        for row, count in zip(self._dataset, np.diff(self._ends, prepend=0).tolist(), strict=True):
            yield from self._values(row, count)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[row - 1]) if row else 0
        if self._last[0] != row:
            self._last = (row, self._values(self._dataset[row], int(self._ends[row]) - start))
        return self._last[1][index - start]

    def _values(self, row: dict, count: int) -> list:
        if self._name != "responses":
            return [row[self._name]] * count
        texts = filter(has_text, row["responses"])
        return (
            list(texts) if isinstance(row["prompt"], str) else [[{"role": "assistant", "content": t}] for t in texts]
        )


def judge_columns(dataset: "Dataset") -> dict[str, ResponseColumn]:
    """
    Arguments for a judge that goes through them in parts.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`, `responses` and further columns, which the judge gets as well.

    Returns:
        `dict[str, ResponseColumn]`: `prompts`, `completions` and the other columns, one value a response that has a
        visible character.
    """
    counts = (sum(map(has_text, texts)) for texts in dataset["responses"])
    ends = np.cumsum(np.fromiter(counts, np.int64, len(dataset)))
    others = [name for name in dataset.column_names if name not in _NOT_FOR_THE_JUDGE]
    names = {"prompts": "prompt", "completions": "responses", **{name: name for name in others}}
    return {argument: ResponseColumn(dataset, name, ends) for argument, name in names.items()}


def iter_verdicts(judge: Judge, dataset: "Dataset") -> Iterator[list[Verdict]]:
    """
    Have all responses of a dataset judged, in bounded memory.

    Args:
        judge (`Callable`):
            Judge in the form of a TRL reward function.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`, `responses` and further columns, which the judge gets as well.

    Yields:
        `list[Verdict]`: A verdict for each response of a row. Those without a visible character are not judged, as there
        is nothing to pay for. A score that is not finite becomes `None`.

    Raises:
        `ValueError`: If the judge does not give one number, `None` or [`Verdict`] a response.
    """
    rows = _streamed(judge, dataset) if streams(judge) else _called_in_blocks(judge, dataset)
    for verdicts, texts in zip(rows, dataset["responses"], strict=True):
        given = iter(verdicts)
        yield [next(given) if has_text(text) else Verdict(None, "empty response") for text in texts]


def _streamed(judge: Any, dataset: "Dataset") -> Iterator[list[Verdict]]:
    columns = judge_columns(dataset)
    total = len(columns["completions"])
    entries = iter(judge.stream(**columns)) if total else iter(())
    done = 0
    for texts in dataset["responses"]:
        count = sum(map(has_text, texts))
        verdicts = list(map(_verdict, islice(entries, count)))
        done += len(verdicts)
        if len(verdicts) != count:
            raise ValueError(f"The judge must give one entry a response, but gave {done} for {total}.")
        yield verdicts
    # Its end is where a judge says what came to nothing.
    if (more := sum(1 for _ in entries)) > 0:
        raise ValueError(f"The judge must give one entry a response, but gave {done + more} for {total}.")


def _called_in_blocks(judge: Judge, dataset: "Dataset") -> Iterator[list[Verdict]]:
    names = [name for name in dataset.column_names if name not in _NOT_FOR_THE_JUDGE]
    for start in range(0, len(dataset), ROWS_AT_A_TIME):
        block = dataset[start : start + ROWS_AT_A_TIME]
        responses = [list(filter(has_text, texts)) for texts in block["responses"]]
        yield from judge_responses(judge, block["prompt"], responses, {name: block[name] for name in names})
