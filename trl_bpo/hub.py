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


"""Saving curated datasets and pushing them to the Hub: the only module that talks to it."""

import dataclasses
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCard,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ._version import __version__
from .card import CuratedCardData, create_dataset_card
from .card_merge import merge_card
from .pictures import histogram_picture, pictures_of_run, save_pictures
from .run_folder import RunFolder, SavedSelection, step_name


logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_SHARD_BYTES = 500_000_000
_POOL = "pool"
_STEP = re.compile(r"step-\d{6,}")
_NOT_PARQUET = re.compile(r"\.(jsonl?|csv|tsv|txt|arrow|zip|gz|tar)\b")
_ATTEMPTS = 4
_FIRST_WAIT = 1.0
# The request was not wrong: the server was too slow or too busy, or somebody else pushed meanwhile.
_TRY_AGAIN = {408, 412, 429}


# Saving


def _data_folder(config_name: str) -> str:
    # Where `Dataset.push_to_hub` puts a configuration, too.
    return "data" if config_name == "default" else config_name


def _drawn(draw: Callable[[], dict[str, Any]], folder: Path) -> dict[str, str]:
    try:
        return save_pictures(draw(), folder)
    except ImportError as error:
        logger.warning("The card has no pictures. %s", error)
        return {}


def save_curated_dataset(
    dataset: Dataset, path: str | Path, card_data: CuratedCardData, *, run: RunFolder | None = None
) -> None:
    """
    Save a curated dataset as a folder that [`~datasets.load_dataset`] reads: `data/train-*.parquet`, the dataset card
    `README.md`, and the pictures of the card if `matplotlib` is installed.

    A dataset that was saved to the folder before is replaced; other files are left alone.

    Args:
        dataset ([`~datasets.Dataset`]):
            The curated pairs. All columns are written.
        path (`str` or `Path`):
            Folder to write, created if need be.
        card_data ([`CuratedCardData`]):
            What the card shows.
        run ([`~run_folder.RunFolder`], *optional*):
            The run whose last selection it is, for further pictures than that of the pairs per prompt.
    """
    folder = Path(path)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    shards = max(1, math.ceil(dataset.data.nbytes / _MAX_SHARD_BYTES))
    files = [folder / "data" / f"train-{index:05d}-of-{shards:05d}.parquet" for index in range(shards)]
    for index, file in enumerate(files):
        dataset.shard(shards, index, contiguous=True).to_parquet(file)
    # A shard left from a dataset of another size would be loaded with the new ones.
    for old in set((folder / "data").glob("train-*-of-*.parquet")) - set(files):
        old.unlink()

    def draw() -> dict[str, Any]:
        if run is not None:
            return pictures_of_run(run)
        histogram = card_data.pairs_per_prompt
        return {"pairs_per_prompt.png": histogram_picture(histogram)} if histogram else {}

    # `load_dataset` finds the files by their names. If the card listed them as `configs`, it would go on reading its
    # cache after the folder was saved anew, since the times of the files no longer count then.
    create_dataset_card(dataset.features, card_data, pictures=_drawn(draw, folder)).save(folder / "README.md")


# Pushing


def _check(repo_id: str, token: str | None) -> None:
    validate_repo_id(repo_id)
    if token is None and get_token() is None:
        raise ValueError(
            "No Hugging Face token was found. Log in with `hf auth login`, or set the environment variable "
            "`HF_TOKEN` to a token with write access."
        )


def _is_refusal(error: Exception) -> bool:
    # The Hub's own word that the request is wrong. Anything else may go away by itself.
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return 400 <= status < 500 and status not in _TRY_AGAIN
    return isinstance(error, ValueError | TypeError | KeyError)


def _retried(push: Callable[[], T]) -> T:
    for attempt in range(1, _ATTEMPTS):
        try:
            return push()
        except Exception as error:
            if _is_refusal(error):
                raise
            wait = _FIRST_WAIT * 2 ** (attempt - 1)
            logger.warning("The push failed and is tried again in %.0f s: %s", wait, error)
            time.sleep(wait)
    return push()


