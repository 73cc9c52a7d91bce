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


"""Responses to prompts, sampled from a policy."""

import hashlib
import json
from collections import abc
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import tqdm
from trl.trainer.utils import pad

from .answer_store import AnswerStore, prepare_folder
from .continuous_batching import check_continuous_batching, generate_continuously
from .generation_requests import RequestKeys, check_request, check_sampling, count_stored, encode_prompts
from .model_fingerprint import model_fingerprint
from .responses import TokenLists
from .streams import in_blocks, streams


_REQUESTS_AT_A_TIME = 65_536

# Answers for the store, a batch at a time: keys and the responses under them.
Generation = abc.Generator[list[tuple[str, dict]], None, None]


@dataclass(frozen=True)
class Response:
    """
    A sampled response.

    Args:
        text (`str`):
            Text of the response, without special tokens.
        truncated (`bool`):
            Whether the response was cut off at the token limit before its end-of-sequence token.
        num_tokens (`int`):
            Number of generated tokens, the end-of-sequence token included.
    """

    text: str
    truncated: bool
    num_tokens: int


class Generator(Protocol):
    """
    What samples responses: any callable with this signature, such as [`TransformersGenerator`].

    It is called for 8,192 prompts at a time. What must see all prompts together, as a limit of costs must, or gives the
    responses back in parts has a method `stream` as well: it takes the same arguments, of which `prompts` and `tools` are
    read from the disk each time they are gone through, and yields the responses of one prompt after the other.
    """

    def __call__(
        self, prompts: list[str | list[dict]], num_responses: int, tools: list | None = None
    ) -> list[list[Response]]:
        """
        Sample responses.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompts in TRL's standard (`str`) or conversational (list of messages) format.
            num_responses (`int`):
                Number of responses for each prompt.
            tools (`list`, *optional*):
                Tool schemas of each prompt: for each a list, its JSON string or `None`.

        Returns:
            `list[list[Response]]`: `num_responses` responses for each prompt, in the order of the prompts.
        """
        ...


def iter_responses(
    generator: Generator,
    prompts: abc.Sequence[str | list[dict]],
    num_responses: int,
    tools: abc.Sequence | None = None,
) -> abc.Iterator[list[Response]]:
    """
    Sample responses, in bounded memory.

    Args:
        generator (`Callable`):
            What samples, see [`Generator`].
        prompts (`Sequence[str | list[dict]]`):
            Prompts in TRL's standard or conversational format, such as a column of a dataset.
        num_responses (`int`):
            Number of responses for each prompt.
        tools (`Sequence`, *optional*):
            Tool schemas of each prompt.

    Yields:
        `list[Response]`: `num_responses` responses, prompt after prompt.

    Raises:
        `ValueError`: If the generator gives another number of responses or of prompts.
    """
    if streams(generator):
        rows = iter(generator.stream(prompts, num_responses, tools))  # type: ignore[attr-defined]
    else:
        rows = _called_in_blocks(generator, prompts, num_responses, tools)
    done = 0
    for row in rows:
        if len(row) != num_responses:
            raise ValueError(
                f"The generator must give `num_responses={num_responses}` responses a prompt, but gave {len(row)}."
            )
        done += 1
        yield row
    if done != len(prompts):
        raise ValueError(f"The generator must give responses for {len(prompts)} prompts, but did for {done}.")


def _called_in_blocks(
    generator: Generator, prompts: abc.Sequence, num_responses: int, tools: abc.Sequence | None
) -> abc.Iterator[list[Response]]:
    blocks = in_blocks(prompts)
    tool_blocks = None if tools is None else in_blocks(tools)
    for block in blocks:
        rows = generator(block, num_responses, None if tool_blocks is None else next(tool_blocks))
        if len(rows) != len(block):
            raise ValueError(f"The generator must give responses for {len(block)} prompts, but did for {len(rows)}.")
        yield from rows


