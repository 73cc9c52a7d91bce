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

import hashlib
import json
import os
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.data_utils import maybe_extract_prompt
from trl.trainer.utils import get_config_model_id

from .bpo_config import BPOConfig
from .capture import target_modules
from .card import CuratedCardData
from .clustering import check_n_clusters
from .depth import DepthSelection, DepthSelector
from .feature_store import StoreMismatchError
from .hub import push_curated_dataset, save_curated_dataset
from .pair_features import PairFeatures, remove_stores
from .preconditioning import check_second_moment
from .projection import SparseProjection
from .prompts import pair_id, prompt_id
from .report import pairs_per_prompt
from .responses import unique_responses
from .sampler import ActivePairsSampler


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)

_STATE_FILE = "bpo_state.json"
_TRUNCATED_COLUMNS = {"chosen_truncated": "chosen_ids", "rejected_truncated": "rejected_ids"}


def _identify(row: dict) -> dict[str, str]:
    tools = row.get("tools")
    ids = {
        "prompt_id": prompt_id(row["prompt"], tools),
        "pair_id": pair_id(row["prompt"], row["chosen"], row["rejected"], tools),
    }
    return {name: value if row.get(name) is None else row[name] for name, value in ids.items()}


def _cut_closing(row: dict, closing_ids: list[int], flags: dict[str, str]) -> dict[str, list[int]]:
    cut = {}
    for flag, column in flags.items():
        if row[flag] and row[column][-len(closing_ids) :] == closing_ids:
            cut[column] = row[column][: -len(closing_ids)]
    return {column: cut.get(column, row[column]) for column in flags.values()}


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

    - `_prepare_dataset`: a response that was cut at the token limit (`chosen_truncated`, `rejected_truncated`) gets no
      end of turn, since the policy never wrote one.
    - `_get_train_sampler`: yields the selected pairs.
    - `num_examples`: counts the selected pairs, so that the logged throughput is theirs.
    - `get_batch_samples`: selects at the boundary of an optimizer step, before the first batch of the step is drawn.
    - `_save_checkpoint`, `_load_optimizer_and_scheduler`: the selection is saved and restored with a checkpoint.
    - `train`: saves and pushes the curated dataset when training ends.

    Each selection is saved as `_selections/step-*.parquet` (one row a pair of the pool, with its `depth_*` columns) and
    `_selections/step-*.json` (its metrics) in `output_dir`; the pairs of the last one, with their card, as
    `_curated_dataset`. The leading underscore keeps your data out of the model repository when you push the model.

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

    _tag_names = ["trl", "bpo"]
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
        self._pool: Dataset | None = None
        self._pair_ids: list[str] = []
        self._prompt_ids: list[str] = []
        self._sampler: ActivePairsSampler | None = None
        self._selection_step = self._num_selections = 0
        self._epoch_iterator: Iterator | None = None
        self._iterator: Iterator = iter(())
        self._selector = DepthSelector(
            args.depth_fraction,
            n_clusters=args.depth_clusters,
            scope=args.depth_scope,
            normalize=args.normalize_gradients,
            min_pairs_per_prompt=args.min_pairs_per_prompt,
            seed=args.seed,
        )
        self._projection = SparseProjection(args.projection_dim, args.seed)
        self._features: PairFeatures | None = None
        if args.depth_fraction < 1.0 and train_dataset is not None:
            train_dataset = self._identify_pairs(train_dataset, args)
        super().__init__(model, ref_model, args, data_collator, train_dataset, *other, **kwargs)
        if self._pool is None:
            return

        # The ids come from here on from what TRL's length filter left.
        ids = self.train_dataset.select_columns(["pair_id", "prompt_id", "_pool_row"])
        self._pair_ids, self._prompt_ids = list(map(str, ids["pair_id"])), list(map(str, ids["prompt_id"]))
        self._pool = self._pool.select(np.asarray(ids["_pool_row"]))
        if args.depth_clusters is not None:
            check_n_clusters("depth_clusters", args.depth_clusters, len(ids))
        # The one sampler of every dataloader: a second dataloader does not take the selections away from the first.
        # Until the first selection it yields the whole pool.
        n_active = self._selector.check(self._prompt_ids)
        self._sampler = ActivePairsSampler(n_active, args.seed if args.data_seed is None else args.data_seed)
        self._sampler.set_rows(np.arange(len(ids)), 0)
        target_modules(self.accelerator.unwrap_model(self.model), args.gradient_layers)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "FSDP 1 flattens the weights, so that their gradients cannot be told apart. Set `fsdp_version: 2`."
            )
        if args.precondition_gradients:
            check_second_moment(self)

    def _identify_pairs(self, dataset: Dataset | IterableDataset, args: BPOConfig) -> Dataset | IterableDataset:
        # Refuses what cannot work while pairs are selected, before a model is loaded.
        off = "or set `depth_fraction=1.0` to train without selection."
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"A streaming dataset cannot be selected from: load it without `streaming=True`, {off}")
        if not isinstance(dataset, Dataset):
            return dataset  # DPOTrainer refuses it
        if len(dataset) == 0:
            raise ValueError("`train_dataset` is empty: there is no pair to select from.")
        if missing := {"chosen", "rejected"} - set(dataset.column_names):
            raise ValueError(
                f"`train_dataset` has no {sorted(missing)} column, only {dataset.column_names}. A preference dataset "
                "in one of TRL's formats is needed."
            )
        if {"image", "images"} & set(dataset.column_names):
            raise ValueError(f"Vision-language pairs have no gradient features yet. Use text-only pairs, {off}")
        # The curated dataset has the texts as they came in: TRL appends the EOS token to those of the pool.
        with args.main_process_first(desc="identifying pairs"):
            dataset = dataset.map(maybe_extract_prompt, desc="Extracting prompts")
            dataset = dataset.map(_identify, desc="Hashing pairs")
        if without_prompt := sum(not prompt for prompt in dataset["prompt"]):
            logger.warning(
                f"{without_prompt} of {len(dataset)} pairs have an empty prompt: their answers have no common beginning. "
                "If another column holds the prompt, rename it to `prompt`."
            )
        if copies := len(dataset) - len(set(dataset["pair_id"])):
            logger.warning(
                f"{copies} of {len(dataset)} pairs repeat an earlier one. They count as often as they occur, in the "
                "budget and in the clusters; drop them first if that is not meant."
            )
        self._pool = dataset
        return dataset.add_column("_pool_row", np.arange(len(dataset)))

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        example: dict = next(iter(dataset), {})
        flags = {flag: column for flag, column in _TRUNCATED_COLUMNS.items() if flag in example}
        if not flags:
            return dataset
        if isinstance(example["prompt"], str):
            closing = self._tokenizer.eos_token
        else:
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "MARK"}]
            closing = processing_class.apply_chat_template(turns, tokenize=False).rpartition("MARK")[2]
        closing_ids = self._tokenizer(closing, add_special_tokens=False)["input_ids"]
        return dataset.map(_cut_closing, fn_kwargs={"closing_ids": closing_ids, "flags": flags})

    # Selection

    def select_pairs(self) -> DepthSelection:
        """
        Select pairs under the current policy. Training calls this on its schedule; it also works without training, and
        then [`~BPOTrainer.curated_dataset`] is what was kept.

        Under several processes all of them must call it. They share the responses, and all get the same selection.

        Returns:
            [`DepthSelection`]: The selection over the rows of `train_dataset`.

        Raises:
            `ValueError`: If `depth_fraction` is 1.0, if the features are not finite or all zero, or if unfinished features
                of other data or options lie in `output_dir`.
            `OSError`: If the disk has no room for the features.
        """
        if self._pool is None:
            raise ValueError("`depth_fraction=1.0` keeps every pair, so there is nothing to select. Set it below 1.0.")
        features = self._pair_features()
        # Only one process clusters, and all take its answer: ranks that disagree in one pair would train on different
        # data. Its error is shared as well, since the others would wait for it forever.
        outcome: list[DepthSelection | Exception | None] = [None]
        if features is not None:
            try:
                outcome[0] = self._selector.select(features, self._pair_ids, self._prompt_ids)
            except Exception as error:
                outcome[0] = error
        broadcast_object_list(outcome, from_process=0)
        if not isinstance(outcome[0], DepthSelection):
            raise outcome[0] or RuntimeError("The main process sent no selection.")
        if not self.is_in_train:
            remove_stores(self._features_path, self.accelerator)
        self.selection = outcome[0]
        return outcome[0]

    @property
    def _features_path(self) -> Path:
        return Path(str(self.args.output_dir)) / "_features"

    def _pair_features(self) -> np.ndarray | None:
        if self._features is None:
            responses = unique_responses(self.train_dataset, self.args.max_length, self.args.truncation_mode)
            self._features = PairFeatures(self, responses)
        step = self.state.global_step
        # The store of this selection serves a run that is killed and started again, until the next selection has its own.
        folder = self._features_path / f"step-{step:06d}"
        try:
            features = self._features.compute(self._projection, folder)
        except StoreMismatchError as error:
            # Steps that were trained again need not give the same bits on a GPU. All else is for the user to decide.
            # The folder of the process that failed, by its name: they may have one each.
            trained_again = step > 0 and folder.name in error.folder.parts
            if not trained_again or not set(error.differing) <= {"model", "second_moment"}:
                raise
            logger.warning(f"{error} Steps that were trained again may differ so, and they are computed anew.")
            remove_stores(folder, self.accelerator)
            features = self._features.compute(self._projection, folder)
        remove_stores(self._features_path, self.accelerator, keep=folder)
        return features

    def _activate(self, selection: DepthSelection, previous: DepthSelection | None, step: int) -> None:
        self._selection_step, self._num_selections = step, self._num_selections + 1
        metrics = dict(selection.metrics)
        if previous is not None:
            kept, kept_before = selection.selected, previous.selected
            metrics["overlap"] = float((kept & kept_before).sum() / (kept | kept_before).sum())
        for name, value in metrics.items():
            # What is logged is the mean of the list, and the mean of two selections would be neither.
            self._metrics["train"][f"bpo/{name}"] = [value]
        logger.info(
            f"Selection at step {step}: {metrics['active_pairs']:.0f} of {len(self._pair_ids)} pairs, at most "
            f"{metrics['pairs_per_prompt_max']:.0f} a prompt; {metrics['prompts_without_pair']:.0f} prompts keep none. "
            f"Variance explained {metrics['variance_explained']:.3f}, of a Gaussian "
            f"{metrics['variance_explained_gaussian']:.3f}."
        )
        if self.args.should_save:
            folder = Path(str(self.args.output_dir)) / "_selections"
            folder.mkdir(parents=True, exist_ok=True)
            ids = Dataset.from_dict({"pair_id": self._pair_ids, "prompt_id": self._prompt_ids})
            selection.annotate(ids).to_parquet(folder / f"step-{step:06d}.parquet")
            (folder / f"step-{step:06d}.json").write_text(json.dumps({"step": step, **metrics}, indent=2) + "\n")

    # Training

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler

    # The parent counts the whole dataset, for the log and for `train_samples_per_second`.
    def num_examples(self, dataloader: Any) -> int:  # noqa: D102
        return super().num_examples(dataloader) if self._sampler is None else len(self._sampler)

    # The parent draws the batches of one optimizer step. This is the only place that all processes pass between two
    # steps, before the batches of the next one are drawn: a callback would be one prefetched batch late. The iterator of
    # an epoch begins to draw when its first batch is asked for, so a selection at the start of an epoch needs no new one.
    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:  # noqa: D102
        if self._sampler is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        dataloader = self.callback_handler.train_dataloader
        accumulation = self.args.gradient_accumulation_steps
        steps_per_epoch = max(1, -(-len(dataloader) // accumulation))
        step = self.state.global_step
        every = self.args.reselect_every_steps or self.args.reselect_every_epochs * steps_per_epoch
        new_epoch = epoch_iterator is not self._epoch_iterator
        # With `auto_find_batch_size` training may start over, and lie behind its last selection.
        due = self.selection is None or step < self._selection_step
        due = due or (every > 0 and step > self._selection_step and step % every == 0)
        if due:
            previous, selection = self.selection, self.select_pairs()
            self._activate(selection, previous, step)
            self._sampler.set_rows(np.flatnonzero(selection.selected), self._num_selections)
        if new_epoch or due:
            n_active = len(self._sampler)
            per_step = self._train_batch_size * accumulation * self.accelerator.num_processes

            def drawn(steps: int) -> int:
                return steps // steps_per_epoch * n_active + steps % steps_per_epoch * per_step

            # An uninterrupted run opens its iterator when an epoch begins and at each selection within it. A resumed run
            # opens the same one, so that it draws the same batches to the last row.
            epoch_start = step - step % steps_per_epoch
            opened = max(epoch_start, self._selection_step)
            self._sampler.start = drawn(opened) - drawn(self._selection_step)
            self._sampler.already_drawn = drawn(opened) - drawn(epoch_start)
            if not new_epoch:
                # The abandoned iterator would stay registered as the active one.
                dataloader.end()
            self._epoch_iterator = epoch_iterator
            # `Trainer` itself skips the batches that a resumed epoch has behind it.
            self._iterator = epoch_iterator
            if opened > epoch_start:
                self._iterator = iter(dataloader)
                # To open an iterator takes a number from the global random state. When `Trainer` resumes, it restores
                # that state after this call.
                with torch.random.fork_rng(devices=[]):
                    batches = [next(self._iterator) for _ in range((step - opened) * accumulation + 1)]
                self._iterator = chain(batches[-1:], self._iterator)
        return super().get_batch_samples(self._iterator, num_batches, device)

    def _pool_hash(self) -> str:
        return hashlib.sha256("".join(self._pair_ids).encode()).hexdigest()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._sampler is not None and self.selection is not None and self.args.should_save:
            state = {
                "pool": self._pool_hash(),
                "budget": len(self._sampler),
                "selection_step": self._selection_step,
                "num_selections": self._num_selections,
                "selected": np.flatnonzero(self.selection.selected).tolist(),
                "clusters": self.selection.clusters.tolist(),
                "distances": self.selection.distances.tolist(),
                "ranks": self.selection.ranks.tolist(),
                "metrics": self.selection.metrics,
            }
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _STATE_FILE).write_text(json.dumps(state))
        super()._save_checkpoint(model, trial)

    # Called with the resolved path of the checkpoint on every backend, before the first batch is drawn.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", _STATE_FILE)
        if self._sampler is None or checkpoint is None or not os.path.isfile(path):
            return
        state = json.loads(Path(path).read_text())
        if state["pool"] != self._pool_hash():
            raise ValueError(
                f"The selection in {checkpoint} was made from other pairs than those of `train_dataset`. Resume with the "
                "same dataset and `max_length`, or start anew without `resume_from_checkpoint`."
            )
        if state["budget"] != len(self._sampler):
            raise ValueError(
                f"The run in {checkpoint} trained on {state['budget']} pairs, but `depth_fraction` now stands for "
                f"{len(self._sampler)}. Resume with the `depth_fraction` of that run."
            )
        selected = np.zeros(len(self._pair_ids), dtype=bool)
        selected[state["selected"]] = True
        self.selection = DepthSelection(
            selected,
            np.asarray(state["clusters"]),
            np.asarray(state["distances"]),
            np.asarray(state["ranks"]),
            state["metrics"],
        )
        self._selection_step, self._num_selections = state["selection_step"], state["num_selections"]
        self._sampler.set_rows(np.flatnonzero(selected), self._num_selections)

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        # Each call starts with a selection, or with that of its checkpoint.
        self.selection = None
        self._selection_step = self._num_selections = 0
        output = super().train(*args, **kwargs)
        if self._sampler is not None and self.selection is not None:
            remove_stores(self._features_path, self.accelerator)
            # The model is not saved yet at this point, and it cost more than to save or push the dataset again does.
            try:
                if self.args.should_save:
                    save_curated_dataset(self.curated_dataset, self._curated_path, self.curated_card_data())
                if self.args.curated_dataset_hub_id is not None:
                    self.push_curated_dataset()
            except Exception as error:
                logger.error(
                    f"The curated dataset could not be saved in {self._curated_path} or could not be pushed to "
                    f"{self.args.curated_dataset_hub_id}: {error}. It is in `trainer.curated_dataset` and, by its ids, in "
                    "`_selections`; call `push_curated_dataset()` to push it again.",
                    exc_info=True,
                )
        return output

    # Curated dataset

    @property
    def _curated_path(self) -> Path:
        return Path(str(self.args.output_dir)) / "_curated_dataset"

    @property
    def curated_dataset(self) -> Dataset:
        """The pairs of the last selection as they came in, with `prompt_id`, `pair_id` and the `depth_*` columns."""
        if self.selection is None or self._pool is None:
            raise ValueError(
                "Nothing has been selected yet. Call `train()` or `select_pairs()` first, with `depth_fraction` below 1.0."
            )
        return self.selection.annotate(self._pool).select(np.flatnonzero(self.selection.selected))

    def curated_card_data(self) -> CuratedCardData:
        """
        What the card of the curated dataset says: what the trainer knows, and `curated_card_fields`.

        Returns:
            [`CuratedCardData`]: The data of the card.
        """
        kept = list(map(str, self.curated_dataset["prompt_id"]))
        options = ["depth_fraction", "depth_clusters", "depth_scope", "min_pairs_per_prompt", "depth_feature"]
        options += ["normalize_gradients", "gradient_layers", "precondition_gradients"]
        model_name = get_config_model_id(self.model.config)
        fields = dict(self.curated_card_fields)
        # Pairs that were built from saved scores say who gave them.
        judges = list(self.curated_dataset["judge"]) if "judge" in self.curated_dataset.column_names else []
        if judges and isinstance(judges[0], str) and all(judge == judges[0] for judge in judges):
            fields.setdefault("judge", judges[0])
        funnel = fields.pop("funnel", [("pairs", len(self._pool or []), "after TRL's length filter")])
        settings = {"model": Path(model_name).name if Path(model_name).is_dir() else model_name}
        settings |= {name: getattr(self.args, name) for name in (*options, "projection_dim", "seed")}
        data = CuratedCardData(
            pretty_name=f"Pairs that BPO kept for {Path(str(self.args.output_dir)).name}",
            policy_model=None,
            num_pairs=len(kept),
            num_prompts=len(set(kept)),
            funnel=[*funnel, ("pairs kept (depth)", len(kept), f"by the gradients at step {self._selection_step}")],
            settings=fields.pop("settings", {}) | settings,
            setting_notes=dict.fromkeys(options, "not specified by the paper"),
            metrics=dict(self.selection.metrics) if self.selection else {},
            pairs_per_prompt=pairs_per_prompt(self._prompt_ids, kept),
        )
        return replace(data, **fields)

    def push_curated_dataset(self, repo_id: str | None = None) -> str | None:
        """
        Push the curated dataset with its card to the Hub, from the main process. May be repeated.

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
        return push_curated_dataset(
            self.curated_dataset,
            repo_id,
            self.curated_card_data(),
            private=self.args.hub_private_repo,
            token=self.args.hub_token,
            saved_to=self._curated_path,
        )
