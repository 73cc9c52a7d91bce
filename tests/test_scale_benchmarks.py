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

"""The benchmarks of scale at sizes of seconds: they run to their end, and their last line says what it should."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from trl_bpo import quickstart


BENCHMARKS = Path(__file__).parents[1] / "recipes" / "benchmarks"


def run(name, *options):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, options)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture
def prompts(tmp_path):
    things = ("a river", "a prime number", "the moon", "rust on iron", "a sonnet", "yeast", "a compiler", "inflation")
    rows = [{"instruction": f"Explain {thing} in {n} words.", "input": ""} for n in range(3, 13) for thing in things]
    path = tmp_path / "prompts.jsonl"
    # One of them twice: only distinct prompts count.
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return path


def needs_encoder():
    try:
        return quickstart.encoder_path()
    except ImportError as error:
        pytest.skip(str(error))


def test_breadth_beside_its_peers():
    options = ("--rows", 2000, "--dim", 16, "--clusters", 20, "--repeats", 1)
    result, output = run("breadth_scale.py", *options)
    assert (result["n"], result["d"], result["n_clusters"]) == (2000, 16, 20)
    peers = ["minibatch", "minibatch_10k"]
    if importlib.util.find_spec("faiss"):
        peers.append("faiss")
    else:
        assert "faiss is not installed" in output
    assert list(result["methods"]) == ["trl_bpo", *peers]
    for measured in result["methods"].values():
        assert measured["seconds"] > 0 and measured["peak_gb"] > 0 and measured["inertia"] > 0
    methods = result["methods"]
    best = min(methods[name]["inertia"] for name in peers)
    assert result["inertia_over_best_peer"] == pytest.approx(methods["trl_bpo"]["inertia"] / best)
    # So few rows are clustered exactly, and mini-batches come near to that: labels are those of the same rows.
    assert 0.8 < result["inertia_over_best_peer"] < 1.1
    good = [
        methods[name]["seconds"]
        for name in peers
        if methods[name]["inertia"] <= 1.01 * min(best, methods["trl_bpo"]["inertia"])
    ]
    expected = pytest.approx(methods["trl_bpo"]["seconds"] / min(good)) if good else None
    assert result["time_over_best_peer"] == expected
    assert "exponent" not in result


def test_breadth_of_prompts(prompts):
    needs_encoder()
    result, _ = run("breadth_scale.py", "--rows", 0, "--prompts", prompts)
    assert result["prompts"] == 80
    assert 0 < result["seconds_in_encoder"] < result["seconds"]
    rest = result["seconds"] - result["seconds_in_encoder"]
    assert result["overhead"] == pytest.approx(rest / result["seconds_in_encoder"])


def test_depth():
    # Enough pairs for two sizes, from which the growth is fitted.
    options = ("--pairs", 31_623, "--dim", 8, "--growth_clusters", 4, "--repeats", 1)
    result, output = run("depth_scale.py", *options)
    assert (result["n"], result["d"]) == (31_623, 8)
    assert result["peak_gb"] > 0 and result["seconds"] > 0
    assert list(result["growth"]) == ["10000", "31623"]
    # With two sizes the fit is the line through both.
    assert result["exponent"] == pytest.approx(result["exponent_of_last"])
    assert "10,000 pairs, 4 clusters" in output


def test_coverage(prompts, tmp_path):
    needs_encoder()
    cache = tmp_path / "embeddings.npy"
    result, output = run("coverage.py", prompts, "--cache", cache, "--fraction", 0.25)
    assert (result["n"], result["n_keep"]) == (80, 20)
    methods = ["bpo", "bpo_overall", "bpo_one_each", "random", "farthest_point"]
    if importlib.util.find_spec("semhash"):
        methods.append("semhash")
    else:
        assert "semhash is not installed" in output
    assert list(result["methods"]) == methods
    assert len(result["methods"]["random"]) == 5
    for runs in result["methods"].values():
        for measured in runs:
            # Clusters may be empty where there is one for each prompt that is kept.
            assert 0 < measured["kept"] <= 20
            assert 0 < measured["mean"] <= measured["p95"] <= measured["max"] <= 2
            assert 0 <= measured["near_duplicates"] <= 1
    # What greedy k-centre is for.
    farthest = result["methods"]["farthest_point"][0]["max"]
    assert farthest <= min(measured["max"] for measured in result["methods"]["random"])
    table = [line for line in output.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(methods)
    # The second time from the file.
    assert cache.stat().st_size > 80 * 384 * 4
    again, _ = run("coverage.py", prompts, "--cache", cache, "--fraction", 0.25)
    for name in ("bpo", "farthest_point"):
        assert again["methods"][name][0]["mean"] == result["methods"][name][0]["mean"]
