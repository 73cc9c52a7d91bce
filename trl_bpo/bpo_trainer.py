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

"""The trainer that selects the pairs it trains on."""

import json
import textwrap
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import skip_first_batches
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import get_config_model_id

from .bpo_config import DATA_STRATEGIES, GRADIENT_STRATEGIES, POLICY_STRATEGIES, BPOConfig
from .capture import stacked_weights, target_modules
from .card import CuratedCardData
from .clustering import check_n_clusters
from .depth import DepthSelection, DepthSelector
from .model_card import add_training_data
from .pair_features import PairFeatures, StoredPairs, remove_stores
from .pool import PairPool, identify_pairs, open_truncated_responses
from .preconditioning import check_second_moment
from .processes import meanwhile, on_main_process
from .projection import SparseProjection
from .recorder import SelectionRecorder
from .responses import unique_responses
from .rules import draw_scores
from .sampler import ActivePairsSampler
from .schedule import SelectionSchedule
from .selection_state import load_header, load_selection_state, save_selection_state
from .strategies import RULE_OF_STRATEGY, check_strategy, measure_by_data, measure_by_policy
from .tracking import SelectionPicturesCallback


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)

# With another value a resumed run would not find its place in the selection.
_RESUMED_WITH = ("depth_strategy", "seed", "data_seed")


