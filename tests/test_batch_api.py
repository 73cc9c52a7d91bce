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


import json
import logging
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest
from batch_server import CUT, DROP, HANG, BatchServer
from datasets import Dataset
from openai_server import Reply, error

from trl_bpo import BPODataCollector, OpenAIJudge
from trl_bpo.api import CollectionStopped, batch
from trl_bpo.openai_generator import OpenAIGenerator


KEY = "sk-very-secret-1234567890"
PRICES = {"grader": {"input_cost_per_token": 1e-3, "output_cost_per_token": 1e-3}}
PROMPT = "What is it?"
RESPONSES = ["x" * length for length in range(1, 8)]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def response_of(body):
    lines = [line for line in body["messages"][1]["content"].splitlines() if line.startswith('"')]
    return json.loads(lines[1])


def rate(body):
    """The rating is the length of the response. Some separators of Unicode stand in the answer as they are."""
    return json.dumps({"reason": "so\u2028and\x85so", "rating": len(response_of(body))}, ensure_ascii=False)


@pytest.fixture
def server():
    with BatchServer(rate, key=KEY) as server:
        yield server


@pytest.fixture
def judge(server, tmp_path):
    """Makes a judge like one in a process of its own: it shares nothing with others but the folder."""

    def make(**options):
        options = {"base_url": server.base_url, "max_retries": 1, "cache_dir": str(tmp_path / "answers"), **options}
        return OpenAIJudge("grader", **options)

    return make


def inputs(responses=RESPONSES, prompt=PROMPT):
    return {"prompts": [prompt] * len(responses), "completions": list(responses)}


def scores(verdicts):
    return [verdict.score for verdict in verdicts]


def finish_all(server, **options):
    for job_id, job in server.jobs.items():
        if job["status"] == "validating":
            server.finish(job_id, **options)


def assert_all_are_there_once(server, judge, responses=RESPONSES):
    """Every request was asked directly or is in a job, and none twice. With the jobs' answers, nothing more is asked."""
    bodies = [line["body"] for job_id in server.jobs for line in server.lines(job_id)]
    assert sorted(response_of(body) for body in server.direct + bodies) == sorted(responses)
    # Each time that something is handed in, one request is asked directly.
    assert len(server.direct) <= 2 and len(bodies) >= 5
    count = len(server.direct)
    finish_all(server)
    assert judge().collect_batch().is_ready
    assert scores(judge()(**inputs(responses))) == [float(len(response)) for response in responses]
    assert len(server.direct) == count


def test_answers_of_a_job_are_those_that_would_have_been_asked_for(server, judge, tmp_path):
    directly = judge(cache_dir=str(tmp_path / "direct"))(**inputs())
    server.direct.clear()

    status = judge().submit_batch(**inputs())
    assert (status.jobs, status.pending, status.collected, status.is_ready) == (1, 6, 0, False)
    # The first is asked directly, so that what the server does not accept shows at once.
    assert [response_of(body) for body in server.direct] == ["x"]
    (job_id,) = server.jobs
    bodies = [line["body"] for line in server.lines(job_id)]
    assert [response_of(body) for body in bodies] == RESPONSES[1:]
    assert all({**body, "messages": server.direct[0]["messages"]} == server.direct[0] for body in bodies)

    for state in ("validating", "in_progress", "finalizing"):
        server.jobs[job_id]["status"] = state
        status = judge().collect_batch()
        assert (status.jobs, status.pending, status.collected, status.is_ready) == (1, 6, 0, False)
        assert "6 requests in 1 jobs under way" in str(status)
    server.finish(job_id)
    status = judge().collect_batch()
    assert (status.jobs, status.pending, status.collected, status.is_ready) == (0, 0, 6, True)

    again = judge()
    assert again(**inputs()) == directly
    assert scores(directly) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert len(server.direct) == 1
    assert (again.report.from_store, again.report.sent) == (7, 0)


def test_nothing_is_handed_in_or_taken_in_twice(server, judge):
    for _ in range(3):
        assert judge().submit_batch(**inputs()).pending == 6
    assert len(server.jobs) == 1
    # What is new goes to a job of its own.
    more = [*RESPONSES, "x" * 8, "x" * 9, "x" * 10]
    status = judge().submit_batch(**inputs(more))
    assert (status.jobs, status.pending) == (2, 8)
    assert [response_of(body) for body in server.direct] == ["x", "x" * 8]
    finish_all(server)
    assert [judge().collect_batch().collected for _ in range(2)] == [8, 0]
    status = judge().submit_batch(**inputs(more))
    assert status.is_ready
    assert (len(server.jobs), len(server.direct)) == (2, 2)
    assert server.calls["GET /v1/files/content"] == 2


