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
What the policy tells of each pair of a trainer's pool, its gradient feature or its loss and margin: which passes that
takes, where they are kept, and what is made of them.

| `depth_feature` | feature of a pair |
| --- | --- |
| `"pair"` | gradient of its loss, `c+ g(y+) + c- g(y-)`: the literal reading of the paper |
| `"sum"` | `g(y+) + g(y-)` |
| `"chosen"` | `g(y+)` |
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast, broadcast_object_list, gather_object
from trl import DPOTrainer

from .feature_store import FeatureStore, StoreMismatchError, rows_hash, tensors_hash
from .gradients import Pieces, can_pack, gradient_pass, log_prob_pass, pair_batches
from .pair_loss import loss_of_one_pair, needs_reference, pair_coefficients, reference_pass
from .preconditioning import second_moment_scales
from .projection import SparseProjection
from .responses import PairResponses, deal, length_batches, one_a_row, packed_length


logger = get_logger(__name__)

T = TypeVar("T")

# Rows that are put together, or sent between processes, at a time.
_CHUNK = 1024


def runs_in_lockstep(trainer: DPOTrainer) -> bool:
    """
    Whether the weights of a trainer's model are sharded, so that each forward pass takes all processes.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer.

    Returns:
        `bool`: Whether they are.
    """
    if trainer.accelerator.distributed_type == DistributedType.FSDP:
        return True
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return plugin is not None and plugin.zero_stage == 3


def _packing_pays(trainer: DPOTrainer, responses: PairResponses, both: bool) -> bool:
    # Multiplications of a forward pass: one a weight and token, and those of attention, which is square in the length.
    # A mask of its own makes attention compute the half that a causal one leaves out. `both`: the alternative is not one
    # row a response but two rows a pair.
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = model.config.get_text_config()
    # ZeRO-3 leaves empty parameters behind, with their size as an attribute.
    weights = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    embeddings = model.get_input_embeddings().weight
    weights -= getattr(embeddings, "ds_numel", embeddings.numel())
    attention = config.num_hidden_layers * config.hidden_size
    rows = np.concatenate([responses.chosen, responses.rejected]) if both else slice(None)
    alone = sum(n * weights + n * n * attention for n in responses.lengths[rows].tolist())
    lengths = (packed_length(responses, pair) for pair in range(len(responses.chosen)))
    return sum(n * weights + 2 * n * n * attention for n in lengths) < alone


