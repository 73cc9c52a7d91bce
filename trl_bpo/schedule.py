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

"""When pairs are selected, and which positions of the sampler's stream each optimizer step takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SelectionSchedule:
    """
    When pairs are selected, and what each optimizer step draws.

    Steps are counted as `state.global_step` does: step 0 is before the first optimizer step. The paper repeats the
    selection "during training" and specifies no schedule.

    Args:
        first (`int`):
            Step of the first selection.
        every_steps (`int`, *optional*):
            Steps from one selection to the next. If `None`, `every_epochs` decides.
        every_epochs (`int`):
            Epochs from one selection to the next, which fall on epoch boundaries. 0 for one selection only.
        steps_per_epoch (`int`):
            Optimizer steps an epoch.
        rows_per_step (`int`):
            Pairs that all processes together take an optimizer step.
        rows_per_epoch (`int`):
            Pairs an epoch of the sampler: the budget.
        rows_used_per_epoch (`int`):
            Those of them that make up full batches, where incomplete ones are dropped.
    """

    first: int
    every_steps: int | None
    every_epochs: int
    steps_per_epoch: int
    rows_per_step: int
    rows_per_epoch: int
    rows_used_per_epoch: int

    def is_due(self, step: int, last: int | None) -> bool:
        """
        Whether to select before a step.

        Args:
            step (`int`):
                The step that is about to begin.
            last (`int`, *optional*):
                Step of the last selection. `None` if there was none.

        Returns:
            `bool`: Whether a selection is due.
        """
        if step < self.first or last is None:
            return step >= self.first
        if step <= last:
            return False
        if self.every_steps is not None:
            return (step - self.first) % self.every_steps == 0
        return self.every_epochs > 0 and step % (self.every_epochs * self.steps_per_epoch) == 0

    def epoch_start(self, step: int) -> int:
        """
        First step of an epoch.

        Args:
            step (`int`):
                A step of it.

        Returns:
            `int`: Its first.
        """
        return step - step % self.steps_per_epoch

    def rows_before(self, step: int) -> int:
        """
        Rows that the steps before one have drawn. An epoch that is over has drawn all of its rows.

        Args:
            step (`int`):
                The step.

        Returns:
            `int`: Number of rows.
        """
        epochs, steps = divmod(step, self.steps_per_epoch)
        return epochs * self.rows_per_epoch + steps * self.rows_per_step

    def rows_of(self, step: int) -> int:
        """
        Rows that a step trains on. The last step of an epoch may have fewer than the others.

        Args:
            step (`int`):
                The step.

        Returns:
            `int`: Number of rows.
        """
        return min(self.rows_per_step, self.rows_used_per_epoch - step % self.steps_per_epoch * self.rows_per_step)
