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

"""The pictures of the selections in real trackers: tensorboard, and trackio and wandb where they stay on this machine."""

import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pairs import config, pairs
from peft import LoraConfig
from PIL import Image
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler

from trl_bpo import BPOTrainer, DepthSelection
from trl_bpo.tracking import SelectionPicturesCallback


pytest.importorskip("matplotlib", reason="needs matplotlib, which draws the pictures")

OF_FEATURES = {"bpo/pairs_per_prompt", "bpo/clusters", "bpo/distances"}
OF_SCORES = {"bpo/pairs_per_prompt", "bpo/scores"}
SECRET = "key-that-nobody-may-see"
SCRIPT = Path(__file__).parent / "tracking_script.py"


def train(tiny_dir, path, callbacks=None, **kwargs):
    trainer = BPOTrainer(
        tiny_dir,
        args=config(path, **{"reselect_every_steps": 3, "max_steps": 5, **kwargs}),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4),
        callbacks=callbacks,
    )
    trainer.train()
    assert trainer.state.global_step == 5
    return trainer


def events(folder):
    """Pictures of the one tensorboard run below a folder, as tag -> [(step, picture)], and the tags of its scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list(Path(folder).rglob("events.out.tfevents.*"))
    assert len(files) == 1, files
    accumulator = EventAccumulator(str(files[0]), size_guidance={"images": 0}).Reload()
    pictures = {}
    for tag in accumulator.Tags()["images"]:
        pictures[tag] = []
        for event in accumulator.Images(tag):
            picture = Image.open(io.BytesIO(event.encoded_image_string))
            assert picture.format == "PNG" and picture.size == (event.width, event.height)
            pictures[tag].append((event.step, check_picture(picture)))
    return pictures, {tag: [event.step for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def check_picture(picture):
    pixels = np.asarray(picture.convert("RGB"))
    # Neither blank nor too small to be read.
    assert min(picture.size) >= 400 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    return pixels


@pytest.fixture
def tensorboard():
    return pytest.importorskip("tensorboard")


@pytest.fixture(scope="module")
def run(tiny_dir, tmp_path_factory):
    """Folder of a training that reported to all trackers that are installed, in a process of its own."""
    trackers = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name)]
    folder = tmp_path_factory.mktemp("trackers")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_DIR": str(folder),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_API_KEY": SECRET.ljust(40, "0"),
    }
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "SPACE_ID", "TENSORBOARD_LOGGING_DIR"):
        environment.pop(name, None)
    command = [sys.executable, str(SCRIPT), tiny_dir, str(folder / "out"), *trackers]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)
    assert process.returncode == 0, process.stderr[-10000:]
    assert "pictures" not in process.stderr and SECRET not in process.stdout + process.stderr
    return folder


def check_rows(rows):
    """Rows of a run, with the pictures as True, and the steps by its scalars."""
    steps = [row["train/global_step"] for row in rows]
    assert steps == sorted(steps) and steps[0] == 0
    drawn = [row for row in rows if any(name.startswith("bpo/") for name in row)]
    assert [row["train/global_step"] for row in drawn] == [0, 3]
    # The scalars of a selection come with the next log.
    assert [row["train/global_step"] for row in rows if "train/bpo/n_clusters" in row] == [1, 4]
    for row in drawn:
        assert {name for name in row if name.startswith("bpo/")} == OF_FEATURES
        for name in OF_FEATURES:
            assert row[name]["caption"] == f"Selection at step {row['train/global_step']}"
    return drawn


def test_tensorboard_beside_others_has_them(tensorboard, run):
    pictures, scalars = events(run / "out")
    assert pictures.keys() == OF_FEATURES and scalars["train/bpo/n_clusters"] == [1, 4]
    assert all([step for step, _ in shown] == [0, 3] for shown in pictures.values())


def test_trackio(run):
    pytest.importorskip("trackio")
    kept = json.loads((run / "out" / "kept.json").read_text())
    assert kept["runs"] == ["run"]
    files = set()
    for row in check_rows(kept["rows"]):
        for name in OF_FEATURES:
            assert row[name]["_type"] == "trackio.image"
            files.add(row[name]["file_path"])
            check_picture(Image.open(run / "trackio" / "media" / row[name]["file_path"]))
    assert len(files) == len(list((run / "trackio" / "media").rglob("*.png"))) == 6


def wandb_rows(file):
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, rows = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        row = {}
        for item in record.history.item:
            # What it keeps of a picture is an item each.
            value = json.loads(item.value_json)
            if len(item.nested_key) > 1:
                row.setdefault(item.nested_key[0], {})[item.nested_key[1]] = value
            else:
                row[item.key or item.nested_key[0]] = value
        if row:
            rows.append(row)
    return rows


def test_wandb(run):
    pytest.importorskip("wandb")
    (folder,) = (run / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    files = set()
    for row in check_rows(wandb_rows(file)):
        for name in OF_FEATURES:
            value = row[name]
            picture = Image.open(folder / "files" / value["path"])
            assert value["_type"] == "image-file" and picture.size == (value["width"], value["height"])
            files.add(value["path"])
            check_picture(picture)
    assert len(files) == len(list((folder / "files" / "media").rglob("*.png"))) == 6


def test_nothing_leaves_the_machine(run):
    asked = json.loads((run / "out" / "kept.json").read_text())["asked"]
    assert set(asked) <= {"127.0.0.1", "localhost", "::1"}, asked


def test_tensorboard_pictures_differ_with_the_selection(tensorboard, tiny_dir, tmp_path):
    trainer = train(tiny_dir, tmp_path, report_to=["tensorboard"], depth_strategy="random")
    pictures, scalars = events(tmp_path)
    # A selection by a score has no clusters.
    assert pictures.keys() == OF_SCORES and scalars["train/bpo/active_pairs"] == [1, 4]
    (first, before), (second, after) = pictures["bpo/scores"]
    assert (first, second) == (0, 3) and not np.array_equal(before, after)
    # The run is closed with the scalars' one.
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, TensorBoardCallback)]
    assert callback.tb_writer is None


def test_the_colours_of_kept_and_dropped_are_as_many_as_the_pairs(tensorboard, tmp_path):
    def share(kept):
        callback, event, writer = by_hand(tmp_path / str(kept))
        callback.on_selection(*event, selection=selection(4000, kept))
        writer.close()
        (((_, pixels),),) = [shown for name, shown in events(tmp_path / str(kept))[0].items() if "clusters" in name]
        blue = (pixels == (0x00, 0x72, 0xB2)).all(-1).sum()
        orange = (pixels == (0xE6, 0x9F, 0x00)).all(-1).sum()
        return blue / (blue + orange)

    assert share(0.25) == pytest.approx(0.25, abs=0.03) and share(0.75) == pytest.approx(0.75, abs=0.03)


def selection(n, kept=0.25, **kwargs):
    rows = np.arange(n)
    selected = (rows // 10) % 100 < 100 * kept
    fields = {"clusters": rows % 10, "distances": np.where(selected, 0.1, 0.9) + rows % 7 / 100, **kwargs}
    return DepthSelection(selected, rows // 10, {}, **fields)


def by_hand(folder, n=4000, writer=None, more=()):
    """The callback without a trainer, the arguments of its event, and the writer of tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer = writer or SummaryWriter(str(folder))
    handler = CallbackHandler([TensorBoardCallback(writer), *more], None, None, None, None)
    callback = SelectionPicturesCallback(handler, pa.chunked_array([[f"prompt {row // 4}" for row in range(n)]]))
    return (
        callback,
        (config(folder), TrainerState(global_step=7, is_world_process_zero=True), TrainerControl()),
        writer,
    )


