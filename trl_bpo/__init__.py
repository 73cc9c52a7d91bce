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

from ._version import __version__
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
