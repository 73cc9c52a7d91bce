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

"""A trainer that writes down what it selects and what it trains on."""

import numpy as np

from trl_bpo import BPOTrainer


class RecordingTrainer(BPOTrainer):
    """Keeps `selections`, as (step, selected rows), and `batches`, as (step, rows), of a training."""

    def __init__(self, *args, **kwargs):
        self.selections, self.batches = [], []
        super().__init__(*args, **kwargs)
        self._row_of = {}
        for row, example in enumerate(self.train_dataset):
            batch = self.data_collator([example])
            self._row_of[tuple(self._texts(batch))] = row
        assert len(self._row_of) == len(self.train_dataset), "two pairs read alike"

    @staticmethod
    def _texts(batch):
        masks = batch["attention_mask"].bool()
        return [tuple(ids[mask].tolist()) for ids, mask in zip(batch["input_ids"], masks, strict=True)]

    def select_pairs(self):
        selection = super().select_pairs()
        self.selections.append((self.state.global_step, set(np.flatnonzero(selection.selected).tolist())))
        return selection

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training:
            texts = self._texts(inputs)
            half = len(texts) // 2
            rows = [self._row_of[pair] for pair in zip(texts[:half], texts[half:], strict=True)]
            self.batches.append((self.state.global_step, rows))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def active(self, step):
        """Rows that were selected when `step` began."""
        return [rows for selected_at, rows in self.selections if selected_at <= step][-1]
