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

"""What the errors of an API mean."""

import email.utils
import math
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import openai


_FORMAT_REFUSED = re.compile("response_format|json_schema|json_object|structured output", re.IGNORECASE)


class CollectionStopped(RuntimeError):
    """
    A stop that loses nothing: every answer so far is kept, and the same call again goes on from there.

    Raised where `max_cost` is reached, where the server cannot be reached any more, or where it asks to wait for hours.
    """


@dataclass(frozen=True)
class Outcome:
    """What an error of a request means: `rate_limit`, `retry`, `skip`, `reject`, `stop`, `format` or `max_tokens`."""

    kind: str
    reason: str
    retry_after: float | None = None
    unreachable: bool = False
    error: ValueError | None = None

    @classmethod
    def of(cls, error: Exception, format_is_new: bool, key_variable: str) -> "Outcome":
        """
        Read an error of the client.

        Args:
            error (`Exception`):
                What a request has raised. What is no error of the client is raised again.
            format_is_new (`bool`):
                Whether the request had a `response_format` with which nothing was answered yet, so that the error may be
                about it.
            key_variable (`str`):
                Environment variable of the key, for the remedy.

        Returns:
            [`Outcome`]: What it means.
        """
        import openai

        reason = type(error).__name__
        if isinstance(error, (ValueError, RecursionError)):
            # Announced as JSON, and broken off, in another encoding or nested without end.
            return cls("retry", reason)
        if isinstance(error, openai.APIConnectionError):
            return cls("retry", reason, unreachable=True)
        if not isinstance(error, openai.APIStatusError):
            raise error
        text = str(error).lower()
        retry_after = _retry_after(error.response.headers)
        if format_is_new and error.status_code in (400, 422, 500) and _FORMAT_REFUSED.search(text):
            # llama-cpp-python answers 500 to a format that it does not know.
            return cls("format", reason)
        if error.code in ("content_filter", "context_length_exceeded") or "context length" in text:
            return cls("skip", str(error.code or "context_length_exceeded"))
        if error.status_code == 400 and "max_completion_tokens" in text:
            return cls("max_tokens", reason, error=_as_value_error(error, key_variable))
        if error.status_code == 402 or "insufficient_quota" in (error.code, error.type):
            # Waiting does not refill an account.
            return cls("stop", reason, error=_as_value_error(error, key_variable))
        if error.status_code == 429:
            return cls("rate_limit", reason, retry_after)
        if error.status_code in (408, 409) or error.status_code >= 500:
            return cls("retry", reason, retry_after)
        if error.status_code == 413:
            return cls("skip", reason)
        # Some services answer 403 or 404 to a single prompt, too.
        kind = "stop" if error.status_code == 401 else "reject"
        return cls(kind, reason, error=_as_value_error(error, key_variable))


def api_key(variable: str) -> str:
    """
    Read the key for the API from the environment.

    Args:
        variable (`str`):
            Name of the environment variable.

    Returns:
        `str`: Its value, without white space around it.

    Raises:
        `ValueError`: If it is not set, or cannot be a key.
    """
    # Keys that are pasted or read from a file often end with a line break.
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(
            f"The environment variable `{variable}` is not set. Set it to your key; for a local server that checks no "
            "keys, any value will do."
        )
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"The environment variable `{variable}` holds characters that no key has: only printable ASCII characters "
            "can be sent. Copy the key again."
        )
    return key


def _retry_after(headers: Any) -> float | None:
    """Seconds to wait as the server says: `retry-after-ms`, or `Retry-After` as seconds or as a date (RFC 9110, 10.2.3)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            parsed = email.utils.parsedate_tz(value)
            try:
                seconds = math.inf if parsed is None else email.utils.mktime_tz(parsed) - time.time()
            except (ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None


def _as_value_error(error: "openai.APIStatusError", key_variable: str) -> ValueError:
    remedies = {
        "AuthenticationError": f"The server rejects the key. Check the environment variable `{key_variable}`.",
        "PermissionDeniedError": f"The key in `{key_variable}` has no permission to use the `model`.",
        "NotFoundError": "The server does not know the model, or the address is wrong. Check `model` and `base_url`, which "
        "ends in `/v1` with most servers.",
        "RateLimitError": f"The account of the key in `{key_variable}` has no quota left.",
    }
    default = (
        "The server rejects the request. If it does not accept an option, leave that out: `temperature=None`, "
        "`max_tokens=None`, `expected_score=False`, or what `extra_body` adds."
    )
    name = type(error).__name__
    # Servers repeat a key that they reject, so their words are left out there, and the key is blacked out elsewhere.
    said = str(error).replace(api_key(key_variable), "***")[:300]
    detail = "" if name in ("AuthenticationError", "PermissionDeniedError") else f" The server says: {said}"
    return ValueError(remedies.get(name, default) + detail)
