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
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from huggingface_hub import (
    CommitOperationAdd,
    DatasetCard,
    HfApi,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .card import CuratedCardData, create_dataset_card
from .report import plot_pairs_per_prompt


logger = logging.getLogger(__name__)

_PICTURE = "pairs_per_prompt.png"
_MAX_SHARD_BYTES = 500_000_000


def _draw(card_data: CuratedCardData, path: Path) -> bool:
    if not card_data.pairs_per_prompt:
        return False
    try:
        plot_pairs_per_prompt(card_data.pairs_per_prompt, path)
    except ImportError as error:
        logger.warning("The card has no picture of the pairs per prompt. %s", error)
        return False
    return True


def save_curated_dataset(dataset: Dataset, path: str | Path, card_data: CuratedCardData) -> None:
    """
    Save a curated dataset as a folder that [`~datasets.load_dataset`] reads: `data/train-*.parquet`, the dataset card
    `README.md`, and the picture `pairs_per_prompt.png` if `matplotlib` is installed.

    A dataset that was saved to the folder before is replaced; other files are left alone.

    Args:
        dataset ([`~datasets.Dataset`]):
            The curated pairs. All columns are written.
        path (`str` or `Path`):
            Folder to write, created if need be.
        card_data ([`CuratedCardData`]):
            What the card shows.
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
    picture = _PICTURE if _draw(card_data, folder / _PICTURE) else None
    # `load_dataset` finds the files by their names. If the card listed them as `configs`, it would go on reading its
    # cache after the folder was saved anew, since the times of the files no longer count then.
    create_dataset_card(dataset, card_data, picture=picture).save(folder / "README.md")


def _metadata_on_hub(repo_id: str, config_name: str, revision: str | None, token: str | None) -> dict[str, Any]:
    try:
        readme = hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision, token=token)
    # Only the Hub's own word that there is no card counts. After a network error the card may well be there, and a
    # push would wipe the configurations that it lists.
    except RemoteEntryNotFoundError:
        return {}
    metadata = DatasetCard.load(readme).data.to_dict()
    # `Dataset.push_to_hub` keeps the features that the card lists for a configuration, so that a second push with other
    # columns could not be loaded. It writes the entry anew if there is none. With further splits in the configuration
    # the entry stays, and `push_to_hub` refuses other columns.
    infos = metadata.pop("dataset_info", [])
    kept = [
        info
        for info in (infos if isinstance(infos, list) else [infos])
        if info.get("config_name", "default") != config_name
        or [s["name"] for s in info.get("splits", [])] != ["train"]
    ]
    if kept:
        # A lone entry stands in the card without a list.
        metadata["dataset_info"] = kept if isinstance(infos, list) else kept[0]
    return metadata


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
    saved_to: str | Path | None = None,
) -> str:
    """
    Push a curated dataset with its card and picture to the Hub. Pushing again replaces the configuration of that name.

    Save the dataset first with [`save_curated_dataset`]: a push that fails can then be repeated at any time. If the
    repository has a card already, its text is replaced, while the fields of its front matter that describe other
    configurations, its tags and its licence stay.

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
            Message of the commits.
        saved_to (`str` or `Path`, *optional*):
            Folder where the dataset is saved, named in the message of a push that fails.

    Returns:
        `str`: URL of the dataset on the Hub.

    Raises:
        `ValueError`: If `repo_id` is not the name of a repository, `config_name` has other characters than letters,
            digits, `_`, `-` and `.`, or there is no token. Errors of the Hub are raised as they are, with a note how to
            repeat the push.
    """
    try:
        validate_repo_id(repo_id)
        if not re.fullmatch(r"\w[\w.-]*", config_name, flags=re.ASCII):
            raise ValueError(
                f"`config_name` is {config_name!r}. Use letters, digits, `_`, `-` and `.`, with no `-` or `.` first."
            )
        if token is None and get_token() is None:
            raise ValueError(
                "No Hugging Face token was found. Log in with `hf auth login`, or set the environment variable "
                "`HF_TOKEN` to a token with write access."
            )
        api = HfApi(token=token, library_name="trl_bpo", library_version=card_data.versions.get("trl_bpo"))
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, repo_type="dataset", exist_ok=True)
        _push_card(api, dataset, url.repo_id, card_data, config_name, revision, token, commit_message)
        # `push_to_hub` merges the configuration into the card that is on the Hub by now.
        dataset.push_to_hub(
            url.repo_id,
            config_name=config_name,
            split="train",
            token=token,
            revision=revision,
            commit_message=commit_message,
        )
    except Exception as error:
        if saved_to is not None:
            error.add_note(
                f"Nothing is lost: the dataset is saved in {str(saved_to)!r}. Push again with `push_curated_dataset` "
                "once the cause is removed, or, to a repository that holds nothing else, with "
                f"`hf upload {repo_id} {shlex.quote(str(saved_to))} . --repo-type dataset`."
            )
        raise
    return str(url)


def _push_card(
    api: HfApi,
    dataset: Dataset,
    repo_id: str,
    card_data: CuratedCardData,
    config_name: str,
    revision: str | None,
    token: str | None,
    commit_message: str | None,
) -> None:
    # Every configuration has its own picture, so that no push replaces that of another one.
    picture = _PICTURE if config_name == "default" else f"{config_name}/{_PICTURE}"
    with TemporaryDirectory() as folder:
        file = Path(folder) / _PICTURE
        drawn = _draw(card_data, file)
        card = create_dataset_card(
            dataset,
            dataclasses.replace(card_data, repo_id=repo_id),
            config_name=config_name,
            picture=picture if drawn else None,
            metadata=_metadata_on_hub(repo_id, config_name, revision, token),
        )
        operations = [CommitOperationAdd("README.md", str(card).encode())]
        if drawn:
            operations.append(CommitOperationAdd(picture, file.read_bytes()))
    api.create_commit(
        repo_id,
        operations,
        repo_type="dataset",
        revision=revision,
        commit_message=commit_message or f"Add the dataset card of the configuration {config_name}",
    )
