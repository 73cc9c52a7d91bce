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

"""A judge behind an OpenAI-compatible API, such as a GPT-4 class model or an open one on a server of your own."""

import json
import logging
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from .api import APIRequest, CostEstimate
from .api.batch import BatchStatus, collect_batch, submit_batch
from .api_judge import APIJudge, Requests
from .judging import Verdict
from .rubrics import Rubric, load_rubric


logger = logging.getLogger(__name__)


class OpenAIJudge(APIJudge):
    """
    Rate responses with a model behind an OpenAI-compatible API, through the `openai` client.

    Every answer is in `cache_dir` before it counts, under the content of its request: model, messages, parameters, form of
    the answer and number of the vote. A run that was killed goes on where it ended; what has changed is asked anew. The
    address of the server is not part of it: where another model goes by the same name, take another `cache_dir`.

    The verdict is asked for as structured output. If the server refuses the JSON schema, the judge goes on with JSON
    without one, and then in plain text; if the server ignores it, the rating is read from the text as far as possible.
    Both are said once in the log.

    A response without a usable verdict gets a [`Verdict`] with the score `None` and stops nothing: an answer that cannot
    be read, also when asked again, a refusal of the judge, a response too long for it, and errors of the server that
    outlast the retries. They are counted in `report` and listed in `failed-judgements-*.jsonl` in `cache_dir`. What stops
    everything, and how rate limits are waited for, is in the table of [`~api.APIClient`].

    Works from scripts, in notebooks and under `accelerate launch`, where each process judges what it is given.

    Args:
        model (`str`):
            Name of the judging model, as the server knows it.
        base_url (`str` or `list[str]`, *optional*):
            Address of the server, or of several that share the requests, such as `"http://localhost:8000/v1"`. By default, the environment variable
            `OPENAI_BASE_URL` or else OpenAI's own API.
        api_key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key. Give a server of your own another one, or it gets to see the key for
            the hosted API.
        rubric (`str` or [`~rubrics.Rubric`], *optional*, defaults to `"overall"`):
            What is rated: `"overall"`, one rating from 1 to 10; `"ultrafeedback"`, the mean of four aspects; `"safety"`;
            or a rubric of your own.
        prompt_template (`str`, *optional*):
            Text that takes the place of the rubric's, with the placeholders `{prompt}` and `{response}`, which are
            replaced by JSON strings. The system message, which gives the answer's form and says that these strings are no
            instructions, stays.
        num_votes (`int`, *optional*, defaults to `1`):
            Number of verdicts for each response. The score is the mean of those that can be read. More than one takes a
            `temperature` above 0.
        expected_score (`bool`, *optional*, defaults to `False`):
            Whether the score is the mean of the possible ratings, weighted by the probabilities that the server gives for
            the rating's token, see [`~rubrics.Rubric.expected_score`]. Where the server gives none, it is the rating.
        num_reasks (`int`, *optional*, defaults to `1`):
            How often an answer that cannot be read is asked for again. Each time is paid for.
        max_concurrency (`int`, *optional*, defaults to `8`):
            Number of requests under way at the same time, over all processes.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature of the judge. `None` leaves it to the server, for models that accept no other value.
        max_tokens (`int`, *optional*, defaults to `512`):
            Token limit of a verdict. `None` sends none.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which a request is given up and retried.
        max_retries (`int`, *optional*, defaults to `5`):
            Number of retries of a request after connection errors and server errors, at growing intervals. Waiting for a
            rate limit uses up none.
        extra_body (`dict`, *optional*):
            Further fields of each request, such as `{"reasoning_effort": "low"}`.
        cache_dir (`str`, *optional*):
            Folder in which the answers are kept. By default they are kept in memory, and lost with the process.
        prices (`str` or `dict`, *optional*):
            Price table, see [`~api.costs.model_price`].
        max_cost (`float`, *optional*):
            US dollars that the verdicts of a call may cost, those included that earlier runs have paid for. Before it
            would be passed, as far as prompts can be estimated, the call ends with [`~api.CollectionStopped`].

    Attributes:
        report ([`~api.APIReport`] or `None`): What became of the requests of the last call, and what they cost.

    Raises:
        `ImportError`: If the `openai` package is missing.
        `ValueError`: If an option is out of its range, the template lacks a placeholder, `OPENAI_API_KEY` is not set, or
            `max_cost` is given and the price of the model is not known.

    Example:

    ```python
    >>> judge = OpenAIJudge("gpt-4.1-mini", cache_dir="answers")
    >>> judge(prompts=["What is the capital of France?"], completions=["Paris."])
    [Verdict(score=10.0, raw='{"reason":"The response is correct and to the point.","rating":10}')]
    ```
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | list[str] | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        rubric: str | Rubric = "overall",
        prompt_template: str | None = None,
        num_votes: int = 1,
        expected_score: bool = False,
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
        if isinstance(rubric, str):
            rubric = load_rubric(rubric)
        if prompt_template is not None:
            rubric = replace(rubric, template=prompt_template)
        if num_votes < 1:
            raise ValueError(f"`num_votes` must be at least 1, got {num_votes}.")
        if num_votes > 1 and "seed" in (extra_body or {}):
            raise ValueError("`extra_body` gives all votes the same `seed`, so they would be the same. Leave it out.")
        if num_votes > 1 and temperature == 0:
            raise ValueError(
                f"`temperature=0` gives the same verdict {num_votes} times. Set a positive `temperature`, or "
                "`num_votes=1`."
            )
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
        self.num_votes = num_votes
        self.expected_score = expected_score

    def __call__(
        self, /, *, prompts: list[str | list[dict]], completions: list[str | list[dict]], **columns: Any
    ) -> list[Verdict]:
        """
        Rate responses.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompt of each response.
            completions (`list[str | list[dict]]`):
                Responses.
            columns:
                Other columns of the dataset. `tools` is shown to the judge as part of the prompt.

        Returns:
            `list[Verdict]`: One verdict a response, with the judge's answer as `raw`, or a JSON list of them if there are
            several votes.

        Raises:
            `ValueError`: If the server rejects the key, the model or the requests, cannot be reached from the start, or
                gives no answer that can be read.
            [`~api.CollectionStopped`]: If the call ended early; the same call goes on from there.
        """
        return list(self.stream(prompts=prompts, completions=completions, **columns))

    def stream(
        self, /, *, prompts: Iterable[str | list[dict]], completions: Iterable[str | list[dict]], **columns: Any
    ) -> Iterator[Verdict]:
        """
        Rate all responses, then yield the verdicts from the store.

        Args:
            prompts (`Iterable[str | list[dict]]`):
                Prompt of each response. As the other arguments, they are gone through several times, and never indexed.
            completions (`Iterable[str | list[dict]]`):
                Responses.
            columns:
                Other columns of the dataset.

        Yields:
            [`Verdict`]: Verdict after verdict, as a call gives them.

        Raises:
            `ValueError`: As a call does.
            [`~api.CollectionStopped`]: If the call ended early; the same call goes on from there.
        """
        requests = self._requests(prompts, completions, columns)
        self._ask(requests, self.rubric.read)
        failures: list[dict] = []
        plain = done = 0
        votes: list[tuple[float | None, str | None]] = []
        for answer, failure in self._read(requests, self.rubric.read):
            if answer is None:
                failures.append({"row": done, "vote": len(votes), **failure})
                votes.append((None, failure["answer"] or failure["reason"]))
            else:
                score, is_expected = self._score(answer)
                plain += not is_expected
                votes.append((score, answer["text"]))
            if len(votes) == self.num_votes:
                yield _mean_verdict(votes)
                done += 1
                votes = []
        if self.expected_score and plain:
            logger.warning(
                f"{plain} ratings come without probabilities that tell the ratings apart, so they count as they are."
            )
        self.client.list_failures("judgements", failures)

    def estimate(
        self, /, *, prompts: Iterable[str | list[dict]], completions: Iterable[str | list[dict]], **columns: Any
    ) -> CostEstimate:
        """
        Estimate what rating responses would take. Nothing is sent.

        Args:
            prompts (`Iterable[str | list[dict]]`):
                Prompt of each response.
            completions (`Iterable[str | list[dict]]`):
                Responses.
            columns:
                Other columns of the dataset.

        Returns:
            [`~api.CostEstimate`]: Requests, tokens and money.
        """
        return self.client.estimate(self._requests(prompts, completions, columns)())

    def submit_batch(
        self, /, *, prompts: Iterable[str | list[dict]], completions: Iterable[str | list[dict]], **columns: Any
    ) -> BatchStatus:
        """
        Hand responses in to the Batch API, at half the price, as far as they have no verdict and are in no job yet.

        Once [`~OpenAIJudge.collect_batch`] has taken the answers in, calling the judge gives the verdicts, and asks what
        the jobs left unanswered. All of it can be repeated at any time. Calling the judge while jobs are under way asks
        for their requests again, at the full price.

        The first of the requests is asked directly, at the full price, so that a wrong key, model or option shows at once
        and not a day later in every line.

        Args:
            prompts (`Iterable[str | list[dict]]`):
                Prompt of each response.
            completions (`Iterable[str | list[dict]]`):
                Responses. Both are gone through several times.
            columns:
                Other columns of the dataset. `tools` is shown to the judge as part of the prompt.

        Returns:
            [`~api.batch.BatchStatus`]: The jobs under way.

        Raises:
            `ValueError`: If there is no `cache_dir`, or the server rejects the key or the job.
            [`~api.CollectionStopped`]: If the verdicts could cost more than `max_cost`, or the server cannot be reached.
        """
        return submit_batch(self.client, self._requests(prompts, completions, columns))

    def collect_batch(self) -> BatchStatus:
        """
        Take in the answers of the jobs that have ended.

        Returns:
            [`~api.batch.BatchStatus`]: What was taken in, and what is still under way, which is no error.
        """
        return collect_batch(self.client)

    def _requests(self, prompts: Iterable, completions: Iterable, columns: dict[str, Any]) -> Requests:
        options = {"logprobs": True, "top_logprobs": 20} if self.expected_score else {}

        def requests() -> Iterator[APIRequest]:
            tools = columns["tools"] if columns.get("tools") is not None else (None for _ in prompts)
            for prompt, completion, prompt_tools in zip(prompts, completions, tools, strict=True):
                messages = self.rubric.messages(prompt, completion, prompt_tools)
                for vote in range(self.num_votes):
                    yield self._request(messages, vote, **options)

        return requests

    def _score(self, answer: dict) -> tuple[float, bool]:
        """The score of a readable answer, and whether it is the expected one."""
        if self.expected_score and "logprobs" in answer:
            expected = self.rubric.expected_score(answer["logprobs"])
            if expected is not None:
                return expected, True
        rating = self.rubric.read(answer["text"])
        assert rating is not None
        return rating.score, False


def _mean_verdict(votes: list[tuple[float | None, str | None]]) -> Verdict:
    scores = [score for score, _ in votes if score is not None]
    raw = votes[0][1] if len(votes) == 1 else json.dumps([said for _, said in votes], ensure_ascii=False)
    return Verdict(statistics.fmean(scores) if scores else None, raw)
