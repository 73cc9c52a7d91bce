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


"""Explanations as plain text for a terminal."""

import textwrap
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .placement import PairInSelection, Place, PromptInBreadth, SelectionOfPairs
from .visible import visible


if TYPE_CHECKING:
    from .explain import Explanation


WIDTH = 100
_SHORT_HASH, _SHORT_ID = 12, 24
_REASONS = {
    "added": "kept for its prompt",
    "displaced": "made room for another prompt",
    "left_out": "no usable gradient or score",
}


def _columns(char: str) -> int:
    return 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text: str, width: int) -> str:
    """
    The beginning of a text, as much of it as is at most so wide on a terminal.

    Args:
        text (`str`):
            One line.
        width (`int`):
            Number of columns.

    Returns:
        `str`: The line, with an ellipsis if it is cut.
    """
    if sum(map(_columns, text)) <= width:
        return text
    used = 0
    for number, char in enumerate(text):
        used += _columns(char)
        if used > width - 1:
            return text[:number].rstrip() + "…"
    return text


def _verdict(selected: bool) -> str:
    return "kept" if selected else "dropped"


def _field(name: str, value: str) -> str:
    return f"  {name:<10}{value}"


def _place(place: Place, noun: str, farthest: bool = False) -> Iterator[str]:
    if place.cluster is not None:
        yield _field(
            "cluster", f"{place.cluster}: {place.cluster_size:,} {noun}s, {place.cluster_kept:,} of them kept"
        )
        yield _field("distance", f"{place.distance:.6g} from the centre of the cluster")
        yield _field("rank", f"{place.rank:,} in the cluster, 0 is the nearest")
        if place.rank_of_all is not None:
            yield _field("", f"{place.rank_of_all:,} of all, 0 is the {'farthest' if farthest else 'nearest'}")
    if place.score is not None:
        yield _field("score", f"{place.score:.6g}")
        yield _field("rank", f"{place.rank:,} of all, 0 is the highest")
    if place.cut_rank is not None:
        whole = place.cluster is None or place.rank_of_all is not None
        value = f"score {place.cut_score:.6g}" if place.cluster is None else f"distance {place.cut_distance:.6g}"
        yield _field("cut", f"rank {place.cut_rank:,}, {value}: the last kept of {'all' if whole else 'the cluster'}")
    yield from textwrap.wrap(place.sentence, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _breadth(breadth: PromptInBreadth) -> Iterator[str]:
    counts = f"{breadth.num_kept:,} of {breadth.num_prompts:,} prompts"
    yield f"Breadth: {_verdict(breadth.place.selected)} ({counts} are kept)"
    yield from _place(breadth.place, "prompt")
    if breadth.rows > 1:
        yield f"  {breadth.rows:,} rows have this prompt; dropped as duplicates of another: {breadth.duplicates:,}."


def _heading(selection: SelectionOfPairs) -> str:
    parameters = selection.parameters
    options = [visible(parameters["depth_strategy"])]
    if any(pair.place.cluster is not None for pair in selection.pairs):
        options.append(visible(parameters["depth_scope"]))
    if parameters["min_pairs_per_prompt"]:
        options.append(f"min_pairs_per_prompt {parameters['min_pairs_per_prompt']}")
    counts = f"{selection.num_kept:,} of {selection.num_pairs:,} pairs"
    return f"Depth at step {selection.step} ({', '.join(options)}; {counts} are kept)"


def _short(place: Place) -> str:
    parts = [f"{_verdict(place.selected):<7}"]
    rank = place.rank if place.rank_of_all is None else place.rank_of_all
    if place.cluster is not None:
        parts.append(f"cluster {place.cluster:<4} distance {place.distance:<8.4g}")
    if place.score is not None:
        parts.append(f"score {place.score:<10.4g}")
    if rank is not None:
        parts.append(f"rank {rank:<5}" + ("" if place.cut_rank is None else f" cut {place.cut_rank:<5}"))
    parts.append(_REASONS.get(place.reason, ""))
    return " ".join(parts).rstrip()


def _one_pair(explanation: "Explanation") -> Iterator[str]:
    *earlier, last = explanation.selections
    for selection in earlier:
        for pair in selection.pairs:
            yield f"Depth at step {selection.step:<7} {_short(pair.place)}"
    if earlier:
        yield ""
    yield _heading(last)
    if len(last.pairs) > 1:
        kept = sum(pair.place.selected for pair in last.pairs)
        yield f"  The pool holds this pair {len(last.pairs)} times, and {kept} of them are kept."
    farthest = last.parameters["depth_strategy"].endswith("_farthest")
    for pair in last.pairs:
        yield from _place(pair.place, "pair", farthest)


def _pair_line(pair: PairInSelection) -> str:
    # Of a hash the beginning is enough to ask for it; other ids may differ at their end.
    name = visible(pair.pair_id)
    name = name[:_SHORT_HASH] if len(name) == 64 else cut(name, _SHORT_ID)
    return cut(f"  {name:<{_SHORT_HASH}}  {_short(pair.place)}", WIDTH)


def _pairs_of_prompt(explanation: "Explanation") -> Iterator[str]:
    last = explanation.selections[-1]
    yield f"Pairs: {len(last.pairs):,} in the pool"
    for selection in explanation.selections:
        kept = sum(pair.place.selected for pair in selection.pairs)
        yield f"  step {selection.step:<7} {kept:,} kept"
    yield ""
    yield _heading(last)
    yield from map(_pair_line, last.pairs)


def as_text(explanation: "Explanation") -> str:
    """
    Plain text of at most 100 columns: the last selection in full, those before it in short.

    Args:
        explanation ([`~explain.Explanation`]):
            The explanation.

    Returns:
        `str`: The text, without a newline at its end.
    """
    lines = []
    if explanation.kind == "pair":
        lines.append(f"Pair    {cut(visible(explanation.id), WIDTH - 8)}")
    lines.append(f"Prompt  {cut(visible(explanation.prompt_id), WIDTH - 8)}")
    lines.append(f"        {cut(visible(explanation.prompt), WIDTH - 8)}")
    if explanation.breadth is not None:
        lines += ["", *_breadth(explanation.breadth)]
    if explanation.selections:
        lines += ["", *(_one_pair if explanation.kind == "pair" else _pairs_of_prompt)(explanation)]
    if explanation.notes:
        lines.append("")
    for note in explanation.notes:
        lines += textwrap.wrap(note, WIDTH)
    return "\n".join(lines)
