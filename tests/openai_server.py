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


"""A local server that speaks the OpenAI chat completions protocol and says what a test wants it to say."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """An HTTP answer as it is; a dict as the body is sent as JSON."""

    body: dict | str | bytes
    status: int = 200
    content_type: str = "application/json"
    # Retries come at once, so that tests of them are fast.
    headers: dict[str, str] = field(default_factory=lambda: {"retry-after-ms": "1"})


def completion(content: str | None, finish_reason: str = "stop", refusal: str | None = None) -> Reply:
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return Reply(body)


def error(status: int, message: str, code: Any = None) -> Reply:
    return Reply({"error": {"message": message, "type": "error", "param": None, "code": code}}, status)


def refuse_structured_output(status: int, answer: Callable[[dict], Any]) -> Callable[[dict], Any]:
    """Refuse `response_format` as llama-cpp-python (500) and others (400, 422) do, and answer everything else."""

    def respond(request: dict) -> Any:
        if "response_format" in request:
            return error(status, "Validation: ('body', 'response_format', 'type') should be 'text' or 'json_object'")
        return answer(request)

    return respond


class OpenAIServer:
    """
    Context manager. `answer` maps the parsed request to the text of the completion or to a `Reply`; it runs in one
    thread a request. `requests` holds the parsed requests, `rejected` counts those with a wrong key, and
    `max_in_flight` is the most that were answered together.
    """

    def __init__(self, answer: Callable[[dict], str | Reply], key: str | None = None):
        self.answer = answer
        self.key = key
        self.requests: list[dict] = []
        self.max_in_flight = 0
        self.rejected = 0
        self._in_flight = 0
        self._lock = threading.Lock()

    def _respond(self, handler: BaseHTTPRequestHandler) -> Reply:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        if not body:
            # The client gave up between the headers and the body.
            return error(400, "The body is empty.")
        request = json.loads(body)
        authorization = handler.headers.get("Authorization", "")
        if not handler.path.endswith("/chat/completions"):
            return Reply("<html>Welcome</html>", content_type="text/html")
        if self.key is not None and authorization != f"Bearer {self.key}":
            # Real servers repeat what they were given.
            self.rejected += 1
            return error(401, f"Incorrect API key provided: {authorization}.", "invalid_api_key")
        with self._lock:
            self.requests.append(request)
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        answer = self.answer(request)
        with self._lock:
            self._in_flight -= 1
        return completion(answer) if isinstance(answer, str) else answer

    def __enter__(self):
        respond = self._respond

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Headers and body in one packet: the body would wait for the client to acknowledge the headers, 40 ms.
            wbufsize = -1

            def do_POST(self):
                reply = respond(self)
                body = json.dumps(reply.body) if isinstance(reply.body, dict) else reply.body
                body = body.encode() if isinstance(body, str) else body
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.content_type)
                self.send_header("Content-Length", str(len(body)))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
