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


"""Acceptance test of the engine that asks: every fault that a server can have, 2,000 requests through."""

import json
import logging
import re
import traceback
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from fault_server import (
    Behaviour,
    FaultServer,
    bad_request,
    content_filter,
    context_length_exceeded,
    cut_short,
    dropped,
    dropped_in_body,
    empty_content,
    error,
    filtered,
    hanging,
    insufficient_quota,
    no_choices,
    not_json,
    ok,
    rate_limited,
    refused,
    server_error,
    truncated_json,
    unauthorized,
    unknown_model,
)

from trl_bpo import OpenAIJudge, Verdict
from trl_bpo.answer_store import AnswerStore
from trl_bpo.api import CollectionStopped


ROWS = 2000
RETRIES = 2
KEY = "sk-PLANTED-0123456789abcdef"
PROSE, ELEVEN, HALF = ok("I like it."), ok('{"reason": "so", "rating": 11}'), cut_short('{"reason": "so, rat')


@dataclass(frozen=True)
class Case:
    """
    What the server does at the requests for a row, one after the other, and what must become of the row: `reason` is why
    there is no verdict, if there is none. Without `always`, a good verdict follows.
    """

    faults: tuple[Behaviour, ...] = ()
    always: bool = False
    reason: str | None = None
    is_answered: bool = False
    asked: int = 0


def once(*faults):
    """Retries get an answer; an answer that cannot be used is no error, and is asked for again."""
    return Case(faults, asked=len(faults) + 1)


def fails(fault, reason, asked=1 + RETRIES):
    return Case((fault,), always=True, reason=reason, asked=asked)


def unusable(fault, reason, asked=2):
    return Case((fault,), always=True, reason=reason, is_answered=True, asked=asked)


MIXED = [
    once(server_error(500)),
    once(server_error(502, html=True)),
    once(server_error(503, retry_after=0.1)),
    once(server_error(500), server_error(503)),
    once(dropped()),
    once(dropped(reset=True)),
    once(dropped_in_body()),
    once(dropped_in_body(reset=True)),
    once(truncated_json()),
    once(not_json()),
    once(not_json("application/json")),
    once(PROSE),
    once(ELEVEN),
    once(HALF),
    once(empty_content()),
    once(no_choices()),
    once(ok("[" * 10_000)),
    fails(server_error(500), "InternalServerError"),
    fails(dropped(), "APIConnectionError"),
    fails(truncated_json(), "JSONDecodeError"),
    fails(not_json(), "no completion"),
    fails(content_filter(), "content_filter", asked=1),
    fails(context_length_exceeded(), "context_length_exceeded", asked=1),
    fails(bad_request("I do not like it."), "BadRequestError", asked=1),
    unusable(PROSE, "unreadable"),
    unusable(ELEVEN, "unreadable"),
    unusable(HALF, "cut off at `max_tokens`"),
    unusable(empty_content(), "empty answer"),
    unusable(ok(None), "empty answer"),
    unusable(no_choices(), "empty answer"),
    unusable(refused(), "refused by the model", asked=1),
    unusable(filtered('{"reason": "so", "rating": 5}'), "stopped by a content filter", asked=1),
]
# Side by side, as a rate limit meets whatever is under way: each is one wait for all.
RATE_LIMITS = {
    400: once(rate_limited(0.3)),
    700: once(rate_limited(0.2, "ms")),
    1000: once(rate_limited(0.2, "date")),
    1300: once(rate_limited()),
    # More often than a request is retried.
    1600: once(*[rate_limited(0.05, "ms")] * (RETRIES + 2)),
}


