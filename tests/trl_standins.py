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
Stand-ins for the tiny models and data sets that TRL's tests load from the Hub, for machines that cannot reach it.

Random models of the same architectures, and rows with the same columns, the same nesting and the same number of rows.
Weights, sizes, texts and tokens are others, so a test that depends on those may fail on a stand-in. Of the
vision-language models only Qwen2.5-VL has a stand-in, where torchvision is installed; tests that load others fail.
"""

import io
import json
from pathlib import Path

import torch
from datasets import Dataset, Image
from minihub import LFS_SUFFIXES, Blob, MiniHub, Repo
from PIL import Image as PILImage
from tiny import tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
)
from transformers.utils import is_torchvision_available


NAMESPACE = "trl-internal-testing"
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Name on the Hub -> type of the model and what its configuration needs beside the common sizes.
TEXT_MODELS: dict[str, tuple[str, dict]] = {
    "tiny-Cohere2ForCausalLM": ("cohere2", {}),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", {**_MOE, "n_routed_experts": 4, "first_k_dense_replace": 1}),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {**_MOE, "num_experts": 4}),
    "tiny-NemotronHForCausalLM-nano": (
        "nemotron_h",
        {
            **_MOE,
            "layers_block_type": ["mamba", "attention", "moe"],
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "tiny-Olmo3ForCausalLM": ("olmo3", {}),
    "tiny-Lfm2ForCausalLM": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "tiny-Lfm2ForCausalLM-2.5": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}
# The content of a message is a string or a list of parts.
_VISION_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{%- if message['content'] is string %}{{ message['content'] }}"
    "{%- else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_REMOTE_CODE = """from transformers import Qwen2Config, Qwen2ForCausalLM


class RemoteConfig(Qwen2Config):
    model_type = "remote"


class RemoteForCausalLM(Qwen2ForCausalLM):
    config_class = RemoteConfig
