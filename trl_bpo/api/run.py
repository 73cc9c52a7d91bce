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

"""The workers that have requests answered, and what they share."""

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers.utils import logging as transformers_logging

from .answers import NotACompletion, attempt_key, read_answer, why_unusable, worth_reasking
from .costs import dollars
from .errors import CollectionStopped, Outcome, api_key
from .records import APIRequest, CostEstimate
from .servers import Server, choose_server


if TYPE_CHECKING:
    from .client import APIClient


logger = logging.getLogger(__name__)

# Seconds. Who has to wait for longer is better off with a run that ends and is started again.
_LONGEST_COOL_DOWN = 3600.0
_LONGEST_BACKOFF = 60.0
# Answers that cannot be used, with none that can be among them, after which going on is a waste of money.
_PATIENCE = 32
_FAILURES_IN_A_ROW = 8
_CONNECTIONS_PER_POOL = 32
# Seconds between the first requests of two workers, which is more than a request takes of the CPU.
_START_APART = 0.003
# What an answer may cost where nothing limits it, in tokens.
TOKENS_WITHOUT_LIMIT = 2048
_NOT_A_COMPLETION = ValueError(
    "The server answers with something else than a completion. Check `base_url`, which ends in `/v1` with most servers."
)


class Run:
    """One call of [`APIClient.ask`]: the workers and what they share."""

    def __init__(
        self,
        client: "APIClient",
        path: str,
        is_usable: Callable[[dict], bool],
        num_reasks: int,
        desc: str,
        estimate: CostEstimate,
    ) -> None:
        processes = PartialState().num_processes
        self.client = client
        self.path = path
        self.is_usable = is_usable
        self.num_reasks = num_reasks
        self.desc = desc
        self.estimate = estimate
        self.servers = [Server(address) for address in client.base_urls]
        self.concurrency = max(1, client.max_concurrency // processes)
        self.max_cost = None if client.max_cost is None else client.max_cost / processes
        self.sent = self.reasked = self.cool_downs = self.prompt_tokens = self.completion_tokens = 0
        self.failures = client.failures = {}
        self.cost = self.cost_before = 0.0
        self._under_way: set[str] = set()
        self._reserved = 0.0
        self._estimated = self._reported = 0
        self._usable = self._unusable = self._wasted = self._failed_in_a_row = 0
        self._stop: Exception | None = None
        self._resume_at = self._cooled_at = 0.0
        self._rate_limited_since: float | None = None
        self._cool_down = 0.5

    @property
    def _has_answered(self) -> bool:
        return self.sent > 0 or self.estimate.from_store > 0

    @property
    def _tokens_over_estimate(self) -> float:
        return self._reported / self._estimated if self._estimated else 1.0

    def count_stored(self, requests: Iterable[APIRequest]) -> None:
        """Count the answers that are in the store, so that they are part of `max_cost` wherever they stand in the order."""
        counted: set[str] = set()
        for request in requests:
            if request.key in counted or request.key not in self.client.store:
                continue
            counted.add(request.key)
            for attempt in range(self.num_reasks + 1):
                answer = self.client.store.get(attempt_key(request.key, attempt))
                if answer is None:
                    break
                self.cost_before += self._count(answer)
                if self.is_usable(answer):
                    self._usable += 1
                    break
            else:
                self._wasted += 1

    async def work(self, requests: Iterable[APIRequest]) -> Exception | None:
        """Have the requests answered. Gives the error to raise if that ended early, after what was under way has ended."""
        from openai import DEFAULT_CONNECTION_LIMITS, AsyncOpenAI, DefaultAsyncHttpxClient

        workers = min(self.concurrency, self.estimate.requests)
        # The connection pool goes through all of its connections for every request, so several small ones take less.
        pools = -(-workers // (_CONNECTIONS_PER_POOL * len(self.servers)))
        # The number of workers is the limit. One of the pool's own would let them wait for connections that time-outs have
        # left to be closed, and their own time runs meanwhile.
        limits = type(DEFAULT_CONNECTION_LIMITS)(max_connections=None, max_keepalive_connections=_CONNECTIONS_PER_POOL)
        iterator = iter(requests)
        with transformers_logging.tqdm(
            total=self.estimate.requests, desc=self.desc, disable=not PartialState().is_main_process
        ) as self._progress:
            async with AsyncExitStack() as stack:
                for server in self.servers:
                    server.clients = [
                        await stack.enter_async_context(
                            AsyncOpenAI(
                                api_key=api_key(self.client.api_key_variable),
                                base_url=server.address,
                                max_retries=0,
                                http_client=DefaultAsyncHttpxClient(limits=limits, timeout=self.client.timeout),
                                timeout=self.client.timeout,
                            )
                        )
                        for _ in range(pools)
                    ]
                async with asyncio.TaskGroup() as group:
                    for worker in range(workers):
                        group.create_task(self._work_off(iterator, worker, worker * _START_APART))
        if len(self.servers) > 1:
            logger.info("Servers: %s.", ", ".join(map(str, self.servers)))
        return self._stop

    async def _work_off(self, requests: Iterator[APIRequest], worker: int, delay: float) -> None:
        # What is sent at once is answered at once, and would wait for each other in every round.
        await asyncio.sleep(delay)
        for request in requests:
            if self._stop is not None:
                return
            # A copy of a request shares the fate of the first one, which may still be under way.
            if request.key not in self._under_way and request.key not in self.failures:
                self._under_way.add(request.key)
                try:
                    await self._answer(request, worker)
                except Exception as error:
                    # Such as a full disk. What is under way still lands, as far as it can.
                    self._stop = self._stop or error
                finally:
                    self._under_way.discard(request.key)
            self._progress.update()
            self._progress.set_postfix_str(self._status(), refresh=False)
            # Answers from the store come without a wait, so others would not get a turn.
            await asyncio.sleep(0)

    async def _answer(self, request: APIRequest, worker: int) -> None:
        is_new = False
        for attempt in range(self.num_reasks + 1):
            key = attempt_key(request.key, attempt)
            answer = self.client.store.get(key)
            if answer is None:
                answer = await self._request(request, worker)
                if answer is None:
                    return
                # From here on it is on disk, and counts.
                self.client.store.put(key, answer)
                self.sent += 1
                self.reasked += attempt > 0
                self._count(answer)
                self._estimated += request.tokens
                self._reported += answer["prompt_tokens"]
                is_new = True
            last = answer
            if self.is_usable(answer):
                self._usable += is_new
                return
            if not worth_reasking(answer):
                break
        self._unusable += 1
        self._wasted += is_new
        if is_new and self._wasted >= _PATIENCE and not self._usable and self._stop is None:
            self._stop = ValueError(
                f"`{self.client.model}` has given {_PATIENCE} answers, none of which can be used; the last one: "
                f"{why_unusable(last)}. Nothing more is paid for. Check the model, `prompt_template` and `max_tokens`."
            )

    def _count(self, answer: dict) -> float:
        self.prompt_tokens += answer["prompt_tokens"]
        self.completion_tokens += answer["completion_tokens"]
        if self.client.price is None:
            return 0.0
        cost = self.client.price.of(answer["prompt_tokens"], answer["completion_tokens"], answer.get("batch", False))
        self.cost += cost
        return cost

    async def _request(self, request: APIRequest, worker: int) -> dict | None:
        """Give the answer, or `None` if there is none to be had or everything stops."""
        failures = 0
        while True:
            await self._wait_for_cool_down()
            if self._stop is not None:
                return None
            reserved = self._reserve(request)
            if reserved is None:
                return None
            if reserved < 0:
                await asyncio.sleep(0.05)
                continue
            sent_at = time.monotonic()
            format_index = self.client.format_index
            try:
                answer = await self._send(request, worker, format_index)
            except NotACompletion as error:
                # A page is a wrong address at the start, and later a glitch of something before the server.
                is_page = error.args == ("page",)
                kind = "stop" if is_page and not self._has_answered else "retry"
                outcome = Outcome(kind, "no completion", error=_NOT_A_COMPLETION)
            except Exception as error:
                # The client's error is let go of here: its text and its request can hold the key.
                outcome = Outcome.of(
                    error,
                    format_is_new=self.client.formats[format_index] is not None and not self.client.format_is_accepted,
                    key_variable=self.client.api_key_variable,
                )
            else:
                self._failed_in_a_row = 0
                self.client.format_is_accepted |= format_index == self.client.format_index
                self._rate_limited_since, self._cool_down = None, 0.5
                return answer
            finally:
                self._reserved -= reserved
            if outcome.kind == "format" and self.client.refuse_format(format_index):
                continue
            if outcome.kind == "max_tokens" and self.client.rename_max_tokens():
                continue
            if outcome.kind == "rate_limit":
                self._cool(sent_at, outcome.retry_after)
            elif outcome.kind == "retry" and failures < self.client.max_retries:
                failures += 1
                delay = min(0.5 * 2.0 ** (failures - 1), 8.0) * random.uniform(0.75, 1.0)
                await asyncio.sleep(
                    min(delay if outcome.retry_after is None else outcome.retry_after, _LONGEST_BACKOFF)
                )
            else:
                self._fail(request, outcome)
                return None

    async def _send(self, request: APIRequest, worker: int, format_index: int) -> dict:
        response_format = self.client.formats[format_index]
        body = self.client.body(request, format_index)
        # As plain data: servers differ in what they leave out, and building the client's objects takes longer than the
        # rest of a request.
        data = await choose_server(self.servers).post(worker, self.path, body)
        if isinstance(data, str):
            # Some servers forget to say that it is JSON. A page for people is none.
            try:
                data = json.loads(data)
            except ValueError:
                raise NotACompletion("page") from None
        answer = read_answer(data, request)
        return {**answer, "format": response_format and response_format["type"]}

    def _reserve(self, request: APIRequest) -> float | None:
        """Set money aside for a request: 0 without a limit, -1 if others must end first, `None` if it is spent."""
        if self.max_cost is None or self.client.price is None:
            return 0.0
        # The estimate is for English. What the server counts tells how far it is off for these texts.
        tokens = request.tokens * max(1.0, self._tokens_over_estimate)
        price = self.client.price.of(tokens, request.token_limit or TOKENS_WITHOUT_LIMIT)
        if self.cost + price > self.max_cost:
            if self._stop is None:
                self._stop = CollectionStopped(
                    f"`max_cost` is reached: the answers so far cost {dollars(self.cost)}, and the next may cost "
                    f"{dollars(price)}. They are kept: raise `max_cost` (now {dollars(self.client.max_cost or 0.0)} over all "
                    "processes) and run the same again to go on."
                )
            return None
        if self.cost + self._reserved + price > self.max_cost:
            return -1.0
        self._reserved += price
        return price

    async def _wait_for_cool_down(self) -> None:
        while self._stop is None and (delay := self._resume_at - time.monotonic()) > 0:
            self._progress.set_postfix_str(self._status())
            # In slices, so that a stop does not wait, and not all at the same moment.
            await asyncio.sleep(min(delay, 1.0) + random.uniform(0.0, min(delay, 1.0)) / 4)

    def _cool(self, sent_at: float, retry_after: float | None) -> None:
        now = time.monotonic()
        # What was sent before the last cool-down began tells nothing new.
        if sent_at >= self._cooled_at:
            self.cool_downs += 1
            self._cool_down = min(2.0 * self._cool_down, _LONGEST_BACKOFF)
            self._cooled_at = now
            # A server that says 0 every time is asked less and less often, too.
            wait = self._cool_down if retry_after is None else max(retry_after, self._cool_down / 100)
            self._resume_at = max(self._resume_at, now + wait)
        elif retry_after is not None:
            self._resume_at = max(self._resume_at, now + retry_after)
        if self._rate_limited_since is None:
            self._rate_limited_since = now
        if self._resume_at - self._rate_limited_since > _LONGEST_COOL_DOWN and self._stop is None:
            self._stop = CollectionStopped(
                f"The rate limit of `{self.client.model}` leaves nothing through for another "
                f"{self._resume_at - now:,.0f} s. All answers so far are kept: run the same again later to go on."
            )

    def _fail(self, request: APIRequest, outcome: "Outcome") -> None:
        self.failures[request.key] = outcome.reason
        is_rejected = outcome.kind in ("reject", "format", "max_tokens")
        stop: Exception | None = None
        if outcome.kind == "stop" or (is_rejected and not self._has_answered):
            stop = outcome.error
        elif is_rejected or outcome.kind == "retry":
            self._failed_in_a_row += 1
            # What is left of an earlier run may be nothing but requests that the server rejects.
            patience = max(self.concurrency, _FAILURES_IN_A_ROW if self.sent or not is_rejected else _PATIENCE)
            if outcome.unreachable and self.sent == 0:
                # A server that is not there is not there for the few either.
                patience = min(self.concurrency, self.estimate.requests - self.estimate.from_store)
            if self._failed_in_a_row >= patience:
                if is_rejected:
                    stop = outcome.error
                elif self.sent:
                    stop = CollectionStopped(
                        f"The server has stopped answering: {self._failed_in_a_row} requests in a row ended with "
                        f"`{outcome.reason}`. All answers so far are kept: run the same again when it is back. If it is these "
                        "requests that it fails at, `max_concurrency` above their number goes on without them."
                    )
                elif outcome.unreachable:
                    stop = ValueError(
                        f"The server cannot be reached: {self._failed_in_a_row} requests in a row ended with "
                        f"`{outcome.reason}`, and none was answered. Start the server, check `base_url` or the "
                        "environment variable `OPENAI_BASE_URL`, or raise `timeout` if the server is slow."
                    )
                else:
                    stop = outcome.error or ValueError(
                        f"The server fails: {self._failed_in_a_row} requests in a row ended with `{outcome.reason}`, "
                        "and none was answered. See its log."
                    )
        if self._stop is None:
            self._stop = stop

    def _status(self) -> str:
        parts = []
        if self.client.price is not None:
            to_ask = self.estimate.requests - self.estimate.from_store
            projected = self.cost_before + (self.cost - self.cost_before) / max(self.sent, 1) * to_ask
            parts.append(f"{dollars(self.cost)} of about {dollars(projected)}")
        if self._unusable or self.failures:
            parts.append(f"{self._unusable} unusable, {len(self.failures)} failed")
        if (delay := self._resume_at - time.monotonic()) > 0:
            parts.append(f"rate limit, {delay:.0f} s")
        return ", ".join(parts)


def run_in_any_thread(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """
    Run a coroutine to its end, also where an event loop runs already, as in a notebook.

    Args:
        coroutine (`Coroutine`):
            The coroutine.

    Returns:
        What it returns.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # An event loop runs in this thread already, which cannot run a second one.
    loops: list[asyncio.AbstractEventLoop] = []

    def run() -> Any:
        with asyncio.Runner() as runner:
            loops.append(runner.get_loop())
            return runner.run(coroutine)

    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(run)
        try:
            return future.result()
        except KeyboardInterrupt:
            # The notebook's stop button interrupts this thread alone: the other one is told, or it would go on.
            for loop in loops:
                loop.call_soon_threadsafe(_cancel_all, loop)
            raise


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
