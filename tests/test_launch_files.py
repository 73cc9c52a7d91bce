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


"""The configurations of accelerate and the SLURM script, as accelerate and a shell read them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "accelerate_configs"
PROCESSES = {"single_gpu": 1, "multi_gpu": 8, "fsdp2": 8, "deepspeed_zero3": 8, "two_nodes": 16}


def read(name, *arguments):
    """The arguments of `accelerate launch --config_file`, as it works them out."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), *arguments, "recipes/bpo.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def test_all_are_tested():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_takes_it(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == PROCESSES[name] and config.mixed_precision == "bf16"
    args = read(name)
    assert args.num_processes == PROCESSES[name] and args.mixed_precision == "bf16"
    assert args.num_machines == (2 if name == "two_nodes" else 1)
    assert bool(args.multi_gpu) == (name in ("multi_gpu", "two_nodes"))
    assert (bool(args.use_fsdp), bool(args.use_deepspeed)) == (name == "fsdp2", name == "deepspeed_zero3")


def test_fsdp_is_that_which_the_trainer_needs():
    args = read("fsdp2")
    assert int(args.fsdp_version) == 2 and args.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"


def test_zero_shards_the_weights():
    assert int(read("deepspeed_zero3").zero_stage) == 3


def test_the_command_line_says_which_machine_it_is():
    args = read("two_nodes", "--machine_rank", "1", "--main_process_ip", "10.0.0.7", "--num_machines", "4")
    assert (args.machine_rank, args.main_process_ip, args.num_machines) == (1, "10.0.0.7", 4)


def test_slurm(tmp_path):
    """What the script has each machine run. The scheduler is a stand-in that starts one shell a node."""
    stand_ins = {
        "scontrol": 'printf "node-7\\nnode-8\\n"',
        "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
        "accelerate": f'{sys.executable} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "123456",
        "SLURM_GPUS_ON_NODE": "4",
    }
    command = ["bash", str(ROOT / "recipes" / "launch.slurm"), "--config", "a b.yaml", "--output_dir", "/shared/run"]
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    launched = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(launched) == 2
    for rank, arguments in enumerate(launched):
        assert arguments[-5:] == ["recipes/bpo.py", "--config", "a b.yaml", "--output_dir", "/shared/run"]
        args = _validate_launch_command(launch_command_parser().parse_args(arguments[1:]))[0]
        assert arguments[0] == "launch" and (args.machine_rank, args.num_machines, args.num_processes) == (rank, 2, 8)
        assert (args.main_process_ip, args.main_process_port) == ("node-7", 20000 + 123456 % 20000)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_files_that_commands_name_are_there(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"recipes/[\w/]+\.(?:yaml|slurm|py)", text):
        assert (ROOT / name).is_file(), (page, name)