def test_only_the_main_process_draws(tensorboard, tmp_path):
    callback, (args, state, control), writer = by_hand(tmp_path)
    callback.on_selection(args, replace(state, is_world_process_zero=False), control, selection=selection(4000))
    writer.flush()
    assert not events(tmp_path)[0]
    callback.on_selection(args, state, control, selection=selection(4000), pair_ids=["any"])
    writer.close()
    pictures = events(tmp_path)[0]
    assert pictures.keys() == OF_FEATURES and all([step for step, _ in shown] == [7] for shown in pictures.values())


def test_pairs_that_were_left_out(tensorboard, tmp_path):
    kept = selection(4000)
    left_out = np.arange(4000) % 40 == 39
    kept = replace(
        kept,
        selected=kept.selected & ~left_out,
        clusters=np.where(left_out, -1, kept.clusters),
        distances=np.where(left_out, np.nan, kept.distances),
    )
    callback, event, writer = by_hand(tmp_path)
    callback.on_selection(*event, selection=kept)
    writer.close()
    assert events(tmp_path)[0].keys() == OF_FEATURES


def test_without_matplotlib_there_is_one_warning(tensorboard, tiny_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "trl_bpo.report.figures", raising=False)
    train(tiny_dir, tmp_path, report_to=["tensorboard"], depth_strategy="random")
    pictures, scalars = events(tmp_path)
    assert not pictures and scalars["train/bpo/active_pairs"] == [1, 4]
    lines = [record for record in caplog.records if record.name == "trl_bpo.tracking"]
    assert len(lines) == 1 and lines[0].levelno == logging.WARNING
    assert "pip install 'trl_bpo[report]'" in lines[0].getMessage()


