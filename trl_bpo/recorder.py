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

"""What a training writes down of its selections: their files in `output_dir`, the curated dataset, and its pushes."""

from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate.logging import get_logger
from huggingface_hub import run_as_future

from .bpo_config import SELECTION_OPTIONS
from .card import CuratedCardData, card_data_of_run
from .depth import DepthSelection
from .hub import check_curated_repo, push_run, save_curated_dataset
from .manifest import public_value, sha256_of_ids, training_parameters, write_json
from .run_folder import SELECTIONS, RunFolder, SavedSelection, step_name
from .selection_state import (
    SAMPLE_NAME,
    inputs_of_selection,
    list_selections,
    save_feature_sample,
    save_pool,
    save_selection,
)


logger = get_logger(__name__)


class SelectionRecorder:
    """
    Writes down the selections of a [`BPOTrainer`]. Its methods do nothing on processes that save nothing.

    Args:
        trainer ([`BPOTrainer`]):
            The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.folder = Path(str(trainer.args.output_dir)) / SELECTIONS
        self._pool_table: pa.Table | None = None
        self._manifest: dict[str, Any] = {}
        self._push: Future | None = None

    def save_features(self, features: Any) -> None:
        """
        Save a sample of the features that a selection is made by, for the curve of the number of clusters.

        Args:
            features (`np.ndarray` of shape `(n, d)`):
                Features of the pairs.
        """
        args = self.trainer.args
        if args.should_save:
            save_feature_sample(self.folder, features, args.normalize_gradients, args.seed)

    def record(self, selection: DepthSelection, steps: list[int], metrics: dict[str, float]) -> None:
        """
        Save a selection, see [`~selection_state.save_selection`], with what its card shows as `card.json`, and list it.

        Args:
            selection ([`DepthSelection`]):
                The selection.
            steps (`list[int]`):
                Optimizer steps of the selections of this run; the last is that of this one.
            metrics (`dict[str, float]`):
                What was measured.
        """
        trainer = self.trainer
        if not trainer.args.should_save:
            return
        pool = trainer._pool
        if self._pool_table is None:
            # What an earlier run left may be of other pairs.
            self._pool_table = save_pool(
                self.folder, pool.pairs, trainer.train_dataset, trainer.args.curated_dataset_push_pool
            )
        parameters = training_parameters(trainer.args)
        parameters |= {name: public_value(getattr(trainer.args, name)) for name in SELECTION_OPTIONS}
        inputs = inputs_of_selection(trainer, pool.fingerprint, len(steps))
        if selection.clusters is None:
            # That of an earlier run, by features.
            (self.folder / SAMPLE_NAME).unlink(missing_ok=True)
        step = steps[-1]
        self._manifest = save_selection(self.folder, step, selection, pool.pairs, metrics, inputs, parameters)
        write_json(self.folder / step_name(step) / "card.json", self.card_data(selection).to_dict())
        list_selections(self.folder, [*self._there(steps[:-1]), step])

    def resume(self, selection: DepthSelection, steps: list[int]) -> None:
        """
        Take up the files of a run that goes on from a checkpoint. If they are not in this `output_dir`, or are of another
        run, the selection of the checkpoint is saved anew.

        Args:
            selection ([`DepthSelection`]):
                The selection of the checkpoint.
            steps (`list[int]`):
                Optimizer steps of the selections until then.
        """
        if not self.trainer.args.should_save:
            return
        pool = self.trainer._pool
        # What the run did after the checkpoint before it was killed is done again.
        there = self._there(steps)
        last = SavedSelection(self.folder / step_name(steps[-1]), steps[-1])
        kept = sha256_of_ids(pool.pair_ids.filter(selection.selected))
        if steps[-1] in there and last.manifest["outputs"]["kept"] == kept:
            self._manifest = last.manifest
            self._pool_table = save_pool(
                self.folder, pool.pairs, self.trainer.train_dataset, self.trainer.args.curated_dataset_push_pool
            )
            write_json(last.card_file, self.card_data(selection).to_dict())
            list_selections(self.folder, there)
        else:
            self.record(selection, steps, selection.metrics)

    def _there(self, steps: list[int]) -> list[int]:
        # A run that goes on in another folder has left its earlier selections behind.
        return [step for step in steps if SavedSelection(self.folder / step_name(step), step).manifest_file.is_file()]

    def card_data(self, selection: DepthSelection) -> CuratedCardData:
        """
        What the card of a selection that was recorded says.

        Args:
            selection ([`DepthSelection`]):
                The last selection.

        Returns:
            [`CuratedCardData`]: The data of the card.
        """
        trainer = self.trainer
        return card_data_of_run(
            trainer._pool, self._pool_table, selection, self._manifest, trainer.args, trainer.curated_card_fields
        )

    @property
    def _private(self) -> bool | None:
        args = self.trainer.args
        private = args.curated_dataset_hub_private_repo
        return args.hub_private_repo if private is None else private

    def check_hub(self) -> None:
        """
        Refuse, before a training, a repository that cannot be pushed to.

        Raises:
            `ValueError`: If the Hub refuses the name or the token.
        """
        check_curated_repo(self.trainer.args.curated_dataset_hub_id, self._private, self.trainer.args.hub_token)

    def push(self, repo_id: str) -> str:
        """
        Push all selections of this run, see [`~hub.push_run`].

        Args:
            repo_id (`str`):
                Dataset repository.

        Returns:
            `str`: URL of the dataset.
        """
        args = self.trainer.args
        return push_run(
            self.folder.parent,
            repo_id,
            pool=args.curated_dataset_push_pool,
            private=self._private,
            token=args.hub_token,
        )

    def push_in_background(self, repo_id: str) -> None:
        """
        Push while the training goes on. One push at a time: that of a later selection has the earlier ones as well.

        Args:
            repo_id (`str`):
                Dataset repository.
        """
        if self._push is None or self._push.done():
            self._push = run_as_future(self._try, f"pushed to {repo_id}", lambda: self.push(repo_id))

    def finish(self, selection: DepthSelection) -> None:
        """
        Save the last selection with its card as `_curated_dataset`, and push if that is asked for. A failure is logged with
        what to do: the model that was trained cost more than to do this again.

        Args:
            selection ([`DepthSelection`]):
                The last selection.
        """
        args = self.trainer.args
        if args.should_save:
            self._try("saved", lambda: self._save(selection))
        hub_id = args.curated_dataset_hub_id
        if hub_id is not None and self.trainer.accelerator.is_main_process:
            if self._push is not None:
                wait([self._push])
            self._try(f"pushed to {hub_id}", lambda: self.push(hub_id))

    def _save(self, selection: DepthSelection) -> None:
        run = RunFolder(self.folder.parent)
        dataset = selection.kept(self.trainer._pool.pairs)
        save_curated_dataset(dataset, run.path / "_curated_dataset", self.card_data(selection), run=run)

    def _try(self, what: str, function: Callable[[], Any]) -> None:
        try:
            function()
        except Exception as error:
            repo_id = self.trainer.args.curated_dataset_hub_id or "user/name"
            logger.error(
                f"The curated dataset could not be {what}: {error}\nNothing is lost: the pairs are in {self.folder}. Once "
                f"the cause is removed, push them with `trl-bpo push {self.folder.parent} --repo_id {repo_id}`.",
                exc_info=True,
            )
