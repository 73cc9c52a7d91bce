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
import socket

import pytest
from fault_server import FaultServer, ok, server_error

from trl_bpo import OpenAIGenerator, OpenAIJudge


N = 120
KEY = "sk-planted-several"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def rating(request, attempt, delay=0.02):
    return ok(json.dumps({"reason": "fine", "rating": 7}), delay=delay)


def judge(addresses, n=N, **kwargs):
    """Scores of so many answers."""
    asker = OpenAIJudge("m", base_url=addresses, **{"max_concurrency": 12, "max_retries": 6, **kwargs})
    texts = [f"answer {row}" for row in range(n)]
    verdicts = asker(prompts=["A question?"] * n, completions=texts)
    return asker, [verdict.score for verdict in verdicts]


def free_address():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def test_requests_are_spread_evenly(caplog):
    with FaultServer(rating) as first, FaultServer(rating) as second, FaultServer(rating) as third:
        with caplog.at_level(logging.INFO, logger="trl_bpo.api.run"):
            _, scores = judge([first.base_url, second.base_url, third.base_url])
        counts = [len(server.log) for server in (first, second, third)]
    assert len(set(scores)) == 1 and scores[0] is not None
    assert sum(counts) == N and min(counts) > 0.7 * N / 3
    # Every request was asked once, of one of them.
    assert not set(first.answered) & set(second.answered)
    for server, count in zip((first, second, third), counts, strict=True):
        assert f"127.0.0.1:{server.port} answered {count} and failed at 0" in caplog.text
    assert KEY not in caplog.text


def test_the_faster_server_gets_more():
    with FaultServer(lambda request, attempt: rating(request, attempt, 0.2)) as slow, FaultServer(rating) as fast:
        judge([slow.base_url, fast.base_url])
        assert len(slow.log) + len(fast.log) == N and len(fast.log) > 2 * len(slow.log)


def test_a_server_that_is_down_from_the_start(caplog):
    with FaultServer(rating) as server, caplog.at_level(logging.INFO, logger="trl_bpo.api.run"):
        asker, scores = judge([free_address(), server.base_url])
        assert None not in scores and len(server.log) == N and not asker.report.failed
    assert "answered 0 and failed at" in caplog.text


def test_a_server_that_dies_on_the_way():
    def dying(request, attempt):
        return rating(request, attempt) if len(ill.log) < 20 else server_error(503)

    with FaultServer(rating) as well, FaultServer(dying) as ill:
        _, scores = judge([ill.base_url, well.base_url])
        assert None not in scores
        assert sum(well.answered.values()) + sum(ill.answered.values()) == N
        # It is asked now and then, not for every request.
        assert len(ill.log) < 20 + N / 2


def test_other_addresses_serve_the_rest(tmp_path):
    with FaultServer(rating) as first:
        judge(first.base_url, n=50, cache_dir=tmp_path)
    with FaultServer(rating) as second, FaultServer(rating) as third:
        _, scores = judge([second.base_url, third.base_url], n=80, cache_dir=tmp_path)
        assert len(second.log) + len(third.log) == 30 and None not in scores


def test_all_are_down():
    with pytest.raises(Exception, match="none was answered"):
        judge([free_address(), free_address()], n=20, max_retries=1)


def test_generator_takes_several():
    def answer(request, attempt):
        return ok(["red", "green"])

    with FaultServer(answer) as first, FaultServer(answer) as second:
        generator = OpenAIGenerator("m", base_url=[first.base_url, second.base_url], max_new_tokens=8)
        responses = generator([[{"role": "user", "content": f"Question {row}?"}] for row in range(20)], 2)
        assert first.log and second.log
    assert [len(row) for row in responses] == [2] * 20


def test_batch_api_takes_one(tmp_path):
    asker = OpenAIJudge("m", base_url=[free_address(), free_address()], cache_dir=tmp_path)
    with pytest.raises(ValueError, match="takes one `base_url`"):
        asker.submit_batch(prompts=["x"], completions=["y"])


@pytest.mark.parametrize(("addresses", "message"), [([], "empty list"), (["http://a/v1", "b/v1"], "not the address")])
def test_addresses_that_are_none(addresses, message):
    with pytest.raises(ValueError, match=message):
        OpenAIJudge("m", base_url=addresses)
