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
from dataclasses import dataclass
from typing import Any, Protocol


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
        verdicts[row].append(verdict)
    return verdicts
