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

"""Nothing that a run leaves or pushes holds a key, and nothing of ours tells where it lay on the machine."""

import html
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from minihub import MiniHub
from openai_server import OpenAIServer
from PIL import Image
from test_recipe import OPTIONS, RECIPE, system_multi_turn_and_tools, write


KEYS = {
    "OPENAI_API_KEY": "sk-planted-openai-key-7d1f0c",
    "HF_TOKEN": "hf_PlantedTokenOfTheHub83b2",
    "WANDB_API_KEY": "planted0wandb0key".ljust(40, "9"),
}
# Of what lies in `output_dir`, the rest is written by TRL, transformers, PEFT and the trackers.
OURS = ("_breadth", "_collected", "_curated_dataset", "_report", "_selections", "_funnel.json", "README.md")
# What transformers and PEFT themselves write into a model repository, for every trainer, with the paths that they were
# given: where the policy lies and where the outputs go.
THEIRS = ("adapter_config.json", "training_args.bin", "events.out.tfevents.")


def contents(name, data):
    """What a file says, unpacked: a key in a compressed column or archive is there as well."""
    name = name.split("@")[0]
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(data))
        # The schema has the metadata of the file.
        yield f"{table.schema}{table.schema.metadata}{table.to_pylist()}".encode()
    elif name.endswith(".png"):
        yield repr(Image.open(io.BytesIO(data)).info).encode()
    elif zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from contents(member, archive.read(member))
    yield data


def readings(data):
    """Markdown, HTML and addresses write the characters of a path in their own way."""
    text = data.decode(errors="replace")
    plain = html.unescape(text).replace("\\", "")
    return text, plain, unquote(plain)


def found(files, texts):
    """Names of the files that hold one of the texts, with the text."""
    return sorted(
        {
            (name, text)
            for name, data in files.items()
            for content in contents(name, data)
            for reading in readings(content)
            for text in texts
            if text in reading
        }
    )


