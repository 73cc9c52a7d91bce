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
unique response serves all of the pairs that the response is in. Where a prompt has one pair only, one backward pass
through both responses behind one copy of the prompt is cheaper still.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .capture import capture_gradients, evaluation_mode, target_modules
from .projection import SparseProjection
from .responses import PairResponses, ResponseBatch, length_batches, one_a_row, one_pair_a_row, packed_length


logger = logging.getLogger(__name__)

# Logits of a batch that are kept for the backward pass: in float32 they take 256 MB, and the pass a few times that.
_MAX_LOGITS = 2**26

# Per-token log-probabilities of the responses of a batch, one tensor a response.
Pieces = list[torch.Tensor]
# The derivative of a loss with respect to each of them: rows of the batch, log-probabilities, and where the model gives
# them, `log(sum p^2)` of the distributions that they were taken from.
Weigh = Callable[[list[int], Pieces, Pieces | None], Pieces]
# What becomes of a batch: its rows, features of shape `(n, dim)`, and the same pieces.
Write = Callable[[list[int], torch.Tensor, Pieces, Pieces | None], None]


def _run_model(
    model: PreTrainedModel | PeftModel, batch: ResponseBatch, fused_lm_head: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Log-probability of each completion token, and `log(sum p^2)` where the fused head is taken and was asked for it.
    # To save memory, the fused head computes the logits a second time in its backward pass. A few are cheaper kept.
    # Either would score every position. Handing it nothing but the hidden states that predict a completion token saves
    # the projection of prompts and padding to the vocabulary.
    fused_lm_head = fused_lm_head or len(batch.labels) * model.config.get_text_config().vocab_size > _MAX_LOGITS

    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        hidden = output.last_hidden_state
        rows, columns = batch.positions
        # Prompt tuning puts virtual tokens in front.
        columns = columns + hidden.shape[1] - batch.inputs["input_ids"].shape[1]
        output.last_hidden_state = hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0)
        return output

    inputs: dict[str, Any] = dict(batch.inputs)
    if inputs["attention_mask"].ndim == 4 and model.config._attn_implementation == "eager":
        # This one adds its mask to the scores.
        minimum = torch.finfo(model.dtype).min
        inputs["attention_mask"] = (~inputs["attention_mask"]).to(model.dtype) * minimum
    lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    handle = lm.base_model.register_forward_hook(hook)
    if fused_lm_head:
        inputs |= {"shift_labels": batch.labels.unsqueeze(0), "fused_lm_head": True}
    try:
        output = model(**inputs, use_cache=False)
    finally:
        handle.remove()
    if not fused_lm_head:
        logits = output.logits[0].to(torch.promote_types(output.logits.dtype, torch.float32))
        # Ten times as exact as `log_softmax` in float32 on a CPU, over so many words.
        return logits.gather(1, batch.labels.to(logits.device)[:, None])[:, 0] - logits.logsumexp(dim=1), None
    log_sum_sq_probs = output.log_sum_sq_probs
    return output.log_probs[0], None if log_sum_sq_probs is None else log_sum_sq_probs[0]


