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


import json
import os
import shutil
import subprocess
import sys

import pytest
from explain_runs import hashed, random_features, real_run, save_selections
from minihub import MiniHub

from trl_bpo import __version__
from trl_bpo.cli import main
from trl_bpo.run_folder import RunFolder


COMMANDS = ("explain", "report", "push", "suggest")


@pytest.fixture(scope="module")
def run(tiny_dir, encoder, tmp_path_factory):
    """Folder of a run with both stages."""
    folder = tmp_path_factory.mktemp("cli") / "my-run"
    real_run(tiny_dir, encoder, folder)
    return str(folder)


@pytest.fixture(scope="module")
def pair(run):
    """Id of a pair of it."""
    return RunFolder(run).pool["pair_id"][3].as_py()


def cli(*arguments, env=None, **kwargs):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "trl_bpo.cli", *arguments]
    env = {**os.environ, **(env or {})}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **kwargs)


def fails(capsys, code, *arguments):
    """What a command says when it exits with a code."""
    assert main(list(arguments)) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("trl-bpo: ") and err.count("\n") == 1
    return err


# The command itself


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys\nfrom trl_bpo.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['explain', '--help'], ['push', '--help'], ['suggest', '--help']):\n"
        "    try:\n        main(arguments)\n    except SystemExit as error:\n        assert error.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'numpy', 'pyarrow', 'sklearn', 'matplotlib', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert all(command in process.stdout for command in COMMANDS) and __version__ in process.stdout


