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

"""What the judges behind an API share: how they ask, and which answers they can use."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .answer_store import content_key
from .api import APIClient, APIReport, APIRequest, check_extra_body
from .api.costs import estimate_tokens


logger = logging.getLogger(__name__)

Requests = Callable[[], Iterable[APIRequest]]


class APIJudge:
    """What the judges of this module share: how they ask, and what they say of requests that came to nothing."""

    def __init__(
        self,
        model: str,
        response_format: dict,
        *,
        num_reasks: int,
        temperature: float | None,
        max_tokens: int | None,
        extra_body: dict[str, Any] | None,
        **client_options: Any,
    ) -> None:
        if num_reasks < 0:
            raise ValueError(f"`num_reasks` must be at least 0, got {num_reasks}.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"`max_tokens` must be at least 1 or `None`, got {max_tokens}.")
        check_extra_body(extra_body)
        # Some servers know JSON but no schema, such as llama-cpp-python.
        self.client = APIClient(model, formats=[response_format, {"type": "json_object"}], **client_options)
        # TRL names a reward function by its `__name__`; it is the name that ends up beside the scores.
        self.__name__ = model
        self.num_reasks = num_reasks
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.extra_body = extra_body or {}
        self.report: APIReport | None = None
        self._response_format = response_format

    def _request(self, messages: list[dict], vote: int = 0, **options: Any) -> APIRequest:
        body = {"messages": messages, "temperature": self.temperature, "max_tokens": self.max_tokens, **options}
        body = {name: value for name, value in body.items() if value is not None} | self.extra_body
        key = content_key([self.client.model, body, self._response_format, vote])
        return APIRequest(key, body, sum(estimate_tokens(message["content"]) for message in messages))

    def _ask(self, requests: Requests, read: Callable[[str], Any]) -> None:
        if self.client.store.cache_dir is None:
            logger.warning(
                "Verdicts are kept in memory alone: what was paid for is lost with this process. Set `cache_dir`."
            )
        ignored = False

        def is_usable(answer: dict) -> bool:
            nonlocal ignored
            text = (answer["text"] or "").lstrip()
            # Reasoning models think before they answer.
            if answer["format"] is not None and text and not text.startswith(("{", "<think>")) and not ignored:
                ignored = True
                logger.warning(
                    "The server ignores `response_format`: an answer is no JSON. Verdicts are read from the text, as far as "
                    "it is in the form that the prompt asks for."
                )
            return _readable(answer, read)

        self.report = self.client.ask(
            requests, is_usable=is_usable, num_reasks=self.num_reasks, desc="Judging responses"
        )

    def _read(
        self, requests: Requests, read: Callable[[str], Any]
    ) -> Iterator[tuple[dict | None, dict[str, str | None]]]:
        assert self.report is not None
        return self.client.read(requests(), self.report, lambda answer: _readable(answer, read), self.num_reasks)


def _readable(answer: dict, read: Callable[[str], Any]) -> bool:
    text = answer["text"]
    if text is None or answer["refusal"] or answer["finish_reason"] == "content_filter":
        return False
    # A reasoning model that is cut off in the middle may have drafted a verdict, in a code block, that it did not give.
    if answer["finish_reason"] == "length" and "```" in text:
        return False
    return read(text) is not None
