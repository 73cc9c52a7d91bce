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


"""What requests to a paid API take: tokens, and money from a price table."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any


# A rough figure for English text under the tokenizers of current models. It is for the estimate alone; what is reported
# as used is what the server says.
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Price:
    """
    Price of a model.

    Args:
        input (`float`):
            US dollars a token that is sent.
        output (`float`):
            US dollars a token that is answered.
        batch_input (`float`):
            US dollars a token that is sent through the Batch API.
        batch_output (`float`):
            US dollars a token that is answered through the Batch API.
    """

    input: float
    output: float
    batch_input: float
    batch_output: float

    def of(self, prompt_tokens: float, completion_tokens: float, batch: bool = False) -> float:
        """
        What a request costs.

        Args:
            prompt_tokens (`float`):
                Number of tokens that are sent.
            completion_tokens (`float`):
                Number of tokens that are answered.
            batch (`bool`, *optional*, defaults to `False`):
                Whether the request goes through the Batch API.

        Returns:
            `float`: US dollars.
        """
        if batch:
            return prompt_tokens * self.batch_input + completion_tokens * self.batch_output
        return prompt_tokens * self.input + completion_tokens * self.output


def model_price(model: str, prices: str | os.PathLike | Mapping[str, Any] | None = None) -> Price | None:
    """
    Look up what a model costs.

    Args:
        model (`str`):
            Name of the model, as the server knows it.
        prices (`str`, `os.PathLike` or `dict`, *optional*):
            Price table that goes before the one of this package (`api/prices.json`, which names its source and
            date): a dictionary or a JSON file that gives for each model `input_cost_per_token` and
            `output_cost_per_token` in US dollars and optionally `input_cost_per_token_batches` and
            `output_cost_per_token_batches`. That is the format of LiteLLM's `model_prices_and_context_window.json`,
            whose other fields are ignored. Without the last two, the Batch API costs half.

    Returns:
        [`Price`] or `None`: The price, or `None` if no table has the model.

    Raises:
        `ValueError`: If the table cannot be read, or the model's entry has no usable prices.
    """
    table = json.loads(files("trl_bpo.api").joinpath("prices.json").read_text(encoding="utf-8"))["models"]
    if isinstance(prices, Mapping):
        table = {**table, **prices}
    elif prices is not None:
        try:
            table = {**table, **json.loads(Path(prices).read_text(encoding="utf-8"))}
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"`prices` must be a dictionary or a JSON file of one, but `{prices}` cannot be read as that: {error}."
            ) from error
    if model not in table:
        return None
    entry = table[model]
    values: dict[str, float] = {}
    for side in ("input", "output"):
        single = _dollars(model, entry, f"{side}_cost_per_token")
        batch = _dollars(model, entry, f"{side}_cost_per_token_batches", default=single / 2)
        values |= {side: single, f"batch_{side}": batch}
    return Price(**values)


def _dollars(model: str, entry: Any, name: str, default: float | None = None) -> float:
    value = entry.get(name, default) if isinstance(entry, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(
            f"The entry of `{model}` in `prices` must give `{name}` in US dollars a token, got {entry!r}."
        )
    return float(value)


def dollars(amount: float) -> str:
    """
    Write an amount of money down, small ones to the hundredth of a cent.

    Args:
        amount (`float`):
            US dollars.

    Returns:
        `str`: For example `"$1,234.50"` or `"$0.0312"`.
    """
    return f"${amount:,.2f}" if amount == 0 or amount >= 1 else f"${amount:.4f}"


def estimate_tokens(text: str) -> int:
    """
    Estimate the number of tokens of a text, without a tokenizer: one for every four bytes of UTF-8.

    Args:
        text (`str`):
            The text.

    Returns:
        `int`: About the number of tokens.
    """
    return len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN + 1