def case_of(row):
    if row < 64:
        # Whatever goes wrong before anything was answered is taken for a mistake in the options.
        return Case(asked=1)
    if (block := RATE_LIMITS.get(row // 10 * 10)) is not None:
        return block
    if row // 10 == 20:
        return once(hanging())
    if row // 5 == 50:
        return fails(hanging(), "APITimeoutError")
    return MIXED[row // 3 % len(MIXED)] if row % 3 == 0 else Case(asked=1)


def verdict_of(row):
    return json.dumps({"reason": f"row {row}", "rating": 1 + row % 10})


def row_of(request):
    return int(re.search(r"Response (\d+)", request["messages"][1]["content"])[1])


def misbehave(request, attempt):
    row = row_of(request)
    case = case_of(row)
    if case.always:
        return case.faults[0]
    return case.faults[attempt - 1] if attempt <= len(case.faults) else ok(verdict_of(row))


def behave(request, attempt):
    return ok(verdict_of(row_of(request)))


def judge_rows(server, count=ROWS, **options):
    options = {"max_concurrency": 64, "max_retries": RETRIES, "timeout": 4.0, **options}
    judge = OpenAIJudge("m", base_url=server.base_url, **options)
    return judge, judge(prompts=["Prompt"] * count, completions=[f"Response {row}" for row in range(count)])


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def test_every_fault(tmp_path):
    cases = [case_of(row) for row in range(ROWS)]
    # The plan has every fault, in numbers.
    numbers = Counter(map(repr, cases))
    assert len(numbers) == len(MIXED) + len(RATE_LIMITS) + 3 and min(numbers.values()) >= 5
    usable = [row for row in range(ROWS) if cases[row].reason is None]
    failed = [row for row in range(ROWS) if cases[row].reason is not None and not cases[row].is_answered]
    unused = [row for row in range(ROWS) if cases[row].is_answered]

    with FaultServer(misbehave, key=KEY) as server:
        judge, verdicts = judge_rows(server, cache_dir=str(tmp_path))
        # All answers that could be had are there, and right.
        for row in usable:
            assert verdicts[row] == Verdict(1.0 + row % 10, verdict_of(row)), (row, cases[row])
        assert [row for row in range(ROWS) if verdicts[row].score is None] == sorted(failed + unused)

        # Each request was sent as often as it takes, and none answered twice but those whose answer was of no use.
        asked, good = Counter(), Counter()
        for record in server.log:
            row = row_of(record.request)
            asked[row] += 1
            good[row] += record.answered and record.behaviour == "ok" and cases[row].reason is None
        assert {row: asked[row] for row in range(ROWS) if asked[row] != cases[row].asked} == {}
        twice = {row for row in usable if good[row] > 1}
        assert twice == {row for row in usable if cases[row] in (once(PROSE), once(ELEVEN), once(ok("[" * 10_000)))}
        assert server.max_in_flight <= 64

        # What failed for good is listed.
        lines = (tmp_path / "failed-judgements-00000.jsonl").read_text().splitlines()
        listed = {failure["row"]: failure["reason"] for failure in map(json.loads, lines)}
        assert listed == {row: cases[row].reason for row in failed + unused} and len(lines) == len(listed)

        # The report adds up, and equals what the plan implies.
        report = judge.report
        assert report.requests == ROWS == report.usable + report.unusable + report.failed
        assert (report.usable, report.unusable, report.failed) == (len(usable), len(unused), len(failed))
        assert report.reasons == Counter(case.reason for case in cases if case.reason is not None)
        reasked = [row for row in usable if cases[row].faults and cases[row].faults[0] in NO_ERRORS]
        reasked += [row for row in unused if cases[row].asked == 2]
        assert (report.from_store, report.reasked) == (0, len(reasked))
        assert report.sent == len(usable) + len(unused) + len(reasked) == len(AnswerStore(tmp_path))
        assert (report.prompt_tokens, report.completion_tokens) == (10 * report.sent, 5 * report.sent)
        assert report.cool_downs >= len(RATE_LIMITS) + RETRIES + 1

        # A second run asks what failed without an answer, and a third one nothing.
        server.plan, before = behave, len(server.log)
        judge, verdicts = judge_rows(server, cache_dir=str(tmp_path))
        assert sorted(row_of(record.request) for record in server.log[before:]) == failed
        assert [row for row in range(ROWS) if verdicts[row].score is None] == unused
        report = judge.report
        assert (report.from_store, report.sent, report.failed) == (ROWS - len(failed), len(failed), 0)
        assert (report.usable, report.unusable) == (ROWS - len(unused), len(unused))
        before = len(server.log)
        judge, again = judge_rows(server, cache_dir=str(tmp_path))
        assert again == verdicts and len(server.log) == before and judge.report.sent == 0


# What is an answer, though of no use, and so paid for.
NO_ERRORS = (PROSE, ELEVEN, HALF, empty_content(), no_choices(), ok("[" * 10_000))


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (unauthorized(), "rejects the key. Check the environment variable `OPENAI_API_KEY`"),
        (unknown_model(), "Check `model` and `base_url`"),
        (insufficient_quota(), "no quota left"),
        (bad_request(), "`temperature=None`"),
    ],
    ids=["401", "404", "quota", "400"],
)
def test_permanent_errors_stop_at_once(fault, remedy, tmp_path):
    with FaultServer(lambda request, attempt: fault) as server:
        with pytest.raises(ValueError, match=remedy):
            judge_rows(server, 500, cache_dir=str(tmp_path), max_concurrency=8)
        # Those that were under way together.
        assert len(server.log) <= 8
        server.plan = behave
        assert judge_rows(server, 20, cache_dir=str(tmp_path))[0].report.usable == 20


@pytest.mark.parametrize("fault", [unauthorized(), unknown_model(), insufficient_quota()], ids=["401", "404", "quota"])
def test_permanent_errors_in_the_middle_lose_nothing(fault, tmp_path):
    with FaultServer(lambda request, attempt: behave(request, attempt) if len(server.log) < 100 else fault) as server:
        with pytest.raises(ValueError, match="OPENAI_API_KEY|`model`"):
            judge_rows(server, 500, cache_dir=str(tmp_path), max_concurrency=8)
        # Those under way together, and as many again where it could be a matter of single requests.
        assert len(server.log) <= 116 and len(AnswerStore(tmp_path)) == sum(server.answered.values()) >= 100
        server.plan = behave
        judge, verdicts = judge_rows(server, 500, cache_dir=str(tmp_path))
        assert all(verdict.score is not None for verdict in verdicts)
    assert set(server.answered.values()) == {1} and len(server.answered) == 500


def test_server_that_dies_in_the_middle_loses_nothing(tmp_path):
    with FaultServer(
        lambda request, attempt: behave(request, attempt) if len(server.log) < 200 else dropped()
    ) as server:
        with pytest.raises(CollectionStopped, match="stopped answering: 64 requests in a row"):
            judge_rows(server, 1000, cache_dir=str(tmp_path), max_retries=0)
        assert len(AnswerStore(tmp_path)) == sum(server.answered.values()) >= 200
        server.plan = behave
        judge, verdicts = judge_rows(server, 1000, cache_dir=str(tmp_path))
        assert all(verdict.score is not None for verdict in verdicts)
    assert set(server.answered.values()) == {1} and len(server.answered) == 1000


def everything_said(exception):
    shown = traceback.TracebackException.from_exception(exception, capture_locals=True)
    return "".join(shown.format()) + repr(exception) + repr(vars(exception))


def test_the_key_is_written_nowhere(tmp_path, capfd):
    """Servers repeat the key in their errors; the client logs its requests."""
    echo = "You sent {authorization}, which I do not like."
    faults = [
        unauthorized(),
        error("forbidden", 403, echo),
        error("unknown", 404, echo),
        bad_request(echo),
        replace(insufficient_quota(), body=error("", 429, echo, "insufficient_quota").body),
        replace(not_json(), body=f"<html>{echo}</html>"),
        replace(rate_limited(7200), body=error("", 429, echo).body),
    ]
    # Where each meets single requests, after others were answered.
    single = [
        bad_request(echo),
        replace(content_filter(), body=error("", 400, echo, "content_filter").body),
        replace(server_error(), body=error("", 500, echo).body),
        replace(truncated_json(), body=f'{{"choices": "{echo}'),
        replace(not_json(), body=f"<html>{echo}</html>"),
        dropped(),
        dropped_in_body(),
    ]
    said = []
    handler = logging.FileHandler(tmp_path / "debug.log")
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        for number, fault in enumerate(faults):
            with FaultServer(lambda request, attempt, fault=fault: fault) as server:
                with pytest.raises((ValueError, CollectionStopped)) as raised:
                    judge_rows(server, 20, cache_dir=str(tmp_path / str(number)))
            said.append(everything_said(raised.value))

        def plan(request, attempt):
            row = row_of(request)
            return single[row - 8] if 8 <= row < 8 + len(single) else behave(request, attempt)

        with FaultServer(plan, key=KEY) as server:
            judge, verdicts = judge_rows(
                server, 30, cache_dir=str(tmp_path / "single"), max_concurrency=4, max_retries=1
            )
        assert judge.report.failed == len(single)
        said += [repr(judge.report), str(judge.report), repr(verdicts), repr(vars(judge)), repr(vars(judge.client))]
        with pytest.raises(ValueError) as raised:
            judge.client.base_url = server.base_url
            judge(prompts=["another"] * 4, completions=["a", "b", "c", "d"])
        said.append(everything_said(raised.value))
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
    # The log is what it is meant to be: the client's own words are in it.
    assert "/chat/completions" in (tmp_path / "debug.log").read_text()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"PLANTED" not in path.read_bytes(), path
    assert (
        len(list(tmp_path.rglob("answers-*"))) == 1
        and (tmp_path / "single" / "failed-judgements-00000.jsonl").exists()
    )
    captured = capfd.readouterr()
    for text in [*said, captured.out, captured.err]:
        assert "PLANTED" not in text
