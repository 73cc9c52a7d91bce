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

"""How the loss of a [`~trl.DPOTrainer`] weighs the gradients of the two responses of a pair."""

from collections import defaultdict
from typing import Any

import torch
from tqdm.auto import tqdm
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from .gradients import PairResponses, length_batches, pad_batch


def needs_reference(trainer: DPOTrainer, normalize: bool) -> bool:
    """
    Whether the direction of a pair's gradient depends on the reference model.

    For the `sigmoid` loss, and for `robust` with label smoothing below 1/2, under the reverse KL, the derivatives with
    respect to the two log-probabilities are `-c` and `c` with `c > 0` whatever the log-probabilities are. So once the
    feature is scaled to unit length, beta, the margin and the reference cancel, and `g(y-) - g(y+)` is the feature.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer, with the options of its loss.
        normalize (`bool`):
            Whether the features are scaled to unit length.

    Returns:
        `bool`: `False` where the reference provably cancels.
    """
    cancels = trainer.loss_types == ["sigmoid"] or (trainer.loss_types == ["robust"] and trainer.label_smoothing < 0.5)
    return not (normalize and cancels and trainer.f_divergence_type == "reverse_kl" and trainer.loss_weights[0] > 0)


def reference_log_probs(
    trainer: DPOTrainer, responses: PairResponses, *, pad_token_id: int, batch_tokens: int
) -> torch.Tensor:
    """
    Log-probability of each response under the reference of a trainer; the ranks share the batches. Where the trainer has
    computed them before training, those are taken.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer, whose reference is a model, or its own without the adapter.
        responses ([`PairResponses`]):
            The distinct responses.
        pad_token_id (`int`):
            Id to pad with.
        batch_tokens (`int`):
            Tokens a batch, padding included.

    Returns:
        `torch.Tensor` of shape `(n_responses,)`: Float32, on the CPU. Rows of other processes are zero.
    """
    accelerator = trainer.accelerator
    logps = torch.zeros(len(responses.input_ids))
    if trainer.precompute_ref_logps:
        # TRL keeps no reference model then, and the policy is no longer the reference once it is trained.
        pool: Any = trainer.train_dataset
        if accelerator.is_main_process:
            for indices, column in (
                (responses.chosen, "ref_chosen_logps"),
                (responses.rejected, "ref_rejected_logps"),
            ):
                logps[indices] = torch.tensor(pool[column][:])
        return logps
    batches = length_batches(responses.input_ids, batch_tokens)[accelerator.process_index :: accelerator.num_processes]
    hidden = trainer.args.disable_tqdm or not accelerator.is_main_process
    for batch in tqdm(batches, desc="Computing reference log probs", disable=hidden):
        inputs = {
            key: value.to(accelerator.device) for key, value in pad_batch(responses, batch, pad_token_id).items()
        }
        # TRL halves its batch into chosen and rejected; here it is a plain list of responses.
        halves = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
        logps[batch] = torch.cat(halves).float().cpu()
    return logps


class _FixedLogProbs:
    # Stands where the loss expects the model, and answers with log-probabilities that are already known. The loss sees
    # the sum over the completion only, so all of it sits on the completion's tokens in equal parts.
    def __init__(self, log_probs: torch.Tensor) -> None:
        self.log_probs = log_probs

    def __call__(self, **kwargs: Any) -> FusedCausalLMOutput:
        zeros = torch.zeros_like(self.log_probs)
        return FusedCausalLMOutput(
            log_probs=self.log_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=torch.zeros_like(zeros, dtype=torch.bool),
        )


def pair_coefficients(
    trainer: DPOTrainer, responses: PairResponses, logps: torch.Tensor, ref_logps: torch.Tensor
) -> torch.Tensor:
    """
    Derivatives of the loss of each pair, as a batch of its own, with respect to the two log-probabilities.

    They are taken by autograd through the very loss of the trainer, so that every loss type, weighting and divergence
    that TRL knows is covered and none is written twice. Auxiliary losses of Mixture-of-Experts models are left out.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer.
        responses ([`PairResponses`]):
            The distinct responses.
        logps (`torch.Tensor` of shape `(n_responses,)`):
            Log-probabilities under the policy.
        ref_logps (`torch.Tensor` of shape `(n_responses,)`):
            Log-probabilities under the reference.

    Returns:
        `torch.Tensor` of shape `(n_pairs, 2)`: Derivatives with respect to the log-probability of the chosen and of the
        rejected response, on the CPU.
    """
    device = trainer.accelerator.device
    coefficients = torch.zeros(len(responses.chosen), 2)
    # The loss records metrics as it goes. They belong to training steps, so they are put aside.
    saved = trainer._metrics, trainer._total_train_tokens, trainer.precompute_ref_logps, trainer.aux_loss_enabled
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer.precompute_ref_logps, trainer.aux_loss_enabled = True, False
    try:
        pairs = list(zip(responses.chosen.tolist(), responses.rejected.tolist(), strict=True))
        hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
        for row, pair in enumerate(tqdm(pairs, desc="Computing loss derivatives", disable=hidden)):
            inputs = {key: value.to(device) for key, value in pad_batch(responses, list(pair), pad_token_id=0).items()}
            mask = inputs["completion_mask"][:, 1:]
            share = logps[list(pair)].to(device) / mask.sum(dim=1).clamp(min=1)
            log_probs = (share[:, None] * mask).requires_grad_()
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref_logps[list(pair)].to(device).split(1)
            with torch.enable_grad():
                loss = trainer._compute_loss(_FixedLogProbs(log_probs), inputs, return_outputs=False)
            (gradient,) = torch.autograd.grad(loss, log_probs)
            # The derivative is the same at every token of a completion.
            coefficients[row] = ((gradient * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).cpu()
    finally:
        trainer._metrics, trainer._total_train_tokens, trainer.precompute_ref_logps, trainer.aux_loss_enabled = saved
    return coefficients