def test_identical_requests_are_handed_in_once(server, judge):
    responses = [*RESPONSES, *RESPONSES, "x" * 3]
    assert judge().submit_batch(**inputs(responses)).pending == 6
    finish_all(server)
    judge().collect_batch()
    assert scores(judge()(**inputs(responses))) == [float(len(response)) for response in responses]
    assert (len(server.handed_in()), len(server.direct)) == (6, 1)


def test_a_single_request_needs_no_job(server, judge):
    assert judge().submit_batch(**inputs(["xx"])).is_ready
    assert not server.jobs and not server.uploads
    assert scores(judge()(**inputs(["xx"]))) == [2.0]
    assert len(server.direct) == 1


@pytest.mark.parametrize(("requests", "size", "jobs"), [(2, 10**9, [2, 2, 2]), (4, 10**9, [4, 2]), (9, 2500, [1] * 6)])
def test_more_requests_than_a_job_may_have_are_split(server, judge, monkeypatch, requests, size, jobs):
    monkeypatch.setattr(batch, "_MAX_REQUESTS", requests)
    monkeypatch.setattr(batch, "_MAX_BYTES", size)
    assert judge().submit_batch(**inputs()).jobs == len(jobs)
    assert [len(server.lines(job_id)) for job_id in server.jobs] == jobs
    assert_all_are_there_once(server, judge)


def test_jobs_that_end_one_after_the_other(server, judge, monkeypatch):
    monkeypatch.setattr(batch, "_MAX_REQUESTS", 2)
    judge().submit_batch(**inputs())
    seen = []
    for job_id in list(server.jobs)[::-1]:
        server.finish(job_id)
        status = judge().collect_batch()
        seen.append((status.jobs, status.pending, status.collected))
        # What is still under way is not handed in once more.
        judge().submit_batch(**inputs())
    assert seen == [(2, 4, 2), (1, 2, 2), (0, 0, 2)]
    assert_all_are_there_once(server, judge)


@pytest.mark.parametrize("job", [0, 1])
def test_connection_lost_when_the_job_is_created(server, judge, monkeypatch, job):
    # Other jobs of the account fill pages of the list.
    for _ in range(5):
        server.jobs[f"other-{len(server.jobs)}"] = {
            **{"id": f"other-{len(server.jobs)}", "object": "batch", "endpoint": "/v1/chat/completions"},
            **{"input_file_id": "none", "completion_window": "24h", "created_at": 1, "status": "in_progress"},
        }
    others = dict(server.jobs)
    monkeypatch.setattr(batch, "_MAX_REQUESTS", 3)
    server.faults["POST /v1/batches"] = [None] * job + [DROP]
    with pytest.raises(CollectionStopped, match="APIConnectionError.*run the same again"):
        judge().submit_batch(**inputs())
    # The client retries nothing here on its own: the server has created the job.
    assert server.calls["POST /v1/batches"] == len(server.jobs) - len(others) == job + 1
    assert judge().submit_batch(**inputs()).jobs == 2
    for name in others:
        del server.jobs[name]
    assert len(server.jobs) == 2
    assert_all_are_there_once(server, judge)


def test_a_lost_job_is_also_found_when_its_answers_are_taken_in(server, judge):
    server.faults["POST /v1/batches"] = [DROP]
    with pytest.raises(CollectionStopped):
        judge().submit_batch(**inputs())
    finish_all(server)
    status = judge().collect_batch()
    assert (status.collected, status.is_ready) == (6, True)
    assert_all_are_there_once(server, judge)


def test_connection_lost_at_the_upload(server, judge, tmp_path):
    # Once, the client tries again, with the whole file; then it gives up.
    server.faults["POST /v1/files"] = [DROP]
    judge().submit_batch(**inputs())
    assert_all_are_there_once(server, judge)
    more = ["y" * length for length in range(1, 8)]
    server.faults["POST /v1/files"] = [DROP, DROP]
    with pytest.raises(CollectionStopped):
        judge().submit_batch(**inputs(more))
    assert len(server.jobs) == 1
    assert judge().submit_batch(**inputs(more)).pending == 5
    assert len(server.jobs) == 2
    assert len(list((tmp_path / "answers").glob("batch-*"))) == 2


