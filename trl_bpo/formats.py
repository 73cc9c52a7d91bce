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
From the shapes that preference data comes in to the one that the stages of BPO read.

| stage | columns in | columns out |
| --- | --- | --- |
| `prompts` | `prompt` | the same |
| `responses` | `prompt`, `responses` | the same, `responses` as texts |
| `scores` | `prompt`, `responses` and `scores`, or responses that carry a score each | `prompt`, `responses`, `scores` |
| `pairs` | `chosen`, `rejected`, with or without `prompt` | `prompt`, `chosen`, `rejected` |

Responses may be texts, or dictionaries with a text (`text`, `content` or `response`) and a score (`score`, `rating` or
`overall_score`), as in UltraFeedback; the column may be named `completions`. All other columns are kept.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import extract_prompt

from .prompts import is_transcript, pair_id, split_transcript, transcript_to_messages


STAGES = ("prompts", "responses", "scores", "pairs")
_TEXT_KEYS = ("text", "content", "response")
_SCORE_KEYS = ("score", "rating", "overall_score")
# What the stages from each one on write. What came in under these names is set aside, or it would pass for theirs.
_PAIR_COLUMNS = [
    "chosen",
    "rejected",
    "pair_id",
    "score_chosen",
    "score_rejected",
    "chosen_truncated",
    "rejected_truncated",
]
_WRITTEN = {
    "prompts": ["responses", "truncated", "scores", "verdicts", "judge", *_PAIR_COLUMNS],
    "responses": ["scores", "verdicts", "judge", *_PAIR_COLUMNS],
    "scores": _PAIR_COLUMNS,
    "pairs": [],
}
_BUILDERS = {"json": "json", "jsonl": "json", "parquet": "parquet", "csv": "csv"}


@dataclass(frozen=True)
class PreparedDataset:
    """
    Result of [`prepare_dataset`].

    Attributes:
        dataset ([`~datasets.Dataset`]):
            Rows in the shape of `stage`.
        stage (`str`):
            What the rows hold: one of `"prompts"`, `"responses"`, `"scores"` and `"pairs"`.
        dropped (`int`):
            Transcript pairs dropped because their two contexts differ.
    """

    dataset: Dataset
    stage: str
    dropped: int = 0