"""

_QUESTIONS = [
    ("What do bees make?", "Bees make honey.", "Bees make noise."),
    ("Name a prime number.", "Seven.", "Nine."),
    ("Which way is up?", "Away from the ground.", "It depends."),
    ("How many legs has a spider?", "Eight legs.", "Six legs."),
    ("What is ice?", "Frozen water.", "Cold."),
    ("Where does the sun rise?", "In the east.", "In the west."),
    ("Say hello.", "Hello, nice to meet you.", "No."),
    ("What is two plus two?", "Four.", "Twenty-two."),
    ("Name a colour.", "Blue is a colour.", "Loud."),
    ("What is bread made of?", "Flour, water and salt.", "Crumbs."),
    ("What do fish breathe with?", "They breathe with gills.", "Lungs."),
    ("Who writes books?", "Authors write books.", "Readers."),
    ("How long is a minute?", "Sixty seconds.", "Too long."),
    ("What grows on an apple tree?", "Apples do.", "Leaves, mostly."),
    ("Which is larger, a cat or a whale?", "A whale is larger.", "The cat."),
    ("What does a clock show?", "The time.", "Numbers."),
    ("Where do penguins live?", "In the far south.", "In a zoo."),
]


def _standard() -> list[dict]:
    return [{"prompt": question, "chosen": f" {good}", "rejected": f" {bad}"} for question, good, bad in _QUESTIONS]


def _turn(role: str, content: str, **more: object) -> list[dict]:
    return [{"role": role, "content": content, **more}]


def _conversational() -> list[dict]:
    return [
        {"prompt": _turn("user", question), "chosen": _turn("assistant", good), "rejected": _turn("assistant", bad)}
        for question, good, bad in _QUESTIONS
    ]


def _implicit(rows: list[dict]) -> list[dict]:
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


def _harmony() -> list[dict]:
    def answer(text: str) -> list[dict]:
        return _turn("assistant", text, thinking=f"They want to hear: {text}")

    return [
        {"prompt": _turn("user", question), "chosen": answer(good), "rejected": answer(bad)}
        for question, good, bad in _QUESTIONS
    ]


def _toolcall() -> list[dict]:
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    tool = {
        "type": "function",
        "function": {"name": "look_up", "description": "Look it up.", "parameters": parameters},
    }

    def answer(question: str, text: str) -> list[dict]:
        call = {"type": "function", "function": {"name": "look_up", "arguments": {"text": question}}}
        turns = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        return [*turns, {"role": "tool", "name": "look_up", "content": text}, {"role": "assistant", "content": text}]

    return [
        {
            "prompt": _turn("user", question),
            "chosen": answer(question, good),
            "rejected": answer(question, bad),
            "tools": json.dumps([tool]),
        }
        for question, good, bad in _QUESTIONS
    ]


def _with_images(numbers: list[int]) -> Dataset:
    rows = [
        {**row, "images": [_picture(index + offset) for offset in range(numbers[index % len(numbers)])]}
        for index, row in enumerate(_conversational())
    ]
    return Dataset.from_list(rows).cast_column("images", [Image()])


def _picture(shade: int) -> dict:
    buffer = io.BytesIO()
    PILImage.new("RGB", (56, 56), (shade * 9 % 256, 80, 200)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _datasets() -> dict[str, dict[str, Dataset]]:
    unpaired = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in _standard()]
    rows = {
        "zen": {
            "standard_preference": _standard(),
            "conversational_preference": _conversational(),
            "standard_implicit_prompt_preference": _implicit(_standard()),
            "conversational_implicit_prompt_preference": _implicit(_conversational()),
            "standard_unpaired_preference": unpaired,
        },
        "harmony": {"preference": _harmony()},
        "toolcall": {"preference": _toolcall()},
    }
    made = {name: {config: Dataset.from_list(x) for config, x in configs.items()} for name, configs in rows.items()}
    made["zen-image"] = {"conversational_preference": _with_images([1])}
    made["zen-multi-image"] = {"conversational_preference": _with_images([2, 0, 1])}
    return made


def _sizes(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save_vision_model(folder: Path) -> None:
    from transformers import Qwen2VLVideoProcessor  # needs torchvision

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], special_tokens=True)
    names = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    tokens = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={**_sizes(tokenizer), "rope_parameters": rope},
        vision_config={**vision, "fullatt_block_indexes": [1]},
        **tokens,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    images, videos = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
    Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=_VISION_TEMPLATE).save_pretrained(folder)


def _files(folder: Path) -> dict[str, Blob]:
    return {
        str(file.relative_to(folder)): Blob(file.read_bytes(), lfs=file.name.endswith(LFS_SUFFIXES))
        for file in folder.rglob("*")
        if file.is_file()
    }


def _publish(hub: MiniHub, kind: str, name: str, files: dict[str, Blob]) -> None:
    repo = hub.repos[kind, f"{NAMESPACE}/{name}"] = Repo(kind, f"{NAMESPACE}/{name}")
    repo.commit("main", files, "Stand-in")


def publish_standins(hub: MiniHub, folder: Path) -> None:
    """Publish all stand-ins on `hub`, by way of files in `folder`."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, (model_type, more) in TEXT_MODELS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **{**_sizes(tokenizer), **more})
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        _publish(hub, "model", name, _files(folder / "tokenizer") | _files(folder / name))

    if is_torchvision_available():
        name = "tiny-Qwen2_5_VLForConditionalGeneration"
        _save_vision_model(folder / name)
        _publish(hub, "model", name, _files(folder / name))

    # The custom code is loaded by the one test that is about loading it.
    files = _files(folder / "tokenizer") | _files(folder / "tiny-Qwen2ForCausalLM-2.5")
    architecture = {"model_type": "remote", "architectures": ["RemoteForCausalLM"]}
    auto_map = {
        "AutoConfig": "modeling_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    config = json.loads(files["config.json"].data) | architecture | {"auto_map": auto_map}
    files["config.json"] = Blob(json.dumps(config).encode())
    files["modeling_remote.py"] = Blob(_REMOTE_CODE.encode())
    _publish(hub, "model", "tiny-RemoteForCausalLM", files)

    for name, configs in _datasets().items():
        files, card = {}, []
        for config, dataset in configs.items():
            # The real ones have 17 rows for training and 2 for tests.
            splits = {"train": dataset, "test": dataset.select(range(2))}
            for split, rows in splits.items():
                path = folder / f"{name}-{config}-{split}.parquet"
                rows.to_parquet(path)
                files[f"{config}/{split}.parquet"] = Blob(path.read_bytes(), lfs=True)
            data_files = [{"split": split, "path": f"{config}/{split}.parquet"} for split in splits]
            card.append({"config_name": config, "data_files": data_files})
        files["README.md"] = Blob(f"---\nconfigs: {json.dumps(card)}\n---\n".encode())
        _publish(hub, "dataset", name, files)
