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

"""Sentence embeddings of texts."""

import functools
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from .model_fingerprint import folder_fingerprint


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def require_sentence_transformers(what: str) -> None:
    """
    Refuse early what cannot work without sentence-transformers.

    Args:
        what (`str`):
            What needs it, for the message.

    Raises:
        `ImportError`: If it is not installed.
    """
    try:
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{what} requires the `sentence-transformers` package. Install it with `pip install 'trl_bpo[embeddings]'`."
        ) from error


def encoder_fingerprint(encoder: str) -> str | None:
    """
    Identify an encoder by its content, without loading it.

    Args:
        encoder (`str`):
            Sentence-transformers model id or path.

    Returns:
        `str` or `None`: [`~model_fingerprint.folder_fingerprint`] of a folder, with all its modules, settings and the
        tokenizer; the commit of a model of the Hub. `None` for the name of a model that is not under
        `sentence-transformers/` and has no other namespace.
    """
    if os.path.isdir(encoder):
        return folder_fingerprint(encoder, whole=True)
    # As sentence-transformers completes it.
    name = encoder if "/" in encoder else f"sentence-transformers/{encoder}"
    with suppress(RepositoryNotFoundError):
        # The folder of a snapshot is named after its commit.
        return Path(snapshot_download(name, allow_patterns=["config.json"])).name
    return None


@functools.lru_cache(maxsize=1)
def _load_encoder(encoder: str, content: str | None) -> "SentenceTransformer":
    # By the content as well: what is in a folder can be exchanged while a process lives.
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(encoder)
    # The last turn of a conversation says what is asked for, so it is the beginning that is cut.
    model.tokenizer.truncation_side = "left"
    return model


def embed_texts(
    texts: list[str], encoder: str, batch_size: int = 64, content: str | None = None
) -> tuple[np.ndarray, list[bool]]:
    """
    Embed texts. The encoder is loaded once and stays in memory.

    Args:
        texts (`list[str]`):
            The texts.
        encoder (`str`):
            Sentence-transformers model id or path.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts that are embedded at once.
        content (`str`, *optional*):
            Its [`encoder_fingerprint`]: the encoder is loaded again when that has changed.

    Returns:
        `tuple[np.ndarray, list[bool]]`: The embeddings, float32 of shape `(n, d)` and of unit length, and which texts
        exceed the maximum length of the encoder and were embedded by their last tokens.
    """
    model = _load_encoder(encoder, content)
    # Half precision where it is fast. The embeddings move by about a thousandth of their length.
    with torch.autocast(model.device.type, torch.float16, enabled=model.device.type == "cuda"):
        embeddings = model.encode(texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
    if embeddings.dtype != np.float32:
        embeddings = embeddings.astype(np.float32)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, _over_long(model, texts)


def _over_long(model: "SentenceTransformer", texts: list[str]) -> list[bool]:
    # `encode` does not tell, and to tokenise all texts again would take a tenth of its time. A token of ASCII text has a
    # character at least, and tokenizers add no more than a few of their own.
    limit = model.max_seq_length
    if limit is None:
        return [False] * len(texts)
    over_long = [len(text) + 8 > limit or not text.isascii() for text in texts]
    if unsure := [text for text, unclear in zip(texts, over_long, strict=True) if unclear]:
        lengths = map(len, model.tokenizer(unsure, truncation=False, verbose=False)["input_ids"])
        over_long = [unclear and next(lengths) > limit for unclear in over_long]
    return over_long


class EmbeddingRows:
    """
    Embeddings as `datasets` keeps them, read as they are needed: those of a dataset on the disk stay there.

    Args:
        columns (`Sequence[pyarrow.ChunkedArray]`):
            Columns of embeddings, as lists of `d` numbers, one after the other.

    Attributes:
        shape (`tuple[int, int]`):
            Number of embeddings and of dimensions.
    """

    def __init__(self, columns: Sequence[pa.ChunkedArray]) -> None:
        chunks = [chunk for column in columns for chunk in column.chunks if len(chunk)]
        self._parts = [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in chunks]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.shape = (int(self._starts[-1]), self._parts[0].shape[1])

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        rows = np.arange(*rows.indices(self.shape[0])) if isinstance(rows, slice) else rows
        embeddings = np.empty((len(rows), self.shape[1]), dtype=np.float32)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(parts):
            own = parts == part
            embeddings[own] = self._parts[part][rows[own] - self._starts[part]]
        return embeddings
