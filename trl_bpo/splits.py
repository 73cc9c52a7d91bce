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

"""Splits that do not leak: whole prompts on one side, and a check that training and evaluation share none."""

import hashlib
import unicodedata

from datasets import Dataset, DatasetDict

from .prompts import completion_text, is_transcript, message_text, transcript_to_messages


_MAX_EXAMPLES = 5


def normalize_prompt(prompt: str | list[dict]) -> str:
    """
    A prompt reduced to what makes it the same question, for finding copies of it.

    The text of all user turns, in the Unicode form NFKC and without case; every run of white space and punctuation is
    one space, invisible characters are gone, and symbols such as `+` and `=` stay. System and assistant turns do not
    count, unless there is no user turn. A paraphrase is not found, and two prompts that differ in punctuation alone,
    such as "3-4" and "3.4", are taken for one.

    Args:
        prompt (`str` or `list[dict]`):
            Prompt in TRL's standard or conversational format. An HH-RLHF transcript counts as a conversation.

    Returns:
        `str`: The normalised text.
    """
    if isinstance(prompt, str):
        messages = transcript_to_messages(prompt) if is_transcript(prompt) else [{"role": "user", "content": prompt}]
    else:
        messages = prompt
    turns = [message_text(message) for message in messages if message["role"] == "user"]
    text = "\n".join(turns) if turns else completion_text(prompt)
    # Casefolding can leave NFKC, so the form is taken before and after.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    characters = []
    for character in text:
        category = unicodedata.category(character)
        if category != "Cf":
            characters.append(" " if category[0] in "CPZ" else character)
    # A prompt of punctuation alone would be empty, and so equal to every other one.
    return " ".join("".join(characters).split()) or text.strip()


def _keys(dataset: Dataset, column: str, name: str) -> list[str]:
    if column not in dataset.column_names:
        raise ValueError(
            f"`{name}` has no column `{column}`, only {', '.join(f'`{found}`' for found in dataset.column_names)}. "
            "Name the column that holds the prompts."
        )
    return [normalize_prompt(prompt) for prompt in dataset[column]]


def split_by_prompt(
    dataset: Dataset, test_size: float | int, seed: int = 42, prompt_column: str = "prompt"
) -> DatasetDict:
    """
    Split a dataset so that all rows of a prompt, and of its copies, are on one side.

    The prompts are ranked by a hash of the seed and their normalised text, and the first of them are the test prompts.
    So the sides depend on neither the order nor the number of a prompt's rows.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset to split, with one or more rows for each prompt.
        test_size (`float` or `int`):
            Share (a `float` between 0 and 1) or number (an `int`) of the distinct prompts for the test side. Rows are
            not counted.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the ranking.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column with the prompts, in TRL's standard or conversational format.

    Returns:
        [`~datasets.DatasetDict`]: The splits `train` and `test`, with the columns of `dataset` and its order of rows.

    Raises:
        `ValueError`: If the column is missing, or a side would be empty.
    """
    keys = _keys(dataset, prompt_column, "dataset")
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode(errors="surrogatepass")).digest())
    num_test = test_size if isinstance(test_size, int) else round(test_size * len(ranked))
    if not 0 < num_test < len(ranked):
        raise ValueError(
            f"`test_size={test_size}` would put {num_test} of {len(ranked)} distinct prompts on the test side. "
            "Pass a share between 0 and 1 or a number of prompts that leaves at least one on each side."
        )
    test = set(ranked[:num_test])
    rows: dict[str, list[int]] = {"train": [], "test": []}
    for row, key in enumerate(keys):
        rows["test" if key in test else "train"].append(row)
    return DatasetDict({name: dataset.select(indices) for name, indices in rows.items()})


def overlapping_rows(
    train: Dataset, evaluation: Dataset, prompt_column: str = "prompt", evaluation_column: str | None = None
) -> list[tuple[int, int]]:
    """
    Rows of a training dataset whose prompt is one of the evaluation's.

    Args:
        train ([`~datasets.Dataset`]):
            Dataset that is trained on.
        evaluation ([`~datasets.Dataset`]):
            Dataset that is evaluated on.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of `train` with the prompts.
        evaluation_column (`str`, *optional*):
            Column of `evaluation` with the prompts. Defaults to `prompt_column`.

    Returns:
        `list[tuple[int, int]]`: Row in `train` and the first row in `evaluation` with the same normalised prompt, by
        ascending row in `train`.

    Raises:
        `ValueError`: If a column is missing.
    """
    first: dict[str, int] = {}
    for row, key in enumerate(_keys(evaluation, evaluation_column or prompt_column, "evaluation")):
        first.setdefault(key, row)
    return [(row, first[key]) for row, key in enumerate(_keys(train, prompt_column, "train")) if key in first]


def check_no_overlap(
    train: Dataset, evaluation: Dataset, prompt_column: str = "prompt", evaluation_column: str | None = None
) -> None:
    """
    Refuse a training dataset that has prompts of the evaluation.

    Args:
        train ([`~datasets.Dataset`]):
            Dataset that is trained on.
        evaluation ([`~datasets.Dataset`]):
            Dataset that is evaluated on.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of `train` with the prompts.
        evaluation_column (`str`, *optional*):
            Column of `evaluation` with the prompts. Defaults to `prompt_column`.

    Raises:
        `ValueError`: If a column is missing, or a prompt is in both, compared by [`normalize_prompt`].
    """
    pairs = overlapping_rows(train, evaluation, prompt_column, evaluation_column)
    if not pairs:
        return
    examples = ", ".join(f"{row} (row {other} of `evaluation`)" for row, other in pairs[:_MAX_EXAMPLES])
    raise ValueError(
        f"{len(pairs)} of {len(train)} rows of `train` have a prompt of `evaluation`, {len({b for _, b in pairs})} "
        f"distinct prompts in all. The first rows of `train` are {examples}. Remove the rows that `overlapping_rows` "
        "lists from `train`, or split one dataset with `split_by_prompt`."
    )