def test_what_was_asked_directly_after_a_failed_upload_is_not_handed_in(server, judge, tmp_path):
    server.faults["POST /v1/files"] = [DROP, DROP]
    with pytest.raises(CollectionStopped):
        judge().submit_batch(**inputs())
    judge()(**inputs())
    assert judge().submit_batch(**inputs()).is_ready
    assert not server.jobs
    assert not list((tmp_path / "answers").glob("batch-*"))


@pytest.mark.parametrize("call", ["POST /v1/files", "POST /v1/batches"])
def test_kill_while_handing_in(server, judge, tmp_path, call):
    server.faults[call] = [HANG]
    script = (
        "import sys; from trl_bpo import OpenAIJudge; base_url, cache_dir, responses = sys.argv[1:];"
        "responses = responses.split(',');"
        "judge = OpenAIJudge('grader', base_url=base_url, cache_dir=cache_dir);"
        f"judge.submit_batch(prompts=[{PROMPT!r}] * len(responses), completions=responses)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, server.base_url, str(tmp_path / "answers"), ",".join(RESPONSES)],
        env={**os.environ, "OPENAI_API_KEY": KEY},
        stderr=subprocess.DEVNULL,
    )
    assert server.hanging.wait(120)
    process.kill()
    process.wait()
    # Each time that something is handed in, one request is asked directly.
    assert judge().submit_batch(**inputs()).pending == (5 if call == "POST /v1/files" else 6)
    assert len(server.jobs) == 1
    assert_all_are_there_once(server, judge)


@pytest.mark.parametrize("cut", [1, 2, 30, None])
@pytest.mark.parametrize("collected", [False, True])
def test_torn_last_line_of_the_journal(server, judge, monkeypatch, tmp_path, cut, collected):
    monkeypatch.setattr(batch, "_MAX_REQUESTS", 3)
    journal = tmp_path / "answers" / "batches.jsonl"
    judge().submit_batch(**inputs())
    if collected:
        finish_all(server)
        judge().collect_batch()
    text = journal.read_text()
    # Up to the whole line.
    journal.write_text(text[: -(cut or len(text.splitlines()[-1]) + 1)])
    judge().collect_batch()
    assert judge().submit_batch(**inputs()).jobs == (0 if collected else 2)
    assert len(server.jobs) == 2
    assert_all_are_there_once(server, judge)
    # What was written after the torn line can be read.
    assert judge().submit_batch(**inputs()).is_ready
    calls = server.calls["GET /v1/batches"]
    judge().collect_batch()
    assert server.calls["GET /v1/batches"] == calls


def test_interrupted_while_taking_in(server, judge, tmp_path):
    judge().submit_batch(**inputs())
    finish_all(server)
    server.faults["GET /v1/files/content"] = [CUT]
    with pytest.raises(CollectionStopped, match="broke off"):
        judge().collect_batch()
    # A kill tore the last answer that had arrived.
    last = max((tmp_path / "answers").glob("answers-*.jsonl"), key=os.path.getmtime)
    data = last.read_bytes()
    assert data.count(b"\n") > 1
    last.write_bytes(data[:-20])
    arrived = data.count(b"\n") - 1
    assert judge().collect_batch().collected == 6 - arrived
    assert_all_are_there_once(server, judge)


def test_a_line_without_its_end_does_not_end_a_job(server, judge):
    # A proxy that closes the connection early and says nothing.
    judge().submit_batch(**inputs())
    finish_all(server)
    (job,) = server.jobs.values()
    content = server.files[job["output_file_id"]]
    server.files[job["output_file_id"]] = content[:-40]
    with pytest.raises(CollectionStopped):
        judge().collect_batch()
    server.files[job["output_file_id"]] = content
    assert judge().collect_batch().collected == 1
    assert_all_are_there_once(server, judge)


@pytest.mark.parametrize("in_output", [False, True])
def test_requests_that_a_completed_job_rejects_are_asked_directly(server, judge, in_output, caplog):
    judge().submit_batch(**inputs())
    server.answer = lambda body: error(500, f"Broken for {KEY}") if len(response_of(body)) in (3, 5) else rate(body)
    finish_all(server, errors_in_output=in_output)
    with caplog.at_level(logging.WARNING):
        status = judge().collect_batch()
    assert (status.collected, status.is_ready) == (4, True)
    assert "2 requests of the job" in caplog.text and "2 x " in caplog.text and "Broken for ***" in caplog.text
    # They would be rejected again.
    assert judge().submit_batch(**inputs()).is_ready
    server.answer = rate
    assert scores(judge()(**inputs())) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert sorted(len(response_of(body)) for body in server.direct) == [1, 3, 5]


