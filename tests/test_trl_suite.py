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
TRL's own tests of `DPOTrainer`, run with `BPOTrainer` in its place.

They are not part of an installed TRL. `TRL_BPO_TRL_TESTS` names a checkout of TRL at the installed version, or its
folder `tests`. Where the Hub is out of reach, or `HF_HUB_OFFLINE` is set, the tiny models and data sets that they load
are replaced by stand-ins of the same architectures; the first line of the output says which. Each of the three runs takes
minutes.

```
TRL_BPO_TRL_TESTS=path/to/trl pytest -m slow tests/test_trl_suite.py
```
"""

import faulthandler
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from huggingface_hub import hf_hub_download
from minihub import MiniHub
from trl_standins import NAMESPACE, publish_standins


pytestmark = pytest.mark.slow

# The text of the tests stays as it is: the two names that they look up when they run are other ones. Where a test hands
# over no configuration (of tags, without training), the trainer makes its default one.
PLUGIN = """
import os
from functools import partial

from trl_bpo import BPOConfig, BPOTrainer


def pytest_collection_modifyitems(items):
    fraction = os.environ["DEPTH_FRACTION"]
    config = partial(BPOConfig, depth_fraction=float(fraction)) if fraction else BPOConfig
    for module in {item.module for item in items}:
        assert {"DPOTrainer", "DPOConfig"} <= set(vars(module))
        module.DPOTrainer, module.DPOConfig = BPOTrainer, config
"""

# What selection refuses: tests, the error, and why.
REFUSED: list[tuple[str, str]] = [
    # A stream has no rows to choose from. The last test is about another error of streams, which comes later.
    (r"TestDPOTrainer::test_train_with_iterable_dataset", "streaming dataset cannot be selected from"),
    (r"TestDPOTrainer::test_init_with_train_dataset\[iterable_dataset\]", "streaming dataset cannot be selected from"),
    (
        r"TestDPOTrainer::test_precompute_ref_log_probs_raises_for_iterable_dataset\[train\]",
        "streaming dataset cannot be selected from",
    ),
    # Adapters of expert weights alone: none of them is a layer that runs over the tokens of a response.
    (r"TestDPOTrainer::test_train_moe_with_peft_config", "no gradient to select by"),
    # Pairs with images are not selected from. Some of these tests are about other errors of images, which come later.
    (r"TestDPOTrainerVLM::(?!test_train_vlm_text_only_data)", "Vision-language pairs"),
]


def hub_is_reachable(cache_dir: Path) -> bool:
    try:
        hf_hub_download(f"{NAMESPACE}/tiny-Qwen2ForCausalLM-2.5", "config.json", cache_dir=cache_dir)
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def say(request):
    """Write a line to the terminal now, whatever captures the output: a run takes minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            request.config.get_terminal_writer().line(line)

    return write


@pytest.fixture(scope="module")
def suite(tmp_path_factory, say):
    """Folder of the copied tests, and the environment to run them in."""
    source = os.environ.get("TRL_BPO_TRL_TESTS")
    if source is None:
        pytest.skip("set `TRL_BPO_TRL_TESTS` to a checkout of TRL to run its tests of DPOTrainer with BPOTrainer")
    source = Path(source) / "tests" if (Path(source) / "tests").is_dir() else Path(source)
    folder = tmp_path_factory.mktemp("trl")
    # A configuration of its own, so that pytest does not go up to another one. TRL marks tests with these.
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    low_priority\n")
    (folder / "tests").mkdir()
    for file in source.glob("*.py"):
        shutil.copy(file, folder / "tests")
    (folder / "swap_trainer.py").write_text(PLUGIN)
    env = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path(__file__).parents[1]), env.get("PYTHONPATH", "")])
    if hub_is_reachable(folder / "probe"):
        say("\nTRL's tests of DPOTrainer, with the models and data sets of the Hub")
        yield folder, env
        return
    say("\nTRL's tests of DPOTrainer, with stand-ins for the models and data sets of the Hub")
    with MiniHub() as hub:
        publish_standins(hub, folder / "standins")
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
            env.pop(name, None)
        yield folder, env


@pytest.fixture(scope="module")
def run(suite, say):
    """Run the tests, and return outcome and message of each by its name."""
    folder, env = suite

    def run_tests(name: str, *options: str, **more_env: str) -> dict[str, tuple[str, str]]:
        report = folder / f"{name}.xml"
        command = [sys.executable, "-m", "pytest", "tests/test_dpo_trainer.py", "-q", "--tb=short", *options]
        command += [f"--junitxml={report}", "-p", "no:cacheprovider", f"--basetemp={folder / name}"]
        # The limit of a test is shorter than a run, which has its own. One that hangs is in TRL's tests.
        faulthandler.cancel_dump_traceback_later()
        process = subprocess.run(command, cwd=folder, env=env | more_env, capture_output=True, text=True, timeout=3600)
        # 0: all tests passed. 1: some failed.
        assert process.returncode in (0, 1), process.stdout + process.stderr
        outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            outcome = ("passed", "") if problem is None else (problem.tag, f"{problem.get('message')}\n{problem.text}")
            outcomes[f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}"] = outcome
        say(f"\n{name}: {dict(Counter(outcome for outcome, _ in outcomes.values()))}")
        return outcomes

    return run_tests


@pytest.fixture(scope="module")
def passed(run):
    """Names of the tests that pass for DPOTrainer itself."""
    outcomes = run("DPOTrainer")
    names = [name for name, (outcome, _) in outcomes.items() if outcome == "passed"]
    # With fewer, something other than the trainers is broken.
    assert len(names) > 50, {name: message for name, (_, message) in outcomes.items() if message}
    return names


def test_dpo_trainer(passed):
    # A test of its own, since each of the three runs takes minutes.
    assert any("test_train_loss_types" in name for name in passed)


def test_selection_off(suite, run, passed):
    outcomes = run("selection_off", "-p", "swap_trainer", DEPTH_FRACTION="1.0")
    assert not {name: outcomes[name] for name in passed if outcomes[name][0] != "passed"}
    assert not list((suite[0] / "selection_off").rglob("_selections"))


def test_defaults(suite, run, passed):
    outcomes = run("defaults", "-p", "swap_trainer", DEPTH_FRACTION="")
    failed = {name: message for name in passed for outcome, message in [outcomes[name]] if outcome != "passed"}
    refused = {
        name
        for name, message in failed.items()
        if any(re.match(test, name) and re.search(error, message) for test, error in REFUSED)
    }
    assert not {name: message for name, message in failed.items() if name not in refused}
    # What passes is not listed as refused.
    assert not [name for name in passed if name not in failed and any(re.match(test, name) for test, _ in REFUSED)]
    # They did select: of the tests that train, one folder each.
    assert len(list((suite[0] / "defaults").rglob("_selections"))) > 30
