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


"""The command `trl-bpo`: what a run selected and why, its report, its push, and the number of clusters."""

import os
import sys
from argparse import ArgumentParser, Namespace
from io import TextIOWrapper
from pathlib import Path

from ._version import __version__


# Whatever takes time to import, such as torch, is imported by the command that needs it.


class _PushError(Exception):
    pass


def _explain(args: Namespace) -> str:
    from .explain import explain
    from .run_folder import RunFolder

    return explain(RunFolder(args.path), args.id, args.step).text


def _report(args: Namespace) -> str:
    from .report import write_report

    return str(write_report(args.path))


def _push(args: Namespace) -> str:
    from .hub import push_run

    try:
        return push_run(args.path, args.repo_id, private=args.private, pool=args.pool, license=args.license)
    except ValueError:
        raise
    # Whatever the Hub and the way to it may come up with.
    except Exception as error:
        raise _PushError(f"The push failed: {type(error).__name__}: {error}") from error


def _suggest(args: Namespace) -> str:
    from .embedding import DEFAULT_ENCODER
    from .run_folder import RunFolder
    from .suggest import save_figure, suggest_for_prompts, suggest_for_run

    output = None if args.output is None else Path(args.output)
    if output is not None and not output.resolve().parent.is_dir():
        raise ValueError(f"There is no folder {str(output.parent)!r} to write `--output` to.")
    if (Path(args.target) / "_breadth").is_dir() or (Path(args.target) / "_selections").is_dir():
        suggestions = suggest_for_run(RunFolder(args.target), args.seed)
    else:
        encoder = args.encoder or DEFAULT_ENCODER
        options = {"split": args.split, "prompt_column": args.prompt_column, "sample": args.sample, "seed": args.seed}
        suggestions = [suggest_for_prompts(args.target, encoder=encoder, **options)]
    parts = [suggestion.text for suggestion in suggestions]
    if output is not None:
        for suggestion in suggestions:
            stage = f"-{suggestion.stage}" if len(suggestions) > 1 else ""
            picture = output.with_name(f"{output.stem}{stage}{output.suffix}")
            save_figure(suggestion, picture)
            parts.append(f"Picture: {picture}")
    return "\n\n".join(parts)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="trl-bpo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"trl-bpo {__version__}")
    commands = parser.add_subparsers(help="available commands", dest="command", metavar="command")
    run_help = "`output_dir` of a run"

    command = commands.add_parser("explain", help="say why a prompt or a pair was kept or dropped", allow_abbrev=False)
    command.add_argument("path", help=run_help)
    command.add_argument("id", help="pair_id or prompt_id, or at least its first 6 characters")
    command.add_argument("--step", type=int, help="the selection at this optimizer step alone; all if not given")
    command.set_defaults(run=_explain)

    command = commands.add_parser("report", help="write a page about a run, with its pictures", allow_abbrev=False)
    command.add_argument("path", help=run_help)
    command.set_defaults(run=_report)

    command = commands.add_parser(
        "push",
        help="push the selections of a run to the Hub",
        description="Push the selections of a run to the Hub. The token is that of `hf auth login` or `HF_TOKEN`.",
        allow_abbrev=False,
    )
    command.add_argument("path", help=run_help)
    command.add_argument("--repo_id", required=True, help="dataset repository, as user/name, created if need be")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    command.add_argument("--pool", action="store_true", help="push the pairs that were selected from as well")
    command.add_argument("--license", help="licence of the dataset, as an identifier of the Hub")
    command.set_defaults(run=_push)

    command = commands.add_parser(
        "suggest",
        help="suggest a number of clusters",
        description="Suggest a number of clusters: the variance that K-means explains by their number, beside that of a "
        "Gaussian of the same covariance, which has none.",
        allow_abbrev=False,
    )
    command.add_argument("target", help="`output_dir` of a run, or a dataset: a file, a folder or a Hub id")
    command.add_argument("--split", default="train", help="split of the dataset (default: train)")
    command.add_argument("--prompt_column", default="prompt", help="column of the prompts (default: prompt)")
    command.add_argument("--encoder", help="sentence-transformers model id or path (default: all-MiniLM-L6-v2)")
    command.add_argument("--sample", type=int, default=4096, help="prompts to embed at most (default: 4096)")
    command.add_argument("--seed", type=int, default=42, help="seed of the sample and of K-means (default: 42)")
    command.add_argument("--output", help="picture to write, such as elbow.png; of a run, one a stage")
    command.set_defaults(run=_suggest)
    return parser


def _complain(error: Exception) -> None:
    from .visible import visible

    # Ids, names and what a server says are data as well.
    sys.stderr.write(f"trl-bpo: {visible(' '.join(str(error).split()))}\n")


def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*):
            Arguments. Defaults to those of the process.

    Returns:
        `int`: Exit code: 0, 1 for a push that failed, 2 for bad input, with a message on the standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character gets its escape.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        sys.stdout.write(f"{args.run(args)}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has enough, as `head` has. What is left in the buffer must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except _PushError as error:
        _complain(error)
        return 1
    except (ValueError, OSError, ImportError) as error:
        _complain(error)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
