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

import json
import logging
from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from .answer_store import AnswerStore, content_key
from .prompts import parse_tools, without_none


logger = logging.getLogger(__name__)


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
    prompts: list[str | list[dict]],
    input_ids: list[list[int]],
    num_responses: int,
    *,
    temperature: float,
    max_new_tokens: int,
    context: int | None,
) -> None:
    """
    Check what a generator is asked for, before anything is generated.

    Args:
        prompts (`list[str | list[dict]]`):
            The prompts, for the messages.
        input_ids (`list[list[int]]`):
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
    for row, ids in enumerate(input_ids):
        if not ids:
            raise ValueError(f"The prompt in row {row} is empty. Remove it from the dataset.")
        if context is not None and len(ids) + max_new_tokens > context:
            start = json.dumps(prompts[row], ensure_ascii=False)[:80]
            raise ValueError(
                f"The prompt in row {row} ({start}...) has {len(ids)} tokens, which leaves no room for "
                f"`max_new_tokens={max_new_tokens}` in the model's context of {context} tokens. Lower "
                "`max_new_tokens`, or shorten or remove the prompt."
            )


def request_keys(
    settings: dict[str, Any], input_ids: list[list[int]], parts: list[tuple[int, int]]
) -> list[list[tuple[str, int]]]:
    """
    What each part of each prompt's responses is stored under.

    Args:
        settings (`dict[str, Any]`):
            What the responses depend on beside the prompt: model and sampling options.
        input_ids (`list[list[int]]`):
            Token ids of the prompts.
        parts (`list[tuple[int, int]]`):
            Index of the first response of each part and number of responses in it.

    Returns:
        `list[list[tuple[str, int]]]`: For each prompt, the key and the number of responses of each part. A prompt that
        is there twice has its own keys, and so its own responses, each time.
    """
    times: Counter[tuple[int, ...]] = Counter()
    keys = []
    for ids in input_ids:
        prompt = {**settings, "prompt": ids, "occurrence": times[tuple(ids)]}
        times[tuple(ids)] += 1
        keys.append([(content_key({**prompt, "start": start, "count": count}), count) for start, count in parts])
    return keys


def count_stored(store: AnswerStore, keys: list[list[tuple[str, int]]]) -> int:
    """
    How many responses need not be generated. The number is logged.

    Args:
        store ([`AnswerStore`]):
            The store.
        keys (`list[list[tuple[str, int]]]`):
            Result of [`request_keys`].

    Returns:
        `int`: Number of responses that are in the store.
    """
    stored = sum(count for row in keys for key, count in row if key in store)
    if stored:
        total = sum(count for row in keys for _, count in row)
        logger.info(f"{stored} of {total} responses are in `{store.cache_dir}` and are not generated again.")
    return stored
