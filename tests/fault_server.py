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
A local server that speaks the OpenAI protocol and misbehaves on demand.

A plan, any callable, says what happens to a request:

    def plan(request, attempt):
        return rate_limited(retry_after=0.2) if attempt == 1 else ok('{"reason": "fine", "rating": 7}')

    with FaultServer(plan) as server:
        OpenAIJudge("m", base_url=server.base_url)(prompts=..., completions=...)
    assert set(server.answered.values()) == {1}

In a process of its own it answers by the hash of the content, for tests that kill the client:

    python tests/fault_server.py --port-file port --log answers.jsonl --latency 0.05
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path
from typing import Any


# A judge that falls back to plain text asks for the same content.
NOT_CONTENT = ("response_format",)
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
REASONS = {401: "Unauthorized", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 200: "OK"}


@dataclass(frozen=True)
class Behaviour:
    """
    What the server does with a request. The functions below make the usual ones; `dataclasses.replace` changes them.

    `texts` become the choices of a completion unless there is a `body`, of which a dict is sent as JSON. In a body,
    `{authorization}` is replaced by that header of the request, as real servers repeat what they were given.
    `sent` is the share of the body that is sent before the connection is closed. `is_answer` marks what a client has
    no reason to ask for again, which is what `FaultServer.answered` counts.
    """

    name: str
    texts: tuple[str | None, ...] = ()
    finish_reason: str = "stop"
    refusal: str | None = None
    logprobs: dict | None = None
    usage: dict | None = None
    body: dict | str | None = None
    status: int = 200
    content_type: str = "application/json"
    retry_after: float | None = None
    retry_after_form: str = "seconds"
    delay: float = 0.0
    sent: float = 1.0
    drop: bool = False
    reset: bool = False
    hang: bool = False
    is_answer: bool = False


def ok(
    text: str | list[str] | None,
    finish_reason: str = "stop",
    refusal: str | None = None,
    logprobs: dict | None = None,
    usage: dict | None = USAGE,
    delay: float = 0.0,
) -> Behaviour:
    """A completion, of several choices if `text` is a list."""
    texts = tuple(text) if isinstance(text, list) else (text,)
    return Behaviour("ok", texts, finish_reason, refusal, logprobs, usage, delay=delay, is_answer=True)


def empty_content(finish_reason: str = "stop") -> Behaviour:
    return replace(ok("", finish_reason), name="empty_content")


def cut_short(text: str) -> Behaviour:
    return replace(ok(text, "length"), name="cut_short")


def filtered(text: str | None = None) -> Behaviour:
    """A completion that the server's filter stopped, which is no error to HTTP."""
    return replace(ok(text, "content_filter"), name="filtered")


def refused(refusal: str = "I cannot rate this.") -> Behaviour:
    return replace(ok(None, refusal=refusal), name="refused")


def no_choices() -> Behaviour:
    return Behaviour("no_choices", usage=USAGE)