def test_explain_imports_no_torch(run, pair):
    code = f"import sys\nfrom trl_bpo.cli import main\nassert main(['explain', {run!r}, {pair!r}]) == 0\n"
    process = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    assert "usage: trl-bpo" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["nothing"], ["explain"], ["explain", "x", "y", "--step", "z"], ["push", "x"], ["report"], ["--vers"]],
)
def test_arguments_that_are_wrong(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "usage: trl-bpo" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_none_of_a_run(capsys, tmp_path, monkeypatch, command):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    (tmp_path / "_selections").mkdir()
    more = {"explain": ["abcdef"], "push": ["--repo_id", "tester/x"]}.get(command, [])
    assert "is not the folder of a run with a selection" in fails(capsys, 2, command, str(tmp_path), *more)


# explain


def test_explain(capsys, run, pair):
    assert main(["explain", run, pair]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"Pair    {pair}\n") and out.endswith("\n") and not out.endswith("\n\n")
    assert out.count("Depth at step") == 3 and max(map(len, out.splitlines())) <= 100
    assert main(["explain", run, pair, "--step", "0"]) == 0
    out = capsys.readouterr().out
    assert out.count("Depth at step") == 1 and "Depth at step 0 (gradient" in out


def test_explain_says_what_is_wrong_with_an_id(capsys, tmp_path):
    save_selections(tmp_path, [random_features(30)], ids=[f"source-{i:02d}" for i in range(30)])
    folder = str(tmp_path)
    assert "ambiguous" in fails(capsys, 2, "explain", folder, "source-")
    assert "begins with 'nothing'" in fails(capsys, 2, "explain", folder, "nothing")
    assert "too short" in fails(capsys, 2, "explain", folder, "so")
    assert "no selection at step 7" in fails(capsys, 2, "explain", folder, "source-01", "--step", "7")
    assert "\x1b" not in fails(capsys, 2, "explain", folder, "nothing\x1b[31m\nat all")


def test_messages_show_what_ids_hide(capsys, tmp_path):
    save_selections(tmp_path, [random_features(30)], ids=[f"source-\x1b[31m\u202e{i:02d}" for i in range(30)])
    message = fails(capsys, 2, "explain", str(tmp_path), "source-")
    assert "\x1b" not in message and "\u202e" not in message and "\\x1b[31m\\u202e00" in message


def test_damaged_files(capsys, tmp_path):
    save_selections(tmp_path, [random_features(30)])
    (tmp_path / "_selections" / "step-000000.parquet").write_bytes(b"not parquet")
    fails(capsys, 2, "explain", str(tmp_path), hashed("a", 1))
    (tmp_path / "_selections" / "step-000000.parquet").unlink()
    assert "step-000000.parquet" in fails(capsys, 2, "explain", str(tmp_path), hashed("a", 1))


def test_into_a_pipe_of_another_encoding_that_closes(tmp_path):
    save_selections(tmp_path, [random_features(3000)], prompts=["naïve 漢字 🙂"] * 1, of=3000)
    arguments = ["explain", str(tmp_path), hashed("b", 0)]
    process = cli(*arguments, env={"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and process.stderr == ""
    assert "na\\xefve \\u6f22\\u5b57 \\U0001f642" in process.stdout and len(process.stdout) > 2**17
    command = f"'{sys.executable}' -m trl_bpo.cli {' '.join(arguments)} | head -n 1"
    process = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "") and process.stdout.startswith("Prompt  b00000")


# report


def test_report(capsys, tmp_path, run):
    folder = shutil.copytree(run, tmp_path / "copy")
    assert main(["report", str(folder)]) == 0
    page = folder / "_report" / "index.html"
    assert capsys.readouterr().out == f"{page}\n" and page.read_text().startswith("<!")


# suggest


def test_suggest_for_a_run(capsys, tmp_path, run):
    assert main(["suggest", run]) == 0
    out = capsys.readouterr().out
    assert "Clusters for breadth: 40 prompts" in out and f"Clusters for depth: {len(RunFolder(run).pool)} pairs" in out
    assert out.count("suggested") == out.count("Suggested: ") == 2 and "Picture" not in out
    assert main(["suggest", run, "--output", str(tmp_path / "elbow.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elbow-breadth.png", "elbow-depth.png"]
    assert f"Picture: {tmp_path / 'elbow-depth.png'}" in capsys.readouterr().out


def test_suggest_for_a_dataset(capsys, tmp_path, encoder):
    file = tmp_path / "rows.jsonl"
    rows = [{"question": f"{what} {thing}?"} for what in ("How do I bake", "Who painted") for thing in "abcdefghijkl"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["suggest", str(file), "--prompt_column", "question", "--encoder", encoder, "--split", "train[:20]"]
    assert main([*arguments, "--sample", "16", "--output", str(tmp_path / "elbow.svg")]) == 0
    out = capsys.readouterr().out
    assert "Clusters for breadth: 20 prompts, a sample of 16 of them" in out
    assert (tmp_path / "elbow.svg").read_text().startswith("<?xml")
    assert "`prompt`" in fails(capsys, 2, "suggest", str(file), "--encoder", encoder)
    assert "`sample` must be at least 1" in fails(capsys, 2, *arguments, "--sample", "0")


def test_suggest_of_what_is_not_there(capsys, tmp_path, run):
    assert "There is no file" in fails(capsys, 2, "suggest", str(tmp_path / "nothing.jsonl"))
    missing = str(tmp_path / "nowhere" / "elbow.png")
    assert "There is no folder" in fails(capsys, 2, "suggest", run, "--output", missing)


# push


class Refuses:
    """A fault of the Hub that answers every request about one repository with a status."""

    def __init__(self, name, status):
        self.name, self.status = name, status

    def __call__(self, method, path, data=b""):
        if self.name in path or self.name.encode() in data:
            return self.status, "No", None
        return None


@pytest.fixture(scope="module")
def hub():
    with MiniHub() as hub:
        yield hub


def push(hub, folder, *arguments, token="hf_test"):
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": f"{folder}-home", "HF_TOKEN": token}
    env |= {"HF_HUB_OFFLINE": "0", "HF_TOKEN_PATH": f"{folder}-home/token"}
    return cli("push", folder, *arguments, env=env)


def test_push(hub, run):
    process = push(hub, run, "--repo_id", "tester/pushed", "--private", "--license", "mit")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip().endswith("/datasets/tester/pushed") and process.stdout.count("\n") == 1
    repository = hub.repos["dataset", "tester/pushed"]
    files = repository.trees[repository.refs["main"]]
    assert repository.private and b"license: mit" in files["README.md"].data
    assert {"step-000000/manifest.json", "step-000006/manifest.json"} <= set(files)


def test_push_that_fails(hub, run):
    hub.fault = Refuses("refused", 403)
    process = push(hub, run, "--repo_id", "tester/refused")
    assert process.returncode == 1 and process.stdout == ""
    assert "trl-bpo: The push failed: HfHubHTTPError: " in process.stderr and "Traceback" not in process.stderr
    assert "hf_test" not in process.stderr


def test_push_that_cannot_be(hub, run):
    process = push(hub, run, "--repo_id", "tester/pool", "--pool")
    assert (
        process.returncode == 2 and "Traceback" not in process.stderr and "curated_dataset_push_pool" in process.stderr
    )
    process = push(hub, run, "--repo_id", "tester/no-token", token="")
    assert process.returncode == 2 and "No Hugging Face token was found" in process.stderr
    process = push(hub, run, "--repo_id", "no/such/name")
    assert process.returncode == 2 and "Traceback" not in process.stderr
