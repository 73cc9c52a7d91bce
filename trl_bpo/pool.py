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

"""The pool of pairs that a trainer selects from: what is refused, how pairs are identified, and what TRL leaves of them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from trl.data_utils import maybe_extract_prompt

from .bpo_config import BPOConfig
from .ids import id_column, read_column
from .manifest import sha256_of_ids
from .prompts import pair_id, prompt_id


logger = get_logger(__name__)

_TRUNCATED_COLUMNS = {"chosen_truncated": "chosen_ids", "rejected_truncated": "rejected_ids"}
_ROW = "_pool_row"


def _identify(row: dict) -> dict[str, str]:
    tools = row.get("tools")
    ids = {
        "prompt_id": prompt_id(row["prompt"], tools),
        "pair_id": pair_id(row["prompt"], row["chosen"], row["rejected"], tools),
    }
    return {name: value if row.get(name) is None else row[name] for name, value in ids.items()}


def _count_empty(prompts: pa.Array) -> int:
    lengths = pc.list_value_length(prompts) if pa.types.is_list(prompts.type) else pc.binary_length(prompts)
    return pc.sum(pc.equal(lengths, 0).fill_null(True)).as_py() or 0


def identify_pairs(dataset: Dataset | IterableDataset, args: BPOConfig) -> Dataset:
    """
    Refuse, before a model is loaded, what cannot be selected from, and give every pair its ids.

    Args:
        dataset ([`~datasets.Dataset`]):
            Preference pairs in one of TRL's formats.
        args ([`BPOConfig`]):
            Arguments of the run.

    Returns:
        [`~datasets.Dataset`]: The pairs with an explicit `prompt`, and with `prompt_id` and `pair_id` where they lacked
        them. All other columns stay.

    Raises:
        `ValueError`: If the dataset is streaming, empty, lacks a column, or holds images.
    """
    off = "or set `depth_fraction=1.0` to train without selection."
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"A streaming dataset cannot be selected from: load it without `streaming=True`, {off}")
    if len(dataset) == 0:
        raise ValueError("`train_dataset` is empty: there is no pair to select from.")
    if missing := {"chosen", "rejected"} - set(dataset.column_names):
        raise ValueError(
            f"`train_dataset` has no {sorted(missing)} column, only {dataset.column_names}. A preference dataset in one "
            "of TRL's formats is needed."
        )
    if {"image", "images"} & set(dataset.column_names):
        raise ValueError(
            "Vision-language pairs cannot be selected: TRL tokenises them batch by batch, so that there is no pool of "
            f"tokenised responses to take gradients of. Use text-only pairs, {off}"
        )
    # The curated dataset has the texts as they came in: TRL appends the EOS token to those of the pool.
    with args.main_process_first(desc="identifying pairs"):
        dataset = dataset.map(maybe_extract_prompt, num_proc=args.dataset_num_proc, desc="Extracting prompts")
        dataset = dataset.map(_identify, num_proc=args.dataset_num_proc, desc="Hashing pairs")
    if without_prompt := sum(map(_count_empty, read_column(dataset, "prompt").chunks)):
        logger.warning(
            f"{without_prompt} of {len(dataset)} pairs have an empty prompt: their answers have no common beginning. If "
            "another column holds the prompt, rename it to `prompt`."
        )
    if copies := len(dataset) - pc.count_distinct(read_column(dataset, "pair_id")).as_py():
        logger.warning(
            f"{copies} of {len(dataset)} pairs repeat an earlier one. They count as often as they occur, in the budget "
            "and in the clusters; drop them first if that is not meant."
        )
    return dataset


class PairPool:
    """
    The pairs of a run, as they came in, and how they were tokenised. Both have the same rows.

    Args:
        pairs ([`~datasets.Dataset`]):
            The pairs, as of [`identify_pairs`].

    Attributes:
        pairs ([`~datasets.Dataset`]):
            The pairs as they came in. After [`~PairPool.keep_rows_of`] those that TRL's length filter left.
        num_given (`int`):
            Number of pairs before that filter.
        pair_ids, prompt_ids (`pyarrow.ChunkedArray`):
            Ids of each pair and of its prompt.
    """

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs
        self.num_given = len(pairs)
        self._read_ids()

    def _read_ids(self) -> None:
        self.pair_ids, self.prompt_ids = id_column(self.pairs, "pair_id"), id_column(self.pairs, "prompt_id")

    @property
    def numbered_pairs(self) -> Dataset:
        """The pairs with a column that tells [`~PairPool.keep_rows_of`] which row is which."""
        return self.pairs.add_column(_ROW, np.arange(len(self.pairs)))

    def keep_rows_of(self, dataset: Dataset) -> None:
        """
        Take over which rows are left of [`~PairPool.numbered_pairs`].

        Args:
            dataset ([`~datasets.Dataset`]):
                What TRL made of them: it drops pairs whose prompt fills `max_length`.
        """
        if dropped := self.num_given - len(dataset):
            # Written out once. Each column that is added to a selection of rows would do it again.
            self.pairs = self.pairs.select(read_column(dataset, _ROW).to_numpy()).flatten_indices()
            self._read_ids()
            logger.warning(
                f"{dropped} of {self.num_given} pairs were dropped by TRL: their prompt alone fills `max_length`. The "
                f"selection is made from the other {len(self.pairs)}."
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the ids of the pairs, in their order."""
        return sha256_of_ids(self.pair_ids)


def _cut_closing(row: dict, closing_ids: list[int], flags: dict[str, str]) -> dict[str, list[int]]:
    cut = {}
    for flag, column in flags.items():
        if row[flag] and row[column][-len(closing_ids) :] == closing_ids:
            cut[column] = row[column][: -len(closing_ids)]
    return {column: cut.get(column, row[column]) for column in flags.values()}


def open_truncated_responses(dataset: Any, processing_class: Any, tokenizer: Any) -> Any:
    """
    Take the end of turn away from responses that were cut at the token limit: the policy never wrote one.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs as [`~trl.DPOTrainer`] tokenised them, which closes every response. The columns `chosen_truncated` and
            `rejected_truncated` (bool) tell which were cut; without them nothing is changed.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            What applies the chat template.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The pairs.
    """
    example: dict = next(iter(dataset), {})
    flags = {flag: column for flag, column in _TRUNCATED_COLUMNS.items() if flag in example}
    if not flags:
        return dataset
    if isinstance(example["prompt"], str):
        closing = tokenizer.eos_token
    else:
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "MARK"}]
        closing = processing_class.apply_chat_template(turns, tokenize=False).rpartition("MARK")[2]
    closing_ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    return dataset.map(_cut_closing, fn_kwargs={"closing_ids": closing_ids, "flags": flags})
