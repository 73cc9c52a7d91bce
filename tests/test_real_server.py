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
Generator and judge with a real server, such as vLLM or `transformers serve`; see docs/collector.md for how they start.

    TRL_BPO_SERVER_URL=http://127.0.0.1:8000/v1 TRL_BPO_SERVER_MODEL=policy pytest -m slow tests/test_real_server.py

`TRL_BPO_SERVER_EXTRA` is the generator's `extra_body`, as JSON.
"""

import json
import os

import pytest
from datasets import Dataset

from trl_bpo import BPODataCollector, OpenAIGenerator, OpenAIJudge, OpenAIPairwiseJudge


URL, MODEL = os.environ.get("TRL_BPO_SERVER_URL"), os.environ.get("TRL_BPO_SERVER_MODEL", "")
EXTRA = json.loads(os.environ.get("TRL_BPO_SERVER_EXTRA", "{}"))
PROMPTS = ["What is the capital of France?", "Name three fruits.", "Why is the sky blue?"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(URL is None, reason="needs a server: set `TRL_BPO_SERVER_URL` and `TRL_BPO_SERVER_MODEL`"),
]


@pytest.fixture(scope="module", autouse=True)
def key():
    os.environ.setdefault("OPENAI_API_KEY", "local")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def generated(cache_dir):
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS]})
    collector = BPODataCollector(
        OpenAIGenerator(MODEL, base_url=URL, max_new_tokens=32, extra_body=EXTRA, cache_dir=cache_dir), num_responses=4
    )
    return collector.generate(dataset)


def test_responses_differ_and_are_kept(generated, cache_dir):
    assert all(len(row) == 4 for row in generated["responses"])
    assert any(len(set(row)) > 1 for row in generated["responses"])
    again = OpenAIGenerator(MODEL, base_url=URL, max_new_tokens=32, extra_body=EXTRA, cache_dir=cache_dir)
    texts = [[response.text for response in row] for row in again(list(generated["prompt"]), 4)]
    assert texts == list(generated["responses"]) and again.report.sent == 0


def test_text_prompts_go_on_as_they_are(cache_dir):
    generator = OpenAIGenerator(MODEL, base_url=URL, max_new_tokens=8, cache_dir=cache_dir)
    ((response,),) = generator(["The capital of France is"], 1)
    assert response.text and 1 <= response.num_tokens <= 8


@pytest.mark.parametrize("expected_score", [False, True])
def test_verdicts(generated, cache_dir, caplog, expected_score):
    judge = OpenAIJudge(MODEL, base_url=URL, max_tokens=256, expected_score=expected_score, cache_dir=cache_dir)
    scored = BPODataCollector(judge=judge).score(generated)
    report = judge.report
    assert report.requests == 12 == report.usable + report.unusable + report.failed and report.failed == 0
    scores = [score for row in scored["scores"] for score in row]
    assert sum(score is not None for score in scores) == report.usable
    assert all(1 <= score <= 10 for score in scores if score is not None)
    verdicts = [verdict for row in scored["verdicts"] for verdict in row]
    if not all(verdict.lstrip().startswith("{") for verdict in verdicts):
        assert "The server ignores `response_format`" in caplog.text
    else:
        # A schema is kept to unless the token limit cuts the verdict off.
        complete = [verdict for verdict in verdicts if verdict.rstrip().endswith("}")]
        assert complete and all(set(json.loads(verdict)) == {"reason", "rating"} for verdict in complete)
        assert report.usable >= 1
    judge(
        prompts=[row["prompt"] for row in generated for _ in range(4)],
        completions=[[{"role": "assistant", "content": text}] for row in generated for text in row["responses"]],
    )
    assert judge.report.sent == 0


def test_comparisons(generated, cache_dir):
    judge = OpenAIPairwiseJudge(MODEL, base_url=URL, max_tokens=256, cache_dir=cache_dir)
    shares = judge.compare(list(generated["prompt"]), [row[:2] for row in generated["responses"]])
    assert set(shares) <= {0.0, 0.5, 1.0, None} and judge.report.failed == 0