def check_curated_repo(repo_id: str, private: bool | None = None, token: str | None = None) -> None:
    """
    Create the dataset repository if there is none, so that a wrong name or token shows before a training and not after.

    Args:
        repo_id (`str`):
            Dataset repository.
        private (`bool`, *optional*):
            Whether a new repository is private.
        token (`str`, *optional*):
            Token with write access. Defaults to the one of `hf auth login` or `HF_TOKEN`.

    Raises:
        `ValueError`: If the Hub refuses. If it cannot be reached, a warning is all, since it may be back when the data is
            pushed.
    """
    _check(repo_id, token)
    try:
        HfApi(token=token).create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    except Exception as error:
        if _is_refusal(error):
            raise ValueError(
                f"The curated dataset could not be pushed to {repo_id!r}: {error}\nCheck the name and that the token may "
                "write there, or leave out `curated_dataset_hub_id`."
            ) from error
        logger.warning(
            "The Hub could not be reached, so that it is not known whether %r can be pushed to: %s", repo_id, error
        )


def _card_on_hub(api: HfApi, repo_id: str, revision: str | None, folder: str) -> str | None:
    try:
        readme = api.hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision, local_dir=folder)
    # Only the Hub's own word that there is no card counts. After a network error the card may well be there, and a
    # push would wipe what it holds.
    except RemoteEntryNotFoundError:
        return None
    return Path(readme).read_text(encoding="utf-8")


def _configs(names: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "config_name": name,
            "data_files": [{"split": "train", "path": f"{_data_folder(name)}/train-*"}],
            **({"default": True} if name == "default" else {}),
        }
        for name in names
    ]


def _commit(
    api: HfApi,
    repo_id: str,
    data: dict[str, list[Path]],
    others: dict[str, Path],
    card: DatasetCard,
    *,
    private: bool | None,
    revision: str | None,
    message: str,
    replaces_steps: bool,
    keep_license: bool,
) -> str:
    # All in one commit: who loads the repository meanwhile sees the old state or the new one, and so does a push that is
    # interrupted. Its files need not be sent again then, since the Hub has them by their digests.
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    repo_id = url.repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
    head = api.dataset_info(repo_id, revision=revision)
    there = [sibling.rfilename for sibling in head.siblings or []]
    added = {name: Path(file) for name, file in others.items()}
    for name, files in data.items():
        for index, file in enumerate(files):
            added[f"{_data_folder(name)}/train-{index:05d}-of-{len(files):05d}.parquet"] = file
    folders = {_data_folder(name) for name in data}
    stale_steps = {path.split("/")[0] for path in there if replaces_steps and _STEP.fullmatch(path.split("/")[0])}
    stale_steps -= folders
    deleted = [
        path
        for path in there
        if path not in added
        and (path.split("/")[0] in stale_steps or (path.split("/")[0] in folders and path.endswith(".parquet")))
    ]
    with TemporaryDirectory() as folder:
        existing = _card_on_hub(api, repo_id, head.sha, folder)
    merged = merge_card(existing, card, dropped_configs=stale_steps, keep_license=keep_license)
    foreign = [
        one["config_name"]
        for one in merged.data.to_dict().get("configs", [])
        if _NOT_PARQUET.search(str(one["data_files"]))
    ]
    if foreign:
        raise ValueError(
            f"{repo_id!r} has configurations of another format than Parquet: {foreign}. `load_dataset` reads all of a "
            "repository in one format, so that either they or the pushed data could not be loaded any more. Push to "
            "another repository."
        )
    operations: list[Any] = [CommitOperationAdd("README.md", str(merged).encode())]
    operations += [CommitOperationAdd(path, str(file)) for path, file in added.items()]
    operations += [CommitOperationDelete(path) for path in deleted]
    api.create_commit(
        repo_id, operations, repo_type="dataset", revision=revision, commit_message=message, parent_commit=head.sha
    )
    return str(url)