def test_a_job_without_output(server, judge):
    judge().submit_batch(**inputs())
    server.answer = lambda body: error(400, "No.")
    finish_all(server)
    assert next(iter(server.jobs.values()))["output_file_id"] is None
    status = judge().collect_batch()
    assert (status.collected, status.is_ready) == (0, True)


def test_answers_that_cannot_be_used_are_asked_again_directly(server, judge):
    judge().submit_batch(**inputs())
    server.answer = lambda body: {
        3: "I cannot say.",
        5: Reply({"object": "chat.completion", "choices": []}),
        6: Reply({"detail": "no completion"}),
    }.get(len(response_of(body)), rate(body))
    finish_all(server)
    # What is no completion is no answer.
    assert judge().collect_batch().collected == 5
    server.answer = rate
    again = judge()
    assert scores(again(**inputs())) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert sorted(len(response_of(body)) for body in server.direct) == [1, 3, 5, 6]
    assert again.report.reasked == 2


@pytest.mark.parametrize("status", ["expired", "cancelled"])
@pytest.mark.parametrize("again", [False, True])
def test_what_an_expired_job_has_answered_is_kept(server, judge, status, again, caplog):
    judge().submit_batch(**inputs())
    finish_all(server, status=status, answered=lambda position: position % 3 == 0)
    with caplog.at_level(logging.WARNING):
        assert judge().collect_batch().collected == 2
    assert f"`{status}`" in caplog.text and "batch_expired" in caplog.text
    if again:
        assert judge().submit_batch(**inputs()).pending == 3
        finish_all(server)
        assert judge().collect_batch().collected == 3
        # The first of each submission is asked directly.
        assert [len(response_of(body)) for body in server.direct] == [1, 3]
    assert scores(judge()(**inputs())) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    # None of the paid answers is asked for once more.
    assert len(server.direct) == (2 if again else 5)


def test_failed_job_is_said_and_handed_in_again(server, judge, caplog):
    judge().submit_batch(**inputs())
    fault = {"code": "token_limit_exceeded", "message": f"Enqueued token limit reached for {KEY}.", "line": None}
    finish_all(server, status="failed", errors=[fault])
    with caplog.at_level(logging.WARNING):
        status = judge().collect_batch()
    assert (status.collected, status.is_ready) == (0, True)
    assert "`failed`" in caplog.text and "Enqueued token limit reached for ***." in caplog.text
    assert judge().submit_batch(**inputs()).pending == 5
    finish_all(server)
    assert judge().collect_batch().collected == 5
    assert scores(judge()(**inputs())) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert len(server.direct) == 2


def test_the_price_is_that_of_the_batch_api(server, judge):
    judge(prices=PRICES).submit_batch(**inputs())
    finish_all(server)
    judge(prices=PRICES).collect_batch()
    last = judge(prices=PRICES)
    last(**inputs())
    # 15 tokens an answer, as the server says; one of the seven was asked directly.
    assert last.report.cost == pytest.approx(15e-3 + 6 * 15e-3 / 2)
    assert last.report.spent == 0
    table = {"grader": {**PRICES["grader"], "input_cost_per_token_batches": 0, "output_cost_per_token_batches": 1e-4}}
    last = judge(prices=table)
    last(**inputs())
    assert last.report.cost == pytest.approx(15e-3 + 6 * 5e-4)


def test_max_cost_stops_before_anything_is_sent(server, judge):
    at_most = judge(prices=PRICES).estimate(**inputs()).cost
    with pytest.raises(CollectionStopped, match="`max_cost`"):
        judge(prices=PRICES, max_cost=0.49 * at_most).submit_batch(**inputs())
    assert not server.calls
    # Half the price is enough.
    assert judge(prices=PRICES, max_cost=0.51 * at_most).submit_batch(**inputs()).pending == 6
    # What is under way and what is there already count, as for requests that are asked directly.
    more = [*RESPONSES, *("y" * length for length in range(1, 8))]
    with pytest.raises(CollectionStopped, match="`max_cost`"):
        judge(prices=PRICES, max_cost=0.51 * at_most).submit_batch(**inputs(more))
    assert len(server.jobs) == 1
    # With nothing to hand in there is nothing to stop.
    assert judge(prices=PRICES, max_cost=0.1 * at_most).submit_batch(**inputs()).pending == 6


