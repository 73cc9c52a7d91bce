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


"""Random preference pairs, settings for a short training, and a projection that projects nothing."""

import numpy as np
import torch
from datasets import Dataset

from trl_bpo import BPOConfig


WORDS = "red green blue sea wind list numbers poem france paris capital sort python answer".split()


def words(rng, low, high=None):
    return " ".join(rng.choice(WORDS, rng.integers(low, high) if high else low))


def pairs(prompts=6, per_prompt=3, seed=0):
    """Pairs in the standard format; answers have two to eight words."""
    rng = np.random.default_rng(seed)
    return Dataset.from_list(
        [
            {
                "prompt": f"What about {p} {WORDS[p % len(WORDS)]}?",
                "chosen": f" {words(rng, 2, 9)}",
                "rejected": f" {words(rng, 2, 9)}",
            }
            for p in range(prompts)
            for _ in range(per_prompt)
        ]
    )


def conversational(dataset):
    """The same pairs as messages."""

    def convert(row):
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {column: [{"role": role, "content": row[column].strip()}] for column, role in roles.items()}

    return dataset.map(convert)


def config(output_dir, cls=BPOConfig, **kwargs):
    """Arguments of a short training on the CPU in which every logged number is there to compare."""
    options = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        # Gradients of so small a model are tiny, so the rate is high: otherwise no step would change the selection.
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        **kwargs,
    }
    return cls(str(output_dir), **options)


class IdentityProjection:
    """Has the interface of `SparseProjection`, and keeps every entry of every gradient."""

    def __init__(self, modules):
        self.offsets, self.dim, self.max_numel = {}, 0, 2**63
        for name, module in modules.items():
            self.offsets[name] = self.dim
            self.dim += module.weight.numel()

    def weight_gradient(self, name, inputs, grad_outputs, scale=None):
        gradients = torch.bmm(grad_outputs.transpose(1, 2), inputs) * (1 if scale is None else scale)
        gradients = gradients.flatten(1)
        whole = gradients.new_zeros(len(gradients), self.dim)
        whole[:, self.offsets[name] : self.offsets[name] + gradients.shape[1]] = gradients
        return whole


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()
