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


"""A local server that speaks the Batch API of OpenAI and does with the jobs what a test wants it to do."""

import email
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from openai_server import Reply, completion, error


# Pages of the list of jobs, whatever the client asks for.
PAGE = 2
# Faults that are no answers: the server does as it is told and closes the connection without saying so, or never answers,
# or breaks off in the middle of its answer.
DROP, HANG, CUT = "drop", "hang", "cut"


class BatchServer:
    """
    Context manager. `answer` maps the parsed body of a request to the text of the completion or to a `Reply`.

    `direct` holds the requests that were asked directly, `uploads` the names of the uploaded files, `jobs` the jobs by
    their ids, in the order of their creation, and `calls` counts what was called, such as `"POST /v1/batches"`. A fault
    that is put into `faults` under such a name happens to the next call: a `Reply`, `DROP`, `HANG` or `CUT`. Ids are left
    out of the names: `"GET /v1/files/content"`.
    """

    def __init__(self, answer: Callable[[dict], str | Reply], key: str | None = None):
        self.answer = answer
        self.key = key
        self.direct: list[dict] = []
        self.uploads: list[str] = []
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, dict] = {}
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, list[Reply | str]] = {}
        self.hanging = threading.Event()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def lines(self, job_id: str) -> list[dict]:
        """The requests of a job."""
        return [json.loads(line) for line in self.files[self.jobs[job_id]["input_file_id"]].splitlines()]

    def handed_in(self) -> list[str]:
        """The `custom_id` of every request of every job."""
        return [line["custom_id"] for job_id in self.jobs for line in self.lines(job_id)]

    def finish(
        self,
        job_id: str,
        status: str = "completed",
        answered: Callable[[int], bool] = lambda position: True,
        errors: list[dict] | None = None,
        errors_in_output: bool = False,
    ) -> None:
        """
        Bring a job to its end. The requests at the positions that are not `answered` are listed as expired. What `answer`
        rejects goes to the file of errors, or to the output as well.
        """
        output, rejected = [], []
        for position, line in enumerate(self.lines(job_id) if status != "failed" else []):
            entry = {"id": f"r{position}", "custom_id": line["custom_id"], "response": None, "error": None}
            if not answered(position):
                entry["error"] = {"code": "batch_expired", "message": "This request was not done in time."}
                rejected.append(entry)
                continue
            reply = self.answer(line["body"])
            reply = completion(reply) if isinstance(reply, str) else reply
            entry["response"] = {"status_code": reply.status, "request_id": f"q{position}", "body": reply.body}
            (output if reply.status == 200 or errors_in_output else rejected).append(entry)
        # In an order of its own, and with the separators that are line breaks to Unicode but not to JSON.
        for name, entries in (("output_file_id", output[::-1]), ("error_file_id", rejected)):
            if entries:
                text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
                self.jobs[job_id][name] = self._keep(text.encode())
        self.jobs[job_id]["status"] = status
        self.jobs[job_id]["errors"] = errors and {"object": "list", "data": errors}

    def _keep(self, content: bytes) -> str:
        with self._lock:
            name = f"file-{next(self._ids)}"
            self.files[name] = content
        return name

    def _respond(self, method: str, address: str, headers: email.message.Message, body: bytes) -> Reply:
        url = urlsplit(address)
        parts = url.path.split("/")
        if method == "POST" and url.path == "/v1/files":
            return self._upload(headers, body)
        if method == "POST" and url.path == "/v1/batches":
            return self._create(json.loads(body))
        if method == "GET" and url.path == "/v1/batches":
            jobs = list(self.jobs.values())[::-1]
            after = parse_qs(url.query).get("after", [None])[0]
            start = 0 if after is None else 1 + [job["id"] for job in jobs].index(after)
            return Reply({"object": "list", "data": jobs[start : start + PAGE], "has_more": start + PAGE < len(jobs)})
        if method == "GET" and parts[2] == "batches" and parts[3] in self.jobs:
            return Reply(self.jobs[parts[3]])
        if method == "GET" and parts[2] == "files" and parts[3] in self.files:
            return Reply(self.files[parts[3]].decode(), content_type="application/octet-stream")
        if method == "POST" and url.path in ("/v1/chat/completions", "/v1/completions"):
            with self._lock:
                self.direct.append(json.loads(body))
            reply = self.answer(json.loads(body))
            return completion(reply) if isinstance(reply, str) else reply
        return error(404, f"No such thing: {url.path}")

    def _upload(self, headers: email.message.Message, body: bytes) -> Reply:
        form = email.message_from_bytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
        fields = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
        if fields["purpose"].get_payload() != "batch":
            return error(400, "The purpose must be batch.")
        self.uploads.append(fields["file"].get_filename())
        content = fields["file"].get_payload(decode=True)
        name = self._keep(content)
        about = {"id": name, "object": "file", "bytes": len(content), "created_at": 1, "filename": self.uploads[-1]}
        return Reply({**about, "purpose": "batch", "status": "processed"})

    def _create(self, request: dict) -> Reply:
        content = self.files[request["input_file_id"]]
        lines = [json.loads(line) for line in content.splitlines()]
        faults = []
        if not lines:
            faults.append("empty_file")
        if len({line["custom_id"] for line in lines}) < len(lines):
            faults.append("duplicate_custom_id")
        if {line["url"] for line in lines} != {request["endpoint"]}:
            faults.append("mismatched_url")
        if len({line["body"]["model"] for line in lines}) > 1:
            faults.append("mismatched_model")
        with self._lock:
            job = {
                "id": f"batch_{next(self._ids)}",
                "object": "batch",
                "endpoint": request["endpoint"],
                "input_file_id": request["input_file_id"],
                "completion_window": request["completion_window"],
                "created_at": 1,
                "metadata": request.get("metadata"),
                "status": "failed" if faults else "validating",
                "errors": faults and {"object": "list", "data": [{"code": code, "message": code} for code in faults]},
                "output_file_id": None,
                "error_file_id": None,
            }
            job["errors"] = job["errors"] or None
            self.jobs[job["id"]] = job
        return Reply(job)

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self, method):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                parts = urlsplit(self.path).path.split("/")
                name = f"{method} /" + "/".join(part for part in parts[1:] if part not in server.jobs | server.files)
                with server._lock:
                    server.calls[name] += 1
                    fault = server.faults[name].pop(0) if server.faults.get(name) else None
                if server.key is not None and self.headers.get("Authorization", "") != f"Bearer {server.key}":
                    # Real servers repeat what they were given.
                    reply = error(401, f"Incorrect API key provided: {self.headers.get('Authorization')}.")
                elif isinstance(fault, Reply):
                    reply = fault
                else:
                    reply = server._respond(method, self.path, self.headers, body)
                if fault in (DROP, HANG):
                    if fault == HANG:
                        server.hanging.set()
                        server._closing.wait()
                    self.close_connection = True
                    return
                content = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.content_type)
                self.send_header("Content-Length", str(len(content)))
                # Retries come at once, so that tests of them are fast.
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                if fault == CUT:
                    # In the middle of a line.
                    content = content[: len(content) * 5 // 8]
                    self.close_connection = True
                self.wfile.write(content)

            def do_GET(self):
                self._handle("GET")

            def do_POST(self):
                self._handle("POST")

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
