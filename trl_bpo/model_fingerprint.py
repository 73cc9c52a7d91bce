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


"""Which model it is, by its content: a name or a folder stays the same when the weights behind it change."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel


_SAMPLES = 1024
# What the output does not depend on: where the model came from, and what training switches on and off.
_NOT_CONTENT = {"_name_or_path", "transformers_version", "use_cache", "base_model_name_or_path", "inference_mode"}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CONFIGS = {"config.json", "generation_config.json"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".gguf"}
_SETTINGS = {".json", ".txt", ".model"}
_BLOCK = 1 << 16


def model_fingerprint(model: PreTrainedModel | PeftModel) -> str:
    """
    Identify a loaded model by its content.

    It is made from the config, the adapters with whether they are active, and every weight that the model would save:
    its name, shape, dtype, a sum over the bits of all its values and a sample of at most 1,024 of the values. Training,
    merging or exchanging weights changes it; a change that keeps the sum and misses the sample, such as swapping a few
    values, does not. Quantized weights count as the bytes that they are stored in.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.

    Returns:
        `str`: SHA-256 hex digest.

    Raises:
        `ValueError`: If weights are offloaded to where they cannot be read.
    """
    digest = hashlib.sha256()
    settings: list[Any] = [_content(model.config.to_dict())]
    if isinstance(model, PeftModel):
        settings.append([model.active_adapters, model.has_active_enabled_adapter])
        settings.append({name: _content(config.to_dict()) for name, config in model.peft_config.items()})
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            settings.append([name, module.active_adapters, module.disable_adapters, module.merged_adapters])
    digest.update(_json(settings))
    for name, value in model.state_dict().items():
        for tensor in _plain_tensors(value) if isinstance(value, torch.Tensor) else ():
            if tensor.is_meta:
                raise ValueError(
                    f"The weight `{name}` is offloaded, so the model cannot be identified by its content. Load the "
                    "model without offloading, or leave `cache_dir` at `None`."
                )
            digest.update(_json([name, list(tensor.shape), str(tensor.dtype)]))
            digest.update(_summary(tensor))
    return digest.hexdigest()


def folder_fingerprint(folder: str | Path, whole: bool = False) -> str:
    """
    Identify a saved model by its content, without loading it.

    It is made from `config.json`, `generation_config.json` and every weight file: its name, its size and a sample of 64
    blocks of 64 KiB that are spread over the file, its beginning and its end among them.

    Args:
        folder (`str` or `Path`):
            Folder of the model.
        whole (`bool`, *optional*, defaults to `False`):
            Whether subfolders, settings (`.json`) and vocabularies (`.txt`, `.model`) count as well, as for a model that is
            given texts and not token ids.

    Returns:
        `str`: SHA-256 hex digest.
    """
    digest = hashlib.sha256()
    suffixes = _WEIGHTS | _SETTINGS if whole else _WEIGHTS
    for path in sorted(Path(folder).rglob("*") if whole else Path(folder).iterdir()):
        if (path.name not in _CONFIGS and path.suffix not in suffixes) or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(_json([path.relative_to(folder).as_posix(), size]))
        with open(path, "rb") as file:
            for number in range(64):
                file.seek(max(0, size - _BLOCK) * number // 63)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _content(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _NOT_CONTENT}


def _json(value: Any) -> bytes:
    # The order of a set differs from process to process.
    return json.dumps(value, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v)).encode()


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    # A sharded or quantized weight can be a tensor that is made of others.
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def _summary(tensor: torch.Tensor) -> bytes:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    values = tensor.detach().reshape(-1)
    # As integers, their sum is exact and the same in any order. In pieces, as the sum widens them to 64 bits first.
    bits = values.view(_INTEGERS[values.element_size()])
    total = sum(int(piece.sum()) for piece in bits.split(1 << 24))
    # An odd step does not stay in one column of the matrix.
    step = -(-len(bits) // _SAMPLES) | 1
    return _json([total, bits[::step].cpu().tolist()])