def truncated_json() -> Behaviour:
    """The first half of a completion, announced as the whole."""
    whole = json.dumps(_completion({"model": "m"}, ok('{"reason": "fine", "rating": 7}'), chat=True))
    return Behaviour("truncated_json", body=whole[: len(whole) // 2])


def not_json(content_type: str = "text/html") -> Behaviour:
    return Behaviour("not_json", body="<html>Welcome</html>", content_type=content_type)


def error(name: str, status: int, message: str, code: str | None = None) -> Behaviour:
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    return Behaviour(name, body=body, status=status)


def rate_limited(retry_after: float | None = None, form: str = "seconds") -> Behaviour:
    """`form` is `"seconds"`, `"date"` (whole seconds, rounded up) or `"ms"` (`retry-after-ms`)."""
    behaviour = error("rate_limited", 429, "Rate limit reached.", "rate_limit_exceeded")
    return replace(behaviour, retry_after=retry_after, retry_after_form=form)


def insufficient_quota() -> Behaviour:
    return error("insufficient_quota", 429, "You exceeded your current quota.", "insufficient_quota")


def server_error(status: int = 500, html: bool = False, retry_after: float | None = None) -> Behaviour:
    behaviour = error("server_error", status, "The server had an error.")
    if html:
        behaviour = replace(behaviour, body=f"<html><h1>{status}</h1></html>", content_type="text/html")
    return replace(behaviour, retry_after=retry_after)


def dropped(reset: bool = False) -> Behaviour:
    """The connection is closed without an answer, or reset."""
    return Behaviour("dropped", drop=True, sent=0.0, reset=reset)


def dropped_in_body(
    text: str = '{"reason": "fine", "rating": 7}', sent: float = 0.5, reset: bool = False
) -> Behaviour:
    return replace(ok(text), name="dropped_in_body", drop=True, sent=sent, reset=reset, is_answer=False)


def hanging() -> Behaviour:
    """No answer until the client gives up."""
    return Behaviour("hanging", hang=True)


def unauthorized() -> Behaviour:
    return error("unauthorized", 401, "Incorrect API key provided: {authorization}.", "invalid_api_key")


def unknown_model() -> Behaviour:
    return error("unknown_model", 404, "The model `m` does not exist.", "model_not_found")


def bad_request(message: str = "Unsupported parameter: 'temperature'.", code: str | None = None) -> Behaviour:
    return error("bad_request", 400, message, code)


def content_filter() -> Behaviour:
    return error("content_filter", 400, "The prompt was filtered.", "content_filter")


def context_length_exceeded() -> Behaviour:
    message = "This model's maximum context length is 8 tokens."
    return error("context_length_exceeded", 400, message, "context_length_exceeded")


def token_logprobs(tokens: list[tuple[str, dict[str, float]]]) -> dict:
    """Chat log-probabilities: the sampled token of each position, with the probabilities of the alternatives there."""

    def entry(token: str, probability: float) -> dict:
        return {"token": token, "logprob": math.log(probability), "bytes": list(token.encode())}

    return {
        "content": [
            {
                **entry(token, top.get(token, 1.0)),
                "top_logprobs": [entry(other, probability) for other, probability in top.items()],
            }
            for token, top in tokens
        ],
        "refusal": None,
    }


@dataclass(frozen=True)
class Record:
    """
    A request and what became of it. `attempt` counts the requests of this content, from 1; it is 0 where the server
    turned the request away by itself. `complete` says that the whole response was handed to the socket, and `answered`
    that it was an answer as well.
    """

    received: float
    path: str
    request: dict
    authorization: str
    content: str
    attempt: int = 0
    behaviour: str = ""
    status: int = 0
    time: float = 0.0
    complete: bool = False
    answered: bool = False


def content_id(request: dict) -> str:
    content = {name: value for name, value in request.items() if name not in NOT_CONTENT}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class FaultServer:
    """
    Context manager around a server in a thread.

    `plan` maps the parsed request and the number of the attempt at its content to a [`Behaviour`]. It runs in the
    server's event loop, so it must not wait. What it raises is raised again on exit. `key` is what clients have to
    send, if anything; above `concurrency_limit` requests at a time the server answers `rejection`.

    `log` lists a [`Record`] a request, in the order in which they ended; `answered` counts the answers of each content;
    `in_flight` and `max_in_flight` count requests. With `log_path`, the records go to that file as JSON lines, too,
    without the requests.
    """

    def __init__(
        self,
        plan: Callable[[dict, int], Behaviour],
        key: str | None = None,
        concurrency_limit: int | None = None,
        rejection: Behaviour | None = None,
        log_path: str | Path | None = None,
    ):
        self.plan = plan
        self.key = key
        self.concurrency_limit = concurrency_limit
        self.rejection = rejection or rate_limited()
        self.log_path = log_path
        self.log: list[Record] = []
        self.answered: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.connections: set[_Connection] = set()
        self.in_flight = 0
        self.max_in_flight = 0
        self.error: Exception | None = None

    def decide(self, record: Record) -> tuple[Behaviour, int]:
        if not record.path.endswith(("/chat/completions", "/completions")):
            return error("unknown_path", 404, f"There is nothing at {record.path}."), 0
        if self.key is not None and record.authorization != f"Bearer {self.key}":
            return unauthorized(), 0
        if self.concurrency_limit is not None and self.in_flight > self.concurrency_limit:
            return self.rejection, 0
        self.attempts[record.content] += 1
        attempt = self.attempts[record.content]
        try:
            return self.plan(record.request, attempt), attempt
        except Exception as error_of_plan:
            self.error = error_of_plan
            return error("plan_failed", 400, repr(error_of_plan)), attempt

    def record(self, record: Record) -> None:
        self.log.append(record)
        if record.answered:
            self.answered[record.content] += 1
        if self.log_path is not None:
            line = {name: value for name, value in vars(record).items() if name not in ("request", "authorization")}
            # A single write to a file opened for appending comes out whole.
            os.write(self._log_file, (json.dumps(line) + "\n").encode())

    async def _serve(self, ready: Callable[[], None]) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=4096)
        self.port = server.sockets[0].getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        ready()
        await self._stopped.wait()
        server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        # The connections are told that they are lost in the next round of the loop.
        await asyncio.sleep(0)

    def __enter__(self):
        if self.log_path is not None:
            self._log_file = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started.set)), daemon=True)
        self._thread.start()
        if not started.wait(timeout=30):
            raise RuntimeError("The server has not started.")
        return self

    def __exit__(self, exc_type, exc, traceback):
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        if self.log_path is not None:
            os.close(self._log_file)
        if self.error is not None and exc is None:
            raise self.error


