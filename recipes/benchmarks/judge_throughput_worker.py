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
The processes of `judge_throughput.py`: the server, and each side that asks it. Nothing is imported before the role is
known, since a side is measured beside what it brings along itself.

    python judge_throughput_worker.py ROLE JSON

The last line is a JSON object with `seconds` and `cpu_seconds` of the requests and their number, and for the memory
`base_mb` before and `peak_mb` while they were under way.
"""

import asyncio
import json
import os
import resource
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Run:
    """What the server saw of a run. `keep` is whether it keeps the requests."""

    def __init__(self, keep: bool) -> None:
        self.keep, self.requests = keep, []
        self.answered = self.rejected = self.in_flight = self.max_in_flight = 0


class Connection(asyncio.Protocol):
    """
    A server of a fixed latency that answers 429 above a number of requests at a time. Both are in the address, so that
    one process serves all runs: `/NAME/LATENCY/LIMIT/v1/chat/completions`. `GET /NAME/stats` says what a run has seen;
    the name of a run that starts with `record` has its requests kept for `GET /NAME/requests`.
    """

    runs: dict[str, Run] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self.transport: Any = transport
        self.buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return
        head = self.buffer[:end].lower()
        place = head.find(b"content-length:")
        length = int(head[place + 15 : head.find(b"\r\n", place)]) if place >= 0 else 0
        if len(self.buffer) < end + length:
            return
        parts = self.buffer[: self.buffer.find(b" HTTP/")].decode().split()[1].strip("/").split("/")
        body, self.buffer = bytes(self.buffer[end : end + length]), bytearray()
        run = self.runs.setdefault(parts[0], Run(keep=parts[0].startswith("record")))
        if parts[1] == "stats":
            self.send(200, json.dumps({name: value for name, value in vars(run).items() if name != "requests"}))
        elif parts[1] == "requests":
            self.send(200, "[" + ",".join(request.decode() for request in run.requests) + "]")
        elif run.in_flight >= int(parts[2]):
            run.rejected += 1
            self.send(429, '{"error": {"message": "Too many requests.", "code": "rate_limit_exceeded"}}')
        else:
            run.in_flight += 1
            run.max_in_flight = max(run.max_in_flight, run.in_flight)
            if run.keep:
                run.requests.append(body)
            asyncio.get_running_loop().call_later(float(parts[1]), self.answer, run, zlib.crc32(body))

    def answer(self, run: Run, number: int) -> None:
        """The verdict follows from the request."""
        verdict = {"reason": f"Response {number:08x} answers what was asked, with small faults." + 40 * " x"}
        message = {"role": "assistant", "content": json.dumps({**verdict, "rating": 1 + number % 10})}
        completion = {
            "id": f"chatcmpl-{number:08x}",
            "object": "chat.completion",
            "created": 1,
            "model": "judge",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
            "usage": {"prompt_tokens": 300, "completion_tokens": 30, "total_tokens": 330},
        }
        run.in_flight -= 1
        run.answered += 1
        self.send(200, json.dumps(completion))

    def send(self, status: int, body: str) -> None:
        """Send a response; the connection stays open."""
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body.encode())}\r\n\r\n"
        self.transport.write((head + body).encode())


async def serve(port_file: str) -> None:
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=4096)
    # Renamed, so that whoever waits for the file never finds it empty.
    Path(f"{port_file}.part").write_text(str(server.sockets[0].getsockname()[1]))
    os.rename(f"{port_file}.part", port_file)
    await server.serve_forever()


def private_mb() -> float:
    """Resident memory that no file backs: pages of a mapped dataset are the system's to drop."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


class Measurement:
    """Time of the process, and peak of its private memory, sampled five times a second."""

    def __enter__(self) -> "Measurement":
        self.base = self.peak = private_mb()
        self.done = threading.Event()
        self.sampler = threading.Thread(target=self.sample)
        self.sampler.start()
        self.cpu, self.start = self.cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.cpu = self.cpu_seconds() - self.cpu
        self.done.set()
        self.sampler.join()
        self.peak = max(self.peak, private_mb())

    def sample(self) -> None:
        while not self.done.wait(0.2):
            self.peak = max(self.peak, private_mb())

    @staticmethod
    def cpu_seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime


