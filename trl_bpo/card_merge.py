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

"""Bringing the card of a curated dataset together with the one that its repository has."""

import logging
import re
from collections.abc import Set
from typing import Any

import yaml
from huggingface_hub import DatasetCard, DatasetCardData

from .markdown import escaped


logger = logging.getLogger(__name__)

# What `trl_bpo` wrote of a card. All else is its readers'.
_SECTION = re.compile(r"<!-- trl_bpo:begin\b.*?<!-- trl_bpo:end -->", re.DOTALL)
_MARK = re.compile(r"<!-- trl_bpo:(?:begin|end)\b")
_TITLE = re.compile(r"^# (.*)$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\s*^---[ \t]*\n(.*?)^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)
# Both the earlier card and the new one may know of several.
_JOINED_FIELDS = ("tags", "task_categories", "source_datasets", "base_model")
_LICENCE_FIELDS = ("license", "license_name", "license_link", "license_details")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _unreadable(reason: Any) -> ValueError:
    return ValueError(
        f"The card `README.md` that the dataset repository has cannot be added to: {reason}. Mend it on the Hub, or delete "
        "it there, and push again. Nothing was changed."
    )


def _parsed(existing: str) -> tuple[dict[str, Any], str]:
    found = _FRONT_MATTER.match(existing)
    if found is None:
        if existing.lstrip().startswith("---"):
            raise _unreadable("the metadata that its first line `---` opens is not closed by another such line")
        return {}, existing
    try:
        metadata = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as error:
        raise _unreadable(f"its metadata is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict) or not all(isinstance(name, str) for name in metadata):
        raise _unreadable("its metadata is no mapping of names to values")
    for name in ("configs", "dataset_info"):
        if not all(isinstance(entry, dict) for entry in _as_list(metadata.get(name))):
            raise _unreadable(f"`{name}` of its metadata is no list of mappings")
    return metadata, existing[found.end() :]


def _merged_body(body: str, section: str) -> str:
    if not body.strip():
        return f"\n{section}\n"
    marks = len(_MARK.findall(body))
    if not marks:
        return f"\n{body.strip()}\n\n{section}\n"
    if marks != 2 or not _SECTION.search(body):
        raise _unreadable(
            "of the comments `<!-- trl_bpo:begin -->` and `<!-- trl_bpo:end -->`, between which lies what is replaced, it has "
            "not just one each in this order"
        )
    return _SECTION.sub(lambda _: section, body)


def _merged_configs(theirs: dict[str, Any], ours: dict[str, Any], dropped: Set[str]) -> dict[str, Any]:
    replaced = {config["config_name"] for config in ours.get("configs", [])}
    configs = [one for one in _as_list(theirs.get("configs")) if one.get("config_name") not in replaced | dropped]
    for config in configs:
        # `load_dataset` refuses a repository with two defaults, and one of the name `default` always is one.
        if "default" in replaced and config.pop("default", False):
            logger.warning(
                "The configuration %r was the default of the dataset repository. Now the curated pairs are.",
                config.get("config_name"),
            )
    # With the features of the old data, the new data would not load.
    infos = [
        info
        for info in _as_list(theirs.get("dataset_info"))
        if info.get("config_name", "default") not in replaced | dropped
    ]
    return {"configs": [*configs, *ours.get("configs", [])], "dataset_info": infos}


def merge_card(
    existing: str | None, card: DatasetCard, *, dropped_configs: Set[str] = frozenset(), keep_license: bool = False
) -> DatasetCard:
    """
    Bring the card of a curated dataset together with the one that its repository has already.

    Of the existing metadata everything stays. Tags, tasks, source datasets and base models are added to; configurations,
    their `dataset_info` and the size are replaced by those of `card`; its licence replaces the existing one; language and
    name only where there is none, or where the name is that of an earlier card.

    Of the existing text everything stays, too, but for what lies between the comments `<!-- trl_bpo:begin -->` and
    `<!-- trl_bpo:end -->`, where the text of `card` goes. If there are no such comments, it goes to the end.

    Args:
        existing (`str`, *optional*):
            The existing `README.md`.
        card ([`~huggingface_hub.DatasetCard`]):
            What [`~card.create_dataset_card`] made.
        dropped_configs (`Set[str]`, *optional*, defaults to `frozenset()`):
            Names of configurations that are no longer in the repository.
        keep_license (`bool`, *optional*, defaults to `False`):
            Whether an existing licence stays: one that the publisher chose outdoes one that was only inherited.

    Returns:
        [`~huggingface_hub.DatasetCard`]: The card to push.

    Raises:
        `ValueError`: If the metadata or the comments of the existing card are broken, so that something could get lost.
    """
    theirs, body = _parsed((existing or "").removeprefix("\ufeff").replace("\r\n", "\n"))
    ours = card.data.to_dict()
    merged = {**theirs, **ours, **_merged_configs(theirs, ours, dropped_configs)}
    for field in _JOINED_FIELDS:
        first = _as_list(theirs.get(field))
        joined = first + [value for value in _as_list(ours.get(field)) if value not in first]
        merged[field] = joined[0] if field == "base_model" and len(joined) == 1 else joined
    # YAML 1.1, which Python reads, takes the code of Norwegian for a boolean.
    languages = ["no" if language is False else language for language in _as_list(theirs.get("language"))]
    merged["language"] = languages or ours.get("language")
    of_license = theirs if theirs.get("license") and (keep_license or "license" not in ours) else ours
    merged |= {field: of_license.get(field) for field in _LICENCE_FIELDS}
    section = _SECTION.search(body)
    title = _TITLE.search(section[0]) if section else None
    if name := theirs.get("pretty_name"):
        merged["pretty_name"] = ours["pretty_name"] if title and title[1] == escaped(name) else name
    text = _merged_body(body, card.text.strip())
    try:
        data = DatasetCardData(**{name: value for name, value in merged.items() if value not in (None, [])})
    except TypeError as error:
        raise _unreadable(error) from error
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n{text}")