def load_rows(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """
    Load a dataset by the name of a file, a folder or a repository on the Hub.

    Args:
        name (`str`):
            A `.json`, `.jsonl`, `.parquet` or `.csv` file (possibly compressed with gzip), a folder that
            [`~datasets.Dataset.save_to_disk`] wrote, or whatever else [`~datasets.load_dataset`] takes.
        split (`str`, *optional*, defaults to `"train"`):
            Split, possibly a slice such as `"train[:100]"`. A file has the split `train` alone.
        config (`str`, *optional*):
            Configuration of the dataset.

    Returns:
        [`~datasets.Dataset`]: The rows.

    Raises:
        `FileNotFoundError`: If the name looks like a file that is not there.
        `ValueError`: If the file's type is unknown, or it has no rows.
    """
    path = Path(name)
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if path.is_file():
        if suffix not in _BUILDERS:
            raise ValueError(f"`{name}` is not a file of a known type. Convert it to one of {sorted(_BUILDERS)}.")
        try:
            return load_dataset(_BUILDERS[suffix], data_files=str(path), split=split)
        # A file of no bytes ends the reader's iteration; one without rows is an error of its own.
        except (StopIteration, ValueError) as error:
            if isinstance(error, ValueError) and "corresponds to no data" not in str(error):
                raise
            raise ValueError(f"`{name}` is empty, or has no rows in the split {split!r}.") from error
    if suffix in _BUILDERS:
        raise FileNotFoundError(f"There is no file `{name}`. Give the path from the current directory, or a Hub id.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(str(path))
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return load_dataset(name, name=config, split=split)


def _first(row: dict, keys: Iterable[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _unpack_responses(row: dict) -> dict[str, list]:
    return {
        "responses": [_first(response, _TEXT_KEYS) for response in row["responses"]],
        "scores": [_first(response, _SCORE_KEYS) for response in row["responses"]],
    }


def _split_pair(row: dict) -> dict[str, str | None]:
    prompt, chosen = split_transcript(row["chosen"])
    other_prompt, rejected = split_transcript(row["rejected"])
    return {"prompt": prompt if prompt == other_prompt else None, "chosen": chosen, "rejected": rejected}


def _to_messages(row: dict) -> dict[str, list[dict[str, str]]]:
    prompt = row["prompt"]
    messages = transcript_to_messages(prompt) if is_transcript(prompt) else [{"role": "user", "content": prompt}]
    converted = {"prompt": messages}
    for column in ("chosen", "rejected"):
        if column in row:
            converted[column] = [{"role": "assistant", "content": row[column].strip()}]
    return converted


def _check_rows(dataset: Dataset) -> None:
    # The one pass over the rows that names the first bad one, before any work.
    transcripts = "prompt" not in dataset.column_names and is_transcript(dataset[0]["chosen"])
    columns = [c for c in ("prompt", "responses", "scores", "chosen", "rejected") if c in dataset.column_names]
    for number, row in enumerate(dataset.select_columns(columns)):
        for column in columns:
            if not row[column]:
                raise ValueError(f"Row {number} has an empty `{column}`. Drop or mend such rows first.")
            if column in ("responses", "scores") and not isinstance(row[column], list):
                raise ValueError(
                    f"Row {number} has `{column}` of type {type(row[column]).__name__}, not a list. CSV cannot hold lists: "
                    "use JSON or Parquet."
                )
        for score in row.get("scores", []):
            if score is not None and not isinstance(score, int | float):
                raise ValueError(f"Row {number} has the score {score!r} in `scores`. Scores are numbers or None.")
        if "scores" in row and len(row["scores"]) != len(row["responses"]):
            raise ValueError(
                f"Row {number} has {len(row['responses'])} `responses` but {len(row['scores'])} `scores`. Give one score "
                "a response; None where there is none."
            )
        if transcripts and not (is_transcript(row["chosen"]) and is_transcript(row["rejected"])):
            raise ValueError(
                f"Row {number} is no transcript (`\\n\\nHuman: ... \\n\\nAssistant: ...`) as the first one is. Do not mix the "
                "two in one dataset."
            )


def drop_duplicate_pairs(dataset: Dataset) -> Dataset:
    """
    Keep the first of pairs that are exactly the same in prompt, tools and both answers.

    Args:
        dataset ([`~datasets.Dataset`]):
            Pairs with the columns `prompt`, `chosen` and `rejected`.

    Returns:
        [`~datasets.Dataset`]: The distinct pairs, in their order.
    """
    first: dict[str, int] = {}
    for number, row in enumerate(dataset):
        first.setdefault(pair_id(row["prompt"], row["chosen"], row["rejected"], row.get("tools")), number)
    return dataset.select(list(first.values()))


def _stage_of(columns: list[str]) -> str | None:
    present = set(columns)
    if len({"chosen", "rejected"} & present) == 1:
        raise ValueError(f"The dataset has only one of `chosen` and `rejected`: {columns}. Pairs need both.")
    if {"chosen", "rejected"} <= present:
        return "pairs"
    if {"prompt", "responses", "scores"} <= present:
        return "scores"
    if {"prompt", "responses"} <= present:
        return "responses"
    return "prompts" if "prompt" in present else None


def prepare_dataset(
    dataset: Dataset, *, prompt_column: str = "prompt", start_from: str = "auto", to_messages: bool = False
) -> PreparedDataset:
    """
    Bring a dataset into the shape of the stage at which its columns let BPO start.

    Pairs without a prompt get one: HH-RLHF transcripts are split at their last `Assistant:` turn, everything else as
    [`~trl.extract_prompt`] does.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows in one of the shapes of the module's table.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt. It is renamed to `prompt`, in the place of a column of that name.
        start_from (`str`, *optional*, defaults to `"auto"`):
            Stage to start at. `"auto"` takes the furthest that the columns allow. An earlier one sets what is already
            there aside: `"prompts"` uses the prompts of a preference dataset alone.
        to_messages (`bool`, *optional*, defaults to `False`):
            Whether to turn text prompts and answers into messages, so that the chat template of the policy applies.

    Returns:
        [`PreparedDataset`]: The rows, the stage, and what was dropped.

    Raises:
        `ValueError`: If the dataset is streaming or empty, if no stage fits the columns, if the columns do not allow the
            stage that is asked for, or if a row is empty or of another shape.
    """
    if start_from not in ("auto", *STAGES):
        raise ValueError(f"`start_from` must be one of {('auto', *STAGES)}, got {start_from!r}.")
    if isinstance(dataset, IterableDataset):
        raise ValueError("A streaming dataset cannot be selected from. Load it without streaming.")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty. Check its name and the split.")
    if prompt_column != "prompt":
        if prompt_column not in dataset.column_names:
            raise ValueError(f"`prompt_column={prompt_column!r}` is not among the columns {dataset.column_names}.")
        # Asked for by name, so it goes before a column that happens to be called `prompt`.
        aside = ["prompt"] if "prompt" in dataset.column_names else []
        dataset = dataset.remove_columns(aside).rename_column(prompt_column, "prompt")
    if "completions" in dataset.column_names and "responses" not in dataset.column_names:
        dataset = dataset.rename_column("completions", "responses")

    stage, rows = _stage_of(dataset.column_names), len(dataset)
    if stage is None:
        raise ValueError(
            f"The dataset has no `{prompt_column}` column and no `chosen` and `rejected`, only {dataset.column_names}. "
            "Name the column that holds the prompt with `prompt_column`."
        )
    _check_rows(dataset)
    if "responses" in dataset.column_names and isinstance(dataset[0]["responses"][0], dict):
        own_scores = list(dataset["scores"]) if "scores" in dataset.column_names else None
        dataset = dataset.map(_unpack_responses, desc="Unpacking responses")
        if own_scores is not None:
            dataset = dataset.remove_columns("scores").add_column("scores", own_scores)
        if stage != "pairs":
            scored = any(score is not None for scores in dataset["scores"] for score in scores)
            stage = "scores" if scored else "responses"
    if stage == "pairs" and "prompt" not in dataset.column_names:
        if is_transcript(dataset[0]["chosen"]):
            dataset = dataset.map(_split_pair, desc="Splitting transcripts")
            dataset = dataset.filter(lambda row: row["prompt"] is not None, desc="Dropping pairs of two contexts")
        else:
            dataset = dataset.map(extract_prompt, desc="Extracting prompts")
            if without := sum(not prompt for prompt in dataset["prompt"]):
                raise ValueError(
                    f"{without} of {rows} pairs have no prompt: their answers have no common beginning. If one of the "
                    f"columns {dataset.column_names} holds it, name it with `prompt_column`."
                )
    if start_from != "auto":
        if STAGES.index(start_from) > STAGES.index(stage):
            raise ValueError(
                f"`start_from={start_from!r}` needs columns that the dataset lacks; {dataset.column_names} allow "
                f"`start_from={stage!r}`."
            )
        if stage == "pairs" and start_from != "prompts" and start_from != "pairs":
            raise ValueError(f"`start_from={start_from!r}` does not apply to pairs. Use 'prompts' or 'pairs'.")
        stage = start_from
    dataset = dataset.remove_columns([column for column in _WRITTEN[stage] if column in dataset.column_names])
    if to_messages and isinstance(dataset[0]["prompt"], str):
        dataset = dataset.map(_to_messages, desc="Converting to messages")
    return PreparedDataset(dataset, stage, rows - len(dataset))