@pytest.fixture(scope="module")
def run(tiny_dir, encoder, tmp_path_factory):
    """Files of a run of the whole recipe, what the Hub got from it, what it printed, and the places on this machine."""
    folder = tmp_path_factory.mktemp("place_of_the_run")
    home, output_dir = folder / "home", folder / "out"
    home.mkdir()
    # What the tracker writes is searched as well, and the underscore keeps it out of the model repository.
    (output_dir / "_wandb").mkdir(parents=True)
    data = write(folder / "prompts.jsonl", system_multi_turn_and_tools(12))
    received = {}

    def rate(request):
        return json.dumps({"reason": "", "rating": len(request["messages"][-1]["content"]) % 10 + 1})

    def note(method, path, body):
        received[f"{len(received)} {method} {path}"] = body

    with OpenAIServer(rate, key=KEYS["OPENAI_API_KEY"]) as judge, MiniHub(tokens={KEYS["HF_TOKEN"]: "tester"}) as hub:
        hub.fault = note
        options = {
            **OPTIONS,
            "report_to": [name for name in ("tensorboard", "wandb") if importlib.util.find_spec(name)],
            "dataset_name": str(data),
            "model_name_or_path": tiny_dir,
            "output_dir": str(output_dir),
            "breadth_fraction": 0.5,
            "breadth_encoder": encoder,
            "judge_model": "judge",
            "judge_base_url": judge.base_url,
            "allow_truncated_chosen": "true",
            "num_train_epochs": 2,
            "reselect_every_epochs": 1,
            "save_strategy": "epoch",
            "push_to_hub": "true",
            "hub_model_id": "tester/policy",
            "curated_dataset_hub_id": "tester/kept",
            "curated_dataset_push_pool": "true",
        }
        environment = {
            **os.environ,
            **KEYS,
            "HOME": str(home),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "WANDB_DIR": str(output_dir / "_wandb"),
            "WANDB_MODE": "offline",
        }
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(options))
        command = [sys.executable, str(RECIPE), "--config", str(config)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=folder)
        assert process.returncode == 0, process.stderr[-20000:]
        # Every commit, since an earlier one can be looked up for ever.
        pushed = {
            f"{kind} {name}/{file}@{commit[:8]}": blob.data
            for (kind, name), repo in hub.repos.items()
            for commit, tree in repo.trees.items()
            for file, blob in tree.items()
        }
        asked = json.dumps(judge.requests)
    files = {
        str(path.relative_to(output_dir)): path.read_bytes()
        for path in output_dir.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    places = [str(folder), str(home), tiny_dir, sys.prefix, str(RECIPE.parent.parent)]
    return files, pushed, received, (process.stdout, process.stderr, asked), places


def ours(files):
    return {
        name: data
        for name, data in files.items()
        if name.split("/")[0] in OURS or name.endswith("/bpo_selection.safetensors")
    }


def test_the_run_left_what_is_searched(run):
    files, pushed, received, (stdout, _, asked), _ = run
    # A search of nothing finds nothing.
    for name in (
        "_breadth/prompts.parquet",
        "_breadth/manifest.json",
        "_collected/scores.parquet",
        "_curated_dataset/README.md",
        "_funnel.json",
        "_report/index.html",
        "_selections/step-000000/card.json",
        "_selections/pool.parquet",
        "_selections/step-000000/manifest.json",
        "README.md",
        "checkpoint-3/bpo_selection.safetensors",
    ):
        assert name in ours(files), name
    others = files.keys() - ours(files).keys()
    assert "training_args.bin" in others
    for name, written in (("tensorboard", "runs/"), ("wandb", "_wandb/wandb/offline-run")):
        assert not importlib.util.find_spec(name) or any(one.startswith(written) for one in others), name
    assert sum(name.startswith("_selections/step-") and name.endswith("/train.parquet") for name in files) == 2
    for name in (
        "dataset tester/kept/README.md",
        "dataset tester/kept/pool/train-00000-of-00001.parquet",
        "model tester/policy/README.md",
    ):
        assert any(one.startswith(name) for one in pushed), (name, pushed.keys())
    assert len(received) > 10 and "rating" in asked
    assert "pairs kept (depth)" in stdout


def test_the_search_finds_what_is_hidden():
    key = KEYS["OPENAI_API_KEY"]
    table, archive, place = io.BytesIO(), io.BytesIO(), "/home/a_b/out"
    # The least and the greatest are kept in the clear.
    pq.write_table(pa.table({"text": ["a", *[key] * 100, "z"]}), table, compression="gzip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.pkl", f"x{key}x" * 100)
    files = {"a.parquet": table.getvalue(), "a.bin": archive.getvalue(), "a.txt": b"nothing"}
    assert all(key.encode() not in data for data in files.values())
    assert [name for name, _ in found(files, [key])] == ["a.bin", "a.parquet"]
    texts = {"a.md": b"/home/a\\_b/out", "a.html": b"&#x2F;home/a_b/out", "a.url": b"%2Fhome%2Fa_b%2Fout"}
    assert [name for name, _ in found(texts, [place])] == sorted(texts)


def test_no_file_holds_a_key(run):
    files, pushed, received, _, _ = run
    assert found(files, KEYS.values()) == []
    assert found(pushed, KEYS.values()) == []
    assert found(received, KEYS.values()) == [] and not any(key in name for name in received for key in KEYS.values())


def test_nothing_printed_or_asked_holds_a_key(run):
    _, _, _, texts, _ = run
    assert not [key for key in KEYS.values() for text in texts if key in text]


def test_no_file_of_ours_tells_where_it_lay(run):
    files, _, _, (_, _, asked), places = run
    assert found(ours(files), places) == []
    assert not [place for place in places if place in asked]


def test_nothing_pushed_tells_where_it_lay(run):
    _, pushed, received, _, places = run
    told = {name.split("@")[0] for name, _ in found(pushed, places)}
    assert not [name for name in told if not name.startswith("model ") or not name.split("/")[-1].startswith(THEIRS)]
    # The other requests are the commits, with their messages, and what is asked about the files.
    assert found({name: body for name, body in received.items() if "/_lfs/" not in name}, places) == []
