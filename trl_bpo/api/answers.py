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

"""What comes back from an API, as it is kept and read."""

import math
import re
from typing import Any

from ..answer_store import content_key
from .costs import estimate_tokens
from .records import APIRequest


class NotACompletion(Exception):
    """The server has sent something, with status 200, that is no completion: JSON of another form, or a page."""


def read_answer(data: Any, request: APIRequest) -> dict:
    """
    Take from a completion what is kept of it.

    Args:
        data (`Any`):
            The server's answer, parsed.
        request ([`APIRequest`]):
            What was asked, for the number of tokens if the server does not tell.

    Returns:
        `dict`: `text` (`str` or `None`), `refusal` (`str` or `None`), `finish_reason` (`str` or `None`), `prompt_tokens`
        and `completion_tokens` (`int`), and `logprobs` of [`compact_logprobs`] if the server sent any.

    Raises:
        [`NotACompletion`]: If it is none.
    """
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise NotACompletion
    # Some servers answer with no choice at all where they have nothing to say.
    choice: dict = choices[0] if choices else {"finish_reason": "no choices"}
    message = choice.get("message") or {}
    usage = data.get("usage") or {}
    if not isinstance(message, dict) or not isinstance(usage, dict):
        raise NotACompletion
    text = _text(choice["text"] if "text" in choice else message.get("content"))
    answer: dict[str, Any] = {
        "text": text,
        "refusal": _text(message.get("refusal")),
        "finish_reason": _text(choice.get("finish_reason")),
        "prompt_tokens": _count(usage.get("prompt_tokens"), request.tokens),
        "completion_tokens": _count(usage.get("completion_tokens"), estimate_tokens(text or "")),
    }
    if tokens := (choice.get("logprobs") or {}).get("content"):
        answer["logprobs"] = compact_logprobs(tokens)
    return answer


def compact_logprobs(content: list[dict]) -> list[list]:
    """
    Shorten the log-probabilities of an answer to what a rating's probabilities can be read from.

    Alternatives are kept for a token with a digit, and for the one after it, which tells whether the number goes on. All
    other tokens are joined, without any.

    Args:
        content (`list[dict]`):
            `choice.logprobs.content` of a chat completion.

    Returns:
        `list[list]`: `[token, logprob, [[alternative, logprob], ...]]`, whose tokens join to the answer. A log-probability
        that is not finite is `None`.
    """
    kept: list[list] = []
    after_digit = last_is_plain = False
    for token in content:
        has_digit = re.search("[0-9]", token["token"]) is not None
        if has_digit or after_digit:
            alternatives = [[top["token"], _finite(top.get("logprob"))] for top in token.get("top_logprobs") or []]
            kept.append([token["token"], _finite(token.get("logprob")), alternatives])
        elif last_is_plain:
            kept[-1][0] += token["token"]
        else:
            kept.append([token["token"], None, []])
        last_is_plain = not (has_digit or after_digit)
        after_digit = has_digit
    return kept


def _text(value: Any) -> str | None:
    if isinstance(value, list):
        # Content in parts.
        value = "".join(part.get("text") or "" for part in value if isinstance(part, dict))
    if value is not None and not isinstance(value, str):
        raise NotACompletion
    # Half of a surrogate pair, such as an emoji that was cut in two, can be kept in no dataset.
    return value and value.encode("utf-8", "replace").decode()


def _count(value: Any, estimate: int) -> int:
    return value if isinstance(value, int) and value > 0 else estimate


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is not None and math.isfinite(logprob) else None


def why_unusable(answer: dict) -> str:
    """
    Say in a few words why an answer cannot be used.

    Args:
        answer (`dict`):
            Answer from [`APIClient.answer`].

    Returns:
        `str`: One of few texts, fit to be counted.
    """
    if answer["refusal"]:
        return "refused by the model"
    if answer["finish_reason"] == "content_filter":
        return "stopped by a content filter"
    if answer["finish_reason"] == "length":
        return "cut off at `max_tokens`"
    return "unreadable" if (answer["text"] or "").strip() else "empty answer"


def worth_reasking(answer: dict) -> bool:
    """
    Whether another answer to the same request could be a better one.

    Args:
        answer (`dict`):
            An answer that cannot be used.

    Returns:
        `bool`: Not if the model or a content filter refuses.
    """
    return not answer["refusal"] and answer["finish_reason"] != "content_filter"


def attempt_key(key: str, attempt: int) -> str:
    """
    Key under which the answer to a request that is asked again is kept.

    Args:
        key (`str`):
            Key of the request.
        attempt (`int`):
            How often it was asked before.

    Returns:
        `str`: The key.
    """
    return key if attempt == 0 else content_key([key, attempt])