def stored_responses(store: AnswerStore, keys: RequestKeys) -> abc.Iterator[list[Response]]:
    """
    Responses of each prompt, from the store.

    Args:
        store ([`AnswerStore`]):
            The store, which has all of them.
        keys ([`RequestKeys`]):
            Their keys.

    Yields:
        `list[Response]`: The responses of each prompt, in order.
    """
    for row in keys:
        answers = (store.get(key) for key, _ in row)
        yield [Response(**response) for answer in answers if answer is not None for response in answer["responses"]]


class TransformersGenerator:
    """
    Sample responses with the `generate` method of a transformers model.

    Sampling is from the model's own distribution, changed by `temperature` and `top_p` alone: of the model's generation
    config, which may carry a top-k, a repetition penalty and the like, only the end-of-sequence tokens are kept. Neither
    the model nor the tokenizer is changed, and the global random state is restored.

    With `cache_dir`, every batch is written there before it counts. After a crash or a kill, the same call reads what
    was finished and generates the rest: the batches are formed as before, so the responses are those of an
    uninterrupted run. A response is found again by what it depends on: the content of the model (see
    [`~model_fingerprint.model_fingerprint`]), the token ids of the prompt, and the sampling options. With other
    weights, also in the same folder or under the same name, everything is generated anew.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy. A path or model id is loaded to the device of the process; a model is used where it is.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the model. By default, it is loaded from where the model was loaded from.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Token limit of a response.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. 0 decodes greedily, which gives one response a prompt.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample from the smallest set of tokens that has this probability.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of sequences that are generated together. A prompt with more responses than that is split.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling. The random numbers of a batch depend on this seed and on the prompts in the batch, not
            on what was generated before, so the same call on the same machine gives the same responses.
        cache_dir (`str`, *optional*):
            Folder in which the responses are kept as they are generated. Several processes and runs can share it. By
            default, nothing is written.
        continuous_batching (`bool`, *optional*, defaults to `False`):
            Whether to let the next sequence take the place of one that has ended, with transformers' continuous
            batching, instead of waiting for the longest of a batch. `batch_size` sequences are in flight at a time, and
            each response is stored as it ends. All sequences draw from one random state, so the same call gives the same
            responses only as long as it is not interrupted: what a resumed call still has to generate is drawn
            anew. As it is the short ones that were finished, a call that is killed very often favours short responses.
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments for `from_pretrained` if `model` is a path or model id, for example `dtype`.

    Raises:
        `ValueError`: If an option is out of its range, `model_init_kwargs` comes with a model that is loaded, or
            `continuous_batching` with an adapter that works on the prompt.
        `ImportError`: If the installed transformers is too old for `continuous_batching`.

    Example:

    ```python
    >>> generator = TransformersGenerator("Qwen/Qwen3-0.6B", max_new_tokens=64)
    >>> responses = generator([[{"role": "user", "content": "What is the capital of France?"}]], num_responses=4)
    >>> responses[0][0].text
    'The capital of France is Paris.'
    ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 16,
        seed: int = 42,
        cache_dir: str | None = None,
        continuous_batching: bool = False,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        check_sampling(max_new_tokens, temperature, top_p)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if isinstance(model, str):
            init_kwargs = {"device_map": PartialState().device, **(model_init_kwargs or {})}
            model = AutoModelForCausalLM.from_pretrained(model, **init_kwargs)
        elif model_init_kwargs is not None:
            raise ValueError("`model_init_kwargs` applies only when `model` is a path or model id. Remove it.")
        if continuous_batching:
            check_continuous_batching()
            # It calls the model below the adapters, which is right for those inside its layers alone.
            if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
                raise ValueError("`continuous_batching` does not work with an adapter that adds to the prompt.")
        self.model = model
        self.processing_class = processing_class or AutoTokenizer.from_pretrained(model.config._name_or_path)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.batch_size = batch_size
        self.seed = seed
        prepare_folder(cache_dir)
        self.cache_dir = cache_dir
        self.continuous_batching = continuous_batching

    def __call__(
        self, prompts: list[str | list[dict]], num_responses: int, tools: list | None = None
    ) -> list[list[Response]]:
        """
        Sample responses.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompts in TRL's standard or conversational format. Conversational ones go through the chat template.
            num_responses (`int`):
                Number of responses for each prompt.
            tools (`list`, *optional*):
                Tool schemas of each prompt: for each a list, its JSON string or `None`.

        Returns:
            `list[list[Response]]`: `num_responses` responses for each prompt, in the order of the prompts.

        Raises:
            `ValueError`: If a prompt is empty or leaves no room for `max_new_tokens` in the model's context, or if
                several responses are asked for with `temperature=0`.
        """
        return list(self.stream(prompts, num_responses, tools))

    def stream(
        self, prompts: abc.Sequence[str | list[dict]], num_responses: int, tools: abc.Sequence | None = None
    ) -> abc.Iterator[list[Response]]:
        """
        Sample responses for all prompts, then yield them. Memory: four bytes a token of the prompts, 24 bytes a
        prompt and 16 a part of its responses; the responses are in `cache_dir`, or in memory without one.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                Prompts, as for a call.
            num_responses (`int`):
                Number of responses for each prompt.
            tools (`Sequence`, *optional*):
                Tool schemas of each prompt.

        Yields:
            `list[Response]`: `num_responses` responses, prompt after prompt.

        Raises:
            `ValueError`: As a call does.
        """
        input_ids = encode_prompts(self.processing_class, prompts, tools)
        check_request(
            prompts,
            input_ids,
            num_responses,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            # Models without position embeddings of a fixed number, such as state space models, have no limit to check.
            context=getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        )
        per_call = 1 if self.continuous_batching else min(num_responses, self.batch_size)
        parts = [(start, min(per_call, num_responses - start)) for start in range(0, num_responses, per_call)]
        keys = RequestKeys(self._settings(), input_ids, parts)
        generate = self._generate_continuously if self.continuous_batching else self._generate_in_batches
        with closing(AnswerStore(self.cache_dir)) as store:
            with (
                tqdm(
                    total=len(prompts) * num_responses,
                    initial=count_stored(store, keys),
                    desc="Generating responses",
                    disable=not PartialState().is_main_process,
                ) as progress,
                self._sampling_mode() as eos_token_ids,
                # Closed at once when storing fails: what generates continuously has a thread.
                closing(generate(input_ids, keys, parts, store, eos_token_ids)) as batches,
            ):
                for batch in batches:
                    store.put_many(batch)
                    progress.update(sum(len(answer["responses"]) for _, answer in batch))
            # Who takes the responses may use the model in between, so it is itself again.
            yield from stored_responses(store, keys)

    def _settings(self) -> dict[str, Any]:
        return {
            "generator": "transformers",
            # Without a folder, the store lives as long as the call, in which the model does not change.
            "model": None if self.cache_dir is None else model_fingerprint(self.model),
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "eos_token_ids": self._eos_token_ids(),
            "continuous_batching": self.continuous_batching,
        }

    @contextmanager
    def _sampling_mode(self) -> abc.Iterator[list[int]]:
        eos_token_ids = self._eos_token_ids()
        was_training = self.model.training
        base_model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        # A PEFT model usually shows the config of its base model; one of its own it would hand down to that.
        configs: list[tuple[Any, Any]] = [
            (m, m.generation_config) for m in (self.model, base_model) if "generation_config" in vars(m)
        ]
        self.model.eval()
        try:
            # What `generate` is not told it takes from the model's config.
            for model, _ in configs:
                model.generation_config = GenerationConfig()
            yield eos_token_ids
        finally:
            self.model.train(was_training)
            for model, config in configs:
                model.generation_config = config

    def _generate_in_batches(
        self,
        input_ids: TokenLists,
        keys: RequestKeys,
        parts: list[tuple[int, int]],
        store: AnswerStore,
        eos_token_ids: list[int],
    ) -> Generation:
        # Prompts of about the same length share a batch, so that little is computed on padding. The longest come
        # first: if memory runs out, it does so at once. The batches are those of all prompts, stored or not, as the
        # random numbers of a batch depend on what is in it.
        order = _longest_first(input_ids)
        prompts_per_batch = self.batch_size // parts[0][1]
        for start in range(0, len(order), prompts_per_batch):
            for part, (done, count) in enumerate(parts):
                rows = [row for row in order[start : start + prompts_per_batch] if keys[row][part][0] not in store]
                if rows:
                    batch = self._generate([input_ids[row] for row in rows], count, done, eos_token_ids)
                    answers = [batch[first : first + count] for first in range(0, len(batch), count)]
                    yield [
                        (keys[row][part][0], {"responses": [asdict(response) for response in answer]})
                        for row, answer in zip(rows, answers, strict=True)
                    ]

    def _generate_continuously(
        self,
        input_ids: TokenLists,
        keys: RequestKeys,
        parts: list[tuple[int, int]],
        store: AnswerStore,
        eos_token_ids: list[int],
    ) -> Generation:
        left = ((key, row) for row in _longest_first(input_ids) for key, _ in keys[row] if key not in store)
        base_model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        # The lists of what is still to do are in memory, so they are not all made at once.
        while requests := {key: input_ids[row] for key, row in islice(left, _REQUESTS_AT_A_TIME)}:
            with self._forked_rng():
                for key, ids in generate_continuously(
                    base_model,
                    requests,
                    self._generation_config(1, eos_token_ids, self._pad_token_id(eos_token_ids)),
                    max_concurrency=self.batch_size,
                    seed=self._batch_seed(list(requests.values())),
                ):
                    yield [(key, {"responses": [asdict(self._response(ids, set(eos_token_ids)))]})]

    def _eos_token_ids(self) -> list[int]:
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        return sorted({*configured, self.processing_class.eos_token_id} - {None})

    def _generation_config(self, num_responses: int, eos_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                # Unset, it would be 50.
                "top_k": 0,
            }
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=num_responses,
            eos_token_id=eos_token_ids,
            pad_token_id=pad_token_id,
            # Training with gradient checkpointing switches the cache off in the model's own config.
            use_cache=True,
            **sampling,
        )

    @torch.inference_mode()
    def _generate(
        self, input_ids: list[list[int]], num_responses: int, done: int, eos_token_ids: list[int]
    ) -> list[Response]:
        device = self.model.device
        pad_token_id = self._pad_token_id(eos_token_ids)
        tensors = [torch.tensor(ids) for ids in input_ids]
        batch = pad(tensors, padding_value=pad_token_id, padding_side="left").to(device)
        attention_mask = pad([torch.ones_like(ids) for ids in tensors], padding_value=0, padding_side="left").to(
            device
        )
        with self._forked_rng():
            torch.manual_seed(self._batch_seed(input_ids, done))
            output = self.model.generate(  # type: ignore[operator]
                input_ids=batch,
                attention_mask=attention_mask,
                generation_config=self._generation_config(num_responses, eos_token_ids, pad_token_id),
            )
        completions = output[:, batch.shape[1] :].tolist()
        return [self._response(ids, set(eos_token_ids)) for ids in completions]

    def _pad_token_id(self, eos_token_ids: list[int]) -> int:
        # Padding is masked, and what follows a response's end is cut off, so any token will do.
        fallback = eos_token_ids[0] if eos_token_ids else 0
        return fallback if self.processing_class.pad_token_id is None else self.processing_class.pad_token_id

    def _batch_seed(self, input_ids: list[list[int]], done: int = 0) -> int:
        digest = hashlib.sha256(json.dumps([self.seed, done, input_ids]).encode()).digest()
        return int.from_bytes(digest[:8]) >> 1

    def _forked_rng(self) -> AbstractContextManager:
        device = self.model.device
        # The random state of a CPU is always forked; Apple's has no state for each device that could be.
        devices = [] if device.type in ("cpu", "mps") else [device]
        return torch.random.fork_rng(devices=devices, device_type=device.type)

    def _response(self, ids: list[int], eos_token_ids: set[int]) -> Response:
        end = next((position for position, token in enumerate(ids) if token in eos_token_ids), None)
        text = self.processing_class.decode(ids[:end], skip_special_tokens=True)
        return Response(text=str(text), truncated=end is None, num_tokens=len(ids) if end is None else end + 1)


def _longest_first(input_ids: TokenLists) -> list[int]:
    return np.argsort(-input_ids.lengths, kind="stable").tolist()
