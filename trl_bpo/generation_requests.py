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


"""What a generator that keeps its responses is asked for: token ids, their checks, and the keys of the responses."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from .answer_store import AnswerStore, content_key
from .prompts import parse_tools, without_none
from .responses import TokenLists


logger = logging.getLogger(__name__)

_KEY_BYTES = 16


def encode_prompt(
    processing_class: PreTrainedTokenizerBase, prompt: str | list[dict], tools: str | list | None = None
) -> list[int]:
    """
    Token ids of a prompt, as the model continues it. Conversational prompts go through the chat template.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str` or `list[dict]`):
            Prompt in TRL's standard or conversational format.
        tools (`str` or `list`, *optional*):
            Tool schemas of the prompt, as a list or as its JSON string.

    Returns:
        `list[int]`: The token ids.
    """
    if isinstance(prompt, str):
        return processing_class(prompt)["input_ids"]
    text = processing_class.apply_chat_template(
        without_none(prompt),
        tools=without_none(parse_tools(tools)),
        add_generation_prompt=True,
        tokenize=False,
    )
    # The template writes the special tokens itself.
    return processing_class(text, add_special_tokens=False)["input_ids"]


def encode_prompts(
    processing_class: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict]], tools: Sequence | None = None
) -> TokenLists:
    """
    Token ids of prompts. Memory: four bytes a token.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompts (`Sequence[str | list[dict]]`):
            Prompts in TRL's standard or conversational format.
        tools (`Sequence`, *optional*):
            Tool schemas of each prompt.

    Returns:
        [`TokenLists`]: The token ids of each, see [`encode_prompt`].
    """
    pairs = zip(prompts, repeat(None, len(prompts)) if tools is None else tools, strict=True)
    return TokenLists.of(encode_prompt(processing_class, prompt, prompt_tools) for prompt, prompt_tools in pairs)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """
    Check the options of the sampling.

    Args:
        max_new_tokens (`int`):
            Token limit of a response.
        temperature (`float`):
            Sampling temperature.
        top_p (`float`):
            Probability of the set of tokens to sample from.

    Raises:
        `ValueError`: If one of them is out of its range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"`temperature` must be >= 0 and `top_p` in (0, 1], got {temperature} and {top_p}.")


def check_num_responses(num_responses: int, temperature: float) -> None:
    """
    Check that responses to a prompt can differ.

    Args:
        num_responses (`int`):
            Number of responses for each prompt.
        temperature (`float`):
            Sampling temperature.

    Raises:
        `ValueError`: If several responses are asked for with `temperature=0`.
    """
    if temperature == 0 and num_responses > 1:
        raise ValueError(
            f"`temperature=0` gives the same response {num_responses} times. Set a positive `temperature` or "
            "`num_responses=1`."
        )


def check_request(
    prompts: Sequence[str | list[dict]],
    input_ids: TokenLists,
    num_responses: int,
    *,
    temperature: float,
    max_new_tokens: int,
    context: int | None,
) -> None:
    """
    Check what a generator is asked for, before anything is generated.

    Args:
        prompts (`Sequence[str | list[dict]]`):
            The prompts, for the messages.
        input_ids ([`TokenLists`]):
            Their token ids.
        num_responses (`int`):
            Number of responses for each prompt.
        temperature (`float`):
            Sampling temperature.
        max_new_tokens (`int`):
            Token limit of a response.
        context (`int`, *optional*):
            Number of tokens that the model has room for; `None` for no limit.

    Raises:
        `ValueError`: If a prompt is empty or leaves no room for `max_new_tokens`, or if several responses are asked for
            with `temperature=0`.
    """
    check_num_responses(num_responses, temperature)
    share = " of this process's share" if PartialState().num_processes > 1 else ""
    for row, length in enumerate(input_ids.lengths.tolist()):
        if not length:
            raise ValueError(f"The prompt in row {row}{share} is empty. Remove it from the dataset.")
        if context is not None and length + max_new_tokens > context:
            start = json.dumps(prompts[row], ensure_ascii=False)[:80]
            raise ValueError(
                f"The prompt in row {row}{share} ({start}...) has {length} tokens, which leaves no room for "
                f"`max_new_tokens={max_new_tokens}` in the model's context of {context} tokens. Lower "
                "`max_new_tokens`, or shorten or remove the prompt."
            )


class RequestKeys(Sequence[list[tuple[str, int]]]):
    """
    What each part of each prompt's responses is stored under: for each prompt, the key and the number of responses of each
    part. A prompt that is there twice has its own keys, and so its own responses, each time.

    Memory: 16 bytes a part and 8 a prompt.

    Args:
        settings (`dict[str, Any]`):
            What the responses depend on beside the prompt: model and sampling options.
        input_ids ([`TokenLists`]):
            Token ids of the prompts.
        parts (`list[tuple[int, int]]`):
            Index of the first response of each part and number of responses in it.
    """

    def __init__(self, settings: dict[str, Any], input_ids: TokenLists, parts: list[tuple[int, int]]) -> None:
        self._counts = [count for _, count in parts]
        keys = bytearray()
        for ids, occurrence in zip(input_ids, _occurrences(input_ids).tolist(), strict=True):
            prompt = {**settings, "prompt": ids, "occurrence": occurrence}
            for start, count in parts:
                keys += bytes.fromhex(content_key({**prompt, "start": start, "count": count}))
        self._keys = np.frombuffer(keys, np.uint8).reshape(len(input_ids), len(parts), _KEY_BYTES)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, row: Any) -> Any:
        return [(key.tobytes().hex(), count) for key, count in zip(self._keys[row], self._counts, strict=True)]


def _occurrences(input_ids: TokenLists) -> np.ndarray:
    """How often each prompt was there before."""
    digests = bytearray()
    for ids in input_ids:
        digests += hashlib.blake2b(np.array(ids, np.int32).tobytes(), digest_size=16).digest()
    _, groups = np.unique(np.frombuffer(digests, np.uint64).reshape(-1, 2), axis=0, return_inverse=True)
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    occurrences = np.empty(len(groups), np.int64)
    occurrences[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return occurrences


def count_stored(store: AnswerStore, keys: Iterable[list[tuple[str, int]]]) -> int:
    """
    How many responses need not be generated. The number is logged.

    Args:
        store ([`AnswerStore`]):
            The store.
        keys ([`RequestKeys`]):
            Keys of the responses.

    Returns:
        `int`: Number of responses that are in the store.
    """
    stored = total = 0
    for key, count in chain.from_iterable(keys):
        total += count
        stored += count if key in store else 0
    if stored:
        logger.info(f"{stored} of {total} responses are in `{store.cache_dir}` and are not generated again.")
    return stored
