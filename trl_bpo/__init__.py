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

"""Balanced Preference Optimization (BPO) for TRL: select the preference data that is worth training on."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__


if TYPE_CHECKING:
    from .api import CollectionStopped
    from .bpo_config import BPOConfig
    from .bpo_trainer import BPOTrainer
    from .breadth import BreadthSelection, BreadthSelector
    from .collector import BPODataCollector
    from .depth import DepthSelection, DepthSelector
    from .generation import TransformersGenerator
    from .judging import Verdict
    from .openai_generator import OpenAIGenerator
    from .openai_judge import OpenAIJudge
    from .openai_pairwise_judge import OpenAIPairwiseJudge
    from .reward_model_judge import RewardModelJudge
    from .verifiable import VerifiableJudge
    from .vllm_generator import VLLMGenerator


# Where each public name is. They are imported when they are asked for, since torch and TRL take seconds.
_MODULES = {
    "BPOConfig": "bpo_config",
    "BPODataCollector": "collector",
    "BPOTrainer": "bpo_trainer",
    "BreadthSelection": "breadth",
    "BreadthSelector": "breadth",
    "CollectionStopped": "api",
    "DepthSelection": "depth",
    "DepthSelector": "depth",
    "OpenAIGenerator": "openai_generator",
    "OpenAIJudge": "openai_judge",
    "OpenAIPairwiseJudge": "openai_pairwise_judge",
    "RewardModelJudge": "reward_model_judge",
    "TransformersGenerator": "generation",
    "VLLMGenerator": "vllm_generator",
    "Verdict": "judging",
    "VerifiableJudge": "verifiable",
}

__all__ = [
    "BPOConfig",
    "BPODataCollector",
    "BPOTrainer",
    "BreadthSelection",
    "BreadthSelector",
    "CollectionStopped",
    "DepthSelection",
    "DepthSelector",
    "OpenAIGenerator",
    "OpenAIJudge",
    "OpenAIPairwiseJudge",
    "RewardModelJudge",
    "TransformersGenerator",
    "VLLMGenerator",
    "Verdict",
    "VerifiableJudge",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
