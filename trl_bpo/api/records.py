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

"""What is asked of an API, what it would take, and what became of it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .costs import dollars


@dataclass(frozen=True)
class APIRequest:
    """
    A request.

    Args:
        key (`str`):
            [`~answer_store.content_key`] of everything that the answer depends on.
        body (`dict[str, Any]`):
            What is sent, without `model` and `response_format`.
        tokens (`int`):
            About the number of tokens of what is sent.
    """

    key: str
    body: dict[str, Any]
    tokens: int

    @property
    def token_limit(self) -> int | None:
        """Largest number of tokens that can be answered, `None` if nothing limits it."""
        limit = self.body.get("max_tokens")
        return self.body.get("max_completion_tokens") if limit is None else limit


def check_extra_body(extra_body: dict[str, Any] | None) -> None:
    """
    Check further fields of requests.

    Args:
        extra_body (`dict`, *optional*):
            The fields.

    Raises:
        `ValueError`: If one of them would change what is asked or how it is read.
    """
    for name in ("model", "messages", "prompt", "n", "stream", "response_format"):
        if name in (extra_body or {}):
            raise ValueError(f"`extra_body` must not have `{name}`, which is set for each request. Leave it out.")


@dataclass
class APIReport:
    """
    What became of the requests of a call.

    Every request is counted once: `requests` is the sum of `usable`, `unusable` and `failed`.

    Args:
        requests (`int`):
            Number of requests, copies of one another included.
        from_store (`int`):
            Those that had their answer before anything was sent.
        sent (`int`):
            Requests that were answered by the server in this call, those included that were asked again.
        reasked (`int`):
            Those of `sent` that were asked because an earlier answer to the same request could not be used.
        usable (`int`):
            Requests with an answer that can be used.
        unusable (`int`):
            Requests whose answers cannot be used: unreadable, refused or filtered.
        failed (`int`):
            Requests without an answer, because errors outlasted the retries or the server rejects them. A later call asks
            them again.
        reasons (`dict[str, int]`):
            Why requests are `unusable` or `failed`, with their numbers.
        cool_downs (`int`):
            How often the server's rate limit made everything wait.
        prompt_tokens (`int`):
            Tokens sent, over all answers to these requests, those from the store included.
        completion_tokens (`int`):
            Tokens answered, likewise.
        cost (`float`, *optional*):
            US dollars for these tokens; `None` if no price is known.
        spent (`float`, *optional*):
            The part of `cost` that this call added.
        seconds (`float`):
            Wall-clock time.
    """

    requests: int = 0
    from_store: int = 0
    sent: int = 0
    reasked: int = 0
    usable: int = 0
    unusable: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    cool_downs: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None
    spent: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        money = "" if self.cost is None else f", {dollars(self.cost)} ({dollars(self.spent or 0.0)} in this run)"
        lost = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.items())
        return (
            f"{self.requests:,} requests, {self.from_store:,} answered before; {self.prompt_tokens:,} + "
            f"{self.completion_tokens:,} tokens{money}; {self.usable:,} usable" + (f", {lost}" if lost else "")
        )


def total_report(reports: list[APIReport]) -> APIReport:
    """
    Add up what several processes asked.

    Args:
        reports (`list[APIReport]`):
            Report of each process.

    Returns:
        [`APIReport`]: Their sum; of the times, the longest.
    """
    total = APIReport(seconds=max(report.seconds for report in reports))
    for name in ("requests", "from_store", "sent", "reasked", "usable", "unusable", "failed", "cool_downs"):
        setattr(total, name, sum(getattr(report, name) for report in reports))
    total.prompt_tokens = sum(report.prompt_tokens for report in reports)
    total.completion_tokens = sum(report.completion_tokens for report in reports)
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(report.reasons)
        if report.cost is not None:
            total.cost = (total.cost or 0.0) + report.cost
            total.spent = (total.spent or 0.0) + (report.spent or 0.0)
    total.reasons = dict(reasons.most_common())
    return total


@dataclass(frozen=True)
class CostEstimate:
    """
    What requests would take, before anything is sent.

    Args:
        requests (`int`):
            Number of requests, copies of one another included.
        from_store (`int`):
            Those that have their answer already.
        prompt_tokens (`int`):
            About the number of tokens that would be sent, see [`~api.costs.estimate_tokens`].
        completion_tokens (`int`, *optional*):
            Largest number of tokens that could be answered; `None` without a token limit.
        cost (`float`, *optional*):
            US dollars for that at most, requests that are asked again apart; `None` if no price or limit is known.
    """

    requests: int
    from_store: int
    prompt_tokens: int
    completion_tokens: int | None
    cost: float | None

    def __str__(self) -> str:
        answer = (
            "no limit of tokens" if self.completion_tokens is None else f"at most {self.completion_tokens:,} tokens"
        )
        money = "price unknown" if self.cost is None else f"at most {dollars(self.cost)}"
        return (
            f"{self.requests - self.from_store:,} requests to send ({self.from_store:,} answered before), about "
            f"{self.prompt_tokens:,} tokens; answers: {answer}; {money}"
        )
