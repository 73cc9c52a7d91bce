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
Requests through the Batch API: half the price, and an answer within a day.

Two steps, both of which can be repeated at any time: [`submit_batch`] hands in what has no answer and is in no job yet,
[`collect_batch`] takes in what is ready. The answers go to the same store under the same keys as those of
[`APIClient.ask`], which asks for whatever is left over. Jobs and their requests are in `cache_dir`:

| file | content |
| --- | --- |
| `batch-{server}-{name}.jsonl` | the requests of a job, as they are uploaded; without it, the job is given up |
| `batches.jsonl` | a line for every job that was created or came to its end |
| `batches.lock` | held by the process that hands in or takes in |

A job belongs to the address of the server that it was handed in to. Jobs of other addresses are left alone.
"""

import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from ..answer_store import content_key
from .answers import NotACompletion, read_answer
from .client import APIClient
from .costs import dollars
from .errors import CollectionStopped, Outcome, api_key
from .records import APIRequest
from .run import TOKENS_WITHOUT_LIMIT


if TYPE_CHECKING:
    import openai


logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Limits of OpenAI's API: https://platform.openai.com/docs/guides/batch
_MAX_REQUESTS = 50_000
_MAX_BYTES = 190_000_000
_ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True)
class BatchStatus:
    """
    Where the jobs of a folder stand.

    Args:
        jobs (`int`):
            Number of jobs under way.
        pending (`int`):
            Number of requests in them.
        collected (`int`):
            Number of answers that this step has taken in.
    """

    jobs: int
    pending: int
    collected: int

    @property
    def is_ready(self) -> bool:
        """Whether no job is under way any more."""
        return self.jobs == 0

    def __str__(self) -> str:
        if self.is_ready:
            return f"Batch API: {self.collected:,} answers taken in, no job under way."
        return (
            f"Batch API: {self.collected:,} answers taken in, {self.pending:,} requests in {self.jobs} jobs under way. "
            "That takes up to 24 hours: run the same again later."
        )


def submit_batch(
    client: APIClient, requests: Callable[[], Iterable[APIRequest]], path: str = "/chat/completions"
) -> BatchStatus:
    """
    Hand in all requests that have no answer and are in no job yet.

    The first of them is asked directly, at the full price: a wrong key or model, or an option that the server does not
    accept, shows at once and not a day later in every line of a job.

    What a completed job left unanswered is not handed in again, but left to [`APIClient.ask`]. What a job that failed,
    expired or was cancelled left unanswered is handed in again.

    Args:
        client ([`APIClient`]):
            Client with a `cache_dir`.
        requests (`Callable[[], Iterable[APIRequest]]`):
            Gives the requests, from the beginning every time it is called.
        path (`str`, *optional*, defaults to `"/chat/completions"`):
            Endpoint.

    Returns:
        [`BatchStatus`]: The jobs under way, those included that were handed in earlier.

    Raises:
        `ValueError`: If the client has no `cache_dir`, or the server rejects the key, the requests or the job.
        [`CollectionStopped`]: If the answers could cost more than `max_cost`, or the server cannot be reached.
    """
    with _open_jobs(client) as jobs:
        jobs.find_lost()
        handed_in = {key for file in (*jobs.under_way.values(), *jobs.completed) for key in _keys(file)}

        def missing() -> Iterator[APIRequest]:
            for request in _distinct(requests()):
                if request.key not in client.store and request.key not in handed_in:
                    yield request

        first = next(missing(), None)
        if first is not None:
            _check_cost(client, requests())
            client.ask(lambda: [first], path=path, is_usable=lambda answer: True, desc="Trying the first request")
            jobs.hand_in(missing(), path)
        return jobs.status(0)


def collect_batch(client: APIClient) -> BatchStatus:
    """
    Take in the answers of the jobs that have ended.

    Args:
        client ([`APIClient`]):
            Client with a `cache_dir`.

    Returns:
        [`BatchStatus`]: What was taken in, and what is still under way, which is no error. Requests that are in a job
        under way are asked a second time by [`APIClient.ask`]: wait until [`BatchStatus.is_ready`].

    Raises:
        `ValueError`: If the client has no `cache_dir`, the server rejects the key, or does not know a job any more.
        [`CollectionStopped`]: If the server cannot be reached.
    """
    with _open_jobs(client) as jobs:
        jobs.find_lost()
        return jobs.status(sum(jobs.collect(job_id) for job_id in list(jobs.under_way)))


def _distinct(requests: Iterable[APIRequest]) -> Iterator[APIRequest]:
    seen: set[str] = set()
    for request in requests:
        if request.key not in seen:
            seen.add(request.key)
            yield request


def _check_cost(client: APIClient, requests: Iterable[APIRequest]) -> None:
    if client.max_cost is None or client.price is None:
        return
    cost = 0.0
    for request in _distinct(requests):
        answer = client.store.get(request.key)
        if answer is None:
            limit = request.token_limit or TOKENS_WITHOUT_LIMIT
            cost += client.price.of(request.tokens, limit, batch=True)
        else:
            cost += client.price.of(
                answer["prompt_tokens"], answer["completion_tokens"], batch=answer.get("batch", False)
            )
    if cost > client.max_cost:
        raise CollectionStopped(
            f"The answers may cost {dollars(cost)}, those included that are there already, which is above `max_cost` "
            f"({dollars(client.max_cost)}). Nothing was handed in: raise `max_cost`, or lower `max_tokens`."
        )


def _keys(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["custom_id"]


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    # The client's own splitting breaks lines at separators of Unicode, which JSON holds as they are.
    rest, reason = b"", None
    try:
        for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            yield from filter(bytes.strip, lines)
    except Exception as error:
        # The client passes the errors of its HTTP library on here, which is another one with every other version.
        reason = type(error).__name__
    if reason is not None:
        raise CollectionStopped(f"A file of the Batch API broke off (`{reason}`). Run the same again to go on.")
    if rest.strip():
        yield rest


@contextmanager
def _open_jobs(client: APIClient) -> Iterator["_Jobs"]:
    from openai import OpenAI

    folder = client.store.cache_dir
    if folder is None:
        raise ValueError("The Batch API needs a `cache_dir`, in which the ids of its jobs are kept. Set it.")
    if len(client.base_urls) > 1:
        raise ValueError("The Batch API takes one `base_url`: its jobs are at one server. Give that address alone.")
    folder.mkdir(parents=True, exist_ok=True)
    # Without the lock, what one process is about to hand in would look to another as if it had been forgotten.
    with (
        FileLock(folder / "batches.lock"),
        OpenAI(
            api_key=api_key(client.api_key_variable),
            base_url=client.base_urls[0],
            timeout=client.timeout,
            max_retries=client.max_retries,
        ) as openai_client,
    ):
        client.store.refresh()
        yield _Jobs(client, openai_client, folder)


class _Jobs:
    """The jobs of a folder at one server, by their ids."""

    def __init__(self, client: APIClient, openai_client: "openai.OpenAI", folder: Path) -> None:
        self.client = client
        self.openai = openai_client
        self.folder = folder
        self.under_way: dict[str, Path] = {}
        self.completed: list[Path] = []
        # The address itself may hold a password.
        self._prefix = f"batch-{content_key(str(openai_client.base_url))[:8]}-"
        self._journal = folder / "batches.jsonl"
        files = set(folder.glob(f"{self._prefix}*.jsonl"))
        self._lost = set(files)
        for event in self._events():
            job_id, file = event["id"], folder / event["file"]
            if file not in files:
                continue
            if event["event"] == "created":
                self._lost.discard(file)
                self.under_way[job_id] = file
            elif self.under_way.pop(job_id, None) is not None and event["status"] == "completed":
                self.completed.append(file)

    def _events(self) -> list[dict]:
        text = self._journal.read_text(encoding="utf-8") if self._journal.exists() else ""
        if text and not text.endswith("\n"):
            # A kill tore the last line. What it said is found out again, and the next line must not be part of it.
            with open(self._journal, "a", encoding="utf-8") as journal:
                journal.write("\n")
        events = []
        for line in text.split("\n"):
            with suppress(json.JSONDecodeError):
                events.append(json.loads(line))
        return events

    def status(self, collected: int) -> BatchStatus:
        """Where the jobs stand, and how many answers were taken in."""
        pending = sum(1 for file in self.under_way.values() for _ in _keys(file))
        return BatchStatus(len(self.under_way), pending, collected)

    def find_lost(self) -> None:
        """Find the jobs of files that a kill or a broken connection separated from them. The others were not created."""
        lost = {file.stem: file for file in self._lost}
        jobs = self._call(self._jobs_named, set(lost)) if lost else {}
        for name, file in lost.items():
            if name in jobs:
                self._note_created(jobs[name], file)
            else:
                # Its requests are missing still, or have been answered in the meantime.
                file.unlink()
        for partial in self.folder.glob(f"{self._prefix}*.partial"):
            partial.unlink()

    def _jobs_named(self, names: set[str]) -> dict[str, str]:
        jobs = ((job, (job.metadata or {}).get("trl_bpo")) for job in self.openai.batches.list(limit=100))
        return {name: job.id for job, name in jobs if name in names}

    def hand_in(self, requests: Iterable[APIRequest], path: str) -> None:
        """Upload requests, as many at a time as a job may have, and create the jobs."""
        for file in self._write(requests, path):
            self._note_created(self._call(self._create, file, path), file)

    def _write(self, requests: Iterable[APIRequest], path: str) -> Iterator[Path]:
        common = {"method": "POST", "url": f"/v1{path}"}
        lines = (
            json.dumps({"custom_id": request.key, **common, "body": self.client.body(request)}) + "\n"
            for request in requests
        )
        line = next(lines, None)
        while line is not None:
            partial = self.folder / f"{self._prefix}{uuid.uuid4().hex}.partial"
            count = size = 0
            with open(partial, "w", encoding="utf-8") as file:
                while line is not None and count < _MAX_REQUESTS and (count == 0 or size + len(line) <= _MAX_BYTES):
                    file.write(line)
                    count, size = count + 1, size + len(line)
                    line = next(lines, None)
            yield partial.replace(partial.with_suffix(".jsonl"))

    def _create(self, file: Path, path: str) -> str:
        with open(file, "rb") as content:
            upload = self.openai.files.create(file=(file.name, content), purpose="batch")
        # Not retried: a job whose creation seems to have failed may be there, and would be paid for twice.
        return (
            self.openai.with_options(max_retries=0)
            .batches.create(
                input_file_id=upload.id,
                endpoint=f"/v1{path}",  # type: ignore[arg-type]
                completion_window="24h",
                metadata={"trl_bpo": file.stem},
            )
            .id
        )

    def collect(self, job_id: str) -> int:
        """Take in the answers of a job if it has ended."""
        file = self.under_way[job_id]
        gone = (
            f"The server does not know the job `{job_id}` any more, or what came out of it. Use the key with which it was "
            f"handed in, or remove `{file}` to give the job up and have its requests asked again."
        )
        job = self._call(self.openai.batches.retrieve, job_id, not_found=gone)
        if job.status not in _ENDED:
            return 0
        with open(file, encoding="utf-8") as lines:
            response_format = json.loads(next(lines))["body"].get("response_format")
        form = response_format and response_format["type"]
        collected, reasons = 0, Counter[str]()
        for file_id in filter(None, (job.output_file_id, job.error_file_id)):
            collected += self._call(self._read, file_id, form, reasons, not_found=gone)
        if reasons:
            said = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            logger.warning(f"{reasons.total()} requests of the job `{job_id}` of the Batch API have no answer: {said}")
        if job.status != "completed":
            said = "; ".join(self._without_key(item.message or "") for item in (job.errors and job.errors.data) or [])
            logger.warning(
                f"The job `{job_id}` of the Batch API has ended as `{job.status}`; what it left unanswered can be handed "
                f"in again. {said}".rstrip()
            )
        # The answers have to be on the disk when the job is let go of.
        self.client.store.flush()
        self._note({"event": "ended", "id": job_id, "file": file.name, "status": job.status})
        del self.under_way[job_id]
        return collected

    def _read(self, file_id: str, form: str | None, reasons: Counter[str]) -> int:
        collected = 0
        with self.openai.files.with_streaming_response.content(file_id) as response:
            for line in _lines(response.iter_bytes()):
                entry: dict[str, Any] = json.loads(line)
                key, result = entry["custom_id"], entry.get("response") or {}
                if key in self.client.store:
                    continue
                with suppress(NotACompletion):
                    if result.get("status_code") == 200:
                        answer = read_answer(result.get("body"), APIRequest(key, {}, 0))
                        self.client.store.put(key, {**answer, "format": form, "batch": True})
                        collected += 1
                        continue
                reasons[self._without_key(json.dumps(entry.get("error") or result.get("body")))] += 1
        return collected

    def _note_created(self, job_id: str, file: Path) -> None:
        self._note({"event": "created", "id": job_id, "file": file.name})
        self.under_way[job_id] = file

    def _note(self, event: dict) -> None:
        with open(self._journal, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(event) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def _call(self, function: Callable[..., _T], *args: Any, not_found: str | None = None) -> _T:
        """Talk to the server, with errors that say what to do."""
        import openai

        try:
            return function(*args)
        except (openai.APIError, json.JSONDecodeError) as error:
            # The client's error is let go of here: its text and its request can hold the key.
            outcome = Outcome.of(error, False, self.client.api_key_variable)
            is_not_found = isinstance(error, openai.NotFoundError)
        if is_not_found:
            raise ValueError(not_found or "The server has no Batch API at this address. Check `base_url`.")
        if outcome.kind in ("retry", "rate_limit"):
            raise CollectionStopped(
                f"The Batch API gave no answer (`{outcome.reason}`). Nothing is lost: run the same again in a minute."
            )
        raise outcome.error or ValueError(f"The Batch API does not take the job (`{outcome.reason}`).")

    def _without_key(self, text: str) -> str:
        return text.replace(api_key(self.client.api_key_variable), "***")[:300]