def can_pack(model: PreTrainedModel | PeftModel, responses: PairResponses, pad_token_id: int) -> bool:
    """
    Whether both responses of a pair can be computed behind one copy of their prompt, exactly.

    That takes an attention that is given its mask (`sdpa` or `eager`; Flash Attention is not), in every layer the full
    one, and a model that goes by `position_ids`. What a configuration says may be wrong, so the log-probabilities of
    one pair are computed both ways and compared.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, with the fused LM head of TRL.
        responses ([`PairResponses`]):
            The distinct responses; the pair of median length is the one compared.
        pad_token_id (`int`):
            Id to pad with.

    Returns:
        `bool`: Whether pairs can be packed.
    """
    config = model.config.get_text_config()
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
    windowed = getattr(config, "sliding_window", None) is not None and not getattr(config, "layer_types", None)
    if model.config._attn_implementation not in ("sdpa", "eager") or not full or windowed:
        return False
    telling = [
        pair
        for pair, indices in enumerate(zip(responses.chosen.tolist(), responses.rejected.tolist(), strict=True))
        if all(len(responses.input_ids[index]) > max(responses.starts[index], 1) for index in indices)
    ]
    if not telling:
        return False
    pair = sorted(telling, key=lambda pair: packed_length(responses, pair))[len(telling) // 2]
    device = model.device
    with evaluation_mode(model), torch.no_grad():
        try:
            packed, _ = _run_model(model, one_pair_a_row(responses, [pair], pad_token_id).to(device), True)
        except Exception as error:
            # What a model does with a mask that it does not know is anything, as where ALiBi is made from it.
            if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
                raise
            logger.info("Pairs are not packed: the model does not take a mask of four dimensions (%s).", error)
            return False
        plain = [
            _run_model(model, one_a_row(responses, [int(index)], pad_token_id).to(device), True)[0]
            for index in (responses.chosen[pair], responses.rejected[pair])
        ]
    # Half precision differs by its rounding; a wrong mask or position by far more.
    full_precision = model.dtype.itemsize >= 4 and not torch.is_autocast_enabled(device.type)
    tolerance = 1e-3 if full_precision else 0.1
    return bool((packed - torch.cat(plain)).abs().mean() < tolerance)


def _saved_bytes(model: PreTrainedModel | PeftModel, batch: ResponseBatch, fused_lm_head: bool) -> int:
    # What autograd keeps of a forward pass for the backward pass, weights included.
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = _run_model(model, batch, fused_lm_head)
    del kept
    return sum(saved.values())


def gradient_pass(
    model: PreTrainedModel | PeftModel,
    batches: list[list[int]],
    collate: Callable[[list[int]], ResponseBatch],
    projection: SparseProjection,
    write: Write,
    *,
    tokens: np.ndarray,
    n_own: int | None = None,
    weigh: Weigh | None = None,
    layers: Sequence[int] | None = None,
    scales: dict[str, torch.Tensor] | None = None,
    with_sum_sq_probs: bool = False,
    lockstep: bool = False,
    disable_tqdm: bool = False,
) -> None:
    """
    Projected gradients of a weighted sum of completion log-probabilities, one for each row that is asked for.

    One batched forward and backward pass over the activations. `param.grad`, `requires_grad`, training mode, hooks and
    random state are left as they were, also after an exception. Memory: what autograd keeps of a batch, and the
    per-sample gradients of one module; an estimate is logged before the start. If a batch does not fit into memory, it
    and all that follow are cut in halves; floats may then differ in their last bits from those of whole batches.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The policy, unwrapped, with the fused LM head of TRL ([`~trl.trainer.utils.add_fused_lm_head`]) as
            [`~trl.DPOTrainer`] gives it.
        batches (`list[list[int]]`):
            Rows of each batch.
        collate (`Callable[[list[int]], ResponseBatch]`):
            Makes the input of the model from the rows of a batch. If it has several rows of tokens for each, their
            gradients are added.
        projection ([`SparseProjection`]):
            Projection of the gradients.
        write (`Callable`):
            Called with the rows of each batch, their features of shape `(n, dim)` (float32, or float64 of a model in
            float64) on the CPU, the log-probabilities of the completion tokens, one tensor a response, and in the same
            form `log(sum p^2)`, or `None` where it is not asked for.
        tokens (`np.ndarray` of shape `(n,)`, int64):
            Tokens of each row, for the progress bar and the estimate.
        n_own (`int`, *optional*):
            Number of batches to write. Those behind are run only, for the sake of other processes. If `None`, all.
        weigh (`Callable`, *optional*):
            Called with the rows of a batch and the same two lists, it gives the factor of each token's gradient, in
            tensors of the same shapes. If `None`, every factor is 1.
        layers (`Sequence[int]`, *optional*):
            As in [`target_modules`].
        scales (`dict[str, torch.Tensor]`, *optional*):
            Factor of each entry of the gradients, of the shape of the weight, by module name.
        with_sum_sq_probs (`bool`, *optional*, defaults to `False`):
            Whether `weigh` or `write` needs `log(sum p^2)`, which takes a fused LM head that was asked for it.
        lockstep (`bool`, *optional*, defaults to `False`):
            Whether other processes run as many forward passes, as FSDP and ZeRO-3 need. No batch is halved then.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Raises:
        `ValueError`: If a module does not see one row a response, as the experts of a Mixture-of-Experts model do.
        `RuntimeError`: If a single row, or under `lockstep` a batch, does not fit into memory.
    """
    modules = target_modules(model, layers)
    n_own = len(batches) if n_own is None else n_own
    # The head of sharded weights is fetched as training fetches it: after the other way ZeRO-3 would miss it there.
    fused_lm_head = with_sum_sq_probs or lockstep
    sketch = torch.empty(0)
    n_rows = n_tokens = 0
    seen: set[str] = set()

    def consume(name: str, inputs: torch.Tensor, grad_outputs: torch.Tensor) -> None:
        if inputs.shape[:-1] == (n_rows * n_tokens,):
            # Some models, such as OPT, have their layers run over the tokens of all rows in one line.
            inputs, grad_outputs = (x.view(n_rows, n_tokens, -1) for x in (inputs, grad_outputs))
        if inputs.ndim != 3 or len(inputs) != n_rows:
            raise ValueError(
                f"`{name}` does not see one row a response but inputs of shape {tuple(inputs.shape)}, as the experts "
                "of a Mixture-of-Experts model do: its gradient cannot be told apart by response. Leave it out of the "
                "`target_modules` of your adapter."
            )
        seen.add(name)
        scale = None if scales is None else scales[name]
        gradient = projection.weight_gradient(name, inputs.to(sketch.dtype), grad_outputs.to(sketch.dtype), scale)
        sketch.add_(gradient.to(sketch.device))

    with capture_gradients(model, modules, consume) as anchor, torch.enable_grad():

        def run(rows: list[int]) -> tuple[torch.Tensor, Pieces, Pieces | None]:
            nonlocal sketch, n_rows, n_tokens
            batch = collate(rows).to(model.device)
            n_rows, n_tokens = batch.inputs["input_ids"].shape
            # Under autocast and with quantised weights, half precision is what the pass uses, not what it adds up in.
            dtype = torch.promote_types(model.dtype, torch.float32)
            sketch = torch.zeros(n_rows, projection.dim, device=model.device, dtype=dtype)
            log_probs, log_sum_sq_probs = _run_model(model, batch, fused_lm_head)
            # The loss takes them to the CPU in one go.
            pieces = list(log_probs.detach().cpu().split(batch.lengths))
            sums = None if log_sum_sq_probs is None else list(log_sum_sq_probs.cpu().split(batch.lengths))
            factors = torch.ones_like(log_probs)
            if weigh is not None:
                factors = torch.cat(weigh(rows, pieces, sums)).to(log_probs)
            # It is unused where no layer ran, as adapters of expert weights, which PEFT never calls as layers.
            (used,) = torch.autograd.grad(log_probs, anchor, factors, allow_unused=True)
            if used is None:
                raise ValueError(
                    f"None of the {len(modules)} trainable linear layers, such as `{next(iter(modules))}`, takes part in a "
                    "forward pass, so there is no gradient to select by. Adapt linear layers as well, or set "
                    "`depth_fraction=1.0`."
                )
            return sketch.cpu().view(len(rows), -1, projection.dim).sum(dim=1), pieces, sums

        # Where the weights are gathered from all processes, all of them run the pass that the estimate takes.
        if batches and (lockstep or logger.isEnabledFor(logging.INFO)):
            _log_memory(model, batches, collate, projection, modules, tokens, fused_lm_head, lockstep)
        _run_batches(run, write, batches, n_own, tokens, "Computing gradient features", lockstep, disable_tqdm)
    if batches and (idle := [name for name in modules if name not in seen]):
        logger.warning(
            "%d trainable linear layers, such as `%s`, took no part in the gradient pass: the features do not cover them.",
            len(idle),
            idle[0],
        )


def _run_batches(
    run: Callable[[list[int]], tuple],
    write: Callable[..., None],
    batches: list[list[int]],
    n_own: int,
    tokens: np.ndarray,
    desc: str,
    lockstep: bool,
    disable_tqdm: bool,
) -> None:
    # Writes what `run` gives for each batch, and halves those that do not fit into memory.
    total = sum(tokens[row] for batch in batches[:n_own] for row in batch)
    with tqdm(total=total, desc=desc, unit="tok", unit_scale=True, disable=disable_tqdm) as bar:
        waiting, n_left = deque(batches), n_own
        while waiting:
            rows, failure = waiting.popleft(), None
            try:
                results = run(rows)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                failure = error
            # Out of the handler, so that the traceback does not keep the tensors of the failed pass.
            if failure is not None:
                waiting, n_left = _halve(rows, waiting, n_left, tokens, lockstep, failure.with_traceback(None))
                clear_device_cache(garbage_collection=True)
                continue
            if n_left > 0:
                write(rows, *results)
                bar.update(sum(tokens[row] for row in rows))
            n_left -= 1


def log_prob_pass(
    model: PreTrainedModel | PeftModel,
    batches: list[list[int]],
    collate: Callable[[list[int]], ResponseBatch],
    write: Callable[[list[int], Pieces, Pieces | None], None],
    *,
    tokens: np.ndarray,
    n_own: int | None = None,
    with_sum_sq_probs: bool = False,
    lockstep: bool = False,
    disable_tqdm: bool = False,
) -> None:
    """
    Log-probabilities of the completion tokens, as in [`gradient_pass`] but without a backward pass.

    Args:
        model, batches, collate, tokens, n_own, with_sum_sq_probs, lockstep, disable_tqdm:
            As in [`gradient_pass`].
        write (`Callable`):
            Called with the rows of each batch, the log-probabilities of the completion tokens, one tensor a response on
            the CPU, and in the same form `log(sum p^2)`, or `None` where it is not asked for.

    Raises:
        `RuntimeError`: If a single row, or under `lockstep` a batch, does not fit into memory.
    """
    n_own = len(batches) if n_own is None else n_own

    def run(rows: list[int]) -> tuple[Pieces, Pieces | None]:
        batch = collate(rows).to(model.device)
        log_probs, log_sum_sq_probs = _run_model(model, batch, with_sum_sq_probs or lockstep)
        sums = None if log_sum_sq_probs is None else list(log_sum_sq_probs.cpu().split(batch.lengths))
        return list(log_probs.cpu().split(batch.lengths)), sums

    with evaluation_mode(model), torch.no_grad():
        _run_batches(run, write, batches, n_own, tokens, "Computing log probs", lockstep, disable_tqdm)


def _halve(
    rows: list[int], waiting: deque[list[int]], n_left: int, tokens: np.ndarray, lockstep: bool, error: Exception
) -> tuple[deque[list[int]], int]:
    if len(rows) == 1 or lockstep:
        what = "batch" if lockstep else "response or pair"
        raise RuntimeError(
            f"A {what} of {sum(tokens[row] for row in rows)} tokens does not fit into memory beside the model. Lower "
            f"{'`gradient_batch_tokens`' if lockstep else '`max_length`'}, or shard the model over more devices."
        ) from error
    logger.warning(
        "A batch of %d tokens does not fit into memory, so it and those that follow are cut in halves. Set "
        "`gradient_batch_tokens` to half of its value: the features are then the same to the last bit in each run.",
        sum(tokens[row] for row in rows),
    )
    halves: deque[list[int]] = deque()
    n_halves = 0
    for position, batch in enumerate([rows, *waiting]):
        cut = [half for half in (batch[: (len(batch) + 1) // 2], batch[(len(batch) + 1) // 2 :]) if half]
        halves.extend(cut)
        n_halves += len(cut) if position < n_left else 0
    return halves, n_halves


def _log_memory(
    model: PreTrainedModel | PeftModel,
    batches: list[list[int]],
    collate: Callable[[list[int]], ResponseBatch],
    projection: SparseProjection,
    modules: dict[str, nn.Linear],
    tokens: np.ndarray,
    fused_lm_head: bool,
    lockstep: bool,
) -> None:
    # What autograd keeps grows with the tokens of the batch. The difference that a second copy of the shortest row makes
    # leaves out the weights, which a sharded model gathers for the occasion.
    try:
        once, twice = (collate(n * batches[-1][-1:]).to(model.device) for n in (1, 2))
        more = _saved_bytes(model, twice, fused_lm_head) - _saved_bytes(model, once, fused_lm_head)
        per_token = more / once.inputs["input_ids"].numel()
    except RuntimeError as error:
        # Where not even these fit, the pass itself says so; in lockstep, before the others have gone on.
        if lockstep or not should_reduce_batch_size(error):
            raise
        return
    largest = max(batches, key=lambda rows: len(rows) * max(tokens[row] for row in rows))
    batch_tokens = len(largest) * max(tokens[row] for row in largest)
    n_rows = max(map(len, batches))
    numel = [min(module.weight.numel(), projection.max_numel) for module in modules.values()]
    parts = {
        "activations": per_token * batch_tokens,
        "projection": 4.0 * sum(numel),
        "gradients of one module": 8.0 * n_rows * max(numel),
    }
    logger.info(
        "Memory of the gradient pass beside the model, estimated: %.2f GB for batches of up to %d tokens (%s).",
        sum(parts.values()) / 1e9,
        batch_tokens,
        ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items()),
    )


def response_gradients(
    model: PreTrainedModel | PeftModel,
    responses: PairResponses,
    projection: SparseProjection,
    *,
    pad_token_id: int,
    batch_tokens: int = 4096,
    layers: Sequence[int] | None = None,
    disable_tqdm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Projected gradient and value of `log pi(y | x)`, the sum over the completion tokens, of each response.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`gradient_pass`].
        responses ([`PairResponses`]):
            The distinct responses.
        projection ([`SparseProjection`]):
            Projection of the gradients.
        pad_token_id (`int`):
            Id to pad with.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Tokens a batch, padding included.
        layers (`Sequence[int]`, *optional*):
            As in [`target_modules`].
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The features, of shape `(n_responses, dim)`, and the log-probabilities,
        float64 of shape `(n_responses,)`, on the CPU.
    """
    features = torch.zeros(len(responses.input_ids), projection.dim)
    features = features.to(torch.promote_types(model.dtype, torch.float32))
    logps = torch.zeros(len(responses.input_ids), dtype=torch.float64)

    def write(rows: list[int], sketches: torch.Tensor, pieces: Pieces, _: Pieces | None) -> None:
        features[rows] = sketches
        logps[rows] = torch.stack([piece.double().sum() for piece in pieces])

    gradient_pass(
        model,
        length_batches(responses.input_ids, batch_tokens, responses.lengths),
        lambda rows: one_a_row(responses, rows, pad_token_id),
        projection,
        write,
        tokens=responses.lengths,
        layers=layers,
        disable_tqdm=disable_tqdm,
    )
    return features, logps


class _PairKeys(Sequence[list[int]]):
    # Ids of both responses of a pair, made as they are asked for.
    def __init__(self, responses: PairResponses) -> None:
        self._responses = responses

    def __len__(self) -> int:
        return len(self._responses.chosen)

    def __getitem__(self, pair: Any) -> Any:
        ids = self._responses.input_ids
        return ids[self._responses.chosen[pair]] + ids[self._responses.rejected[pair]]


def pair_batches(
    responses: PairResponses, batch_tokens: int, pad_token_id: int, packed: bool
) -> tuple[list[list[int]], Callable[[list[int]], ResponseBatch], np.ndarray]:
    """
    Batches of pairs whose two responses go through the model together.

    Args:
        responses ([`PairResponses`]):
            The distinct responses.
        batch_tokens (`int`):
            Tokens a batch, padding included.
        pad_token_id (`int`):
            Id to pad with.
        packed (`bool`):
            Whether both responses of a pair share a row and one copy of the prompt, see [`can_pack`].

    Returns:
        `tuple[list[list[int]], Callable[[list[int]], ResponseBatch], np.ndarray]`: For [`gradient_pass`]: the pairs of
        each batch, what makes the input of the model from them, and the tokens of each pair.
    """
    pairs = np.stack([responses.chosen, responses.rejected], axis=1)
    keys = _PairKeys(responses)
    if packed:
        lengths = np.fromiter((packed_length(responses, pair) for pair in range(len(pairs))), np.int64)
        batches = length_batches(keys, batch_tokens, lengths)
        return batches, lambda rows: one_pair_a_row(responses, rows, pad_token_id), lengths
    lengths = responses.lengths[pairs]
    batches = length_batches(keys, batch_tokens, 2 * lengths.max(axis=1))
    return (
        batches,
        lambda rows: one_a_row(responses, pairs[rows].ravel().tolist(), pad_token_id),
        lengths.sum(axis=1),
    )


def pair_gradients(
    model: PreTrainedModel | PeftModel,
    responses: PairResponses,
    projection: SparseProjection,
    weigh: Weigh,
    *,
    pad_token_id: int,
    batch_tokens: int = 4096,
    packed: bool = True,
    layers: Sequence[int] | None = None,
    disable_tqdm: bool = False,
) -> torch.Tensor:
    """
    Projected gradient of a loss of each pair, out of one backward pass through both of its responses.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`gradient_pass`].
        responses ([`PairResponses`]):
            The distinct responses.
        projection ([`SparseProjection`]):
            Projection of the gradients.
        weigh (`Callable`):
            Derivatives of the loss, as in [`gradient_pass`]; the responses of a batch are chosen and rejected of its
            first pair, of the second, and so on.
        pad_token_id (`int`):
            Id to pad with.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Tokens a batch, padding included.
        packed (`bool`, *optional*, defaults to `True`):
            Whether both responses of a pair share a row and one copy of the prompt, see [`can_pack`].
        layers (`Sequence[int]`, *optional*):
            As in [`target_modules`].
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        `torch.Tensor` of shape `(n_pairs, dim)`: The features, on the CPU.
    """
    features = torch.zeros(len(responses.chosen), projection.dim)
    features = features.to(torch.promote_types(model.dtype, torch.float32))

    def write(rows: list[int], sketches: torch.Tensor, *_: Any) -> None:
        features[rows] = sketches

    batches, collate, tokens = pair_batches(responses, batch_tokens, pad_token_id, packed)
    gradient_pass(
        model,
        batches,
        collate,
        projection,
        write,
        tokens=tokens,
        weigh=weigh,
        layers=layers,
        disable_tqdm=disable_tqdm,
    )
    return features
