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


"""The servers that share the requests of a run."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit


if TYPE_CHECKING:
    import openai


# A server that fails so often in a row is left alone for some seconds, twice as many each time.
_FAILURES_IN_A_ROW = 3
_LONGEST_REST = 60.0


@dataclass
class Server:
    """
    One address, and how it fares.

    Attributes:
        address (`str`, *optional*):
            The address; `None` is that of the openai package.
        clients (`list[openai.AsyncOpenAI]`):
            Its clients, each with a pool of connections.
        under_way (`int`):
            Requests that it has not answered yet.
        answered, failed (`int`):
            Requests that it answered, and that it failed at: no connection, no answer in time, or an error of its own.
    """

    address: str | None
    clients: list["openai.AsyncOpenAI"] = field(default_factory=list)
    under_way: int = 0
    answered: int = 0
    failed: int = 0
    _failed_in_a_row: int = 0
    _rests_until: float = 0.0

    def __str__(self) -> str:
        # The address may hold a password.
        host = "" if self.address is None else urlsplit(self.address).hostname
        port = "" if self.address is None or urlsplit(self.address).port is None else f":{urlsplit(self.address).port}"
        return f"{host or 'default'}{port} answered {self.answered} and failed at {self.failed}"

    async def post(self, pool: int, path: str, body: dict[str, Any]) -> Any:
        """Send a request through one of the clients."""
        import openai

        self.under_way += 1
        try:
            data = await self.clients[pool % len(self.clients)].post(path, cast_to=object, body=body)
        except (openai.APIConnectionError, openai.InternalServerError):
            self.failed += 1
            self._failed_in_a_row += 1
            rests = self._failed_in_a_row - _FAILURES_IN_A_ROW
            if rests >= 0:
                self._rests_until = time.monotonic() + min(2.0 ** min(rests, 10), _LONGEST_REST)
            raise
        finally:
            self.under_way -= 1
        self.answered += 1
        self._failed_in_a_row, self._rests_until = 0, 0.0
        return data

    @property
    def _rest(self) -> float:
        return max(0.0, self._rests_until - time.monotonic())


def choose_server(servers: list[Server]) -> Server:
    """
    The server for the next request: of those that work the one with the fewest requests under way. One that fails at once
    has none under way, so it must not be the next choice. Where all fail, it is that whose rest ends first.

    Args:
        servers (`list[Server]`):
            The servers.

    Returns:
        [`Server`]: One of them.
    """
    return min(servers, key=lambda server: (server._rest, server.under_way, server.answered))
