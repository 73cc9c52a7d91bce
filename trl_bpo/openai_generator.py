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


"""Responses to prompts, sampled from a policy behind an OpenAI-compatible server."""

import logging
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

from .answer_store import content_key
from .api import APIClient, APIReport, APIRequest, CostEstimate, check_extra_body
from .api.batch import BatchStatus, collect_batch, submit_batch
from .api.costs import estimate_tokens
from .generation import Response
from .generation_requests import check_num_responses, check_sampling
from .prompts import parse_tools, render_prompt, without_none


logger = logging.getLogger(__name__)


class OpenAIGenerator:
    """
    Sample responses with a model behind an OpenAI-compatible API: vLLM, SGLang, `transformers serve` or a hosted one.

    Each response is a request of its own, with a seed of its own where the server takes one, so that any of them can be
    asked for alone. The server batches what is under way at the same time: raise `max_concurrency` until it is busy. vLLM
    and SGLang take what a request leaves open, such as top-k, from the model's generation config unless they are started
    otherwise (`--generation-config vllm`, `--sampling-defaults openai`).

    Every response is in `cache_dir` before it counts, under the content of its request: model, prompt, tools, parameters,
    seed and number of the sample. A run that was killed goes on where it ended. A prompt that is there twice has the same
    responses twice. The address of the server and the weights behind the name of the model are not part of it: for another
    policy under the same name, take another `cache_dir`.

    A prompt that the server rejects or fails at gives empty responses, which make no pairs; they are counted in `report`
    and listed in `failed-responses-*.jsonl` in `cache_dir`. What stops everything, and how rate limits are waited for, is
    in the table of [`~api.APIClient`].

    Args:
        model (`str`):
            Name of the model, as the server knows it.
        base_url (`str` or `list[str]`, *optional*):
            Address of the server, or of several that share the requests, such as `"http://localhost:8000/v1"`. By default, the environment variable
            `OPENAI_BASE_URL` or else OpenAI's own API.
        api_key_variable (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key. Give a server of your own another one, or it gets to see the key for
            the hosted API.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Token limit of a response.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. 0 decodes greedily, which gives one response a prompt.
        top_p (`float`, *optional*, defaults to `1.0`):
            Sample from the smallest set of tokens that has this probability.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling. Whether a server repeats itself with the same seed is up to it: vLLM does for the same
            batch, but its kernels differ with the batch in the last bits. What is in `cache_dir` does not change. `None`
            sends none, for servers that do not accept it.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Number of requests under way at the same time, over all processes.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds after which a request is given up and retried.
        max_retries (`int`, *optional*, defaults to `5`):
            Number of retries of a request after connection errors and server errors.
        extra_body (`dict`, *optional*):
            Further fields of each request, for what a server knows beyond OpenAI's API, such as `{"top_k": 20}` or
            `{"chat_template_kwargs": {"enable_thinking": False}}` with vLLM. `transformers serve` samples only if the
            generation config of the model says so, or `{"generation_config": '{"do_sample": true, "eos_token_id": 2}'}`.
        cache_dir (`str`, *optional*):
            Folder in which the responses are kept. By default they are kept in memory, and lost with the process.
        prices (`str` or `dict`, *optional*):
            Price table, see [`~api.costs.model_price`].
        max_cost (`float`, *optional*):
            US dollars that the responses of a call may cost, those included that earlier runs have paid for. Before it
            would be passed, as far as prompts can be estimated, the call ends with [`~api.CollectionStopped`].

    Attributes:
        report ([`~api.APIReport`] or `None`): What became of the requests of the last call, and what they cost.

    Raises:
        `ImportError`: If the `openai` package is missing.
        `ValueError`: If an option is out of its range, `OPENAI_API_KEY` is not set, or `max_cost` is given and the price
            of the model is not known.

    Example:

    ```python
    >>> generator = OpenAIGenerator("Qwen/Qwen3-0.6B", base_url="http://localhost:8000/v1", cache_dir="answers")
    >>> responses = generator([[{"role": "user", "content": "What is the capital of France?"}]], num_responses=4)
    ```
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | list[str] | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
        max_new_tokens: int = 512,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = 42,
        max_concurrency: int = 64,
        timeout: float = 600.0,
        max_retries: int = 5,
        extra_body: dict[str, Any] | None = None,
        cache_dir: str | None = None,
        prices: str | dict | None = None,
        max_cost: float | None = None,
    ) -> None:
        check_sampling(max_new_tokens, temperature, top_p)
        check_extra_body(extra_body)
        self.client = APIClient(
            model,
            base_url=base_url,
            api_key_variable=api_key_variable,
            max_concurrency=max_concurrency,
            timeout=timeout,
            max_retries=max_retries,
            cache_dir=cache_dir,
            prices=prices,
            max_cost=max_cost,
        )
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.extra_body = extra_body or {}
        self.report: APIReport | None = None

    def __call__(
        self, prompts: list[str | list[dict]], num_responses: int, tools: list | None = None
    ) -> list[list[Response]]:
        """
        Sample responses.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompts in TRL's standard format, which go to `/completions` as they are, or in the conversational one,
                which go to `/chat/completions`, where the server applies its chat template. Not both.
            num_responses (`int`):
                Number of responses for each prompt.
            tools (`list`, *optional*):
                Tool schemas of each prompt: for each a list, its JSON string or `None`.

        Returns:
            `list[list[Response]]`: `num_responses` responses for each prompt, in the order of the prompts.

        Raises:
            `ValueError`: If several responses are asked for with `temperature=0`, the formats of the prompts are mixed,
                or the server rejects the key, the model or the requests, or cannot be reached from the start.
            [`~api.CollectionStopped`]: If the call ended early; the same call goes on from there.
        """
        return list(self.stream(prompts, num_responses, tools))

    def stream(
        self, prompts: Sequence[str | list[dict]], num_responses: int, tools: Sequence | None = None
    ) -> Iterator[list[Response]]:
        """
        Sample responses for all prompts, then yield them from the store.

        Args:
            prompts (`Sequence[str | list[dict]]`):
                Prompts, as for a call. They are gone through several times.
            num_responses (`int`):
                Number of responses for each prompt.
            tools (`Sequence`, *optional*):
                Tool schemas of each prompt.

        Yields:
            `list[Response]`: `num_responses` responses, prompt after prompt.

        Raises:
            `ValueError`: As a call does.
            [`~api.CollectionStopped`]: If the call ended early; the same call goes on from there.
        """
        self._check(prompts, num_responses)

        def requests() -> Iterator[APIRequest]:
            return self._requests(prompts, num_responses, tools)

        self.report = self.client.ask(requests, path=_path(prompts), is_usable=_is_usable, desc="Generating responses")
        responses: list[Response] = []
        failures: list[dict] = []
        all_the_same = num_responses > 1
        for position, (answer, failure) in enumerate(self.client.read(requests(), self.report, _is_usable)):
            if answer is not None:
                truncated = answer["finish_reason"] == "length"
                responses.append(Response(answer["text"], truncated, answer["completion_tokens"]))
            else:
                row, response = divmod(position, num_responses)
                failures.append({"row": row, "response": response, **failure})
                responses.append(Response("", False, 0))
            if len(responses) == num_responses:
                all_the_same = all_the_same and len({one.text for one in responses}) == 1
                yield responses
                responses = []
        self.client.list_failures("responses", failures)
        if all_the_same and len(prompts) > 0:
            logger.warning(
                f"All {num_responses} responses to a prompt are the same, for every prompt: the server does not sample, or "
                "ignores `seed`. Such responses make no pairs. See `extra_body`."
            )

    def estimate(self, prompts: list[str | list[dict]], num_responses: int, tools: list | None = None) -> CostEstimate:
        """
        Estimate what sampling would take. Nothing is sent.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompts.
            num_responses (`int`):
                Number of responses for each prompt.
            tools (`list`, *optional*):
                Tool schemas of each prompt.

        Returns:
            [`~api.CostEstimate`]: Requests, tokens and money.
        """
        self._check(prompts, num_responses)
        return self.client.estimate(self._requests(prompts, num_responses, tools))

    def submit_batch(
        self, prompts: list[str | list[dict]], num_responses: int, tools: list | None = None
    ) -> BatchStatus:
        """
        Hand prompts in to the Batch API, at half the price, as far as they have no responses and are in no job yet.

        The first request is asked directly, to see that the server accepts it. Once [`~OpenAIGenerator.collect_batch`]
        has taken the responses in, calling the generator gives them, and asks what the jobs left unanswered. All of it
        can be repeated at any time.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompts.
            num_responses (`int`):
                Number of responses for each prompt.
            tools (`list`, *optional*):
                Tool schemas of each prompt.

        Returns:
            [`~api.batch.BatchStatus`]: The jobs under way.

        Raises:
            `ValueError`: If there is no `cache_dir`, or the server rejects the key, the requests or the job, or as for a
                call.
            [`~api.CollectionStopped`]: If the responses could cost more than `max_cost`, or the server cannot be reached.
        """
        self._check(prompts, num_responses)
        return submit_batch(self.client, lambda: self._requests(prompts, num_responses, tools), _path(prompts))

    def collect_batch(self) -> BatchStatus:
        """
        Take in the responses of the jobs that have ended.

        Returns:
            [`~api.batch.BatchStatus`]: What was taken in, and what is still under way, which is no error. To call the
            generator before all of it has ended asks for the rest a second time, at the full price.
        """
        return collect_batch(self.client)

    def _check(self, prompts: Sequence[str | list[dict]], num_responses: int) -> None:
        check_num_responses(num_responses, self.temperature)
        if len({isinstance(prompt, str) for prompt in prompts}) > 1:
            raise ValueError(
                "`prompts` are partly text and partly lists of messages. Bring them into one format, for example with "
                "`to_messages`."
            )

    def _requests(
        self, prompts: Sequence[str | list[dict]], num_responses: int, tools: Sequence | None
    ) -> Iterator[APIRequest]:
        sampling = {"max_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}
        for prompt, prompt_tools in zip(prompts, repeat(None, len(prompts)) if tools is None else tools, strict=True):
            content: dict[str, Any]
            if isinstance(prompt, str):
                content = {"prompt": prompt}
            else:
                content = {"messages": without_none(prompt)}
                if parsed := without_none(parse_tools(prompt_tools)):
                    # The tools are for the prompt alone: what is sampled is a text.
                    content |= {"tools": parsed, "tool_choice": "none"}
            tokens = estimate_tokens(render_prompt(prompt, prompt_tools))
            for sample in range(num_responses):
                body = {**content, **sampling, **self.extra_body}
                if self.seed is not None:
                    # A seed for each sample, or a server would give the same response to all.
                    body["seed"] = int(content_key([self.seed, content, sample])[:7], 16)
                yield APIRequest(content_key([self.client.model, body, sample]), body, tokens)


def _path(prompts: Sequence[str | list[dict]]) -> str:
    return "/completions" if len(prompts) > 0 and isinstance(prompts[0], str) else "/chat/completions"


def _is_usable(answer: dict) -> bool:
    return answer["text"] is not None and answer["finish_reason"] != "content_filter"
