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
from typing import TYPE_CHECKING

import numpy as np


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


@functools.lru_cache(maxsize=1)
def _load_encoder(encoder: str) -> "SentenceTransformer":
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(encoder)
    # The last turn of a conversation says what is asked for, so it is the beginning that is cut.
    model.tokenizer.truncation_side = "left"
    return model


def embed_texts(texts: list[str], encoder: str, batch_size: int = 64) -> tuple[np.ndarray, list[bool]]:
    """
    Embed texts. The encoder is loaded once and stays in memory.

    Args:
        texts (`list[str]`):
            The texts.
        encoder (`str`):
            Sentence-transformers model id or path.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts that are embedded at once.

    Returns:
        `tuple[np.ndarray, list[bool]]`: The embeddings, float32 of shape `(n, d)` and of unit length, and which texts
        exceed the maximum length of the encoder and were embedded by their last tokens.
    """
    model = _load_encoder(encoder)
    lengths = [len(ids) for ids in model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    embeddings = model.encode(texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
    return embeddings, [model.max_seq_length is not None and length > model.max_seq_length for length in lengths]