def test_without_a_tracker_nothing_is_drawn(tiny_dir, tmp_path, monkeypatch, caplog):
    # It would warn if it tried to.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "trl_bpo.report.figures", raising=False)
    train(tiny_dir, tmp_path, report_to="none", depth_strategy="random")
    assert not [record for record in caplog.records if record.name == "trl_bpo.tracking"]


def test_a_tracker_that_fails_does_not_stop_training(tensorboard, tiny_dir, tmp_path, caplog):
    from torch.utils.tensorboard import SummaryWriter

    class Unreachable(SummaryWriter):
        def add_image(self, *args, **kwargs):
            raise ConnectionError(f"https://user:{SECRET}@tracker.example refused the picture")

    callbacks = [TensorBoardCallback(Unreachable(str(tmp_path / "runs")))]
    train(tiny_dir, tmp_path, callbacks, depth_strategy="random")
    pictures, scalars = events(tmp_path / "runs")
    assert not pictures and scalars["train/bpo/active_pairs"] == [1, 4]
    lines = [record for record in caplog.records if record.name == "trl_bpo.tracking"]
    assert len(lines) == 1 and lines[0].levelno == logging.WARNING and lines[0].exc_info is None
    assert "tensorboard" in lines[0].getMessage() and "ConnectionError" in lines[0].getMessage()
    assert SECRET not in caplog.text


def test_a_tracker_that_fails_does_not_keep_others_from_it(tensorboard, tmp_path, caplog):
    wandb = pytest.importorskip("wandb")
    assert wandb.run is None
    # No run has begun, so wandb refuses.
    callback, event, writer = by_hand(tmp_path, more=[WandbCallback()])
    for _ in range(2):
        callback.on_selection(*event, selection=selection(4000))
    writer.close()
    assert all(len(shown) == 2 for shown in events(tmp_path)[0].values())
    (line,) = [record.getMessage() for record in caplog.records if record.name == "trl_bpo.tracking"]
    assert "wandb" in line


def test_a_tracker_gets_the_next_picture_after_one_that_failed(tensorboard, tmp_path, caplog):
    from torch.utils.tensorboard import SummaryWriter

    class FailsOnce(SummaryWriter):
        failed = False

        def add_image(self, *args, **kwargs):
            if not self.failed:
                self.failed = True
                raise TimeoutError
            super().add_image(*args, **kwargs)

    callback, event, writer = by_hand(tmp_path, writer=FailsOnce(str(tmp_path)))
    for _ in range(2):
        callback.on_selection(*event, selection=selection(4000))
    writer.close()
    assert {name: len(shown) for name, shown in events(tmp_path)[0].items()} == dict.fromkeys(OF_FEATURES, 1)
    assert caplog.text.count("TimeoutError") == 1


def test_a_large_pool(tensorboard, tmp_path):
    callback, event, writer = by_hand(tmp_path, 300_000)
    callback.on_selection(*event, selection=selection(300_000))
    writer.close()
    assert events(tmp_path)[0].keys() == OF_FEATURES


def test_the_trackers_are_not_imported(run):
    # Each takes seconds, and most trainings use none or one.
    assert json.loads((run / "out" / "kept.json").read_text())["imported"] == []