class _Connection(asyncio.Protocol):
    """A connection with keep-alive. A client has one request under way on it at a time."""

    def __init__(self, server: FaultServer):
        self.server = server
        self.buffer = bytearray()
        self.pending: tuple[Record, Behaviour] | None = None
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        if self.timer is not None:
            self.timer.cancel()
        self._end(complete=False)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator or self.pending is not None:
            return
        lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        body, self.buffer = rest[:length], rest[length:]
        request = json.loads(body) if body else {}
        record = Record(
            time.time(), lines[0].split()[1], request, headers.get("authorization", ""), content_id(request)
        )
        self.server.in_flight += 1
        self.server.max_in_flight = max(self.server.max_in_flight, self.server.in_flight)
        behaviour, attempt = self.server.decide(record)
        self.pending = (replace(record, attempt=attempt, behaviour=behaviour.name), behaviour)
        self.close_after = headers.get("connection", "").lower() == "close"
        if behaviour.hang:
            return
        if behaviour.delay:
            self.timer = asyncio.get_running_loop().call_later(behaviour.delay, self._answer)
        else:
            self._answer()

    def _answer(self) -> None:
        record, behaviour = self.pending
        body = behaviour.body
        if body is None:
            body = _completion(record.request, behaviour, chat=record.path.endswith("/chat/completions"))
        text = body if isinstance(body, str) else json.dumps(body)
        payload = text.replace("{authorization}", record.authorization).encode()
        if behaviour.sent > 0:
            head = _head(behaviour, len(payload), close=self.close_after)
            self.transport.write(head + payload[: int(len(payload) * behaviour.sent)])
        # What is left in the buffer has not been handed to the socket, or the connection is gone.
        complete = (
            behaviour.sent == 1.0 and not self.transport.is_closing() and not self.transport.get_write_buffer_size()
        )
        self._end(complete)
        if behaviour.reset:
            # Without lingering, closing sends a reset in place of an orderly end.
            linger = struct.pack("ii", 1, 0)
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()
        elif behaviour.drop or self.close_after:
            self.transport.close()

    def _end(self, complete: bool) -> None:
        if self.pending is None:
            return
        record, behaviour = self.pending
        self.pending = self.timer = None
        self.server.in_flight -= 1
        status = 0 if behaviour.hang or behaviour.sent == 0 else behaviour.status
        answered = complete and behaviour.is_answer
        self.server.record(replace(record, status=status, time=time.time(), complete=complete, answered=answered))