class BPOTrainer(DPOTrainer):
    """
    Trainer for Balanced Preference Optimization between Knowledge Breadth and Depth (BPO, arXiv 2411.10914).

    A drop-in for [`~trl.DPOTrainer`]. It trains on the fraction `depth_fraction` of the pairs whose gradients lie
    nearest to the centres of their K-means clusters, selects them when training starts, and selects anew under the
    current policy on a schedule. Everything else is inherited; with `depth_fraction=1.0` it trains bit for bit like
    [`~trl.DPOTrainer`].

    The whole pool stays the training dataset and a sampler of constant length yields the selected pairs, so optimizer,
    learning-rate schedule, number of steps and precomputed reference log-probabilities stay valid at a re-selection.

    Overridden methods of [`~trl.DPOTrainer`] and of [`~transformers.Trainer`], and why:

    - `__init__`: refuses what cannot work while pairs are selected, and numbers the pairs.
    - `_prepare_dataset`: a response that was cut at the token limit (`chosen_truncated`, `rejected_truncated`) gets no
      end of turn, since the policy never wrote one.
    - `_get_train_sampler`: yields the selected pairs.
    - `num_examples`: counts the selected pairs, so that the logged throughput is theirs.
    - `get_batch_samples`: selects at the boundary of an optimizer step, before the first batch of the step is drawn, and
      takes no step after the last, where a run that was over is resumed.
    - `_save_checkpoint`, `_load_optimizer_and_scheduler`: the selection is saved and restored with a checkpoint.
    - `train`: saves and pushes the curated dataset when training ends.
    - `create_model_card`: says what was trained on, and links the curated dataset.

    Each selection is saved in `output_dir`: the pairs that it kept as `_selections/step-*/train.parquet` with a manifest
    beside them, one row for every pair of the pool with its `depth_*` columns as `_selections/step-*.parquet`, and its
    metrics as `_selections/step-*.json`. The pairs of the last one are saved with their card as `_curated_dataset`. The
    leading underscore keeps your data out of the model repository when you push the model. `trl-bpo report`, `explain` and
    `push` read this folder.

    Callbacks that have a method `on_selection(args, state, control, selection, pair_ids)` get it called on every process
    after each selection in training, before the first of its batches is drawn: with the [`DepthSelection`], and with the
    ids of the pairs it kept, a `pyarrow.ChunkedArray`. What it returns plays no part.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`~trl.DPOTrainer`].
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            As in [`~trl.DPOTrainer`].
        args ([`BPOConfig`], *optional*):
            Configuration. If `None`, a default one with the output directory `{model}-BPO`.
        data_collator, train_dataset, *other, **kwargs:
            As in [`~trl.DPOTrainer`], in the same order. Where the training dataset has `prompt_id` and `pair_id`, they
            are used; otherwise they are computed.

    Attributes:
        selection ([`DepthSelection`], *optional*):
            The last selection, over the rows of `train_dataset`.
        seconds_selecting (`float`):
            Time that selections took in the last training.
        curated_card_fields (`dict[str, Any]`):
            Fields of [`CuratedCardData`] that the trainer cannot know (`judge`, `license`, ...), for the card of the
            curated dataset. It adds to those of `funnel` and `settings` and replaces the others.

    Raises:
        `ValueError`: If the dataset or an option does not go with selection.

    Example:
    ```python
    >>> from datasets import load_dataset
    >>> from trl_bpo import BPOConfig, BPOTrainer

    >>> trainer = BPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=BPOConfig("Qwen2.5-0.5B-BPO", depth_fraction=0.25),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    args: BPOConfig
    model: Any
    train_dataset: Any
    _pool: Any
    _selection_steps: list[int]
    _seen: np.ndarray
    _schedule: SelectionSchedule
    _run_state: Any
    _started: float
    seconds_selecting: float

    _tag_names = ["trl", "dpo", "bpo"]
    _name = "BPO"
    _paper = {
        "title": "BPO: Towards Balanced Preference Optimization between Knowledge Breadth and Depth in Alignment",
        "id": "2411.10914",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{wang2025bpo,
                title        = {{BPO: Towards Balanced Preference Optimization between Knowledge Breadth and Depth in Alignment}},
                author       = {Sizhe Wang and Yongqi Tong and Hengyuan Zhang and Dawei Li and Xin Zhang and Tianlong Chen},
                year         = 2025,
                booktitle    = {Proceedings of the 2025 Conference of the Nations of the Americas Chapter of the Association for Computational Linguistics},
                eprint       = {2411.10914},
                archivePrefix= {arXiv},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: BPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        *other: Any,
        **kwargs: Any,
    ) -> None:
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = BPOConfig(f"{model_name.split('/')[-1]}-BPO")
        elif not isinstance(args, BPOConfig):
            raise TypeError(f"`args` must be a `BPOConfig`, got `{type(args).__name__}`. Replace the class name.")

        self.selection: DepthSelection | None = None
        self.curated_card_fields: dict[str, Any] = {}
        self._pool: PairPool | None = None
        self._sampler: Any = None
        self._epoch_iterator: Iterator | None = None
        self._iterator: Iterator = iter(())
        self._loader: Any = None
        self._selector = DepthSelector(
            args.depth_fraction,
            n_clusters=args.depth_clusters,
            scope=args.depth_scope,
            rule=RULE_OF_STRATEGY.get(args.depth_strategy, "nearest"),
            normalize=args.normalize_gradients,
            min_pairs_per_prompt=args.min_pairs_per_prompt,
            seed=args.seed,
        )
        self._projection = SparseProjection(args.projection_dim, args.seed)
        if args.depth_fraction < 1.0 and isinstance(train_dataset, Dataset | IterableDataset):
            self._pool = PairPool(identify_pairs(train_dataset, args))
            check_strategy(args.depth_strategy, self._pool.pairs)
            train_dataset = self._pool.numbered_pairs
        super().__init__(model, ref_model, args, data_collator, train_dataset, *other, **kwargs)
        self._recorder = SelectionRecorder(self)
        if self._pool is None:
            return

        self._pool.keep_rows_of(self.train_dataset)
        n = len(self._pool.pair_ids)
        if args.depth_clusters is not None:
            check_n_clusters("depth_clusters", args.depth_clusters, n)
        # The one sampler of every dataloader: a second dataloader does not take the selections away from the first.
        n_active = self._selector.check(self._pool.prompt_ids)
        self._sampler = ActivePairsSampler(n_active, args.seed if args.data_seed is None else args.data_seed)
        self._forget_selections()
        self.add_callback(SelectionPicturesCallback(self.callback_handler, self._pool.prompt_ids))
        if args.depth_strategy in POLICY_STRATEGIES and self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "FSDP 1 flattens the weights, so that their gradients cannot be told apart. Set `fsdp_version: 2`."
            )
        if args.depth_strategy in GRADIENT_STRATEGIES:
            policy = self.accelerator.unwrap_model(self.model)
            covered = target_modules(policy, args.gradient_layers)
            if stacked := stacked_weights(policy):
                logger.warning(
                    f"The gradient features cover {len(covered)} linear layers, but not {len(stacked)} trainable "
                    f"parameters that stack several weights, such as `{stacked[0]}`."
                )
            if args.precondition_gradients:
                check_second_moment(self)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return open_truncated_responses(dataset, processing_class, self._tokenizer)

    # Selection

    def select_pairs(self) -> DepthSelection:
        """
        Select pairs under the current policy. Training calls this on its schedule; it also works without training, and
        then [`~BPOTrainer.curated_dataset`] is what was kept.

        Under several processes all of them must call it. They share the responses, and all get the same selection. In
        training, a call of yours changes nothing about what is trained on.

        Returns:
            [`DepthSelection`]: The selection over the rows of `train_dataset`.

        Raises:
            `ValueError`: If `depth_fraction` is 1.0, if the features are not finite or all zero, or if unfinished features
                of other data or options lie in `output_dir`.
            `OSError`: If the disk has no room for the features.
        """
        if self._pool is None:
            raise ValueError("`depth_fraction=1.0` keeps every pair, so there is nothing to select. Set it below 1.0.")
        strategy = self.args.depth_strategy
        if self.selection is not None and strategy in DATA_STRATEGIES and strategy != "random":
            # It does not change.
            return self.selection
        by_policy = measure_by_policy(self) if strategy in POLICY_STRATEGIES else None

        def select() -> DepthSelection:
            measures = measure_by_data(self) if by_policy is None else by_policy
            ids = self._pool.pair_ids, self._pool.prompt_ids
            if isinstance(measures, np.ndarray) and measures.ndim == 1:
                return self._selector.select_by_score(measures, *ids)
            self._recorder.save_features(measures)
            # The draw 0 is that of the steps before the first selection.
            return self._selector.select(measures, *ids, self._num_selections + 1)

        try:
            selection = on_main_process(self.accelerator, select)
        finally:
            if isinstance(by_policy, StoredPairs):
                by_policy.close()
        if not self.is_in_train:
            remove_stores(self._features_path, self.accelerator)
            self.selection = selection
            steps = self._steps_with(self.state.global_step)
            meanwhile(self.accelerator, lambda: self._recorder.record(selection, steps, selection.metrics))
        return selection

    @property
    def _selection_step(self) -> int:
        return self._selection_steps[-1] if self._selection_steps else 0

    @property
    def _num_selections(self) -> int:
        return len(self._selection_steps)

    @property
    def _features_path(self) -> Path:
        return Path(str(self.args.output_dir)) / "_features"

    @cached_property
    def _features(self) -> PairFeatures:
        responses = unique_responses(self.train_dataset, self.args.max_length, self.args.truncation_mode)
        # The norm is what `gradient_norm` goes by.
        normalize = self.args.normalize_gradients and self.args.depth_strategy != "gradient_norm"
        return PairFeatures(self, responses, normalize)

    def _pair_features(self) -> StoredPairs | None:
        return self._features.at_this_step(
            self._features_path, lambda folder: self._features.compute(self._projection, folder)
        )

    def _steps_with(self, step: int) -> list[int]:
        return [*(past for past in self._selection_steps if past < step), step]

    def _select_at(self, step: int) -> None:
        started, previous = time.perf_counter(), self.selection
        selection = self.select_pairs()
        metrics = dict(selection.metrics)
        if previous is not None:
            kept, kept_before = selection.selected, previous.selected
            metrics["overlap"] = float((kept & kept_before).sum() / (kept | kept_before).sum())
        self.selection, self._selection_steps = selection, self._steps_with(step)
        meanwhile(self.accelerator, lambda: self._recorder.record(selection, self._selection_steps, metrics))
        self._sampler.set_rows(np.flatnonzero(selection.selected), self._num_selections)
        self._log_scalars(metrics)
        if metrics["active_pairs"] < len(self._sampler):
            logger.warning(
                f"Only {metrics['active_pairs']:.0f} pairs could be selected, fewer than the budget of {len(self._sampler)}: "
                "the others have no gradient, or one that is not finite. Some of those selected are used more than once an "
                "epoch."
            )
        seconds = time.perf_counter() - started
        self.seconds_selecting += seconds
        logger.info(
            f"Selection at step {step}: {metrics['active_pairs']:.0f} of {len(selection.selected)} pairs in {seconds:.1f} s, "
            f"{selection.summary}."
        )
        hub_id, strategy = self.args.curated_dataset_hub_id, self.args.curated_dataset_hub_strategy
        if hub_id is not None and strategy == "every_selection" and self.accelerator.is_main_process:
            self._recorder.push_in_background(hub_id)
        pair_ids = self._pool.pair_ids.filter(selection.selected)
        for callback in self.callback_handler.callbacks:
            # The event is ours, so that most callbacks do not know of it.
            if hasattr(callback, "on_selection"):
                callback.on_selection(self.args, self.state, self.control, selection=selection, pair_ids=pair_ids)

    def _log_scalars(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            # What is logged is the mean of the list, and the mean of two selections would be neither.
            self._metrics["train"][f"bpo/{name}"] = [value]

    # Training

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler

    # The parent counts the whole dataset, for the log and for `train_samples_per_second`.
    def num_examples(self, dataloader: Any) -> int:  # noqa: D102
        batch_sampler = dataloader.batch_sampler
        # Under several processes that of each is wrapped around the one of all.
        sampler = getattr(getattr(batch_sampler, "batch_sampler", batch_sampler), "sampler", None)
        ours = self._sampler is not None and sampler is self._sampler
        return len(self._sampler) if ours else super().num_examples(dataloader)

    # The parent draws the batches of one optimizer step. This is the only place that all processes pass between two
    # steps, before the batches of the next one are drawn: a callback would be one prefetched batch late. The iterator of
    # an epoch begins to draw when its first batch is asked for, so a selection at the start of an epoch needs no new one.
    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:  # noqa: D102
        if self._sampler is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        new_epoch = epoch_iterator is not self._epoch_iterator
        dataloader: Any = self.callback_handler.train_dataloader
        if new_epoch:
            self._schedule = self._make_schedule(dataloader)
        accumulation = self.args.gradient_accumulation_steps
        schedule, step = self._schedule, self.state.global_step
        if step >= self.state.max_steps:
            # A run that was over within an epoch when it was resumed. `Trainer` would take one step more.
            self.control.should_training_stop = True
            return [], None
        if self.state is not self._run_state:
            # A new run, or with `auto_find_batch_size` one that starts over with the weights as they are.
            if self._run_state is not None:
                remove_stores(self._features_path, self.accelerator)
            self._forget_selections()
            self._run_state = self.state
        due = schedule.is_due(step, None if self.selection is None else self._selection_step)
        if due:
            self._select_at(step)
        if new_epoch or due:
            # An uninterrupted run opens its iterator when an epoch begins and at each selection within it. A resumed run
            # opens the same one, so that it draws the same batches to the last row.
            epoch_start = schedule.epoch_start(step)
            opened = max(epoch_start, self._selection_step)
            self._sampler.start = schedule.rows_before(opened) - schedule.rows_before(self._selection_step)
            self._sampler.already_drawn = schedule.rows_before(opened) - schedule.rows_before(epoch_start)
            if not new_epoch:
                # The abandoned iterator would stay registered as the active one.
                self._loader.end()
            self._epoch_iterator, self._loader = epoch_iterator, dataloader
            # `Trainer` itself skips the batches that a resumed epoch has behind it.
            self._iterator = epoch_iterator
            if opened > epoch_start:
                if step > opened:
                    self._loader = skip_first_batches(dataloader, (step - opened) * accumulation)
                self._iterator = iter(self._loader)
                # To open an iterator takes a number from the global random state. When `Trainer` resumes, it restores
                # that state after this call.
                with torch.random.fork_rng(devices=[]):
                    first = next(self._iterator)
                if step > opened and not self.args.dataloader_drop_last:
                    # Accelerate does not work it out where batches are skipped, and what fills up the last batch would
                    # count twice in the metrics.
                    self._loader.remainder = len(dataloader.dataset) % dataloader.total_batch_size
                self._iterator = chain([first], self._iterator)
        position = schedule.rows_before(step) - schedule.rows_before(self._selection_step)
        self._seen[self._sampler.rows_at(position, schedule.rows_of(step))] = True
        share = self.seconds_selecting / (time.perf_counter() - self._started)
        self._log_scalars({"unique_pairs": int(np.count_nonzero(self._seen)), "selection_time_share": share})
        batches, num_items = super().get_batch_samples(self._iterator, num_batches, device)
        if not batches:
            # `Trainer` would pass over the steps of the rest of the epoch without a word.
            raise RuntimeError(
                f"There is no batch left for step {step}, in the middle of an epoch. Please report this."
            )
        return batches, num_items

    def _make_schedule(self, dataloader: Any) -> SelectionSchedule:
        args, n_active, batches_per_epoch = self.args, len(self._sampler), len(dataloader)
        rows_per_batch = dataloader.total_batch_size
        schedule = SelectionSchedule(
            first=args.first_selection_step,
            every_steps=args.reselect_every_steps,
            every_epochs=args.reselect_every_epochs,
            steps_per_epoch=max(1, -(-batches_per_epoch // args.gradient_accumulation_steps)),
            rows_per_step=rows_per_batch * args.gradient_accumulation_steps,
            rows_per_epoch=n_active,
            rows_used_per_epoch=min(n_active, batches_per_epoch * rows_per_batch),
        )
        if schedule.first >= self.state.max_steps > 0:
            raise ValueError(
                f"`first_selection_step={schedule.first}` is not reached: training takes {self.state.max_steps} steps. "
                "Lower it."
            )
        return schedule

    def _forget_selections(self) -> None:
        self.selection = None
        self._selection_steps = []
        self._seen = np.zeros(len(self._pool.pair_ids), dtype=bool)
        rows = np.arange(len(self._seen))
        if self.args.first_selection_step > 0:
            draw = draw_scores(self._pool.pair_ids, self.args.seed, 0)
            subset = self._selector.select_by_score(draw, self._pool.pair_ids, self._pool.prompt_ids)
            rows = np.flatnonzero(subset.selected)
        self._sampler.set_rows(rows, 0)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._sampler is not None and self.args.should_save:
            header = {
                "pool": self._pool.fingerprint,
                "budget": len(self._sampler),
                "selection_steps": self._selection_steps,
                **{name: getattr(self.args, name) for name in _RESUMED_WITH},
            }
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            save_selection_state(folder, self.selection, self._seen, header)
        super()._save_checkpoint(model, trial)

    # Called with the resolved path of the checkpoint on every backend, before the first batch is drawn.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        header = None if checkpoint is None else load_header(checkpoint)
        if checkpoint is not None and (header is None) != (self._sampler is None):
            self._check_max_steps(checkpoint, "without" if header is None else "with")
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or header is None or self._sampler is None:
            return
        if header["pool"] != self._pool.fingerprint:
            raise ValueError(
                f"The selection in {checkpoint} was made from other pairs than those of `train_dataset`. Resume with the "
                "same dataset and `max_length`, or start anew without `resume_from_checkpoint`."
            )
        if header["budget"] != len(self._sampler):
            raise ValueError(
                f"The run in {checkpoint} trained on {header['budget']} pairs, but `depth_fraction` now stands for "
                f"{len(self._sampler)}. Resume with the `depth_fraction` of that run."
            )
        for name in _RESUMED_WITH:
            if header[name] != getattr(self.args, name):
                raise ValueError(
                    f"The run in {checkpoint} had `{name}={header[name]!r}`, this one has `{name}="
                    f"{getattr(self.args, name)!r}`. Resume with the value of that run, or start anew without "
                    "`resume_from_checkpoint`."
                )
        self._run_state = self.state
        self.selection, self._seen = load_selection_state(checkpoint, len(self._pool.pair_ids))
        self._selection_steps = header["selection_steps"]
        if self.selection is not None:
            self._sampler.set_rows(np.flatnonzero(self.selection.selected), self._num_selections)
            selection, steps = self.selection, self._selection_steps
            meanwhile(self.accelerator, lambda: self._recorder.resume(selection, steps))

    def _check_max_steps(self, checkpoint: str, how: str) -> None:
        # Its learning rates and its place in the epochs would mean something else here.
        path = Path(checkpoint) / TRAINER_STATE_NAME
        max_steps = json.loads(path.read_text())["max_steps"] if path.is_file() else None
        if max_steps not in (None, self.state.max_steps):
            raise ValueError(
                f"The run in {checkpoint} was {how} selection and took {max_steps} steps, this one takes "
                f"{self.state.max_steps}. Set `max_steps={max_steps}`, or start anew without `resume_from_checkpoint`."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        self._started, self.seconds_selecting, self._run_state = time.perf_counter(), 0.0, None
        if self._sampler is not None:
            # Each call starts with a selection, or with that of its checkpoint.
            self._forget_selections()
            if self.args.curated_dataset_hub_id is not None:
                on_main_process(self.accelerator, self._recorder.check_hub)
        output = super().train(*args, **kwargs)
        # The abandoned iterators would keep their workers alive.
        self._epoch_iterator, self._iterator, self._loader = None, iter(()), None
        if self._sampler is not None and self.selection is None:
            logger.warning(f"Training ended before the first selection, at step {self.args.first_selection_step}.")
        elif self._sampler is not None:
            remove_stores(self._features_path, self.accelerator)
            meanwhile(self.accelerator, lambda: self._recorder.finish(self._selected))
        return output

    # Cards and curated dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        super().create_model_card(*args, **kwargs)
        if self.selection is not None and self.is_world_process_zero():
            add_training_data(
                Path(str(self.args.output_dir)) / "README.md",
                int(self.selection.selected.sum()),
                len(self.selection.selected),
                strategy=self.args.depth_strategy,
                curated_repo_id=self.args.curated_dataset_hub_id,
            )

    @property
    def _selected(self) -> DepthSelection:
        if self.selection is None or self._pool is None:
            raise ValueError(
                "Nothing has been selected yet. Call `train()` or `select_pairs()` first, with `depth_fraction` below 1.0."
            )
        return self.selection

    @property
    def curated_dataset(self) -> Dataset:
        """The pairs of the last selection as they came in, with `prompt_id`, `pair_id` and the `depth_*` columns."""
        return self._selected.kept(self._pool.pairs)

    def curated_card_data(self) -> CuratedCardData:
        """
        What the card of the curated dataset says: what the trainer knows, and `curated_card_fields`.

        Returns:
            [`CuratedCardData`]: The data of the card.
        """
        return self._recorder.card_data(self._selected)

    def push_curated_dataset(self, repo_id: str | None = None) -> str | None:
        """
        Push the selections of this run with their card to the Hub, from the main process. May be repeated.

        Args:
            repo_id (`str`, *optional*):
                Dataset repository. If `None`, `args.curated_dataset_hub_id`.

        Returns:
            `str`, *optional*: URL of the dataset; `None` on other processes.
        """
        repo_id = repo_id or self.args.curated_dataset_hub_id
        if repo_id is None:
            raise ValueError("Name the dataset repository with `repo_id`, or set `curated_dataset_hub_id`.")
        if not self.accelerator.is_main_process:
            return None
        return self._recorder.push(repo_id)
