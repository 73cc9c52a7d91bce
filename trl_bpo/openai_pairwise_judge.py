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

"""A judge behind an OpenAI-compatible API that compares responses two by two."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, combinations, repeat
from typing import Any, TypeAlias

import numpy as np

from .api import APIRequest
from .api_judge import APIJudge
from .judging import Verdict
from .prompts import prompt_id
from .rubrics import PairwiseRubric


# A prompt, two responses to it, and its tools.
_Comparison: TypeAlias = tuple[Any, Any, Any, Any]


class OpenAIPairwiseJudge(APIJudge):
    """
    Compare responses two by two with a model behind an OpenAI-compatible API.

    Each pair is judged in both orders, since judges prefer a place. Where the two verdicts differ, it is a tie.

    As a judge of [`BPODataCollector`] it compares all responses to the same prompt with each other, which takes
    `k * (k - 1)` requests for `k` responses; the score of a response is its share of wins, a tie counting half. To compare
    two sets of answers, use [`~OpenAIPairwiseJudge.compare`].

    Requests are kept, retried and paid for as by [`OpenAIJudge`], which describes the options.

    Args:
        model (`str`):
            Name of the judging model, as the server knows it.
        base_url (`str` or `list[str]`, *optional*):
            Address of the server, or of several that share the requests.
        api_key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key.
        prompt_template (`str`, *optional*):
            Text of the message that asks for the verdict, with the placeholders `{prompt}`, `{response_a}` and
            `{response_b}`. By default, `templates/judge_pairwise.md` of the package.
        num_reasks (`int`, *optional*, defaults to `1`):
            How often an answer that cannot be read is asked for again.
        max_concurrency (`int`, *optional*, defaults to `8`):
            Number of requests under way at the same time, over all processes.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature of the judge. `None` leaves it to the server.
        max_tokens (`int`, *optional*, defaults to `512`):
            Token limit of a verdict. `None` sends none.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which a request is given up and retried.
        max_retries (`int`, *optional*, defaults to `5`):
            Number of retries of a request.
        extra_body (`dict`, *optional*):
            Further fields of each request.
        cache_dir (`str`, *optional*):
            Folder in which the answers are kept.
        prices (`str` or `dict`, *optional*):
            Price table, see [`~api.costs.model_price`].
        max_cost (`float`, *optional*):
            US dollars that the verdicts of a call may cost.

    Attributes:
        report ([`~api.APIReport`] or `None`): What became of the requests of the last call, and what they cost.

    Raises:
        `ImportError`: If the `openai` package is missing.
        `ValueError`: If an option is out of its range, or the template lacks a placeholder.

    Example:

    ```python
    >>> judge = OpenAIPairwiseJudge("gpt-4.1-mini", cache_dir="answers")
    >>> judge.compare(["What is the capital of France?"], [["Paris.", "Lyon."]])
    [1.0]
    ```
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | list[str] | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        prompt_template: str | None = None,
        num_reasks: int = 1,
        max_concurrency: int = 8,
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        timeout: float = 120.0,
        max_retries: int = 5,
        extra_body: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        prices: str | dict | None = None,
        max_cost: float | None = None,
    ) -> None:
        rubric = PairwiseRubric() if prompt_template is None else PairwiseRubric(template=prompt_template)
        super().__init__(
            model,
            rubric.response_format(),
            base_url=base_url,
            api_key_variable=api_key_variable,
            num_reasks=num_reasks,
            temperature=temperature,
            max_tokens=max_tokens,
            extra_body=extra_body,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            cache_dir=cache_dir,
            prices=prices,
            max_cost=max_cost,
        )
        self.rubric = rubric

    def compare(
        self,
        prompts: list[str | list[dict]],
        completions: list[list[str | list[dict]]],
        tools: list | None = None,
    ) -> list[float | None]:
        """
        Compare two responses to each prompt.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompts.
            completions (`list[list]`):
                Two responses to each.
            tools (`list`, *optional*):
                Tool schemas of each prompt.

        Returns:
            `list[float | None]`: 1 where the first response is the better one in both orders, 0 where the second is, 0.5
            for a tie or where the orders disagree, `None` without a usable verdict in both orders.

        Raises:
            `ValueError`: If a prompt has not two responses, or as for [`OpenAIJudge`].
            [`~api.CollectionStopped`]: If the call ended early; the same call goes on from there.
        """
        for row, pair in enumerate(completions):
            if len(pair) != 2:
                raise ValueError(f"Row {row} of `completions` has {len(pair)} responses, but two are compared.")

        def comparisons() -> Iterator[_Comparison]:
            for prompt, (first, second), prompt_tools in zip(
                prompts, completions, tools or repeat(None, len(prompts)), strict=True
            ):
                yield prompt, first, second, prompt_tools

        return list(self._compare(comparisons))

    def _compare(self, comparisons: Callable[[], Iterable[_Comparison]]) -> Iterator[float | None]:
        def requests() -> Iterator[APIRequest]:
            for prompt, first, second, prompt_tools in comparisons():
                yield self._request(self.rubric.messages(prompt, first, second, prompt_tools))
                yield self._request(self.rubric.messages(prompt, second, first, prompt_tools))

        self._ask(requests, self.rubric.read)
        failures: list[dict] = []
        done = 0
        both: list[str | None] = []
        for answer, failure in self._read(requests, self.rubric.read):
            if answer is None:
                failures.append({"row": done, "swapped": bool(both), **failure})
                both.append(None)
            else:
                both.append(self.rubric.read(answer["text"]))
            if len(both) == 2:
                yield _share(both[0], both[1])
                done += 1
                both = []
        self.client.list_failures("judgements", failures)

    def __call__(
        self, /, *, prompts: list[str | list[dict]], completions: list[str | list[dict]], **columns: Any
    ) -> list[Verdict]:
        """
        Score responses by how many others to the same prompt they beat.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompt of each response.
            completions (`list[str | list[dict]]`):
                Responses.
            columns:
                Other columns of the dataset. `tools` is shown to the judge as part of the prompt.

        Returns:
            `list[Verdict]`: For each response, its share of wins between 0 and 1, over the comparisons with a usable
            verdict; `None` if there is none.
        """
        return list(self.stream(prompts=prompts, completions=completions, **columns))

    def stream(
        self, /, *, prompts: Sequence[str | list[dict]], completions: Sequence[str | list[dict]], **columns: Any
    ) -> Iterator[Verdict]:
        """
        Make all comparisons, then yield the verdicts. Memory: 50 bytes a response, and the responses to one prompt.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                Prompt of each response. As the other arguments, they are gone through several times.
            completions (`Sequence[str | list[dict]]`):
                Responses.
            columns:
                Other columns of the dataset.

        Yields:
            [`Verdict`]: Verdict after verdict, as a call gives them.
        """
        tools = columns.get("tools")
        digests = bytearray()
        for prompt, prompt_tools in zip(prompts, repeat(None, len(prompts)) if tools is None else tools, strict=True):
            digests += bytes.fromhex(prompt_id(prompt, prompt_tools)[:16])
        _, groups = np.unique(np.frombuffer(digests, np.uint64), return_inverse=True)
        order = np.argsort(groups, kind="stable")
        by_prompt = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)

        def comparisons() -> Iterator[_Comparison]:
            for rows in map(np.ndarray.tolist, by_prompt):
                prompt, prompt_tools = prompts[rows[0]], None if tools is None else tools[rows[0]]
                for first, second in combinations([completions[row] for row in rows], 2):
                    yield prompt, first, second, prompt_tools

        wins, ties, losses = counts = np.zeros((3, len(groups)), np.int32)
        pairs = chain.from_iterable(combinations(rows.tolist(), 2) for rows in by_prompt)
        for (first, second), share in zip(pairs, self._compare(comparisons), strict=True):
            if share is not None:
                for row, its_share in ((first, share), (second, 1.0 - share)):
                    counts[0 if its_share == 1.0 else 1 if its_share == 0.5 else 2, row] += 1
        for won, tied, lost in zip(wins.tolist(), ties.tolist(), losses.tolist(), strict=True):
            decided = won + tied + lost
            yield Verdict(
                (won + 0.5 * tied) / decided if decided else None,
                json.dumps({"wins": won, "ties": tied, "losses": lost}),
            )


def _share(verdict: str | None, swapped: str | None) -> float | None:
    if verdict is None or swapped is None:
        return None
    in_order = {"A": 1.0, "B": 0.0, "tie": 0.5}
    first, second = in_order[verdict], 1.0 - in_order[swapped]
    return first if first == second else 0.5
