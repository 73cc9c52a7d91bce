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

"""Adam's second moment, by which gradient features may be divided as its steps are."""

from typing import Any

import torch
from accelerate.logging import get_logger
from transformers.training_args import OptimizerNames
from trl import DPOTrainer

from .capture import target_modules


logger = get_logger(__name__)

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def check_second_moment(trainer: DPOTrainer) -> None:
    """
    Refuse a trainer whose optimizer will keep no second moment of each weight, before anything is trained.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer.

    Raises:
        `ValueError`: If the second moments are sharded, or if the option `optim` is no Adam of torch and no optimizer
            was passed.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "`precondition_gradients` does not go with sharded weights or with DeepSpeed, which keep the second moments in "
            "pieces. Unset it, or train under DDP."
        )
    optim = OptimizerNames(trainer.args.optim).value
    if trainer.optimizer is None and optim not in _OPTIMIZERS:
        raise ValueError(
            f"`precondition_gradients` needs the second moment that Adam keeps of each weight, which `optim='{optim}'` does "
            "not give. Set `optim='adamw_torch'`, or unset `precondition_gradients`."
        )


def second_moment_scales(trainer: DPOTrainer, layers: list[int] | None) -> dict[str, torch.Tensor] | None:
    """
    What Adam divides each entry of a gradient by, inverted: `1 / (sqrt(v / (1 - beta2^t)) + eps)`, with the second
    moment `v` as it is. Frozen like that it is linear in the gradient, unlike the update of LESS (arXiv 2402.04333),
    which lets the gradient into its own `v`.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer.
        layers (`list[int]`, *optional*):
            As in [`~trl_bpo.capture.target_modules`].

    Returns:
        `dict[str, torch.Tensor]`, *optional*: The factors by module name, or `None` before the first optimizer step.

    Raises:
        `ValueError`: If the optimizer keeps no second moment of each weight.
    """
    optimizer: Any = trainer.optimizer
    unfit = (
        "`precondition_gradients` needs the second moment that Adam keeps of each weight, and the optimizer of this run "
        "keeps none. Set `optim='adamw_torch'`, or unset `precondition_gradients`."
    )
    # Some have no state at all, and would never be past their first step.
    if optimizer is not None and not all("betas" in group for group in optimizer.param_groups):
        raise ValueError(unfit)
    if optimizer is None or not optimizer.state:
        logger.warning(
            "Before the first optimizer step there is no second moment: the gradients are taken as they are."
        )
        return None
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    scales = {}
    for name, module in target_modules(trainer.accelerator.unwrap_model(trainer.model), layers).items():
        state, group = optimizer.state.get(module.weight, {}), groups.get(id(module.weight), {})
        if not state:
            raise ValueError(
                f"`precondition_gradients` needs the second moment of every weight, and the optimizer has none of `{name}`, "
                "which took part in no step. Leave it out with `gradient_layers`, or unset `precondition_gradients`."
            )
        if "exp_avg_sq" not in state:
            raise ValueError(unfit)
        correction = 1 - group["betas"][1] ** float(state["step"])
        scales[name] = 1 / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"])
    return scales
