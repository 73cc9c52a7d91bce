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


"""Manifests: what a selection was made from, by which parameters, and what came out."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig


_PACKAGES = (
    *("trl_bpo", "trl", "transformers", "datasets", "accelerate", "peft", "torch", "numpy", "scikit-learn"),
    "sentence-transformers",
)
# What says where a run writes and whom it tells, and so changes nothing that it computes. Secrets are among them.
_NOT_PARAMETERS = {
    *("output_dir", "logging_dir", "run_name", "report_to", "project", "disable_tqdm", "resume_from_checkpoint"),
    *("local_rank", "ddp_backend", "ddp_timeout"),
}
_NOT_PARAMETERS_PREFIXES = ("hub_", "push_to_hub", "curated_dataset_", "trackio_", "log", "save_")


def public_name(name: str) -> str:
    """
    A name that may be shown: a Hub id as it is, of a local path the last part. Where files lie is nobody else's business.

    Args:
        name (`str`):
            Hub id or path of a model or dataset.

    Returns:
        `str`: The name.
    """
    return os.path.basename(name.rstrip("/")) if os.path.isabs(name) or os.path.exists(name) else name


def public_value(value: Any) -> Any:
    """
    A value as JSON has it, without the paths of this machine.

    Args:
        value:
            Any value.

    Returns:
        Numbers and texts, lists and dictionaries of them; anything else as text.
    """
    if isinstance(value, str):
        return public_name(value) if os.path.isabs(value) else value
    if isinstance(value, dict):
        return {str(key): public_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [public_value(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value).removeprefix("torch.")


def sha256_of_ids(ids: Iterable[str] | pa.ChunkedArray) -> str:
    """
    SHA-256 over ids, in their order.

    Args:
        ids (`Iterable[str]` or `pyarrow.ChunkedArray`):
            The ids.

    Returns:
        `str`: Hex digest.
    """
    digest = hashlib.sha256()
    if isinstance(ids, pa.ChunkedArray):
        for chunk in ids.cast(pa.large_string()).chunks:
            # One after the other, as Arrow has them.
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int64)
            digest.update(memoryview(data or b"")[ends[chunk.offset] : ends[chunk.offset + len(chunk)]])
        return digest.hexdigest()
    for one in ids:
        digest.update(one.encode())
    return digest.hexdigest()


def sha256_of_text(text: str | None) -> str | None:
    """
    SHA-256 of a text in UTF-8.

    Args:
        text (`str`, *optional*):
            The text.

    Returns:
        `str`, *optional*: Hex digest, `None` without a text.
    """
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """
    SHA-256 of the bytes of a file.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `str`: Hex digest.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def installed_versions() -> dict[str, str]:
    """
    Versions of the packages that a selection depends on. Those that are not installed are left out.

    Returns:
        `dict[str, str]`: Name -> version.
    """
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def training_parameters(args: TrainingArguments) -> dict[str, Any]:
    """
    The training arguments that differ from their defaults, as keyword arguments that make them again.

    Left out is what changes nothing about the computation: where outputs go, logging, saving, the Hub, and with it every
    token. Of absolute paths only the last part is there.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The arguments.

    Returns:
        `dict[str, Any]`: Name -> value, as JSON has it.
    """
    values = args.to_dict()
    parameters = {}
    for field in dataclasses.fields(args):
        name = field.name
        if not field.init or name in _NOT_PARAMETERS or name.startswith(_NOT_PARAMETERS_PREFIXES):
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        value = values[name]
        # The arguments take a key out of theirs.
        if name == "accelerator_config" and value.items() <= AcceleratorConfig().to_dict().items():
            continue
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if item is not None}
        # What the arguments make of an unset field is unset, too.
        if getattr(args, name) != default and not (not default and value in (None, "", [], {})):
            parameters[name] = public_value(value)
    return parameters


def write_json(path: Path, content: Any) -> None:
    """
    Write JSON in one go: who reads the file meanwhile sees the old or the new content.

    Args:
        path (`Path`):
            The file.
        content:
            What to write.
    """
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
    os.replace(part, path)


def write_manifest(
    path: Path, stage: str, inputs: dict[str, Any], parameters: dict[str, Any], outputs: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """
    Write a manifest.

    Args:
        path (`Path`):
            The file.
        stage (`str`):
            `"breadth"` or `"depth"`.
        inputs (`dict[str, Any]`):
            What the selection was made from: names, numbers and SHA-256 digests.
        parameters (`dict[str, Any]`):
            The keyword arguments that make it again.
        outputs (`dict[str, Any]`):
            What came out. Values that are a `Path` stand for the SHA-256 of the file.
        **more:
            Further entries.

    Returns:
        `dict[str, Any]`: The manifest.
    """
    manifest = {
        "format": 1,
        "stage": stage,
        **more,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        "parameters": parameters,
        "outputs": {
            name: sha256_of_file(value) if isinstance(value, Path) else value for name, value in outputs.items()
        },
        "versions": installed_versions(),
    }
    write_json(path, manifest)
    return manifest
