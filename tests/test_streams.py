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


"""Generators and judges that are asked in parts, and the columns that come of it."""

import json
import platform
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from openai_server import OpenAIServer

from trl_bpo import judging, streams
from trl_bpo.answer_store import content_key
from trl_bpo.collector import _own_rows
from trl_bpo.columns import _nearest, _reordered, beside, write_rows
from trl_bpo.generation import Response, iter_responses
from trl_bpo.generation_requests import RequestKeys, encode_prompts
from trl_bpo.judging import Verdict, iter_verdicts, judge_columns
from trl_bpo.openai_generator import OpenAIGenerator
from trl_bpo.openai_judge import OpenAIJudge
from trl_bpo.openai_pairwise_judge import OpenAIPairwiseJudge
from trl_bpo.prompts import prompt_id
from trl_bpo.responses import TokenLists


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(judging, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr(streams.in_blocks, "__defaults__", (2,))


class Streaming:
    def stream(self, prompts, num_responses, tools=None):
        for prompt in prompts:
            yield [Response(prompt, False, 1)] * num_responses

    def __call__(self, prompts, num_responses, tools=None):
        return list(self.stream(prompts, num_responses, tools))


class Overridden(Streaming):
    def __call__(self, prompts, num_responses, tools=None):
        return [[Response("mine", False, 1)] * num_responses for _ in prompts]


def test_the_method_that_was_overridden_last_counts():
    (streamed,) = iter_responses(Streaming(), ["a"], 2)
    (called,) = iter_responses(Overridden(), ["a"], 2)
    assert (streamed[0].text, called[0].text) == ("a", "mine")
    assert not streams.streams(lambda: None) and not streams.streams(print)


def test_generators_are_called_in_blocks(small_blocks):
    seen = []

    def generate(prompts, num_responses, tools=None):
        seen.append((prompts, tools))
        return [[Response(prompt, False, 1)] * num_responses for prompt in prompts]

    rows = list(iter_responses(generator=generate, prompts=list("abcde"), num_responses=2, tools=list("uvwxy")))
    assert [row[1].text for row in rows] == list("abcde")
    assert seen == [(["a", "b"], ["u", "v"]), (["c", "d"], ["w", "x"]), (["e"], ["y"])]
    list(iter_responses(generate, ["a"], 2))
    assert seen[-1] == (["a"], None)


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_of_prompts_is_an_error(number):
    rows = [[Response("a", False, 1)] * 2] * number
    with pytest.raises(ValueError, match=f"for 2 prompts, but did for {number}"):
        list(iter_responses(lambda *args: rows, ["a", "b"], 2))
    streaming = type("Streaming", (), {"stream": lambda *args: iter(rows)})()
    with pytest.raises(ValueError, match=f"for 2 prompts, but did for {number}"):
        list(iter_responses(streaming, ["a", "b"], 2))


ROWS = Dataset.from_dict(
    {
        "prompt": ["a", "b", "c", "d", "e"],
        "responses": [["x", "", "yy"], [" "], ["zzz"], ["u", "v"], [None, "w"]],
        "truncated": [[False] * 3, [False], [False], [False] * 2, [False] * 2],
        "answer": [1, 2, 3, 4, 5],
    }
)
EXPECTED = [[1.0, None, 2.0], [None], [3.0], [1.0, 1.0], [None, 1.0]]


def length(prompts, completions, answer):
    return [float(len(text)) for text in completions]


def test_judges_are_called_in_blocks(small_blocks):
    seen = []

    def judge(prompts, completions, answer):
        seen.append((prompts, completions, answer))
        return length(prompts, completions, answer)

    verdicts = list(iter_verdicts(judge, ROWS))
    assert [[verdict.score for verdict in row] for row in verdicts] == EXPECTED
    assert verdicts[1] == [Verdict(None, "empty response")]
    assert seen == [
        (["a", "a"], ["x", "yy"], [1, 1]),
        (["c", "d", "d"], ["zzz", "u", "v"], [3, 4, 4]),
        (["e"], ["w"], [5]),
    ]


def test_judges_that_stream():
    class Judge:
        def __init__(self, extra=0):
            self.extra = extra

        def stream(self, prompts, completions, answer):
            # Gone through twice, and looked up.
            assert list(completions) == ["x", "yy", "zzz", "u", "v", "w"] and len(answer) == 6
            assert [prompts[index] for index in range(6)] == list(prompts) == ["a", "a", "c", "d", "d", "e"]
            assert [completions[index] for index in range(6)] == list(completions)
            scores = length(prompts, completions, answer)
            yield from scores[: len(scores) + min(self.extra, 0)] + [0.0] * max(self.extra, 0)

    assert [[verdict.score for verdict in row] for row in iter_verdicts(Judge(), ROWS)] == EXPECTED
    with pytest.raises(ValueError, match="gave 5 for 6"):
        list(iter_verdicts(Judge(-1), ROWS))
    with pytest.raises(ValueError, match="gave 8 for 6"):
        list(iter_verdicts(Judge(2), ROWS))


def test_columns_for_a_judge():
    message = [{"role": "user", "content": "a"}]
    dataset = Dataset.from_dict({"prompt": [message], "responses": [["x", "y"]], "tools": [["t"]]})
    columns = judge_columns(dataset)
    assert set(columns) == {"prompts", "completions", "tools"}
    assert list(columns["prompts"]) == [message] * 2
    assert columns["completions"][1] == [{"role": "assistant", "content": "y"}]
    with pytest.raises(IndexError):
        columns["completions"][2]
    with pytest.raises(IndexError):
        columns["completions"][-1]


def test_an_api_gives_in_parts_what_a_call_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")

    def answer(request):
        content = request["messages"][-1]["content"]
        if "response_format" not in request:
            return f"{request['seed']}"
        if "response_a" in json.dumps(request["response_format"]) or "verdict" in json.dumps(
            request["response_format"]
        ):
            return json.dumps({"verdict": "A" if content.rfind("yy") < content.rfind("zzz") else "B"})
        return json.dumps({"rating": 7})

    rows = Dataset.from_dict({"prompt": ["a", "b", "a"], "responses": [["x", "yy"], ["zzz", "yy"], ["zzz"]]})
    columns = judge_columns(rows)
    plain = {name: list(column) for name, column in columns.items()}
    with OpenAIServer(answer) as server:
        options = {"base_url": server.base_url, "cache_dir": str(tmp_path)}
        for judge in (OpenAIJudge("gpt-4.1-mini", **options), OpenAIPairwiseJudge("gpt-4.1-mini", **options)):
            called = judge(**plain)
            sent = judge.report.sent
            assert sent > 0 and list(judge.stream(**columns)) == called and judge.report.sent == 0
            assert len(called) == 5
        # Three responses to one prompt and two to the other, each pair in both orders.
        assert sent == 2 * (3 + 1)
        generator = OpenAIGenerator("gpt-4.1-mini", **options)
        messages = [[{"role": "user", "content": prompt}] for prompt in "ab"]
        called = generator(messages, 2)
        column = Dataset.from_dict({"prompt": messages})["prompt"]
        assert list(generator.stream(column, 2)) == called and generator.report.sent == 0
        assert len({response.text for row in called for response in row}) == 4


def test_keys_of_responses():
    prompts = ["b", "a", "b", "", "b", "a"]
    input_ids = encode_prompts(lambda prompt: {"input_ids": list(prompt.encode())}, prompts)
    parts = [(0, 3), (3, 1)]
    keys = RequestKeys({"seed": 1}, input_ids, parts)
    times: Counter = Counter()
    for prompt, row in zip(prompts, keys, strict=True):
        content = {"seed": 1, "prompt": list(prompt.encode()), "occurrence": times[prompt]}
        assert row == [(content_key({**content, "start": start, "count": count}), count) for start, count in parts]
        times[prompt] += 1
    assert len(RequestKeys({}, TokenLists.of([]), parts)) == 0


@pytest.mark.parametrize("num_processes", [2, 3, 5, 8])
def test_rows_of_the_processes(num_processes):
    prompts = np.random.default_rng(0).integers(0, 12, 40).astype(str).tolist()
    dataset = Dataset.from_dict({"prompt": prompts})
    states = [SimpleNamespace(num_processes=num_processes, process_index=index) for index in range(num_processes)]
    shares = [_own_rows(dataset, state).tolist() for state in states]
    # As one would write it down.
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt_id(prompt), []).append(row)
    expected: list[list[int]] = [[] for _ in states]
    start = 0
    for rows in groups.values():
        expected[start * num_processes // len(prompts)] += rows
        start += len(rows)
    assert shares == expected


def test_columns_on_the_disk():
    features = Features({"scores": List(Value("float64"))})
    rows = [{"scores": [1.0, None]}, {"scores": []}]
    columns = write_rows(iter(rows), features)
    assert columns.to_list() == rows and columns.cache_files
    assert write_rows(iter(rows), features)._fingerprint == columns._fingerprint
    assert write_rows(iter(rows[:1]), features)._fingerprint != columns._fingerprint
    assert len(write_rows(iter(()), features)) == 0
    both = beside(Dataset.from_dict({"prompt": ["a", "b"]}).select([1, 0]), columns)
    assert both[0] == {"prompt": "b", "scores": [1.0, None]}
    # Neither is copied where the rows of both are all there in their order.
    plain = write_rows([{"prompt": "a"}, {"prompt": "b"}], Features({"prompt": Value("string")}))
    assert beside(plain, columns).cache_files == plain.cache_files + columns.cache_files
    # Else the one is, whose are not.
    chosen = plain.select([1, 0])
    assert beside(chosen, columns).cache_files[1:] == columns.cache_files
    assert beside(chosen, columns).to_list() == [{"prompt": "b", **rows[0]}, {"prompt": "a", **rows[1]}]


def test_results_of_all_processes_in_their_order():
    features = Features({"row": Value("int64")})
    columns = write_rows(({"row": row} for row in range(2500)), features)
    path = columns.cache_files[0]["filename"]
    rows = np.random.default_rng(0).permutation(2500)
    new_path = _reordered(path, rows, features)
    assert Dataset.from_file(new_path)["row"][:] == rows.tolist()
    assert not Path(path).exists()
    # The file of this machine comes before that of another one whose disk is seen, too.
    other = write_rows(iter([{"row": 0}]), features).cache_files[0]["filename"]
    assert _nearest([("another", other), (platform.node(), None), (platform.node(), new_path)]) == new_path
    assert _nearest([("another", other), (platform.node(), path)]) == other
    with pytest.raises(OSError, match="Set `TMPDIR` to a folder that all processes of a machine share"):
        _nearest([(platform.node(), path), ("another", None)])