def test_needs_a_folder(server, judge):
    without = judge(cache_dir=None)
    for step in (lambda: without.submit_batch(**inputs()), without.collect_batch):
        with pytest.raises(ValueError, match="`cache_dir`"):
            step()
    assert not server.calls


def test_nothing_handed_in(server, judge):
    status = judge().collect_batch()
    assert (status.jobs, status.collected) == (0, 0)
    assert judge().submit_batch(prompts=[], completions=[]).is_ready
    assert not server.calls


@pytest.mark.parametrize("call", ["POST /v1/files", "POST /v1/batches"])
@pytest.mark.parametrize(
    ("reply", "raised", "said"),
    [
        (error(404, "Not Found"), ValueError, "no Batch API"),
        (error(401, f"Incorrect API key provided: {KEY}"), ValueError, "`OPENAI_API_KEY`"),
        (error(400, f"Bad {KEY}"), ValueError, r"Bad \*\*\*"),
        (error(413, "Too large"), ValueError, "does not take the job"),
        (error(429, "Slow down"), CollectionStopped, "run the same again"),
        (error(500, "Oops"), CollectionStopped, "run the same again"),
    ],
)
def test_errors_of_the_server_say_what_to_do(server, judge, call, reply, raised, said):
    server.faults[call] = [reply, reply]
    with pytest.raises(raised, match=said) as info:
        judge().submit_batch(**inputs())
    assert KEY not in "".join(traceback.format_exception(info.value))
    assert not server.jobs
    server.faults.clear()
    judge().submit_batch(**inputs())
    assert_all_are_there_once(server, judge)


@pytest.mark.parametrize("call", ["GET /v1/batches", "GET /v1/files/content"])
@pytest.mark.parametrize("status", [404, 429, 500])
def test_errors_of_the_server_while_taking_in(server, judge, call, status):
    judge().submit_batch(**inputs())
    finish_all(server)
    server.faults[call] = [error(status, "Oops")] * 2
    with pytest.raises(ValueError if status == 404 else CollectionStopped):
        judge().collect_batch()
    server.faults.clear()
    assert_all_are_there_once(server, judge)


def test_a_passing_error_is_retried(server, judge):
    for call in ("POST /v1/files", "GET /v1/batches", "GET /v1/files/content"):
        server.faults[call] = [error(500, "Oops")]
    judge().submit_batch(**inputs())
    assert_all_are_there_once(server, judge)


def test_a_job_that_is_gone_can_be_given_up(server, judge):
    judge().submit_batch(**inputs())
    server.jobs.clear()
    with pytest.raises(ValueError, match="does not know the job") as info:
        judge().collect_batch()
    Path(str(info.value).split("remove `")[1].split("`")[0]).unlink()
    assert judge().collect_batch().is_ready
    assert judge().submit_batch(**inputs()).pending == 5


@pytest.mark.parametrize("renamed", [False, True])
def test_what_the_server_does_not_accept_shows_before_the_upload(server, judge, renamed):
    def answer(body):
        if renamed and "max_tokens" in body:
            return error(400, "Unsupported parameter: use 'max_completion_tokens' instead.")
        if not renamed and body.get("response_format", {}).get("type") == "json_schema":
            return error(400, "response_format of type json_schema is not supported")
        return rate(body)

    server.answer = answer
    judge().submit_batch(**inputs())
    finish_all(server)
    # In a process of its own, which does not know of it.
    assert judge().collect_batch().collected == 6
    last = judge()
    assert scores(last(**inputs())) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    (request,) = last._requests([PROMPT], ["xx"], {})()
    assert last.client.store.get(request.key)["format"] == ("json_schema" if renamed else "json_object")


def test_a_request_that_is_rejected_is_said_at_once(server, judge):
    server.answer = lambda body: error(400, "`temperature` is not supported")
    with pytest.raises(ValueError, match="temperature=None"):
        judge().submit_batch(**inputs())
    assert not server.uploads


