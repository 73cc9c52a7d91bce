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

"""Markdown of names and texts that come from data, models and files: shown as they are, and nothing more than that."""

import re
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id


_MAX_CHARACTERS = 300
# HTML entities for what opens HTML, code, a formula or a table cell, since every renderer knows them; backslashes for the
# rest of Markdown's punctuation, which keeps the source readable.
_ESCAPES = str.maketrans(
    {char: f"&#{ord(char)};" for char in "\\$|`"}
    | {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    | {char: f"\\{char}" for char in "*_[]~#"}
)
# Renderers link bare addresses, some of them even where their punctuation is escaped. Not across a comment, though.
_ADDRESS = re.compile(r"(?=://)|(?<=\S)(?=@)|(?<=www)(?=\.)", re.IGNORECASE)
_PLAIN = re.compile(r"[\w./:@+=,{}()\[\]\"'#%*~!?;^… -]+")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def one_line(value: Any) -> str:
    """
    A value as one line of printable characters.

    A line break would end a table row or the front matter; control and direction characters would show something else
    than what is written.

    Args:
        value:
            Any value.

    Returns:
        `str`: The line, cut at 300 characters.
    """
    line = " ".join(str(value).split())
    line = " ".join("".join(char for char in line if char.isprintable()).split())
    return line if len(line) <= _MAX_CHARACTERS else line[: _MAX_CHARACTERS - 1].rstrip() + "…"


def escaped(value: Any) -> str:
    """
    A value as Markdown that shows it as text.

    Args:
        value:
            Any value.

    Returns:
        `str`: One line of Markdown, for a paragraph, a heading or a cell of a table.
    """
    return _ADDRESS.sub("<!-- -->", alt_text(value))


def alt_text(value: Any) -> str:
    """
    A value as the alternative text of a picture, where addresses are no links and comments would show.

    Args:
        value:
            Any value.

    Returns:
        `str`: One line of Markdown.
    """
    return one_line(value).translate(_ESCAPES)


def code(value: Any) -> str:
    """
    A name as Markdown: ordinary ones as code, what holds anything else as escaped text.

    Args:
        value:
            Any value.

    Returns:
        `str`: One line of Markdown.
    """
    line = one_line(value)
    return f"`{line}`" if _PLAIN.fullmatch(line) else escaped(line)


def number(value: Any) -> str:
    """
    A number as text, of four digits where it is no integer; anything else as a name.

    Args:
        value:
            Any value.

    Returns:
        `str`: One line of Markdown.
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else code(value)


def table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """
    A table.

    Args:
        heading (`tuple[str, ...]`):
            Names of the columns.
        rows (`list[tuple[str, ...]]`):
            Its rows, as Markdown.

    Returns:
        `str`: The table, empty without rows.
    """
    if not rows:
        return ""
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def is_hub_id(name: str | None) -> bool:
    """
    Whether a name can be that of a repository on the Hub, with its owner. A name without an owner could be a file's.

    Args:
        name (`str`, *optional*):
            The name.

    Returns:
        `bool`: Whether it can.
    """
    if name is None or not _HUB_ID.fullmatch(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_link(name: str, kind: str = "") -> str:
    """
    A name, linked to its page if it is a Hub id.

    Args:
        name (`str`):
            Hub id or any other name.
        kind (`str`, *optional*, defaults to `""`):
            First part of the address: `"datasets/"`, or nothing for models.

    Returns:
        `str`: One line of Markdown.
    """
    return f"[`{name}`](https://huggingface.co/{kind}{name})" if is_hub_id(name) else code(name)
