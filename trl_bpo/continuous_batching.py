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


"""Generation with transformers' continuous batching: as soon as a sequence ends, the next one takes its place."""

from collections.abc import Iterator

import transformers
from packaging.version import Version
from transformers import GenerationConfig, PreTrainedModel


def check_continuous_batching() -> None:
    """
    Check that the installed transformers has what is used here.

    Raises:
        `ImportError`: If it is too old.
    """
    if Version(transformers.__version__) < Version("5.19.0"):
        raise ImportError(
            "`continuous_batching=True` requires transformers>=5.19. Upgrade with `pip install -U transformers`, or "
            "leave it at `False`."
        )


def generate_continuously(
    model: PreTrainedModel,
    requests: dict[str, list[int]],
    generation_config: GenerationConfig,
    *,
    max_concurrency: int,
    seed: int,
) -> Iterator[tuple[str, list[int]]]:
    """
    Generate one sequence for each request, and yield each as it ends.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model. While sequences are generated, its attention implementation may be another one.
        requests (`dict[str, list[int]]`):
            Token ids of the prompts, by the names of the requests.
        generation_config ([`~transformers.GenerationConfig`]):
            Sampling options, with `max_new_tokens`.
        max_concurrency (`int`):
            Number of sequences that are generated at the same time. The cache has room for that many of the longest.
        seed (`int`):
            Seed of PyTorch's global random state, which is what the sampling draws from.

    Yields:
        `tuple[str, list[int]]`: Name of the request and generated token ids, the end-of-sequence token included.

    Raises:
        `RuntimeError`: If the generation fails.
    """
    from transformers.generation import ContinuousBatchingConfig

    max_concurrency = min(max_concurrency, len(requests))
    lengths = sorted(map(len, requests.values()), reverse=True)
    page_size = ContinuousBatchingConfig.page_size
    blocks = -(-(lengths[0] + generation_config.max_new_tokens) // page_size)
    config = ContinuousBatchingConfig(
        # All sizes are given, for two reasons: by default the cache takes nearly all free memory, and which sequences
        # run together, so what they draw, must not depend on how much memory happens to be free.
        num_blocks=max_concurrency * blocks,
        max_requests_per_batch=max_concurrency,
        max_batch_tokens=min(sum(lengths[:max_concurrency]), 8192),
        # There is room for every sequence that is let in, so none has to be held back for the others.
        safety_margin=0.0,
        seed=seed,
    )
    attention = model.config._attn_implementation
    manager = model.init_continuous_batching(generation_config, continuous_batching_config=config)  # type: ignore[operator]
    try:
        # Requests that came while the loop runs would join it at a step that depends on the timing.
        for name, ids in requests.items():
            manager.add_request(ids, request_id=name)
        manager.warmup()
        manager.start()
        left = len(requests)
        while left:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("Continuous batching stopped.") from manager.background_thread_status.fatal_error
            if result is None or not result.is_finished():
                continue
            if result.error is not None:
                raise RuntimeError(f"Continuous batching failed: {result.error}")
            left -= 1
            yield result.request_id, result.generated_tokens
    finally:
        # A soft stop would first generate all that is waiting.
        manager.stop(hard_stop=True)
        manager.destroy()
        if model.config._attn_implementation != attention:
            # It changes the attention back itself only if its thread was started.
            model.set_attn_implementation(attention)