def push_curated_dataset(
    dataset: Dataset,
    repo_id: str,
    card_data: CuratedCardData,
    *,
    config_name: str = "default",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """
    Push a curated dataset with its card and picture to the Hub, in one commit. Pushing again replaces the configuration of
    that name. To push what a training saved use [`push_run`].

    If the repository has a card already, its other fields and configurations stay, see [`~card_merge.merge_card`].

    Args:
        dataset ([`~datasets.Dataset`]):
            The curated pairs. All columns are pushed, as the split `train`.
        repo_id (`str`):
            Dataset repository, created if need be.
        card_data ([`CuratedCardData`]):
            What the card shows.
        config_name (`str`, *optional*, defaults to `"default"`):
            Name of the configuration, to keep several curated datasets in one repository.
        private (`bool`, *optional*):
            Whether a new repository is private. Defaults to the namespace's own default.
        token (`str`, *optional*):
            Token with write access. Defaults to the one of `hf auth login` or `HF_TOKEN`.
        revision (`str`, *optional*):
            Branch to push to, created if need be. Defaults to `main`.
        commit_message (`str`, *optional*):
            Message of the commit.

    Returns:
        `str`: URL of the dataset on the Hub.

    Raises:
        `ValueError`: If `repo_id` is not the name of a repository, `config_name` has other characters than letters,
            digits, `_`, `-` and `.`, or there is no token. Errors of the Hub are raised as they are, after four attempts
            where they may go away by themselves.
    """
    _check(repo_id, token)
    if not re.fullmatch(r"\w[\w.-]*", config_name, flags=re.ASCII):
        raise ValueError(
            f"`config_name` is {config_name!r}. Use letters, digits, `_`, `-` and `.`, with no `-` or `.` first."
        )
    api = HfApi(token=token, library_name="trl_bpo", library_version=__version__)
    card_data = dataclasses.replace(card_data, repo_id=repo_id)
    histogram = card_data.pairs_per_prompt
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_curated_dataset(dataset, folder, card_data)
        # Every configuration has its own picture, so that no push replaces that of another one.
        prefix = "" if config_name == "default" else f"{config_name}/"
        pictures = _drawn(lambda: {"pairs_per_prompt.png": histogram_picture(histogram)} if histogram else {}, folder)
        card = create_dataset_card(
            dataset.features,
            card_data,
            config_name=config_name,
            pictures={f"{prefix}{file}": alt for file, alt in pictures.items()},
            configs=_configs([config_name]),
        )
        return _retried(
            lambda: _commit(
                api,
                repo_id,
                {config_name: sorted((folder / "data").glob("*.parquet"))},
                {f"{prefix}{file}": folder / file for file in pictures},
                card,
                private=private,
                revision=revision,
                message=commit_message or f"Push the configuration {config_name}",
                replaces_steps=False,
                keep_license=card_data.license_is_inherited,
            )
        )


def _annotated_pool(run: RunFolder, file: Path) -> None:
    # The texts and the columns of the last selection have the same rows in the same order.
    if run.pool_file is None:
        raise ValueError(
            f"The pool of {run.name!r} was not saved. Set `curated_dataset_push_pool=True` when you train, or push "
            "without it."
        )
    pairs, start, writer = run.selections[-1].pairs, 0, None
    for batch in pq.ParquetFile(run.pool_file).iter_batches():
        table = pa.Table.from_batches([batch])
        depth = pairs.slice(start, len(table))
        if not depth["pair_id"].combine_chunks().equals(table["pair_id"].combine_chunks()):
            raise ValueError(f"The pool and the last selection of {run.name!r} are not of the same run. Train anew.")
        for name in [name for name in pairs.column_names if name.startswith("depth_")]:
            table = table.append_column(name, depth[name])
        writer = pq.ParquetWriter(file, table.schema) if writer is None else writer
        writer.write_table(table)
        start += len(table)
    if writer is not None:
        writer.close()


def push_run(
    path: str | Path,
    repo_id: str,
    *,
    pool: bool = False,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """
    Push the selections that a training saved to the Hub, with a card and pictures, in one commit. May be repeated: whatever
    was sent before is not sent again.

    Each selection is a configuration of its name (`step-000012`), with its manifest beside the data; `default` is the last
    one. Configurations of that kind that an earlier run left in the repository are removed: they stay in its history, but
    the card would not be theirs. What else is in the repository stays, and so do the other fields of its card, see
    [`~card_merge.merge_card`].

    Args:
        path (`str` or `Path`):
            The `output_dir` of the training. It may still be running, or have been killed.
        repo_id (`str`):
            Dataset repository, created if need be.
        pool (`bool`, *optional*, defaults to `False`):
            Whether to push the pairs that were selected from as well, as the configuration `pool`, with the `depth_*`
            columns of the last selection. The training must have saved them, with `curated_dataset_push_pool`.
        license (`str`, *optional*):
            Licence of the dataset, as an identifier of the Hub. Defaults to that of the run, if it was named there.
        private, token, revision, commit_message:
            As in [`push_curated_dataset`].

    Returns:
        `str`: URL of the dataset on the Hub.

    Raises:
        `ValueError`: If the folder holds no selection of pairs, the pool was not saved, `repo_id` is not the name of a
            repository, or there is no token. Errors of the Hub are raised as they are, after four attempts where they may
            go away by themselves.
    """
    _check(repo_id, token)
    run = RunFolder(path)
    card_data = run.card_data
    if card_data is None:
        raise ValueError(f"{str(path)!r} holds no selection of pairs, so there is nothing to push.")
    last: SavedSelection = run.selections[-1]
    data = {"default": [last.kept_file]} | {step_name(one.step): [one.kept_file] for one in run.selections}
    others = {"data/manifest.json": last.manifest_file}
    others |= {f"{step_name(one.step)}/manifest.json": one.manifest_file for one in run.selections}
    card_data = dataclasses.replace(
        card_data,
        repo_id=repo_id,
        license=card_data.license if license is None else license,
        license_is_inherited=card_data.license_is_inherited and license is None,
        has_pool=pool,
        selections=[(step_name(one.step), one.step, one.manifest["outputs"]["num_kept"]) for one in run.selections],
    )
    api = HfApi(token=token, library_name="trl_bpo", library_version=__version__)
    with TemporaryDirectory() as name:
        folder = Path(name)
        if pool:
            _annotated_pool(run, folder / "pool.parquet")
            data[_POOL] = [folder / "pool.parquet"]
        pictures = _drawn(lambda: pictures_of_run(run), folder)
        card = create_dataset_card(
            Features.from_arrow_schema(pq.read_schema(last.kept_file)),
            card_data,
            pictures=pictures,
            configs=_configs(list(data)),
        )
        return _retried(
            lambda: _commit(
                api,
                repo_id,
                data,
                {**others, **{file: folder / file for file in pictures}},
                card,
                private=private,
                revision=revision,
                message=commit_message or f"Push the selection at step {last.step}",
                replaces_steps=True,
                keep_license=card_data.license_is_inherited,
            )
        )


def source_fields(dataset_name: str, token: str | None = None) -> dict[str, Any]:
    """
    What the card of a curated dataset takes over from the source dataset on the Hub.

    Args:
        dataset_name (`str`):
            Its Hub id.
        token (`str`, *optional*):
            Token that may read it.

    Returns:
        `dict[str, Any]`: `source_revision` (a commit), and where its card has them `license` (then
        `license_is_inherited` is set) and `language`. Empty, with a
        warning, if the Hub cannot be reached.
    """
    try:
        info = HfApi(token=token).dataset_info(dataset_name)
    except Exception as error:
        logger.warning("The licence of the source dataset %r could not be looked up: %s", dataset_name, error)
        return {}
    metadata = info.card_data.to_dict() if info.card_data is not None else {}
    languages, licence = metadata.get("language"), metadata.get("license")
    fields = {
        "source_revision": info.sha,
        "license": ", ".join(licence) if isinstance(licence, list) else licence,
        "license_is_inherited": bool(licence),
        "language": [languages] if isinstance(languages, str) else languages,
    }
    return {name: value for name, value in fields.items() if value}