class PairFeatures:
    """
    Computes the features of a trainer's pairs, on disk and in shares of all processes.

    A response is identified by its truncated tokens and where the completion starts. The features take one backward
    pass a distinct response; or, where a cost estimate says that it is less and the model allows it, one a pair with
    both responses behind one copy of the prompt. `ld_alpha` makes the gradient of a response depend on its partner, so
    with it and `depth_feature="pair"` both responses of every pair are differentiated anew: for a prompt with k
    responses and all pairs, `k (k - 1)` responses instead of `k`.

    Args:
        trainer ([`BPOTrainer`]):
            The trainer. Its options decide.
        responses ([`PairResponses`]):
            The distinct responses of its pool.
        normalize (`bool`):
            Whether the features will be scaled to unit length. Where it makes no difference then, the reference is
            left out.
    """

    def __init__(self, trainer: Any, responses: PairResponses, normalize: bool) -> None:
        self.trainer = trainer
        self.responses = responses
        self.normalize = normalize
        self._pairs = np.stack([responses.chosen, responses.rejected], axis=1)
        self._rows_hashes: dict[str, str] = {}
        self._ref_logps: torch.Tensor | None = None
        self._folder = Path()

    def at_this_step(self, folder: Path, compute: Callable[[Path], T]) -> T:
        """
        Compute something under the policy of this step, with a store of its own that serves a run that is killed and
        started again. Those of earlier steps are deleted once it is done. All processes must call this.

        Args:
            folder (`Path`):
                Folder of the stores of all steps.
            compute (`Callable`):
                Called with the folder of the store of this step.

        Returns:
            What `compute` returns.

        Raises:
            `ValueError`: If the store is one of other data, of other options, or at step 0 of another model.
        """
        step, accelerator = self.trainer.state.global_step, self.trainer.accelerator
        own = folder / f"step-{step:06d}"
        try:
            result = compute(own)
        except StoreMismatchError as error:
            # Steps that were trained again need not give the same bits on a GPU. All else is for the user to decide.
            # The folder of the process that failed, by its name: they may have one each.
            trained_again = step > 0 and own.name in error.folder.parts
            if not trained_again or not set(error.differing) <= {"model", "second_moment", "reference"}:
                raise
            logger.warning(f"{error} Steps that were trained again may differ so, and they are computed anew.")
            remove_stores(own, accelerator)
            result = compute(own)
        remove_stores(folder, accelerator, keep=own)
        return result

    def compute(self, projection: SparseProjection, folder: Path) -> "StoredPairs | None":
        """
        Compute the features under the current policy, or what is missing of them.

        All processes must call this.

        Args:
            projection ([`SparseProjection`]):
                Projection of the gradients.
            folder (`Path`):
                Folder of the [`FeatureStore`]. That of the reference log-probabilities lies beside it.

        Returns:
            [`StoredPairs`] of shape `(n_pairs, dim)`, *optional*: Feature of each pair, not normalised, on the main
            process; `None` on the others. They are on the disk, in that folder. A pair whose feature is zero has no
            gradient.

        Raises:
            `ValueError`: If the folder holds features that were made otherwise.
            `OSError`: If the disk is full.
        """
        trainer, args = self.trainer, self.trainer.args
        self._folder = folder
        scales = second_moment_scales(trainer, args.gradient_layers) if args.precondition_gradients else None
        options = {"layers": args.gradient_layers, "scales": scales, "lockstep": runs_in_lockstep(trainer)}
        options["with_sum_sq_probs"] = trainer.use_weighting
        path = self._choose_path()
        store = self._open(projection, folder, path, scales)
        try:
            with trainer.accelerator.autocast():
                if path == "responses":
                    self._response_pass(store, projection, options)
                else:
                    self._pair_pass(store, projection, path == "packed pairs", options)
            scalars = self._collect(store)
            coefficients = self._coefficients(scalars) if path == "responses" else None
        finally:
            store.close()
        if not trainer.accelerator.is_main_process:
            return None
        if coefficients is None:
            return StoredPairs(store, np.arange(store.n_rows)[:, None], np.ones((store.n_rows, 1)))
        return StoredPairs(store, self._pairs, coefficients.numpy())

    def losses_and_margins(self, folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """
        The loss of each pair, and its implicit reward margin `beta (log-ratio of chosen - log-ratio of rejected)`,
        under the current policy, or what is missing of them. One forward pass a pair, and the reference's.

        All processes must call this.

        Args:
            folder (`Path`):
                As in [`~PairFeatures.compute`].

        Returns:
            `tuple[np.ndarray, np.ndarray]`: Losses and margins, float64 of shape `(n_pairs,)`, on all processes.

        Raises:
            `ValueError`: If the folder holds something that was made otherwise.
            `OSError`: If the disk is full.
        """
        trainer, args, responses = self.trainer, self.trainer.args, self.responses
        self._folder = folder
        packed = self._can_pack(both=True)
        lockstep = runs_in_lockstep(trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        ref_logps = self._reference()
        header: dict[str, Any] = {"model": self._hash(model.named_parameters()), **self._rows_header("pairs")}
        header |= {"features": "losses and margins", "packed": packed, **self._loss_options()}
        header |= {"gradient_batch_tokens": args.gradient_batch_tokens}
        header |= {"mixed_precision": trainer.accelerator.mixed_precision}
        header |= {"reference": tensors_hash([("ref_logps", ref_logps)])}
        store = self._open_store(folder, header, len(self._pairs), 0, scalars=("loss", "margin"))
        pad_token_id = trainer._tokenizer.pad_token_id
        batches, collate, tokens = pair_batches(responses, args.gradient_batch_tokens, pad_token_id, packed)

        def write(rows: list[int], pieces: Pieces, sums: Pieces | None) -> None:
            losses, margins = [], []
            with loss_of_one_pair(trainer, responses) as loss_of:
                for i, pair in enumerate(rows):
                    two = slice(2 * i, 2 * i + 2)
                    log_probs = [piece.double() for piece in pieces[two]]
                    losses.append(loss_of(pair, log_probs, None if sums is None else sums[two], ref_logps[pair])[0])
                    log_ratios = self._cut_sums(log_probs) - ref_logps[pair]
                    margins.append(trainer.beta * (log_ratios[0] - log_ratios[1]).item())
            store.write(rows, np.empty((len(rows), 0)), loss=np.asarray(losses), margin=np.asarray(margins))

        try:
            with trainer.accelerator.autocast():
                own, n_own = self._deal(store, batches, lockstep)
                hidden = args.disable_tqdm or not trainer.accelerator.is_main_process
                options = {"with_sum_sq_probs": trainer.use_weighting, "lockstep": lockstep, "disable_tqdm": hidden}
                log_prob_pass(model, own, collate, write, tokens=tokens, n_own=n_own, **options)
            scalars = self._collect(store)
        finally:
            store.close()
        return scalars["loss"].numpy(), scalars["margin"].numpy()

    def _choose_path(self) -> str:
        coupled = self.trainer.args.depth_feature == "pair" and self.trainer.ld_alpha is not None
        path = "pairs" if coupled else "responses"
        if self.trainer.args.depth_feature != "chosen" and self._can_pack(coupled):
            path = "packed pairs"
        logger.info(f"Gradient features are computed from {path}.")
        return path

    def _can_pack(self, both: bool) -> bool:
        trainer, packed = self.trainer, [False]
        if _packing_pays(trainer, self.responses, both):
            model = trainer.accelerator.unwrap_model(trainer.model)
            with trainer.accelerator.autocast():
                packed = [can_pack(model, self.responses, trainer._tokenizer.pad_token_id)]
        # The comparison in floats might not come out alike everywhere.
        broadcast_object_list(packed, from_process=0)
        return packed[0]

    def _loss_options(self) -> dict[str, Any]:
        names = ["loss_type", "loss_weights", "beta", "label_smoothing", "f_divergence_type"]
        names += ["f_alpha_divergence_coef", "ld_alpha", "use_weighting", "discopop_tau"]
        return {name: getattr(self.trainer.args, name) for name in names}

    def _open(
        self, projection: SparseProjection, folder: Path, path: str, scales: dict[str, torch.Tensor] | None
    ) -> FeatureStore:
        trainer, args = self.trainer, self.trainer.args
        model = trainer.accelerator.unwrap_model(trainer.model)
        header: dict[str, Any] = {
            "model": self._hash(model.named_parameters()),
            **self._rows_header(path),
            "features": path,
            "seed": args.seed,
            "gradient_batch_tokens": args.gradient_batch_tokens,
            "mixed_precision": trainer.accelerator.mixed_precision,
            "gradient_layers": args.gradient_layers,
            "second_moment": None if scales is None else tensors_hash(scales.items()),
        }
        scalars: tuple[str, ...] = ()
        if path == "responses":
            scalars = ("logp", "alignment")
            header["responses"] = "chosen" if args.depth_feature == "chosen" else "all"
            header["use_weighting"] = trainer.use_weighting
        else:
            header |= {"depth_feature": args.depth_feature, "normalize": self.normalize, **self._loss_options()}
            if trainer.precompute_ref_logps:
                header["reference"] = tensors_hash([("ref_logps", self._reference())])
        dtype = "float64" if model.dtype == torch.float64 else args.gradient_dtype
        n_rows = len(self.responses.input_ids) if path == "responses" else len(self._pairs)
        n_needed = len(np.unique(self.responses.chosen)) if header.get("responses") == "chosen" else n_rows
        options = {"scalars": scalars, "dtype": dtype, "n_needed": n_needed}
        return self._open_store(folder, header, n_rows, projection.dim, **options)

    def _open_store(self, *args: Any, **kwargs: Any) -> FeatureStore:
        # What one process cannot open, none does: the others would wait for it forever.
        accelerator, failure = self.trainer.accelerator, None
        try:
            store = FeatureStore(*args, **kwargs, part=accelerator.process_index)
        except (ValueError, OSError) as error:
            failure = error
        failures = [error for error in gather_object([failure]) if error is not None]
        if failures:
            if failure is None:
                store.close()
            raise failures[0]
        return store

    def _hash(self, weights: Iterable[tuple[str, torch.Tensor]]) -> str:
        # Sharded weights have a hash on each process.
        return "-".join(sorted(set(gather_object([tensors_hash(weights)]))))

    def _rows_header(self, path: str) -> dict[str, str]:
        if path not in self._rows_hashes:
            ids, starts = self.responses.input_ids, self.responses.starts
            rows = ((index,) for index in range(len(ids))) if path == "responses" else self._pairs
            contents = ([n for index in row for n in (len(ids[index]), starts[index], *ids[index])] for row in rows)
            self._rows_hashes[path] = rows_hash(contents)
        return {"rows": self._rows_hashes[path]}

    def _deal(self, store: FeatureStore, batches: list[list[int]], lockstep: bool) -> tuple[list[list[int]], int]:
        # A batch that is done in part is computed as a whole, so that a resumed run adds up the same floats.
        accelerator = self.trainer.accelerator
        done = torch.as_tensor(store.done, dtype=torch.uint8, device=accelerator.device)
        done = accelerator.gather(done[None]).amax(dim=0).bool().cpu().numpy()
        waiting = [batch for batch in batches if not done[batch].all()]
        return deal(waiting, accelerator.process_index, accelerator.num_processes, lockstep)

    def _run(
        self,
        store: FeatureStore,
        projection: SparseProjection,
        batches: list[list[int]],
        collate: Callable,
        options: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        trainer = self.trainer
        own, n_own = self._deal(store, batches, options["lockstep"])
        hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
        model = trainer.accelerator.unwrap_model(trainer.model)
        gradient_pass(model, own, collate, projection, n_own=n_own, disable_tqdm=hidden, **options, **kwargs)

    def _response_pass(self, store: FeatureStore, projection: SparseProjection, options: dict[str, Any]) -> None:
        responses, args = self.responses, self.trainer.args
        pad_token_id = self.trainer._tokenizer.pad_token_id
        batches = length_batches(responses.input_ids, args.gradient_batch_tokens, responses.lengths)
        if args.depth_feature == "chosen":
            needed = np.zeros(len(responses.input_ids), dtype=bool)
            needed[responses.chosen] = True
            batches = [kept for batch in batches if (kept := [row for row in batch if needed[row]])]

        def write(rows: list[int], features: torch.Tensor, pieces: Pieces, sums: Pieces | None) -> None:
            logp = [piece.double().sum().item() for piece in pieces]
            alignment = [0.0] * len(rows)
            if sums is not None:
                alignment = [
                    ((piece.double() - other.double()).sum() / max(len(piece), 1)).item()
                    for piece, other in zip(pieces, sums, strict=True)
                ]
            store.write(rows, features.numpy(), logp=np.asarray(logp), alignment=np.asarray(alignment))

        self._run(
            store,
            projection,
            batches,
            lambda rows: one_a_row(responses, rows, pad_token_id),
            options,
            write=write,
            tokens=responses.lengths,
        )

    def _pair_pass(
        self, store: FeatureStore, projection: SparseProjection, packed: bool, options: dict[str, Any]
    ) -> None:
        trainer, args, responses = self.trainer, self.trainer.args, self.responses
        cancels = not needs_reference(trainer, self.normalize)
        through_loss = args.depth_feature == "pair" and not (cancels and trainer.ld_alpha is None)
        ref_logps = self._reference() if through_loss and not cancels else None
        batches, collate, tokens = pair_batches(
            responses, args.gradient_batch_tokens, trainer._tokenizer.pad_token_id, packed
        )

        def weigh(rows: list[int], pieces: Pieces, sums: Pieces | None) -> Pieces:
            weights: Pieces = []
            with loss_of_one_pair(trainer, responses) as loss_of:
                for i, pair in enumerate(rows):
                    # The two copies of one response need not round alike, and what cancels shall do so to the last
                    # bit. So the first stands for both, and takes the factors of both.
                    same = bool(self._pairs[pair, 0] == self._pairs[pair, 1])
                    two = [2 * i, 2 * i if same else 2 * i + 1]
                    log_probs = [pieces[index].double() for index in two]
                    if through_loss:
                        # Where the reference cancels, any other will do. With the policy itself no derivative vanishes.
                        reference = self._cut_sums(log_probs) if ref_logps is None else ref_logps[pair]
                        reference = reference[[0, 0]] if same else reference
                        own_sums = None if sums is None else [sums[index] for index in two]
                        _, factors = loss_of(pair, log_probs, own_sums, reference)
                    else:
                        sign = -1.0 if args.depth_feature == "pair" else 1.0
                        factors = [torch.full_like(log_probs[0], sign), torch.ones_like(log_probs[1])]
                    weights += [factors[0] + factors[1], torch.zeros_like(factors[1])] if same else factors
            return weights

        def write(rows: list[int], features: torch.Tensor, *_: Any) -> None:
            store.write(rows, features.numpy())

        self._run(store, projection, batches, collate, options, write=write, tokens=tokens, weigh=weigh)

    def _cut_sums(self, log_probs: Pieces) -> torch.Tensor:
        cut = min(map(len, log_probs))
        alpha = 1.0 if self.trainer.ld_alpha is None else self.trainer.ld_alpha
        return torch.stack([piece[:cut].sum() + alpha * piece[cut:].sum() for piece in log_probs])

    def _reference(self) -> torch.Tensor:
        # Of the two responses of each pair. Once for all selections, unless the reference follows the policy.
        trainer, args, pairs = self.trainer, self.trainer.args, torch.as_tensor(self._pairs)
        if trainer.precompute_ref_logps:
            # TRL keeps no reference model then, and the policy is no longer the reference once it is trained.
            columns = [torch.tensor(trainer.train_dataset[f"ref_{side}_logps"][:]) for side in ("chosen", "rejected")]
            return torch.stack(columns, dim=1).double()
        if self._ref_logps is not None and not args.sync_ref_model:
            return self._ref_logps
        by_pair, pad_token_id = trainer.ld_alpha is not None, trainer._tokenizer.pad_token_id
        if by_pair:
            batches, _, _ = pair_batches(self.responses, args.gradient_batch_tokens, pad_token_id, packed=False)
        else:
            batches = length_batches(self.responses.input_ids, args.gradient_batch_tokens, self.responses.lengths)
        model = trainer.ref_model or trainer.accelerator.unwrap_model(trainer.model)
        # Of the policy, the adapter that is trained is no part of its reference. A model of its own is all reference.
        whole = trainer.ref_model is not None
        fixed = ((name, weight) for name, weight in model.named_parameters() if whole or not weight.requires_grad)
        header = {"model": self._hash(fixed), **self._rows_header("pairs" if by_pair else "responses")}
        header |= {"ld_alpha": trainer.ld_alpha, "gradient_batch_tokens": args.gradient_batch_tokens}
        names = ("chosen", "rejected") if by_pair else ("logp",)
        n_rows = len(self._pairs) if by_pair else len(self.responses.input_ids)
        folder = (self._folder if args.sync_ref_model else self._folder.parent) / "reference"
        store = self._open_store(folder, header, n_rows, 0, scalars=names)

        def write(rows: list[int], logps: torch.Tensor) -> None:
            values = logps.view(len(rows), -1).T.numpy()
            store.write(rows, np.empty((len(rows), 0)), **dict(zip(names, values, strict=True)))

        try:
            own, n_own = self._deal(store, batches, runs_in_lockstep(trainer))
            reference_pass(trainer, self.responses, own, write, pad_token_id=pad_token_id, n_own=n_own)
            logps = self._collect(store)
        finally:
            store.close()
        self._ref_logps = torch.stack([logps[name] for name in names], dim=1) if by_pair else logps["logp"][pairs]
        return self._ref_logps

    def _collect(self, store: FeatureStore) -> dict[str, torch.Tensor]:
        # Brings what other processes have to the main one: through the folder where they share it, else by the network.
        # Returns the numbers that came with the features, on all processes.
        accelerator = self.trainer.accelerator
        device = accelerator.device
        store.flush()
        if accelerator.num_processes > 1:
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                store.read_other_parts()
            has = torch.as_tensor(store.done, dtype=torch.uint8, device=device)
            has = accelerator.gather(has[None]).cpu().numpy()
            missing = np.flatnonzero(has.any(axis=0) & ~has[0].astype(bool))
            owner = has[:, missing].argmax(axis=0)
            for start in range(0, len(missing), _CHUNK):
                rows = missing[start : start + _CHUNK]
                own = owner[start : start + _CHUNK] == accelerator.process_index
                features = np.zeros((len(rows), store.dim), dtype=store.feature_dtype)
                features[own] = store.read(rows[own])
                numbers = np.zeros((len(store.scalars), len(rows)))
                for number, name in zip(numbers, store.scalars, strict=True):
                    number[own] = store.scalar(name)[rows[own]]
                sent = [
                    accelerator.reduce(torch.as_tensor(x, device=device)).cpu().numpy() for x in (features, numbers)
                ]
                if accelerator.is_main_process:
                    store.write(rows.tolist(), sent[0], **dict(zip(store.scalars, sent[1], strict=True)))
            store.flush()
        scalars = {name: torch.as_tensor(store.scalar(name).copy()) for name in store.scalars}
        if accelerator.num_processes == 1:
            return scalars
        return {name: broadcast(value.to(device), from_process=0).cpu() for name, value in scalars.items()}

    def _coefficients(self, scalars: dict[str, torch.Tensor]) -> torch.Tensor:
        trainer, args = self.trainer, self.trainer.args
        if args.depth_feature != "pair":
            return torch.tensor([1.0, 1.0 if args.depth_feature == "sum" else 0.0]).expand(len(self._pairs), 2)
        if not needs_reference(trainer, self.normalize):
            return torch.tensor([-1.0, 1.0]).expand(len(self._pairs), 2)
        alignments = scalars["alignment"] if trainer.use_weighting else None
        return pair_coefficients(trainer, self.responses, scalars["logp"], self._reference(), alignments)


class StoredPairs:
    """
    Features of pairs, read from the disk as they are asked for and put together from those of their responses.

    Args:
        store ([`FeatureStore`]):
            Features of the responses. It may be closed: reading opens its files again.
        pairs (`np.ndarray` of shape `(n_pairs, m)`):
            The rows of the store that make each pair: its chosen and its rejected response, or itself.
        coefficients (`np.ndarray` of shape `(n_pairs, m)`):
            Their factors. A response whose factor is 0 in all pairs need not be there.

    Attributes:
        shape (`tuple[int, int]`):
            Number of pairs and of dimensions.
    """

    def __init__(self, store: FeatureStore, pairs: np.ndarray, coefficients: np.ndarray) -> None:
        self.shape = (len(pairs), store.dim)
        self._store = store
        used = coefficients.any(axis=0)
        self._pairs, self._coefficients = pairs[:, used], coefficients[:, used]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        pairs, coefficients = self._pairs[rows], self._coefficients[rows]
        features = np.zeros((len(pairs), self.shape[1]), dtype=self._store.feature_dtype)
        # In parts, as each response's feature is one more copy.
        for start in range(0, len(pairs), _CHUNK):
            part = slice(start, start + _CHUNK)
            for stored, factors in zip(pairs[part].T, coefficients[part].T.astype(features.dtype), strict=True):
                features[part] += factors[:, None] * self._store.read(stored)
        return features

    def close(self) -> None:
        """Close the files."""
        self._store.close()


def remove_stores(folder: Path, accelerator: Any, keep: Path | None = None) -> None:
    """
    Delete stores once they are not needed. All processes must call this.

    Args:
        folder (`Path`):
            Folder that holds them.
        accelerator ([`~accelerate.Accelerator`]):
            The accelerator.
        keep (`Path`, *optional*):
            The one to keep, with the reference log-probabilities beside it. If `None`, none.
    """
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        for path in folder.glob("*"):
            if keep is None or path.name not in (keep.name, "reference"):
                shutil.rmtree(path, ignore_errors=True)
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    # Another process might be about to open a new store in the same place.
    accelerator.wait_for_everyone()
