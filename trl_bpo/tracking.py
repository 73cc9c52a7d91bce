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

"""Pictures of the selections, for the trackers that a training reports to."""

import logging
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from .depth import DepthSelection
from .report import histogram_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)

# Trackers that `report_to` may name and that can show a picture.
_TRACKERS = {"tensorboard": TensorBoardCallback, "trackio": TrackioCallback, "wandb": WandbCallback}


def _figures(selection: DepthSelection, prompt_ids: pa.ChunkedArray) -> dict[str, "Figure"]:
    from .report.figures import clusters_figure, distances_figure, pairs_per_prompt_figure

    selected = selection.selected
    histogram = histogram_of(prompt_ids, selected)
    figures = {"bpo/pairs_per_prompt": pairs_per_prompt_figure(histogram)}
    if selection.scores is not None:
        figures["bpo/scores"] = distances_figure(selection.scores, selected, label="Score")
    if selection.clusters is not None and selection.distances is not None:
        used = selection.clusters >= 0
        sizes = np.bincount(selection.clusters[used])
        kept = np.bincount(selection.clusters[used & selected], minlength=len(sizes))
        figures["bpo/clusters"] = clusters_figure(sizes, kept)
        figures["bpo/distances"] = distances_figure(selection.distances, selected)
    return figures


def _pixels(figure: "Figure") -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(150)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _log(name: str, callback: Any, pictures: Mapping[str, np.ndarray], step: int) -> None:
    if name == "tensorboard":
        for tag, picture in pictures.items():
            callback.tb_writer.add_image(tag, picture, step, dataformats="HWC")
        callback.tb_writer.flush()
        return
    # The run that the callback has begun is the module's current one.
    module = import_module(name)
    images = {tag: module.Image(picture, caption=f"Selection at step {step}") for tag, picture in pictures.items()}
    # Their own steps count calls. What the scalars are plotted over is this.
    module.log({**images, "train/global_step": step})


class SelectionPicturesCallback(TrainerCallback):
    """
    Logs the pictures of each selection to tensorboard, trackio and wandb where `report_to` names them: into the run of the
    scalars, at the optimizer step of the selection.

    | picture | shows | logged for |
    | --- | --- | --- |
    | `bpo/pairs_per_prompt` | how many prompts kept how many pairs | every selection |
    | `bpo/clusters` | sizes of the clusters, kept and dropped | selections by gradients or embeddings |
    | `bpo/distances` | distances to the centres, kept and dropped, with the cut | the same |
    | `bpo/scores` | scores, kept and dropped, with the cut | selections by a score |

    They need `matplotlib`. What fails here never stops the training: it is one warning.

    Args:
        callback_handler ([`~transformers.trainer_callback.CallbackHandler`]):
            The handler of the trainer, which has the callbacks of the trackers.
        prompt_ids (`pyarrow.ChunkedArray`):
            Prompt id of each pair that is selected from.
    """

    def __init__(self, callback_handler: CallbackHandler, prompt_ids: pa.ChunkedArray) -> None:
        self._handler = callback_handler
        self._prompt_ids = prompt_ids
        self._warned: set[str] = set()

    def on_selection(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        selection: DepthSelection,
        **kwargs: Any,
    ) -> None:
        """
        Log the pictures of a selection, on the main process.

        Args:
            args ([`~transformers.TrainingArguments`]):
                Arguments of the training.
            state ([`~transformers.TrainerState`]):
                State of the training.
            control ([`~transformers.TrainerControl`]):
                Left as it is.
            selection ([`DepthSelection`]):
                The selection.
            **kwargs:
                What else comes with the event.
        """
        if not state.is_world_process_zero:
            return
        # They are there if `report_to` names them.
        trackers = {
            name: callback
            for name, kind in _TRACKERS.items()
            for callback in self._handler.callbacks
            if isinstance(callback, kind)
        }
        if not trackers:
            return
        try:
            pictures = {name: _pixels(figure) for name, figure in _figures(selection, self._prompt_ids).items()}
        except Exception as error:
            self._warn_once("drawing", f"The pictures of the selections cannot be drawn for the trackers: {error}")
            return
        for name, callback in trackers.items():
            try:
                _log(name, callback, pictures, state.global_step)
            except Exception as error:
                # What it says may hold an address with a key in it.
                reason = type(error).__name__
                self._warn_once(name, f"The pictures of a selection could not be logged to {name}: {reason}.")

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            logger.warning(message)
        self._warned.add(what)
