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


"""Why a prompt or a pair was kept or dropped, read from the folder of a run."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .placement import PromptInBreadth, SelectionOfPairs, place_in_breadth, place_in_selection
from .run_folder import RunFolder


MIN_PREFIX = 6
_NAMED_IDS = 5


@dataclass(frozen=True)
class Explanation:
    """
    Why a prompt or a pair was kept or dropped.

    Attributes:
        kind (`str`):
            `"prompt"` or `"pair"`.
        id (`str`):
            The whole id.
        prompt_id (`str`):
            Id of the prompt.
        prompt (`str`):
            First 200 characters of the prompt, as they are in the data.
        breadth ([`PromptInBreadth`], *optional*):
            The prompt in the breadth selection. `None` if there was none, or it did not see the prompt.
        selections (`list[SelectionOfPairs]`):
            The pair, or the pairs of the prompt, in each selection that was asked for.
        notes (`list[str]`):
            What else there is to say, in sentences.
    """

    kind: str
    id: str
    prompt_id: str
    prompt: str
    breadth: PromptInBreadth | None
    selections: list[SelectionOfPairs]
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Plain text of at most 100 columns: the last selection in full, those before it in short."""
        from .explain_text import as_text

        return as_text(self)


def _find(run: RunFolder, id: str) -> tuple[str, str]:
    # Kind and whole id of what the id, or its beginning, names. An id that is there is meant, even if another one begins
    # with it; a pair's before a prompt's.
    columns = [("pair", run.pool["pair_id"]), ("prompt", run.pool["prompt_id"])] if run.pool is not None else []
    if run.breadth is not None:
        columns.append(("prompt", run.breadth.prompts["prompt_id"]))
    for kind, ids in columns:
        if pc.any(pc.equal(ids, id)).as_py():
            return kind, id
    if len(id) < MIN_PREFIX:
        raise ValueError(
            f"No pair or prompt has the id {id!r}, and it is too short to be the beginning of one: give at least "
            f"{MIN_PREFIX} characters."
        )
    found = {
        (kind, one) for kind, ids in columns for one in pc.unique(ids.filter(pc.starts_with(ids, id))).to_pylist()
    }
    if not found:
        raise ValueError(
            f"No pair of the pool and no prompt in {run.name!r} has an id that begins with {id!r}. Pairs that a filter "
            "dropped before the selection are in neither."
        )
    if len(found) > 1:
        named = ", ".join(f"{kind} {one}" for kind, one in sorted(found)[:_NAMED_IDS])
        more = ", and others" if len(found) > _NAMED_IDS else ""
        raise ValueError(f"{id!r} is ambiguous, {len(found)} ids begin with it: {named}{more}. Give more characters.")
    return found.pop()


def _scores_of(run: RunFolder, prompt_id: str) -> list[float | None] | None:
    if run.scores_file is None or not {"prompt_id", "scores"} <= set(pq.read_schema(run.scores_file).names):
        return None
    found = pq.read_table(run.scores_file, columns=["scores"], filters=[("prompt_id", "=", prompt_id)])
    return found["scores"][0].as_py() if found.num_rows else None


def _notes(run: RunFolder, prompt_id: str, breadth: PromptInBreadth | None, num_pairs: int) -> list[str]:
    notes = []
    if run.breadth is None:
        notes.append("There was no breadth selection in this run: every prompt that came in went on.")
    elif breadth is None:
        notes.append(
            "The breadth selection did not see this prompt: it is of pairs that came in later, or the prompt was changed "
            "in between."
        )
    if not run.selections:
        notes.append("There is no selection of pairs in this run.")
    elif num_pairs == 0 and breadth is not None and not breadth.place.selected:
        notes.append("So the pool has no pair of this prompt.")
    elif num_pairs == 0:
        scores = _scores_of(run, prompt_id)
        if scores is not None:
            listed = ", ".join("none" if score is None else f"{score:g}" for score in scores)
            notes.append(f"Its responses have the scores {listed}.")
        notes.append(
            "The pool has no pair of this prompt: none could be made, as where the scores tie or are missing, or it was "
            "filtered out, as where it is too long."
        )
    return notes


def explain(run: RunFolder, id: str, step: int | None = None) -> Explanation:
    """
    Say why a prompt or a pair was kept or dropped.

    Everything is recomputed from what the run saved: the cut from the distances or scores, the budget from the manifest.

    Args:
        run ([`~run_folder.RunFolder`]):
            The run.
        id (`str`):
            A `pair_id` or `prompt_id`, or the beginning of one: at least six characters, and of no other.
        step (`int`, *optional*):
            Optimizer step of the selection to explain. If `None`, all of them.

    Returns:
        [`Explanation`]: The numbers and the reasons. Its `text` is what `trl-bpo explain` prints.

    Raises:
        `ValueError`: If no id or several begin so, there is no selection at that step, or what was selected does not
            follow from the distances or scores that are saved with it.
    """
    selections = run.selections if step is None else [saved for saved in run.selections if saved.step == step]
    if step is not None and not selections:
        there = ", ".join(str(saved.step) for saved in run.selections) or "none"
        raise ValueError(f"There is no selection at step {step} in {run.name!r}. Steps of its selections: {there}.")
    kind, id = _find(run, id)
    prompt, rows = id, np.empty(0, dtype=np.int64)
    excerpt = ""
    if run.pool is not None:
        rows = np.flatnonzero(pc.equal(run.pool[f"{kind}_id"], id).to_numpy())
        if len(rows):
            prompt, excerpt = (run.pool[name][rows[0]].as_py() for name in ("prompt_id", "prompt"))
    breadth = None
    if run.breadth is not None:
        found = pc.index(run.breadth.prompts["prompt_id"], prompt).as_py()
        if found >= 0:
            breadth = place_in_breadth(run.breadth, found)
            excerpt = run.breadth.prompts["prompt"][found].as_py()
    return Explanation(
        kind=kind,
        id=id,
        prompt_id=prompt,
        prompt=excerpt,
        breadth=breadth,
        selections=[place_in_selection(saved, rows.tolist()) for saved in selections] if len(rows) else [],
        notes=_notes(run, prompt, breadth, len(rows)),
    )
