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
from dataclasses import dataclass
from typing import Any, Protocol

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
from transformers.utils import logging
from trl.trainer.utils import pad

from .prompts import parse_tools, without_none


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


class TransformersGenerator:
    """
    Sample responses with the `generate` method of a transformers model.

    Sampling is from the model's own distribution, changed by `temperature` and `top_p` alone: of the model's generation
    config, which may carry a top-k, a repetition penalty and the like, only the end-of-sequence tokens are kept. Neither
    the model nor the tokenizer is changed, and the global random state is restored.

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
        model_init_kwargs (`dict`, *optional*):
            Keyword arguments for `from_pretrained` if `model` is a path or model id, for example `dtype`.

    Raises:
        `ValueError`: If an option is out of its range, or `model_init_kwargs` comes with a model that is loaded.

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
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                f"`max_new_tokens` and `batch_size` must be at least 1, got {max_new_tokens} and {batch_size}."
            )
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"`temperature` must be >= 0 and `top_p` in (0, 1], got {temperature} and {top_p}.")
        if isinstance(model, str):
            init_kwargs = {"device_map": PartialState().device, **(model_init_kwargs or {})}
            model = AutoModelForCausalLM.from_pretrained(model, **init_kwargs)
        elif model_init_kwargs is not None:
            raise ValueError("`model_init_kwargs` applies only when `model` is a path or model id. Remove it.")
        self.model = model
        self.processing_class = processing_class or AutoTokenizer.from_pretrained(model.config._name_or_path)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.batch_size = batch_size
        self.seed = seed

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
        if self.temperature == 0 and num_responses > 1:
            raise ValueError(
                f"`temperature=0` gives the same response {num_responses} times. Set a positive `temperature` or "
                "`num_responses=1`."
            )
        input_ids = [
            self._encode(prompt, prompt_tools)
            for prompt, prompt_tools in zip(prompts, tools or [None] * len(prompts), strict=True)
        ]
        self._check_lengths(prompts, input_ids)

        # Prompts of about the same length share a batch, so that little is computed on padding. The longest come
        # first: if memory runs out, it does so at once.
        order = sorted(range(len(prompts)), key=lambda row: len(input_ids[row]), reverse=True)
        per_call = min(num_responses, self.batch_size)
        prompts_per_batch = self.batch_size // per_call
        responses: list[list[Response]] = [[] for _ in prompts]
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
            with logging.tqdm(
                total=len(prompts) * num_responses,
                desc="Generating responses",
                disable=not PartialState().is_main_process,
            ) as progress:
                for start in range(0, len(order), prompts_per_batch):
                    rows = order[start : start + prompts_per_batch]
                    for done in range(0, num_responses, per_call):
                        count = min(per_call, num_responses - done)
                        batch = self._generate([input_ids[row] for row in rows], count, done, eos_token_ids)
                        for position, response in enumerate(batch):
                            responses[rows[position // count]].append(response)
                        progress.update(len(batch))
        finally:
            self.model.train(was_training)
            for model, config in configs:
                model.generation_config = config
        return responses

    def _encode(self, prompt: str | list[dict], tools: str | list | None) -> list[int]:
        if isinstance(prompt, str):
            return self.processing_class(prompt)["input_ids"]
        text = self.processing_class.apply_chat_template(
            without_none(prompt),
            tools=without_none(parse_tools(tools)),
            add_generation_prompt=True,
            tokenize=False,
        )
        # The template writes the special tokens itself.
        return self.processing_class(text, add_special_tokens=False)["input_ids"]

    def _check_lengths(self, prompts: list[str | list[dict]], input_ids: list[list[int]]) -> None:
        # Models without position embeddings of a fixed number, such as state space models, have no limit to check.
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for row, ids in enumerate(input_ids):
            start = json.dumps(prompts[row], ensure_ascii=False)[:80]
            if not ids:
                raise ValueError(f"The prompt in row {row} is empty. Remove it from the dataset.")
            if context is not None and len(ids) + self.max_new_tokens > context:
                raise ValueError(
                    f"The prompt in row {row} ({start}...) has {len(ids)} tokens, which leaves no room for "
                    f"`max_new_tokens={self.max_new_tokens}` in the model's context of {context} tokens. Lower "
                    "`max_new_tokens`, or shorten or remove the prompt."
                )

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
        pad_token_id = self.processing_class.pad_token_id
        if pad_token_id is None:
            # Padding is masked, and what follows a response's end is cut off below, so any token will do.
            pad_token_id = eos_token_ids[0] if eos_token_ids else 0
        tensors = [torch.tensor(ids) for ids in input_ids]
        batch = pad(tensors, padding_value=pad_token_id, padding_side="left").to(device)
        attention_mask = pad([torch.ones_like(ids) for ids in tensors], padding_value=0, padding_side="left").to(
            device
        )
        digest = hashlib.sha256(json.dumps([self.seed, done, input_ids]).encode()).digest()
        # The random state of a CPU is always forked; Apple's has no state for each device that could be.
        devices = [] if device.type in ("cpu", "mps") else [device]
        with torch.random.fork_rng(devices=devices, device_type=device.type):
            torch.manual_seed(int.from_bytes(digest[:8]) >> 1)
            output = self.model.generate(  # type: ignore[operator]
                input_ids=batch,
                attention_mask=attention_mask,
                generation_config=self._generation_config(num_responses, eos_token_ids, pad_token_id),
            )
        completions = output[:, batch.shape[1] :].tolist()
        return [self._response(ids, set(eos_token_ids)) for ids in completions]

    def _response(self, ids: list[int], eos_token_ids: set[int]) -> Response:
        end = next((position for position, token in enumerate(ids) if token in eos_token_ids), None)
        text = self.processing_class.decode(ids[:end], skip_special_tokens=True)
        return Response(text=str(text), truncated=end is None, num_tokens=len(ids) if end is None else end + 1)
