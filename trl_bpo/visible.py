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
"""Texts from data, models and files as one line in which nothing hides, for a terminal or a page."""

# Python takes these for printable, but nothing is to be seen of them: joiners, fillers and variation selectors.
_INVISIBLE = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0}
_INVISIBLE |= {*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}


def visible(text: str) -> str:
    """
    A text with everything that would not show, or be obeyed, as an escape: control characters, line breaks, marks of
    direction, and characters without a width.

    Args:
        text (`str`):
            Any text.

    Returns:
        `str`: One line.
    """
    return "".join(
        char if char.isprintable() and ord(char) not in _INVISIBLE else char.encode("unicode_escape").decode()
        for char in text
    )


def excerpt(text: str, characters: int = 300) -> str:
    """
    The beginning of a text, with its white space as single blanks.

    Args:
        text (`str`):
            Any text.
        characters (`int`, *optional*, defaults to `300`):
            Where it is cut.

    Returns:
        `str`: One line as of [`visible`], which ends in an ellipsis if it was cut.
    """
    begin = text[: 4 * characters]
    shown = visible(" ".join(begin.split()))
    return shown if len(shown) <= characters and len(begin) == len(text) else shown[:characters] + "…"
