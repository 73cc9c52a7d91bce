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
The responses of a pool of pairs, and how they are batched for a forward pass: one a row, or both of a pair behind one
copy of what they share.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset


_ROWS_AT_A_TIME = 1000


class TokenLists(Sequence[list[int]]):
    """
    Lists of token ids, side by side in one array.

    Memory: four bytes a token and eight a list.

    Args:
        tokens (`np.ndarray` of shape `(num_tokens,)`, int32):
            The ids of all lists.
        ends (`np.ndarray` of shape `(n,)`, int64):
            Where each list ends in them.

    Attributes:
        lengths (`np.ndarray` of shape `(n,)`, int64):
            Length of each list.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        self._tokens = tokens
        self._ends = ends
        self.lengths = np.diff(ends, prepend=0)

    @classmethod
    def of(cls, lists: Iterable[list[int]]) -> "TokenLists":
        """
        Put lists side by side.

        Args:
            lists (`Iterable[list[int]]`):
                The lists, which are gone through once.

        Returns:
            [`TokenLists`]: The same.
        """
        tokens, ends = array("i"), array("q")
        for one in lists:
            tokens.extend(one)
            ends.append(len(tokens))
        return cls(np.array(tokens, np.int32), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        end = self._ends[index]
        return self._tokens[end - self.lengths[index] : end].tolist()


@dataclass(frozen=True)
class PairResponses:
    """
    The distinct responses of a pool of pairs, and which pair uses which.

    A response is identified by its truncated token ids and by where the completion starts in them: TRL cuts the prompt
    where the two tokenised answers of a pair diverge from it, so that one text can be two responses.

    Attributes:
        input_ids (`Sequence[list[int]]`):
            Truncated token ids of prompt and completion, one list a response. They are kept as [`TokenLists`].
        starts (`np.ndarray` of shape `(n_responses,)`, int64):
            Index of the first completion token, one a response.
        chosen (`np.ndarray` of shape `(n_pairs,)`, int64):
            Index of each pair's chosen response.
        rejected (`np.ndarray` of shape `(n_pairs,)`, int64):
            Index of each pair's rejected response.
    """

    input_ids: Sequence[list[int]]
    starts: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def __post_init__(self) -> None:
        if not isinstance(self.input_ids, TokenLists):
            object.__setattr__(self, "input_ids", TokenLists.of(self.input_ids))
        object.__setattr__(self, "starts", np.asarray(self.starts, dtype=np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, int64 of shape `(n_responses,)`."""
        return self.input_ids.lengths  # type: ignore[attr-defined]


def unique_responses(
    dataset: Dataset, max_length: int | None = None, truncation_mode: str = "keep_start"
) -> PairResponses:
    """
    Collect the distinct responses of a dataset that [`~trl.DPOTrainer`] has tokenised, in the order in which they come.

    Memory: four bytes a token and about 200 a response; the dataset is read in parts.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs with the columns `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length (`int`, *optional*):
            Tokens to which prompt and completion are cut, as the collator of DPO does.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Which end is kept, `"keep_start"` or `"keep_end"`.

    Returns:
        [`PairResponses`]: The distinct responses.
    """
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    # A digest stands for a response: two of 2 ** 64 would have to meet by chance.
    index: dict[bytes, int] = {}
    tokens, ends, starts = array("i"), array("q"), array("q")
    indices = array("q")
    for batch in dataset.select_columns(columns).with_format("arrow").iter(_ROWS_AT_A_TIME):
        parts = [_lists(batch[column]) for column in columns]
        for prompt, *responses in zip(*parts, strict=True):
            for response in responses:
                ids, start = np.concatenate([prompt, response]), len(prompt)
                cut = max(0, len(ids) - max_length) if max_length is not None else 0
                if truncation_mode == "keep_end":
                    ids, start = ids[cut:], max(0, start - cut)
                else:
                    ids = ids[: len(ids) - cut]
                data = ids.astype(np.int32).tobytes()
                key = hashlib.blake2b(start.to_bytes(8, "little") + data, digest_size=16).digest()
                if key not in index:
                    index[key] = len(index)
                    tokens.frombytes(data)
                    ends.append(len(tokens))
                    starts.append(start)
                indices.append(index[key])
    chosen, rejected = np.asarray(indices, dtype=np.int64).reshape(-1, 2).T.copy()
    input_ids = TokenLists(np.frombuffer(tokens, np.int32) if tokens else np.empty(0, np.int32), np.asarray(ends))
    return PairResponses(input_ids, np.asarray(starts), chosen, rejected)


