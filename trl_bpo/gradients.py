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

"""
Gradient features of responses and of preference pairs.

A DPO loss depends on the policy only through the log-probabilities of the two responses of a pair, so its gradient is
`c+ g(y+) + c- g(y-)`, where `g(y)` is the gradient of `log pi(y | x)` and `c+`, `c-` are the derivatives of the loss with
respect to the two log-probabilities. A random projection is linear, so it commutes with that sum: one backward pass per
unique response serves all of the pairs that the response is in.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .projection import SparseProjection


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairResponses:
    """
    The distinct responses of a pool of pairs, and which pair uses which.

    A response is identified by its truncated token ids and by where the completion starts in them: TRL cuts the prompt
    where the two tokenised answers of a pair diverge from it, so that one text can be two responses.

    Attributes:
        input_ids (`list[list[int]]`):
            Truncated token ids of prompt and completion, one list a response.
        starts (`list[int]`):
            Index of the first completion token, one a response.
        chosen (`np.ndarray` of shape `(n_pairs,)`, int64):
            Index of each pair's chosen response.
        rejected (`np.ndarray` of shape `(n_pairs,)`, int64):
            Index of each pair's rejected response.
    """

    input_ids: list[list[int]]
    starts: list[int]
    chosen: np.ndarray
    rejected: np.ndarray


def unique_responses(
    dataset: Dataset, max_length: int | None = None, truncation_mode: str = "keep_start"
) -> PairResponses:
    """
    Collect the distinct responses of a dataset that [`~trl.DPOTrainer`] has tokenised.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs with the columns `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length (`int`, *optional*):
            Tokens to which prompt and completion are cut, as the collator of DPO does.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Which end is kept, `"keep_start"` or `"keep_end"`.

    Returns:
        [`PairResponses`]: The distinct responses.
    """
    index: dict[tuple[int, tuple[int, ...]], int] = {}
    indices: dict[str, list[int]] = {"chosen_ids": [], "rejected_ids": []}
    for row in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
        for column, used in indices.items():
            ids = row["prompt_ids"] + row[column]
            cut = max(0, len(ids) - max_length) if max_length is not None else 0
            if truncation_mode == "keep_end":
                key = (max(0, len(row["prompt_ids"]) - cut), tuple(ids[cut:]))
            else:
                key = (len(row["prompt_ids"]), tuple(ids[: len(ids) - cut]))
            used.append(index.setdefault(key, len(index)))
    return PairResponses(
        input_ids=[list(ids) for _, ids in index],
        starts=[start for start, _ in index],
        chosen=np.asarray(indices["chosen_ids"]),
        rejected=np.asarray(indices["rejected_ids"]),
    )


def length_batches(input_ids: list[list[int]], batch_tokens: int) -> list[list[int]]:
    """
    Cut length-sorted responses into batches of at most `batch_tokens` tokens, padding included.

    The batches depend on the responses alone, not on their order and not on the number of processes that will share
    them, so that no float does. The longest come first: what does not fit into memory fails at once.

    Args:
        input_ids (`list[list[int]]`):
            Token ids of the responses.
        batch_tokens (`int`):
            Tokens a batch. A longer response is a batch of its own.

    Returns:
        `list[list[int]]`: Indices of the responses of each batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(input_ids)), key=lambda i: (-len(input_ids[i]), input_ids[i])):
        if not batches or len(input_ids[batches[-1][0]]) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def pad_batch(responses: PairResponses, batch: list[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    """
    Pad the responses of one batch on the right, as the collator of DPO does.

    Args:
        responses ([`PairResponses`]):
            The responses.
        batch (`list[int]`):
            Indices of those in the batch.
        pad_token_id (`int`):
            Id to pad with.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `completion_mask`, each of shape `(n, tokens)`.
    """
    length = max(len(responses.input_ids[index]) for index in batch)
    input_ids = torch.full((len(batch), length), pad_token_id)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, index in enumerate(batch):
        ids = responses.input_ids[index]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        completion_mask[row, responses.starts[index] : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}


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
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.consume(inputs, grad_output)
        return grad_output, grad_output.new_zeros(()), None, None


def target_modules(model: PreTrainedModel | PeftModel) -> dict[str, nn.Linear]:
    """
    The linear layers whose gradients make up the features: those with a trainable weight.

    With LoRA these are the A and B factors. With full fine-tuning they are all linear layers of the backbone. Biases,
    norms, embeddings, the LM head and the magnitudes of DoRA are left out.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy.

    Returns:
        `dict[str, nn.Linear]`: Modules by name.

    Raises:
        `ValueError`: If there is none, or if the experts of a Mixture-of-Experts layer are trainable: their weights are
            stacked in one parameter, whose gradient cannot be told apart by response.
    """
    stacked = [
        f"{name}.{parameter_name}" if name else parameter_name
        for name, module in model.named_modules()
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.ndim > 2
    ]
    if stacked:
        raise ValueError(
            f"`{stacked[0]}` stacks several weights, as the experts of a Mixture-of-Experts layer do, and has no "
            "per-response gradient here. Train other modules, or set `depth_fraction=1.0`."
        )
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
    return modules


@contextmanager
def _capture(
    model: PreTrainedModel | PeftModel, consume: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[torch.Tensor]:
    # Everything that is changed here (hooks, training mode) is put back, also after an exception.
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:

        def restore_training_mode() -> None:
            for module in training:
                module.training = True

        stack.callback(restore_training_mode)
        # No dropout, and no gradient checkpointing, which would run the forward hooks a second time.
        model.eval()
        anchor = torch.zeros((), device=model.device, requires_grad=True)
        for name, module in target_modules(model).items():

            def hook(_: nn.Module, args: tuple, output: torch.Tensor, name: str = name) -> torch.Tensor:
                return _CaptureGradient.apply(output, anchor, args[0], lambda x, dy: consume(name, x, dy))

            stack.callback(module.register_forward_hook(hook).remove)
        yield anchor


@contextmanager
def _compact_completions(backbone: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    # The fused LM head scores every position where there is no Triton. Handing it nothing but the hidden states that
    # predict a completion token saves the projection of prompts and padding to the vocabulary on every device.
    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, :-1][mask].unsqueeze(0)
        return output

    handle = backbone.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def response_gradients(
    model: PreTrainedModel | PeftModel,
    responses: PairResponses,
    projection: SparseProjection,
    *,
    pad_token_id: int,
    batch_tokens: int = 4096,
    process_index: int = 0,
    num_processes: int = 1,
    disable_tqdm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Projected gradient and value of `log pi(y | x)`, the sum over the completion tokens, of each response.

    One batched forward and backward pass over the activations; `param.grad`, `requires_grad`, training mode, hooks and
    random state are left as they were. Peak memory beside the pass itself: the per-sample gradient of one module.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, unwrapped, with the fused LM head of TRL ([`~trl.trainer.utils.add_fused_lm_head`]) as
            [`~trl.DPOTrainer`] gives it.
        responses ([`PairResponses`]):
            The distinct responses.
        projection ([`SparseProjection`]):
            Projection of the gradients.
        pad_token_id (`int`):
            Id to pad with.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Tokens a batch, padding included.
        process_index (`int`, *optional*, defaults to `0`):
            Rank of this process: it computes the batches `process_index, process_index + num_processes, ...`.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes that share the responses.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The features, float32 of shape `(n_responses, dim)`, and the
        log-probabilities, float32 of shape `(n_responses,)`, on the CPU. Rows of other processes are zero, so the sum
        over the processes is the whole.
    """
    features = torch.zeros(len(responses.input_ids), projection.dim)
    logps = torch.zeros(len(responses.input_ids))
    batches = length_batches(responses.input_ids, batch_tokens)[process_index::num_processes]
    lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    sketch = torch.empty(0)
    seen: set[str] = set()

    def consume(name: str, inputs: torch.Tensor, grad_outputs: torch.Tensor) -> None:
        if inputs.shape[:1] + inputs.shape[2:-1] != sketch.shape[:1]:
            raise ValueError(
                f"`{name}` does not see one row a response but inputs of shape {tuple(inputs.shape)}, as the experts "
                "of a Mixture-of-Experts model do: its gradient cannot be told apart by response. Leave it out of the "
                "`target_modules` of your adapter."
            )
        seen.add(name)
        sketch.add_(projection.weight_gradient(name, inputs.float(), grad_outputs.float()))

    bar = tqdm(
        total=sum(len(responses.input_ids[index]) for batch in batches for index in batch),
        desc="Computing gradient features",
        unit="tok",
        unit_scale=True,
        disable=disable_tqdm,
    )
    with _capture(model, consume) as anchor, torch.enable_grad(), bar:
        for batch in batches:
            inputs = {key: value.to(model.device) for key, value in pad_batch(responses, batch, pad_token_id).items()}
            mask = inputs["completion_mask"][:, 1:].bool()
            labels = inputs["input_ids"][:, 1:][mask].unsqueeze(0)
            sketch = torch.zeros(len(batch), projection.dim, device=model.device)
            with _compact_completions(lm.base_model, mask):
                log_probs = model(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    shift_labels=labels,
                    use_cache=False,
                    fused_lm_head=True,
                ).log_probs[0]
            torch.autograd.grad(log_probs.sum(), anchor)
            features[batch] = sketch.cpu()
            sums = [part.sum() for part in log_probs.detach().float().split(mask.sum(dim=1).tolist())]
            logps[batch] = torch.stack(sums).cpu()
            bar.update(sum(len(responses.input_ids[index]) for index in batch))
    if batches and (idle := [name for name in target_modules(model) if name not in seen]):
        logger.warning(
            "%d trainable linear layers, such as `%s`, took no part in the gradient pass: the features do not cover them.",
            len(idle),
            idle[0],
        )
    return features, logps
