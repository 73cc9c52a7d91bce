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

"""What is taken from a backward pass: the trainable linear layers of a model, and a hook behind each of them."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


class _CaptureGradient(torch.autograd.Function):
    # An identity behind a linear layer. In backward it hands the layer's input and the gradient of its output to
    # `consume`. The scalar `anchor` is what the backward pass differentiates, so that only activations are: no
    # parameter gets a gradient, and no hook of DDP, FSDP or DeepSpeed on one fires.
    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        anchor: torch.Tensor,
        inputs: torch.Tensor,
        consume: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs)
        ctx.consume = consume
        # With the model split across devices, the layer may lie on another device than the anchor.
        ctx.anchor_device = anchor.device
        # A view would forbid the model to modify it in place, as that of Falcon does.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.consume(inputs, grad_output)
        return grad_output, torch.zeros((), device=ctx.anchor_device), None, None


def target_modules(model: PreTrainedModel | PeftModel, layers: Sequence[int] | None = None) -> dict[str, nn.Linear]:
    """
    The linear layers whose gradients make up the features: those with a trainable weight.

    With LoRA these are the A and B factors. With full fine-tuning they are all linear layers of the backbone. Biases,
    norms, embeddings, the LM head and the magnitudes of DoRA are left out, and so is what [`stacked_weights`] gives.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.
        layers (`Sequence[int]`, *optional*):
            Decoder layers to take them from, counted from 0 at the input. If `None`, all. The backward pass stops at
            the lowest of them.

    Returns:
        `dict[str, nn.Linear]`: Modules by name.

    Raises:
        `ValueError`: If there is none, or if one of the layers has none.
    """
    head = list(model.get_output_embeddings().modules()) if model.get_output_embeddings() is not None else []
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and all(module is not part for part in head)
    }
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no trainable `nn.Linear`, so there is no gradient to select by. Train LoRA "
            "adapters or the full model, or set `depth_fraction=1.0`."
        )
    if layers is None:
        return modules
    # The first number in a module's name is that of its decoder layer in every model of transformers.
    numbers = {name: int(match[1]) for name in modules if (match := re.search(r"\.(\d+)\.", name))}
    if missing := set(layers) - set(numbers.values()):
        raise ValueError(
            f"`gradient_layers` names layer {min(missing)}, which has no trainable `nn.Linear`. Those that have one are "
            f"{sorted(set(numbers.values()))}."
        )
    return {name: module for name, module in modules.items() if numbers.get(name) in layers}


def stacked_weights(model: PreTrainedModel | PeftModel) -> list[str]:
    """
    Trainable parameters that stack several weights, as the experts of a Mixture-of-Experts layer do. No linear layer
    runs over the tokens of a response there, so that their gradients cannot be told apart by response.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.

    Returns:
        `list[str]`: Names of the parameters.
    """
    return [
        f"{name}.{parameter_name}" if name else parameter_name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.ndim > 2
    ]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """
    Without dropout, and without gradient checkpointing, which would run the forward hooks a second time. The modules
    that were in training mode are put back into it, and no others.

    Args:
        model (`torch.nn.Module`):
            The model.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def capture_gradients(
    model: PreTrainedModel | PeftModel,
    modules: dict[str, nn.Linear],
    consume: Callable[[str, torch.Tensor, torch.Tensor], None],
) -> Iterator[torch.Tensor]:
    """
    Have each backward pass hand over what makes up the gradients of linear layers, in evaluation mode. Hooks,
    `requires_grad` and training mode are put back at the end, also after an exception.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, unwrapped.
        modules (`dict[str, nn.Linear]`):
            The layers by name, as of [`target_modules`].
        consume (`Callable`):
            Called in backward with the name of a layer, its input of shape `(n, tokens, in_features)` and the gradient
            of its output, of shape `(n, tokens, out_features)`.

    Yields:
        `torch.Tensor`: The scalar to differentiate with respect to.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        # The fused head would compute the gradient of a head that trains, as large as the head itself, for nobody.
        head = model.get_output_embeddings()
        for parameter in head.parameters() if head is not None else ():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        anchor = torch.zeros((), device=model.device, requires_grad=True)
        for name, module in modules.items():

            def hook(_: nn.Module, args: tuple, output: torch.Tensor, name: str = name) -> torch.Tensor:
                return _CaptureGradient.apply(output, anchor, args[0], lambda x, dy: consume(name, x, dy))

            stack.callback(module.register_forward_hook(hook).remove)
        yield anchor