def _lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def length_batches(
    input_ids: Sequence[list[int]], batch_tokens: int, lengths: np.ndarray | None = None
) -> list[list[int]]:
    """
    Cut length-sorted rows into batches of at most `batch_tokens` tokens, padding included.

    The batches depend on the rows alone, not on their order and not on the number of processes that will share them, so
    that no float does. The longest come first: what does not fit into memory fails at once.

    Args:
        input_ids (`Sequence[list[int]]`):
            Token ids of each row, which settle the order of rows of one length.
        batch_tokens (`int`):
            Tokens a batch. A longer row is a batch of its own.
        lengths (`np.ndarray` of shape `(n,)`, *optional*):
            Tokens that each row takes. If `None`, as many as it has ids.

    Returns:
        `list[list[int]]`: Indices of the rows of each batch.
    """
    if lengths is None:
        lengths = np.fromiter(map(len, input_ids), np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches: list[list[int]] = []
    # By length first, so that only the ids of one length are in memory. Bytes compare as lists of numbers do.
    for rows in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        for index in sorted(rows.tolist(), key=lambda row: np.asarray(input_ids[row], ">u4").tobytes()):
            if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > batch_tokens:
                batches.append([])
            batches[-1].append(index)
    return batches


def deal(
    batches: list[list[int]], process_index: int, num_processes: int, lockstep: bool
) -> tuple[list[list[int]], int]:
    """
    The batches of one process.

    Args:
        batches (`list[list[int]]`):
            All batches, which every process cuts alike.
        process_index (`int`):
            Rank of this process: it gets the batches `process_index, process_index + num_processes, ...`.
        num_processes (`int`):
            Number of processes.
        lockstep (`bool`):
            Whether all processes must run as many forward passes, since each gathers the weights from all of them. A
            process that is one batch short then repeats the last batch of all.

    Returns:
        `tuple[list[list[int]], int]`: The batches to run, and how many of them are the process's own.
    """
    own = batches[process_index::num_processes]
    short = lockstep and len(own) < -(-len(batches) // num_processes)
    return (own + batches[-1:] if short else own), len(own)


@dataclass(frozen=True)
class ResponseBatch:
    """
    Responses as the model takes them.

    Attributes:
        inputs (`dict[str, torch.Tensor]`):
            `input_ids` and `attention_mask`, each of shape `(rows, tokens)`. Packed, the mask has the shape
            `(rows, 1, tokens, tokens)`, and `position_ids` come with it.
        positions (`tuple[torch.Tensor, torch.Tensor]`):
            Row and position of each hidden state that predicts a completion token, response by response.
        labels (`torch.Tensor` of shape `(completion_tokens,)`):
            Those tokens.
        lengths (`list[int]`):
            Number of them, one a response.
    """

    inputs: dict[str, torch.Tensor]
    positions: tuple[torch.Tensor, torch.Tensor]
    labels: torch.Tensor
    lengths: list[int]

    def to(self, device: torch.device) -> "ResponseBatch":
        """
        Move the tensors to a device.

        Args:
            device (`torch.device`):
                The device.

        Returns:
            [`ResponseBatch`]: The batch on the device.
        """
        inputs = {key: value.to(device) for key, value in self.inputs.items()}
        rows, columns = self.positions
        return ResponseBatch(inputs, (rows.to(device), columns.to(device)), self.labels.to(device), self.lengths)


def pad_batch(responses: PairResponses, batch: Sequence[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Pad the responses of one batch on the right, as the collator of DPO does.

    Args:
        responses ([`PairResponses`]):
            The responses.
        batch (`Sequence[int]`):
            Indices of those in the batch.
        pad_token_id (`int`):
            Id to pad with.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `completion_mask`, each of shape `(n, tokens)`.
    """
    length = max(len(responses.input_ids[index]) for index in batch)
    input_ids = torch.full((len(batch), length), pad_token_id)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, index in enumerate(batch):
        ids = responses.input_ids[index]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        completion_mask[row, responses.starts[index] : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


def one_a_row(responses: PairResponses, batch: Sequence[int], pad_token_id: int) -> ResponseBatch:
    """
    Batch responses, one a row.

    Args:
        responses ([`PairResponses`]):
            The responses.
        batch (`Sequence[int]`):
            Indices of those in the batch.
        pad_token_id (`int`):
            Id to pad with.

    Returns:
        [`ResponseBatch`]: The batch.
    """
    inputs = pad_batch(responses, batch, pad_token_id)
    mask = inputs.pop("completion_mask")[:, 1:].bool()
    rows, columns = mask.nonzero(as_tuple=True)
    return ResponseBatch(inputs, (rows, columns), inputs["input_ids"][:, 1:][mask], mask.sum(dim=1).tolist())


def shared_tokens(responses: PairResponses, pair: int) -> int:
    """
    Tokens at which the two responses of a pair are equal from their beginning, at most those of the prompt.

    Args:
        responses ([`PairResponses`]):
            The responses.
        pair (`int`):
            Index of the pair.

    Returns:
        `int`: Length of the common beginning.
    """
    indices = int(responses.chosen[pair]), int(responses.rejected[pair])
    end = min(responses.starts[index] for index in indices)
    # Nearly all pairs share the whole prompt, unless they were cut at their beginning.
    first, second = (responses.input_ids[index][:end] for index in indices)
    if first == second:
        return end
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)


def packed_length(responses: PairResponses, pair: int) -> int:
    """
    Tokens of a pair in one row: what the responses share once, then the rest of each.

    Args:
        responses ([`PairResponses`]):
            The responses.
        pair (`int`):
            Index of the pair.

    Returns:
        `int`: Number of tokens.
    """
    ids = responses.input_ids
    both = len(ids[responses.chosen[pair]]) + len(ids[responses.rejected[pair]])
    return both - shared_tokens(responses, pair)


def one_pair_a_row(responses: PairResponses, batch: Sequence[int], pad_token_id: int) -> ResponseBatch:
    """
    Batch pairs, one a row: one copy of the prompt, then the chosen, then the rejected completion.

    The mask lets no completion see the other, and the positions of both go on from the prompt, so that each response
    is computed as if it stood alone. That needs an attention that takes a mask of four dimensions
    ([`~trl_bpo.gradients.can_pack`]).

    Args:
        responses ([`PairResponses`]):
            The responses.
        batch (`Sequence[int]`):
            Indices of the pairs in the batch.
        pad_token_id (`int`):
            Id to pad with.

    Returns:
        [`ResponseBatch`]: The batch; its responses are chosen and rejected of the first pair, of the second, and so on.
    """
    length = max(packed_length(responses, pair) for pair in batch)
    input_ids = torch.full((len(batch), length), pad_token_id)
    position_ids = torch.zeros_like(input_ids)
    # What a token belongs to: 0 is shared, 1 is chosen, 2 is rejected, 3 is padding.
    part = torch.full_like(input_ids, 3)
    rows, columns, labels, lengths = [], [], [], []
    for row, pair in enumerate(batch):
        shared, begin = shared_tokens(responses, pair), 0
        for kind, index in ((1, responses.chosen[pair]), (2, responses.rejected[pair])):
            ids, start = responses.input_ids[index], responses.starts[index]
            # The column of a token that is not shared is its position in the response and this.
            own = slice(begin + shared, begin + len(ids))
            input_ids[row, own] = torch.tensor(ids[shared:], dtype=torch.long)
            position_ids[row, own] = torch.arange(shared, len(ids))
            part[row, own] = kind
            predicted = torch.arange(max(start, 1), len(ids))
            rows.append(torch.full_like(predicted, row))
            columns.append(torch.where(predicted <= shared, predicted - 1, begin + predicted - 1))
            labels.append(torch.tensor(ids[max(start, 1) :], dtype=torch.long))
            lengths.append(len(predicted))
            begin += len(ids) - shared
        input_ids[row, :shared] = torch.tensor(ids[:shared], dtype=torch.long)
        position_ids[row, :shared] = torch.arange(shared)
        part[row, :shared] = 0
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
    inputs = {"input_ids": input_ids, "attention_mask": (causal & seen)[:, None], "position_ids": position_ids}
    return ResponseBatch(inputs, (torch.cat(rows), torch.cat(columns)), torch.cat(labels), lengths)
