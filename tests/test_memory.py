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
Ceilings of memory: what a selection of many rows takes, beside the same selection of few.

What is measured is the growth a row, over all that a process holds. A column of a million ids or prompts as Python objects takes
more than a hundred bytes a row by itself.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("memory_script.py")


def peaks(what, numbers, folder):
    command = [sys.executable, str(SCRIPT), what, str(folder), *map(str, numbers)]
    environment = {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "peaks.json").read_text())


# Bytes a row, of all that Python and NumPy allocate.
@pytest.mark.parametrize(
    ("what", "few", "many", "ceiling"),
    [
        ("ids", 10_000, 40_000, 20),
        ("depth", 20_000, 60_000, 140),
        ("breadth", 20_000, 60_000, 190),
        # Two responses of 160 bytes of tokens each, with their digests and batches. As lists they would take 1,500.
        ("responses", 5_000, 20_000, 1000),
        # The 32 bytes of two keys, those of the tokens, and digests. As lists and texts they would take 1,000.
        ("keys", 5_000, 20_000, 350),
        # As Python objects, four responses and their verdicts take 1,500.
        ("collect", 9_000, 24_000, 60),
    ],
)
def test_memory_a_row(tmp_path, what, few, many, ceiling):
    before, after = peaks(what, (few, many), tmp_path)
    assert (after - before) / (many - few) < ceiling, (before, after)
