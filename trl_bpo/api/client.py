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
Requests to an OpenAI-compatible API, by the thousand, none of them asked twice.

[`APIClient`] keeps every answer in an [`AnswerStore`] before it counts, so a run that was killed goes on where it ended:
what is asked is what the store does not have. Judge and generator are built on it, and know nothing of connections.
"""

import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..answer_store import AnswerStore, prepare_folder
from .answers import attempt_key, why_unusable
from .costs import model_price
from .errors import api_key
from .records import APIReport, APIRequest, CostEstimate
from .run import Run, run_in_any_thread


logger = logging.getLogger(__name__)


class APIClient:
    """
    Ask a model behind an OpenAI-compatible API.

    The key is read from an environment variable and from nowhere else. Under `accelerate launch` each
    process is meant to ask for its own share: it gets its part of `max_concurrency` and of `max_cost`.

    What happens at errors:

    | error | what follows |
    | --- | --- |
    | 429 | all wait, for as long as `Retry-After` says or else 1, 2, 4, ... 60 s; uses up no retry |
    | 408, 409, 5xx, broken connection, time-out, an answer that is no JSON | the request is retried, `max_retries` times, then counts as failed |
    | content filter, too long for the context, too large | counts as failed |
    | 401, 402, exhausted quota | stops at once, with the remedy |
    | 400, 403, 404, 422 and the like | stops at once, unless the server has answered such requests before: then it counts as failed |
    | failures in a row, as many as are under way at once | stops: the server is gone, or rejects everything |
    | answers that cannot be used, none that can, 32 of them | stops: model or template are at fault |

    Args:
        model (`str`):
            Name of the model, as the server knows it.
        base_url (`str` or `list[str]`, *optional*):
            Address of the server, such as `"http://localhost:8000/v1"`. By default, the environment variable
            `OPENAI_BASE_URL` or else OpenAI's own API. Of several servers of the same model, each request goes to the one
            with the fewest under way; one that fails three times in a row is left alone for some seconds, twice as many
            each time. Answers are kept by what was asked, so other addresses may serve the rest of a run.
        api_key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key. Give a server of your own another one, or it gets to see the key for
            the hosted API.
        max_concurrency (`int`, *optional*, defaults to `8`):
            Number of requests under way at the same time, over all processes.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds after which a request is given up and retried.
        max_retries (`int`, *optional*, defaults to `5`):
            Number of retries of a request.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder in which answers are kept, see [`~answer_store.AnswerStore`]. By default they are kept in memory, and
            lost with the process.
        prices (`str`, `os.PathLike` or `dict`, *optional*):
            Price table, see [`~api.costs.model_price`].
        max_cost (`float`, *optional*):
            US dollars that all answers of a call may cost together, those included that earlier runs have paid for and
            that are in the store. Before it would be passed, the call ends with [`CollectionStopped`].
        formats (`list[dict]`, *optional*):
            Values for `response_format`, the preferred one first. The next one is taken where the server refuses one,
            and none after the last.

    Raises:
        `ImportError`: If the `openai` package is missing.
        `ValueError`: If an option is out of its range, the variable of the key is not set or holds no key, the address is none, or
            `max_cost` is given for a model whose price is not known.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | list[str] | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        max_concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 5,
        cache_dir: str | os.PathLike | None = None,
        prices: str | os.PathLike | dict | None = None,
        max_cost: float | None = None,
        formats: list[dict] | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "Asking a model over an API requires the `openai` package. Install it with "
                "`pip install 'trl_bpo[openai]'`."
            ) from error
        api_key(api_key_variable)
        addresses = base_url if isinstance(base_url, list) else [base_url]
        if not addresses:
            raise ValueError("`base_url` is an empty list. Give the address of one server at least.")
        for given in addresses:
            address = os.environ.get("OPENAI_BASE_URL") if given is None else given
            if address is not None and not re.match(r"https?://[^/\s]", address, re.IGNORECASE):
                raise ValueError(
                    "`base_url`, or the environment variable `OPENAI_BASE_URL`, is not the address of a server. Write it "
                    "with `http://` or `https://` and the host, as in `http://localhost:8000/v1`."
                )
        if max_concurrency < 1:
            raise ValueError(f"`max_concurrency` must be at least 1, got {max_concurrency}.")
        if max_retries < 0 or not timeout > 0:
            raise ValueError(
                f"`max_retries` must be at least 0 and `timeout` above 0, got {max_retries} and {timeout}."
            )
        self.price = model_price(model, prices)
        if max_cost is not None and not max_cost > 0:
            raise ValueError(f"`max_cost` must be above 0, got {max_cost}.")
        if max_cost is not None and self.price is None:
            raise ValueError(
                f"`max_cost` needs the price of `{model}`, which no price table has. Give it with `prices`, for example "
                f'`{{"{model}": {{"input_cost_per_token": 1e-6, "output_cost_per_token": 4e-6}}}}`.'
            )
        self.model = model
        self.base_urls = addresses
        self.api_key_variable = api_key_variable
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_cost = max_cost
        prepare_folder(cache_dir)
        self.store = AnswerStore(cache_dir)
        self.formats: list[dict | None] = [*(formats or []), None]
        self.format_index = 0
        # Whether anything was answered with that format.
        self.format_is_accepted = False
        # Why requests of the last call have no answer, by their keys.
        self.failures: dict[str, str] = {}
        self.max_tokens_name = "max_tokens"

    def estimate(self, requests: Iterable[APIRequest]) -> CostEstimate:
        """
        Estimate what requests would take. Nothing is sent.

        Args:
            requests (`Iterable[APIRequest]`):
                The requests.

        Returns:
            [`CostEstimate`]: Tokens and money.
        """
        total = stored = prompt_tokens = 0
        completion_tokens: int | None = 0
        for request in requests:
            total += 1
            if request.key in self.store:
                stored += 1
                continue
            prompt_tokens += request.tokens
            limit = request.token_limit
            completion_tokens = None if limit is None or completion_tokens is None else completion_tokens + limit
        cost = None
        if self.price is not None and completion_tokens is not None:
            cost = self.price.of(prompt_tokens, completion_tokens)
        return CostEstimate(total, stored, prompt_tokens, completion_tokens, cost)

    def ask(
        self,
        requests: Callable[[], Iterable[APIRequest]],
        *,
        path: str = "/chat/completions",
        is_usable: Callable[[dict], bool],
        num_reasks: int = 0,
        desc: str,
    ) -> APIReport:
        """
        Have requests answered, as far as the store does not have their answers.

        Args:
            requests (`Callable[[], Iterable[APIRequest]]`):
                Gives the requests, from the beginning every time it is called: they are gone through several times rather
                than held in memory.
            path (`str`, *optional*, defaults to `"/chat/completions"`):
                Endpoint, `"/chat/completions"` or `"/completions"`.
            is_usable (`Callable[[dict], bool]`):
                Whether an answer can be used. One that cannot is asked for again.
            num_reasks (`int`, *optional*, defaults to `0`):
                How often a request is asked again after answers that cannot be used. Refusals and what a content filter
                stopped are not.
            desc (`str`):
                What is done, for the progress bar.

        Returns:
            [`APIReport`]: What was asked, and what it took. The answers are in the store: [`~APIClient.read`] gives them,
            and completes the report.

        Raises:
            `ValueError`: If the server rejects the key, the model or the requests, cannot be reached from the start, or
                gives no answer that can be used.
            [`CollectionStopped`]: If the call ended early and can be repeated.
        """
        start = time.perf_counter()
        self.store.refresh()
        estimate = self.estimate(requests())
        if PartialState().is_main_process:
            processes = PartialState().num_processes
            share = "" if processes == 1 else f" (the share of one of {processes} processes)"
            tqdm.write(f"{desc} with `{self.model}`: {estimate}{share}.", file=sys.stderr)
        run = Run(self, path, is_usable, num_reasks, desc, estimate)
        if estimate.from_store:
            run.count_stored(requests())
        try:
            stop = run_in_any_thread(run.work(requests()))
        finally:
            self.store.flush()
        if stop is not None:
            raise stop
        report = APIReport(
            requests=estimate.requests,
            from_store=estimate.from_store,
            sent=run.sent,
            reasked=run.reasked,
            cool_downs=run.cool_downs,
            prompt_tokens=run.prompt_tokens,
            completion_tokens=run.completion_tokens,
            seconds=time.perf_counter() - start,
        )
        if self.price is not None:
            report.cost, report.spent = run.cost, run.cost - run.cost_before
        return report

    def read(
        self,
        requests: Iterable[APIRequest],
        report: APIReport,
        is_usable: Callable[[dict], bool],
        num_reasks: int = 0,
    ) -> Iterator[tuple[dict | None, dict[str, str | None]]]:
        """
        Read the answers after [`~APIClient.ask`].

        Args:
            requests (`Iterable[APIRequest]`):
                The requests that were asked.
            report ([`APIReport`]):
                What `ask` gave. `usable`, `unusable`, `failed` and `reasons` are filled in.
            is_usable (`Callable[[dict], bool]`):
                Whether an answer can be used.
            num_reasks (`int`, *optional*, defaults to `0`):
                How often a request could be asked again.

        Yields:
            `tuple[dict | None, dict]`: For each request, the first answer that can be used: `text` (`str`), `refusal`,
            `finish_reason`, `prompt_tokens`, `completion_tokens`, `format` (type of the `response_format` that was sent,
            or `None`) and, where they were asked for, `logprobs`. If there is none, `None` and what came instead: the
            `reason`, and the last `answer`, if there is one.
        """
        reasons: Counter[str] = Counter()
        for request in requests:
            answer = None
            for attempt in range(num_reasks + 1):
                found = self.store.get(attempt_key(request.key, attempt))
                if found is None:
                    break
                answer = found
                if is_usable(answer):
                    break
            if answer is None:
                report.failed += 1
                failure = {"reason": self.failures[request.key], "answer": None}
            elif is_usable(answer):
                report.usable += 1
                yield answer, {}
                continue
            else:
                report.unusable += 1
                failure = {"reason": why_unusable(answer), "answer": answer["refusal"] or answer["text"]}
            reasons[str(failure["reason"])] += 1
            yield None, failure
        report.reasons = dict(reasons.most_common())
        if reasons:
            logger.warning(f"Not every request has an answer that can be used: {report}.")

    def list_failures(self, name: str, failures: list[dict]) -> None:
        """
        Write down what came to nothing: `failed-{name}-{rank}.jsonl` in `cache_dir`, instead of what an earlier call wrote.
        Rows are those of the process's own share.

        Args:
            name (`str`):
                What was asked for.
            failures (`list[dict]`):
                A line each, JSON-able.
        """
        if self.store.cache_dir is None:
            return
        state = PartialState()
        path = self.store.cache_dir / f"failed-{name}-{state.process_index:05d}.jsonl"
        if state.is_main_process:
            # Of an earlier run with more processes.
            for other in self.store.cache_dir.glob(f"failed-{name}-[0-9]*.jsonl"):
                if int(other.stem.rsplit("-", 1)[1]) >= state.num_processes:
                    other.unlink(missing_ok=True)
        if not failures:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(failure) + "\n" for failure in failures), encoding="utf-8")

    def body(self, request: APIRequest, format_index: int | None = None) -> dict[str, Any]:
        """
        What is sent for a request.

        Args:
            request ([`APIRequest`]):
                The request.
            format_index (`int`, *optional*):
                Place of the `response_format` in `formats`, by default that of the first one that was not refused.

        Returns:
            `dict[str, Any]`: The body.
        """
        response_format = self.formats[self.format_index if format_index is None else format_index]
        body = {"model": self.model, **request.body}
        if response_format is not None:
            body["response_format"] = response_format
        if "max_tokens" in body:
            body[self.max_tokens_name] = body.pop("max_tokens")
        return body

    def refuse_format(self, index: int) -> bool:
        """
        Note that the server refuses a `response_format`.

        Args:
            index (`int`):
                Its place in `formats`.

        Returns:
            `bool`: Whether there is another one to go on with.
        """
        if index == len(self.formats) - 1:
            return False
        if index == self.format_index:
            self.format_index += 1
            self.format_is_accepted = False
            following = self.formats[self.format_index]
            name = "plain text" if following is None else f"`response_format` of type `{following['type']}`"
            logger.warning(f"The server refuses structured output as it was asked for. Going on with {name} instead.")
        return True

    def rename_max_tokens(self) -> bool:
        """
        Note that the server wants the token limit under its newer name.

        Returns:
            `bool`: Whether it was sent under the older one until now.
        """
        renamed = self.max_tokens_name == "max_tokens"
        self.max_tokens_name = "max_completion_tokens"
        return renamed
