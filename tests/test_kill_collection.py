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


"""Acceptance test of the collector: killed with SIGKILL at random moments, started again each time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from collect_script import NUM_PROMPTS, NUM_RESPONSES


TESTS = Path(__file__).parent


@pytest.fixture
def server(tmp_path):
    """Port and log of a server in a process of its own, which outlives those that ask it."""
    port_file, log = tmp_path / "port", tmp_path / "log.jsonl"
    command = [sys.executable, TESTS / "fault_server.py", "--port-file", port_file, "--log", log, "--latency", "0.03"]
    process = subprocess.Popen(command)
    while not port_file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield port_file.read_text(), log
    process.terminate()
    process.wait()


def run_script(server, folder, kind, kills):
    port, log = server
    command = [sys.executable, TESTS / "collect_script.py", "--folder", folder, "--port", port]
    command += ["--kind", kind, "--kills", str(kills)]
    # One thread, as the process forks.
    environment = {
        **os.environ,
        "OPENAI_API_KEY": "sk-none",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    start = found["attempts"][0]["start"]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return found, [record for record in records if record["received"] >= start]


def check_kills(found, kills):
    assert [attempt["exit"] for attempt in found["attempts"]] == [-signal.SIGKILL] * kills + [0], found["rows"]
    # They lie in the middle of it: some answers were there, and some were missing.
    amounts = [len(attempt["stored"]) for attempt in found["attempts"]]
    assert amounts == sorted(amounts) and len(set(amounts[:-1])) > kills / 2 and amounts[-2] < amounts[-1]
    # The same dataset, to the last digit of the scores.
    assert found["rows"] == found["whole"] and len(found["rows"]) > 10
    # Nothing is in the store twice.
    assert max(Counter(found["attempts"][-1]["stored"]).values()) == 1


def count_asked_again(found, records):
    """
    How many answers were asked for again, which must be those that a kill met between the server and the disk.

    An answer that was on disk and is asked for again makes the two numbers differ.
    """
    lost, before, starts = 0, 0, [attempt["start"] for attempt in found["attempts"]]
    api = [attempt["stored"] for attempt in found["attempts"]]
    for number, (first, after) in enumerate(zip(starts, [*starts[1:], float("inf")], strict=True)):
        answered = sum(record["answered"] for record in records if first <= record["received"] < after)
        missing = answered - (len(api[number]) - before)
        before = len(api[number])
        # No more than can be under way.
        assert 0 <= missing <= (found["concurrency"] if number < len(starts) - 1 else 0)
        lost += missing
    answers = Counter(record["content"] for record in records if record["answered"])
    assert sum(answers.values()) - len(answers) == lost
    return lost, len(answers)


def test_collection_over_an_api(server, tmp_path):
    kills = 20
    found, records = run_script(server, tmp_path, "openai", kills)
    check_kills(found, kills)
    lost, answers = count_asked_again(found, records)
    assert answers == len(found["attempts"][-1]["stored"]) == 2 * NUM_RESPONSES * NUM_PROMPTS["openai"]
    # Those in flight at a kill are few.
    assert lost < kills * found["concurrency"]


def test_collection_from_a_model(server, tmp_path):
    found, records = run_script(server, tmp_path, "transformers", 8)
    check_kills(found, 8)