def _head(behaviour: Behaviour, length: int, close: bool) -> bytes:
    lines = [
        f"HTTP/1.1 {behaviour.status} {REASONS.get(behaviour.status, 'Error')}",
        f"Content-Type: {behaviour.content_type}",
        f"Content-Length: {length}",
        f"Connection: {'close' if close else 'keep-alive'}",
    ]
    wait = behaviour.retry_after
    if wait is not None and behaviour.retry_after_form == "date":
        lines.append(f"Retry-After: {formatdate(math.ceil(time.time() + wait), usegmt=True)}")
    elif wait is not None and behaviour.retry_after_form == "ms":
        lines.append(f"retry-after-ms: {wait * 1000:.0f}")
    elif wait is not None:
        lines.append(f"Retry-After: {wait:g}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _completion(request: dict, behaviour: Behaviour, chat: bool) -> dict:
    choices = []
    for index, text in enumerate(behaviour.texts):
        message = {"role": "assistant", "content": text, "refusal": behaviour.refusal}
        said = {"message": message} if chat else {"text": text}
        choices.append(
            {"index": index, **said, "finish_reason": behaviour.finish_reason, "logprobs": behaviour.logprobs}
        )
    completion = {
        "id": "c",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": request.get("model"),
        "choices": choices,
    }
    return completion if behaviour.usage is None else {**completion, "usage": behaviour.usage}


def answer_by_hash(request: dict, latency: float = 0.0) -> Behaviour:
    """
    What a deterministic model would say: an object that fits the schema, a verdict to a judge without one, and a text
    to everybody else, one for each of the `n` choices.
    """
    schema = (request.get("response_format") or {}).get("json_schema", {}).get("schema")
    system = "".join(str(message["content"]) for message in request.get("messages", []) if message["role"] == "system")
    texts = []
    for index in range(request.get("n") or 1):
        digest = hashlib.sha256(f"{content_id(request)} {index}".encode()).digest()
        if schema is not None:
            texts.append(json.dumps(_fit(schema, digest)))
        elif "response_format" in request or "judg" in system.lower():
            texts.append(json.dumps({"reason": digest.hex()[:8], "rating": 1 + digest[0] % 10}))
        else:
            texts.append(f"Answer {digest.hex()[:16]}.")
    return ok(texts, delay=latency)


def _fit(schema: dict, digest: bytes) -> Any:
    if "enum" in schema:
        return schema["enum"][digest[0] % len(schema["enum"])]
    if schema.get("type") == "object":
        # Each property draws its own value.
        return {
            name: _fit(value, hashlib.sha256(digest + name.encode()).digest())
            for name, value in schema["properties"].items()
        }
    if schema.get("type") in ("integer", "number"):
        low, high = schema.get("minimum", 1), schema.get("maximum", 10)
        return low + digest[0] % (high - low + 1)
    return digest.hex()[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers by the hash of the content until it is terminated.")
    parser.add_argument("--port-file", required=True, help="File that gets the port once the server listens.")
    parser.add_argument("--log", required=True, help="File to which the records are appended.")
    parser.add_argument("--latency", type=float, default=0.0, help="Seconds an answer takes.")
    parser.add_argument("--concurrency-limit", type=int, help="Requests at a time above which 429 is the answer.")
    args = parser.parse_args()

    def plan(request: dict, attempt: int) -> Behaviour:
        return answer_by_hash(request, args.latency)

    # The signals are blocked before the server's thread starts, so that it inherits that and they wait here.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with FaultServer(plan, concurrency_limit=args.concurrency_limit, log_path=args.log) as server:
        # Renamed, so that whoever waits for the file never finds it empty.
        part = Path(f"{args.port_file}.part")
        part.write_text(str(server.port))
        part.rename(args.port_file)
        signal.sigwait(signals)


if __name__ == "__main__":
    main()
