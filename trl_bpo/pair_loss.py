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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from .gradients import Pieces
from .responses import PairResponses, pad_batch


PairLoss = Callable[[int, Pieces, Pieces | None, torch.Tensor], tuple[float, Pieces]]


def needs_reference(trainer: DPOTrainer, normalize: bool) -> bool:
    """
    Whether the direction of a pair's gradient depends on the reference model.

    For the `sigmoid` loss, and for `robust` with label smoothing below 1/2, under the reverse KL, the derivatives with
    respect to the two log-probabilities are `-c` and `c` with `c > 0` whatever the log-probabilities are. So once the
    feature is scaled to unit length, beta, the margin, the weight of WPO and the reference cancel, and `g(y-) - g(y+)`
    is the feature.

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


def reference_pass(
    trainer: DPOTrainer,
    responses: PairResponses,
    batches: list[list[int]],
    write: Callable[[list[int], torch.Tensor], None],
    *,
    pad_token_id: int,
    n_own: int,
) -> None:
    """
    Log-probabilities under the reference of a trainer: a model, or the trainer's own without the adapter.

    Each response goes through the reference once. With `ld_alpha`, which cuts the longer response of a pair at the
    length of the other, each goes through it once for each of its pairs.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer.
        responses ([`PairResponses`]):
            The distinct responses.
        batches (`list[list[int]]`):
            Responses of each batch; with `ld_alpha`, pairs.
        write (`Callable`):
            Called with the rows of each batch and their log-probabilities, float64 of shape `(n,)`, or with `ld_alpha`
            `(n, 2)` of chosen and rejected, on the CPU.
        pad_token_id (`int`):
            Id to pad with.
        n_own (`int`):
            Number of batches to write. Those behind are run only, for the sake of other processes.
    """
    accelerator = trainer.accelerator
    pairs = np.stack([responses.chosen, responses.rejected], axis=1)
    hidden = trainer.args.disable_tqdm or not accelerator.is_main_process
    for position, rows in enumerate(tqdm(batches, desc="Computing reference log probs", disable=hidden)):
        # TRL halves its batch into chosen and rejected. Here it is a plain list of responses, unless pairs matter.
        indices = rows if trainer.ld_alpha is None else pairs[rows].T.reshape(-1).tolist()
        inputs = pad_batch(responses, indices, pad_token_id)
        inputs = {key: value.to(accelerator.device) for key, value in inputs.items()}
        halves = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs)
        if position < n_own:
            logps = torch.cat(halves) if trainer.ld_alpha is None else torch.stack(halves, dim=1)
            write(rows, logps.double().cpu())


class _FixedLogProbs:
    # Stands where the loss expects the model, and answers with log-probabilities that are already known.
    def __init__(self, log_probs: torch.Tensor, log_sum_sq_probs: torch.Tensor) -> None:
        self.log_probs = log_probs
        self.log_sum_sq_probs = log_sum_sq_probs

    def __call__(self, **kwargs: Any) -> FusedCausalLMOutput:
        zeros = torch.zeros_like(self.log_probs)
        return FusedCausalLMOutput(
            log_probs=self.log_probs,
            entropy=zeros,
            log_sum_sq_probs=self.log_sum_sq_probs,
            mean_logits=zeros,
            is_top1=torch.zeros_like(zeros, dtype=torch.bool),
        )


@contextmanager
def loss_of_one_pair(trainer: DPOTrainer, responses: PairResponses) -> Iterator[PairLoss]:
    """
    The loss of a trainer for each pair as a batch of its own, and its derivatives by the log-probabilities.

    The derivatives are taken by autograd through the very loss of the trainer, so that every loss type, weighting and
    divergence that TRL knows is covered and none is written twice. Losses that couple the pairs of a batch take their
    value on one pair; auxiliary losses of Mixture-of-Experts models are left out. On the CPU, where an operation on two
    numbers is cheap. No process waits for another. The trainer's metrics are left as they were.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer.
        responses ([`PairResponses`]):
            The distinct responses.

    Yields:
        `Callable`: From the index of a pair, the per-token log-probabilities of its chosen and rejected completion,
        in the same form `log(sum p^2)` of their distributions (or `None`, without `use_weighting`), and the two
        reference log-probabilities, the loss and its derivatives, in the form of the log-probabilities.
    """
    stand_in = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    replaced: dict[str, Any] = {
        # The loss records metrics as it goes, summed over the processes. They belong to training steps.
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "accelerator": stand_in,
        "precompute_ref_logps": True,
        "aux_loss_enabled": False,
    }
    saved = {name: getattr(trainer, name) for name in replaced}
    # TRL bounds the exponential of this divergence by a table of types that ends with float32.
    dtype = torch.float32 if trainer.f_divergence_type == "alpha_divergence" else torch.float64

    def loss_of(
        pair: int, log_probs: Pieces, log_sum_sq_probs: Pieces | None, ref_logps: torch.Tensor
    ) -> tuple[float, Pieces]:
        indices = [int(responses.chosen[pair]), int(responses.rejected[pair])]
        inputs = pad_batch(responses, indices, pad_token_id=0)
        mask = inputs["completion_mask"][:, 1:].bool()

        def spread(pieces: Pieces) -> torch.Tensor:
            return torch.zeros(mask.shape, dtype=dtype).masked_scatter(mask, torch.cat(pieces).to(dtype))

        leaf = spread(log_probs).requires_grad_()
        model = _FixedLogProbs(leaf, spread(log_sum_sq_probs or log_probs))
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref_logps.to(dtype).split(1)
        with torch.enable_grad():
            loss = trainer._compute_loss(model, inputs, return_outputs=False)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.item(), list(gradient[mask].split([len(piece) for piece in log_probs]))

    try:
        for name, value in replaced.items():
            setattr(trainer, name, value)
        yield loss_of
    finally:
        for name, value in saved.items():
            setattr(trainer, name, value)


def pair_coefficients(
    trainer: DPOTrainer,
    responses: PairResponses,
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    alignments: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Derivatives of the loss of each pair with respect to the log-probabilities of its two responses, see
    [`loss_of_one_pair`]. The processes share the pairs. Not for `ld_alpha`, where they differ between the tokens.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer.
        responses ([`PairResponses`]):
            The distinct responses.
        logps (`torch.Tensor` of shape `(n_responses,)`):
            Log-probabilities under the policy.
        ref_logps (`torch.Tensor` of shape `(n_pairs, 2)`):
            Log-probabilities under the reference.
        alignments (`torch.Tensor` of shape `(n_responses,)`, *optional*):
            Mean over the completion tokens of `log p - log(sum p^2)`, which `use_weighting` needs.

    Returns:
        `torch.Tensor` of shape `(n_pairs, 2)`: Derivatives with respect to the log-probability of the chosen and of the
        rejected response, float64, on the CPU.
    """
    accelerator = trainer.accelerator
    pairs = np.stack([responses.chosen, responses.rejected], axis=1).tolist()
    coefficients = torch.zeros(len(pairs), 2, dtype=torch.float64)
    own = range(accelerator.process_index, len(pairs), accelerator.num_processes)
    hidden = trainer.args.disable_tqdm or not accelerator.is_main_process
    with loss_of_one_pair(trainer, responses) as loss_of:
        for pair in tqdm(own, desc="Computing loss derivatives", disable=hidden):
            pieces, sums = [], []
            for index in pairs[pair]:
                length = len(responses.input_ids[index]) - max(responses.starts[index], 1)
                # The loss sees the sums over the completion only, so they are shared out over its tokens.
                pieces.append((logps[index] / max(length, 1)).expand(length))
                if alignments is not None:
                    sums.append(pieces[-1] - alignments[index])
            _, gradients = loss_of(pair, pieces, sums or None, ref_logps[pair])
            coefficients[pair] = torch.stack([gradient.sum() / max(len(gradient), 1) for gradient in gradients])
    # A device without float64, as that of a Mac, does not see it.
    return (
        accelerator.reduce(coefficients.to(accelerator.device)).cpu()
        if accelerator.num_processes > 1
        else coefficients
    )