def test_the_key_is_nowhere(server, judge, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.INFO)
    judge().submit_batch(**inputs())
    finish_all(server)
    judge().collect_batch()
    judge()(**inputs())
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-key")
    for step in (lambda: judge().submit_batch(**inputs(["y", "yy"])), judge().collect_batch):
        try:
            step()
        except ValueError as error:
            assert "sk-wrong-key" not in "".join(traceback.format_exception(error))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    said = caplog.text + "".join(capfd.readouterr())
    for secret in (KEY, "sk-wrong-key"):
        assert secret not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_judges_share_a_folder(server, judge):
    other = {"prompt_template": "Rate the response.\n{prompt}\n{response}\nBe strict."}
    judge().submit_batch(**inputs())
    assert judge(**other).submit_batch(**inputs()).pending == 12
    assert len(server.jobs) == 2
    finish_all(server)
    # Taking in the answers of the other one as well mixes nothing up: the keys differ.
    assert judge().collect_batch().collected == 12
    assert judge(**other).collect_batch().collected == 0
    assert scores(judge()(**inputs())) == scores(judge(**other)(**inputs())) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert len(server.direct) == 2
    assert len(set(server.handed_in())) == 12


def test_jobs_of_another_server_are_left_alone(server, judge):
    with BatchServer(rate) as other:
        other.faults["POST /v1/batches"] = [None, DROP]
        judge(base_url=other.base_url).submit_batch(**inputs())
        with pytest.raises(CollectionStopped):
            judge(base_url=other.base_url).submit_batch(**inputs(["y", "yy", "yyy"]))
        # Neither asked for there, nor forgotten.
        assert judge().submit_batch(**inputs(["z", "zz"])).jobs == 1
        finish_all(server)
        assert judge().collect_batch().is_ready
        finish_all(other)
        assert judge(base_url=other.base_url).collect_batch().collected == 8
    assert set(server.calls) == {
        *("POST /v1/chat/completions", "POST /v1/files", "POST /v1/batches"),
        *("GET /v1/batches", "GET /v1/files/content"),
    }


def test_two_at_once(server, judge):
    judges = [judge() for _ in range(4)]
    threads = [threading.Thread(target=one.submit_batch, kwargs=inputs()) for one in judges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_all_are_there_once(server, judge)


@pytest.mark.parametrize("prompts", [["One", "Two"], [[{"role": "user", "content": "One"}]]])
def test_generator(server, tmp_path, prompts):
    def answer(body):
        text = f"{body['seed']}"
        if "prompt" in body:
            return Reply({"object": "text_completion", "choices": [{"text": text, "finish_reason": "stop"}]})
        return text

    def generator(folder="answers"):
        return OpenAIGenerator("policy", base_url=server.base_url, cache_dir=str(tmp_path / folder), max_retries=1)

    server.answer = answer
    directly = generator("direct")(prompts, 3)
    server.direct.clear()
    count = 3 * len(prompts)
    assert generator().submit_batch(prompts, 3).pending == count - 1
    assert [job["endpoint"] for job in server.jobs.values()] == [
        "/v1/completions" if isinstance(prompts[0], str) else "/v1/chat/completions"
    ]
    assert next(iter(server.jobs.values()))["status"] == "validating"
    assert not generator().collect_batch().is_ready
    finish_all(server)
    assert generator().collect_batch().collected == count - 1
    texts = [[response.text for response in responses] for responses in generator()(prompts, 3)]
    assert texts == [[response.text for response in responses] for responses in directly]
    assert len({text for responses in texts for text in responses}) == count
    assert len(server.direct) == 1


def test_generator_checks_what_it_hands_in(server, tmp_path):
    generator = OpenAIGenerator("policy", base_url=server.base_url, cache_dir=str(tmp_path), temperature=0.0)
    with pytest.raises(ValueError, match="`temperature=0`"):
        generator.submit_batch(["One"], 2)
    assert not server.calls


def test_the_collector_hands_in_again_what_an_expired_job_left(server, judge):
    dataset = Dataset.from_dict({"prompt": [PROMPT], "responses": [[*RESPONSES, " "]]})
    status = BPODataCollector(judge=judge()).score_batch(dataset)
    assert (status.jobs, status.pending, status.collected) == (1, 6, 0)
    finish_all(server, status="expired", answered=lambda position: position < 2)
    status = BPODataCollector(judge=judge()).score_batch(dataset)
    # One more was asked directly with the second hand-in.
    assert (status.jobs, status.pending, status.collected) == (1, 3, 2)
    finish_all(server)
    status = BPODataCollector(judge=judge()).score_batch(dataset)
    assert status.is_ready and status.collected == 3
    asked = len(server.direct)
    scored = BPODataCollector(judge=judge()).score(dataset)
    assert scored["scores"] == [[*(float(len(response)) for response in RESPONSES), None]]
    assert len(server.direct) == asked == 2
    with pytest.raises(ValueError, match="must be an `OpenAIJudge`"):
        BPODataCollector(judge=len).score_batch(dataset)