def judge(job: dict) -> tuple[Callable, Callable]:
    """The judge, through its public interface, on columns that are read from the disk as they are needed."""
    from datasets import load_from_disk

    from trl_bpo import OpenAIJudge

    def ask(base_url: str, count: int, cache_dir: str) -> int:
        dataset = load_from_disk(job["dataset"]).select(range(count))
        judge = OpenAIJudge(
            "judge", base_url=base_url, max_concurrency=job["concurrency"], cache_dir=f"{job['folder']}/{cache_dir}"
        )
        verdicts = judge(prompts=dataset["prompt"], completions=dataset["completion"])
        return sum(verdict.score is not None for verdict in verdicts)

    return (
        lambda: ask(job["warm_url"], job["concurrency"], "warm"),
        lambda: ask(job["base_url"], job["count"], "answers"),
    )


def bare(job: dict) -> tuple[Callable, Callable]:
    """The async client under a semaphore. The requests, which are those of the judge, are there already."""
    from openai import DEFAULT_CONNECTION_LIMITS, AsyncOpenAI, DefaultAsyncHttpxClient

    n = job["concurrency"]
    # The client's own type of the limits, whose package depends on its version.
    limits = type(DEFAULT_CONNECTION_LIMITS)(max_connections=n, max_keepalive_connections=n)
    requests = json.loads(Path(job["requests"]).read_text())

    async def ask(base_url: str, requests: list[dict]) -> int:
        semaphore = asyncio.Semaphore(n)
        async with AsyncOpenAI(base_url=base_url, http_client=DefaultAsyncHttpxClient(limits=limits)) as client:

            async def one(request: dict) -> str | None:
                async with semaphore:
                    completion = await client.chat.completions.create(**request)
                return completion.choices[0].message.content

            texts = await asyncio.gather(*[one(request) for request in requests])
        return sum(text is not None for text in texts)

    return (
        lambda: asyncio.run(ask(job["warm_url"], requests[:n])),
        lambda: asyncio.run(ask(job["base_url"], requests[: job["count"]])),
    )


def loop(job: dict) -> tuple[Callable, Callable]:
    """One request after the other."""
    from openai import OpenAI

    requests = json.loads(Path(job["requests"]).read_text())

    def ask(base_url: str, requests: list[dict]) -> int:
        with OpenAI(base_url=base_url) as client:
            answers = [client.chat.completions.create(**request) for request in requests]
        return sum(answer.choices[0].message.content is not None for answer in answers)

    return lambda: ask(job["warm_url"], requests[:1]), lambda: ask(job["base_url"], requests[: job["count"]])


def curator(job: dict) -> tuple[Callable, Callable]:
    """Bespoke Curator. It is given no schema, as it would check with a request whether the server knows schemas."""
    from importlib.util import find_spec

    # Otherwise it downloads a tokenizer, which litellm brings along.
    litellm = Path(find_spec("litellm").submodule_search_locations[0])
    os.environ["TIKTOKEN_CACHE_DIR"] = str(litellm / "litellm_core_utils" / "tokenizers")
    os.environ.update(TELEMETRY_ENABLED="false", LITELLM_LOCAL_MODEL_COST_MAP="True", HF_HUB_OFFLINE="1")
    from bespokelabs import curator

    class CuratorJudge(curator.LLM):
        def prompt(self, row: dict) -> list[dict]:
            return row["messages"]

        def parse(self, row: dict, response: str) -> dict:
            return {"rating": json.loads(response)["rating"]}

    requests = json.loads(Path(job["requests"]).read_text())

    def prepare(base_url: str, count: int, folder: str) -> Callable:
        # This asks the server for its rate limits, with a request.
        llm = CuratorJudge(
            "judge",
            backend="openai",
            backend_params={
                "base_url": base_url,
                "max_concurrent_requests": job["concurrency"],
                "max_requests_per_minute": 10**7,
                "max_tokens_per_minute": 10**12,
            },
            generation_params={name: requests[0][name] for name in ("temperature", "max_tokens")},
        )
        rows = [{"messages": request["messages"]} for request in requests[:count]]
        return lambda: sum(
            row["rating"] is not None for row in llm(rows, working_dir=f"{job['folder']}/{folder}").dataset
        )

    return (
        prepare(job["warm_url"], job["concurrency"], "warm"),
        prepare(job["base_url"], job["count"], "answers"),
    )


def main(role: str, job: dict) -> None:
    if role == "serve":
        asyncio.run(serve(job["port_file"]))
        return
    warm_up, ask = {"judge": judge, "bare": bare, "loop": loop, "curator": curator}[role](job)
    warm_up()
    with Measurement() as measured:
        usable = ask()
    if usable != job["count"]:
        raise RuntimeError(f"{role} has {usable} verdicts for {job['count']} requests.")
    result = {"seconds": measured.seconds, "cpu_seconds": measured.cpu, "requests": job["count"]}
    print(json.dumps({**result, "base_mb": measured.base, "peak_mb": measured.peak}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
