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

"""A reward model as the judge."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging
from trl.trainer.utils import pad

from .answer_store import AnswerStore, content_key, prepare_folder
from .model_fingerprint import model_fingerprint
from .prompts import completion_text, parse_tools, without_none
from .streams import in_blocks


logger = logging.getLogger(__name__)

# Responses that are sorted by length together. What has been scored of them is found again as long as this stays.
_RESPONSES_AT_A_TIME = 16_384


class RewardModelJudge:
    """
    Score responses with a reward model: a sequence classification model with a single label.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Reward model. A path or model id is loaded to the device of the process; a model is used where it is.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the model. By default, it is loaded from where the model was loaded from.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of responses that are scored together.
        max_length (`int`, *optional*):
            Number of tokens of prompt and response after which the text is cut off; how many were is logged. By
            default, nothing is cut off.
        cache_dir (`str`, *optional*):
            Folder in which the scores are kept, a batch at a time, so that the same call after a kill goes on where it
            ended. A score is found again by the model's content ([`~model_fingerprint.model_fingerprint`]) and by the
            token ids. By default, nothing is written.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments for `from_pretrained` if `model` is a path or model id, for example `dtype`.

    Raises:
        `ValueError`: If the model has more than one label or no padding token, or an option is out of its range.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        cache_dir: str | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"`batch_size` and `max_length` must be at least 1, got {batch_size} and {max_length}.")
        if isinstance(model, str):
            init_kwargs = {"device_map": PartialState().device, **(model_init_kwargs or {})}
            model = cast(PreTrainedModel, AutoModelForSequenceClassification.from_pretrained(model, **init_kwargs))
        elif model_init_kwargs is not None:
            raise ValueError("`model_init_kwargs` applies only when `model` is a path or model id. Remove it.")
        if model.config.num_labels != 1:
            raise ValueError(
                f"A reward model has one label, but `model` has {model.config.num_labels}. Use a sequence "
                "classification model that was trained as a reward model, for example with TRL's `RewardTrainer`."
            )
        if model.config.get_text_config().pad_token_id is None:
            raise ValueError(
                "`model.config.pad_token_id` is not set, so the model cannot tell where a response ends in a batch. "
                "Set it, with a path or model id through `model_init_kwargs={'pad_token_id': ...}`."
            )
        name = model.config._name_or_path or type(model).__name__
        # The name ends up in datasets and their cards, where the folders of this machine have no place.
        self.__name__ = Path(name).resolve().name if Path(name).is_dir() else name
        self.model = model
        self.processing_class = processing_class or AutoTokenizer.from_pretrained(model.config._name_or_path)
        self.batch_size = batch_size
        self.max_length = max_length
        prepare_folder(cache_dir)
        self.cache_dir = cache_dir

    def __call__(
        self, /, *, prompts: list[str | list[dict]], completions: list[str | list[dict]], **columns: Any
    ) -> list[float]:
        """
        Score responses.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompt of each response.
            completions (`list[str | list[dict]]`):
                Responses. Conversational ones go through the chat template together with their prompt, others are
                appended to it.
            columns:
                Other columns of the dataset. `tools` goes into the chat template.

        Returns:
            `list[float]`: The model's output for each response.
        """
        return list(self.stream(prompts=prompts, completions=completions, **columns))

    def stream(
        self, /, *, prompts: Sequence[str | list[dict]], completions: Sequence[str | list[dict]], **columns: Any
    ) -> Iterator[float]:
        """
        Score responses, a part at a time. Memory: the token ids of 16,384 responses.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                Prompt of each response.
            completions (`Sequence[str | list[dict]]`):
                Responses, as for a call.
            columns:
                Other columns of the dataset.

        Yields:
            `float`: The model's output, response after response.
        """
        tools = columns["tools"] if columns.get("tools") is not None else repeat(None, len(prompts))
        model = None if self.cache_dir is None else model_fingerprint(self.model)
        too_long = 0
        with (
            closing(AnswerStore(self.cache_dir)) as store,
            transformers_logging.tqdm(
                total=len(prompts), desc="Scoring responses", disable=not PartialState().is_main_process
            ) as progress,
        ):
            for block in in_blocks(zip(prompts, completions, tools, strict=True), _RESPONSES_AT_A_TIME):
                input_ids = [self._encode(prompt, completion, its_tools) for prompt, completion, its_tools in block]
                if self.max_length is not None:
                    too_long += sum(len(ids) > self.max_length for ids in input_ids)
                    input_ids = [ids[: self.max_length] for ids in input_ids]
                keys = [] if model is None else [content_key(["reward", model, ids]) for ids in input_ids]
                yield from self._score(input_ids, keys, store, progress)
        if too_long:
            logger.warning(f"{too_long} of {len(prompts)} responses were cut off at {self.max_length} tokens.")

    def _score(self, input_ids: list[list[int]], keys: list[str], store: AnswerStore, progress: Any) -> list[float]:
        order = sorted(range(len(input_ids)), key=lambda row: len(input_ids[row]), reverse=True)
        scores = [0.0] * len(input_ids)
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                # Batches are those of all responses, so that a run that goes on computes what it would have.
                rows = [row for row in batch if not keys or keys[row] not in store]
                if rows:
                    for row, score in zip(rows, self._forward([input_ids[row] for row in rows]), strict=True):
                        scores[row] = score
                    if keys:
                        store.put_many((keys[row], {"score": scores[row]}) for row in rows)
                for row in set(batch) - set(rows):
                    scores[row] = store.get(keys[row])["score"]  # type: ignore[index]
                progress.update(len(batch))
        finally:
            self.model.train(was_training)
        return scores

    def _encode(self, prompt: str | list[dict], completion: str | list[dict], tools: str | list | None) -> list[int]:
        if isinstance(prompt, str):
            return self.processing_class(prompt + completion_text(completion))["input_ids"]
        text = self.processing_class.apply_chat_template(
            without_none([*prompt, *completion]), tools=without_none(parse_tools(tools)), tokenize=False
        )
        # The template writes the special tokens itself.
        return self.processing_class(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _forward(self, input_ids: list[list[int]]) -> list[float]:
        tensors = [torch.tensor(ids) for ids in input_ids]
        pad_token_id = self.model.config.get_text_config().pad_token_id
        batch = pad(tensors, padding_value=pad_token_id, padding_side="right").to(self.model.device)
        mask = pad([torch.ones_like(ids) for ids in tensors], padding_value=0, padding_side="right").to(batch.device)
        return self.model(input_ids=batch, attention_mask=mask).logits[:, 0].tolist()
