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
Prompts to compare models on, loaded from where they are published or from a local file of the same layout.

Every loader gives a [`Benchmark`] with the columns `prompt` (messages) and `group` (`str` or `None`). [`~mt_bench`], with its two
turns, has a module of its own.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from .formats import load_rows
from .generation import Generator, Response, TransformersGenerator
from .generation_requests import encode_prompt
from .prompts import is_transcript, prompt_id, split_transcript, transcript_to_messages
from .rubrics import PairwiseRubric, Rubric, load_rubric
from .splits import normalize_prompt


HH_RLHF_SUBSETS = ("helpful-base", "harmless-base")


@dataclass(frozen=True)
class Benchmark:
    """
    Prompts of a benchmark.

    Args:
        name (`str`):
            Name of the benchmark.
        dataset ([`~datasets.Dataset`]):
            One row a prompt, with the columns `prompt` and `group` and those of the benchmark.
        dropped (`dict[str, int]`):
            Rows of the source that are not in it, by the reason.
    """

    name: str
    dataset: Dataset
    dropped: dict[str, int] = field(default_factory=dict)


def load_source(source: str, split: str) -> Dataset:
    """
    Load the rows of a benchmark.

    Args:
        source (`str`):
            Hub id of a dataset, a local file or folder, or a single file on the Hub, as `hf://datasets/owner/name/path`.
        split (`str`):
            Split of a dataset. A file has none.

    Returns:
        [`~datasets.Dataset`]: The rows.
    """
    if source.startswith("hf://"):
        return load_dataset("json", data_files=source, split="train")
    return load_rows(source, "train" if Path(source).is_file() else split)


def _as_messages(prompt: str | list[dict]) -> list[dict]:
    if not isinstance(prompt, str):
        return prompt
    return transcript_to_messages(prompt) if is_transcript(prompt) else [{"role": "user", "content": prompt}]


def _why_unusable(messages: list[dict]) -> str | None:
    turns = [message["role"] for message in messages if message["role"] != "system"]
    # Many chat templates raise an error at anything else.
    if turns != [("user", "assistant")[turn % 2] for turn in range(len(turns))] or len(turns) % 2 == 0:
        return "turns that do not alternate"
    if not str(messages[-1]["content"] or "").strip():
        return "empty prompt"
    return None


def _benchmark(name: str, rows: Iterable[dict]) -> Benchmark:
    """Rows with usable, distinct prompts."""
    kept: dict[str, dict] = {}
    dropped: Counter[str] = Counter()
    for row in rows:
        prompt = _as_messages(row["prompt"] or "")
        reason = _why_unusable(prompt)
        key = prompt_id(prompt, row.get("tools"))
        if reason is not None or key in kept:
            dropped[reason or "prompt that was there before"] += 1
            continue
        kept[key] = {**row, "prompt": prompt}
    if not kept:
        raise ValueError(
            f"The source of `{name}` has no usable prompt: {dict(dropped)}. Check its name and the split."
        )
    return Benchmark(name, Dataset.from_list(list(kept.values())), dict(dropped))


def _check_columns(name: str, dataset: Dataset, *columns: str) -> None:
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(
                f"The source of `{name}` has no column `{column}`, only {dataset.column_names}. Check its name."
            )


def load_alpaca_eval(
    source: str = "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval_gpt4_baseline.json",
    reference_column: str = "output",
) -> Benchmark:
    """
    AlpacaEval: 805 instructions, with the answers of the model that others are compared with.

    Args:
        source (`str`, *optional*):
            See [`load_source`]. By default, the instructions of AlpacaEval 2 with the answers of GPT-4 Turbo.
        reference_column (`str`, *optional*, defaults to `"output"`):
            Column of these answers.

    Returns:
        [`Benchmark`]: With the further columns `instruction`, `dataset` and `reference`. The group is the dataset that an
        instruction is from.

    Raises:
        `ValueError`: If a column is missing.
    """
    rows = load_source(source, "eval")
    _check_columns("alpaca_eval", rows, "instruction", "dataset", reference_column)
    return _benchmark(
        "alpaca_eval",
        (
            {
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "group": row["dataset"],
                "instruction": row["instruction"],
                "dataset": row["dataset"],
                "reference": row[reference_column],
            }
            for row in rows
        ),
    )


def load_hh_rlhf(source: str = "Anthropic/hh-rlhf", split: str = "test") -> Benchmark:
    """
    Held-out prompts of HH-RLHF: conversations up to the last turn of the assistant.

    Args:
        source (`str`, *optional*, defaults to `"Anthropic/hh-rlhf"`):
            See [`load_source`]. Of a dataset with the folders of the original, the two base sets are loaded.
        split (`str`, *optional*, defaults to `"test"`):
            Split.

    Returns:
        [`Benchmark`]: The group is `helpful-base` or `harmless-base`, and `None` for a file.

    Raises:
        `ValueError`: If a row is no transcript.
    """
    parts: list[tuple[str | None, Dataset]]
    if Path(source).is_file():
        parts = [(None, load_source(source, split))]
    else:
        parts = [(name, load_dataset(source, data_dir=name, split=split)) for name in HH_RLHF_SUBSETS]

    def rows() -> Iterable[dict]:
        for group, part in parts:
            _check_columns("hh_rlhf", part, "chosen")
            for number, transcript in enumerate(part["chosen"]):
                if not is_transcript(transcript):
                    raise ValueError(f"Row {number} of the source of `hh_rlhf` has no transcript in `chosen`.")
                yield {"prompt": split_transcript(transcript)[0], "group": group}

    return _benchmark("hh_rlhf", rows())


def load_safe_rlhf(source: str = "PKU-Alignment/PKU-SafeRLHF", split: str = "test") -> Benchmark:
    """
    Held-out prompts of SafeRLHF, many of which ask for something harmful.

    Args:
        source (`str`, *optional*, defaults to `"PKU-Alignment/PKU-SafeRLHF"`):
            See [`load_source`].
        split (`str`, *optional*, defaults to `"test"`):
            Split.

    Returns:
        [`Benchmark`]: Distinct prompts: in the source each stands once for every pair of answers.
    """
    rows = load_source(source, split)
    _check_columns("safe_rlhf", rows, "prompt")
    return _benchmark("safe_rlhf", ({"prompt": prompt, "group": None} for prompt in rows["prompt"]))


def load_ultrafeedback(source: str = "HuggingFaceH4/ultrafeedback_binarized", split: str = "test_prefs") -> Benchmark:
    """
    Held-out prompts of UltraFeedback.

    Args:
        source (`str`, *optional*, defaults to `"HuggingFaceH4/ultrafeedback_binarized"`):
            See [`load_source`].
        split (`str`, *optional*, defaults to `"test_prefs"`):
            Split.

    Returns:
        [`Benchmark`]: The prompts.
    """
    rows = load_source(source, split)
    _check_columns("ultrafeedback", rows, "prompt")
    return _benchmark("ultrafeedback", ({"prompt": prompt, "group": None} for prompt in rows["prompt"]))


def load_prompts(source: str, split: str = "test") -> Benchmark:
    """
    Prompts of your own.

    Args:
        source (`str`):
            See [`load_source`]. The column `prompt` holds text or messages, the column `group`, if there is one, what the
            result is broken down by. The judge gets all other columns.
        split (`str`, *optional*, defaults to `"test"`):
            Split.

    Returns:
        [`Benchmark`]: The prompts with all columns.
    """
    rows = load_source(source, split)
    _check_columns("prompts", rows, "prompt")
    return _benchmark("prompts", ({"group": None, **row} for row in rows))


def drop_seen(benchmark: Benchmark, prompts: Iterable[str | list[dict]]) -> Benchmark:
    """
    Leave out prompts that a model was trained on.

    Args:
        benchmark ([`Benchmark`]):
            The benchmark.
        prompts (`Iterable[str | list[dict]]`):
            Prompts of the training, compared by their [`~splits.normalize_prompt`].

    Returns:
        [`Benchmark`]: The benchmark without them.
    """
    seen = {normalize_prompt(prompt) for prompt in prompts}
    rows = [row for row, prompt in enumerate(benchmark.dataset["prompt"]) if normalize_prompt(prompt) not in seen]
    return _select(benchmark, rows, "prompt of the training")


def draw(benchmark: Benchmark, max_prompts: int, seed: int = 42) -> Benchmark:
    """
    Leave a random part of the prompts.

    Args:
        benchmark ([`Benchmark`]):
            The benchmark.
        max_prompts (`int`):
            Number of prompts to leave. Fewer are left as they are.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the drawing.

    Returns:
        [`Benchmark`]: The benchmark with these prompts, in their order.
    """
    rows = range(len(benchmark.dataset))
    return _select(benchmark, sorted(random.Random(seed).sample(rows, min(max_prompts, len(rows)))), "not drawn")


def _select(benchmark: Benchmark, rows: Sequence[int], reason: str) -> Benchmark:
    left_out = len(benchmark.dataset) - len(rows)
    if not left_out:
        return benchmark
    if not rows:
        raise ValueError(f"No prompt of `{benchmark.name}` is left: all {left_out} are dropped ({reason}).")
    dropped = {**benchmark.dropped, reason: left_out}
    return replace(benchmark, dataset=benchmark.dataset.select(rows), dropped=dropped)


def answer_prompts(generator: Generator, prompts: list[list[dict]]) -> list[Response | None]:
    """
    One answer of a model to each prompt.

    Args:
        generator ([`Generator`]):
            Samples the model.
        prompts (`list[list[dict]]`):
            The prompts.

    Returns:
        `list[Response | None]`: The answers; `None` for a prompt that leaves no room for an answer in the context of the
        model, or that the server behind the generator has no answer to.
    """
    rows = list(range(len(prompts)))
    if isinstance(generator, TransformersGenerator):
        context = getattr(generator.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None:
            limit = context - generator.max_new_tokens
            rows = [row for row in rows if len(encode_prompt(generator.processing_class, prompts[row])) <= limit]
    answers: list[Response | None] = [None] * len(prompts)
    if rows:
        for row, (response,) in zip(rows, generator([prompts[row] for row in rows], 1), strict=True):
            # A model that has answered has generated a token at least, if only the one that ends the answer.
            answers[row] = response if response.text or response.num_tokens else None
    return answers


def alpaca_eval_outputs(dataset: Dataset, answers: Sequence[str | None], generator: str) -> list[dict[str, Any]]:
    """
    Answers in the form that the `alpaca_eval` package reads, for its length-controlled win rate.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows of [`load_alpaca_eval`].
        answers (`Sequence[str | None]`):
            Answer to each. A missing one is written as an empty one.
        generator (`str`):
            Name of the model.

    Returns:
        `list[dict]`: With the keys `instruction`, `output`, `generator` and `dataset`, to be written as one JSON list.
    """
    return [
        {
            "instruction": row["instruction"],
            "output": answer or "",
            "generator": generator,
            "dataset": row["dataset"],
        }
        for row, answer in zip(dataset, answers, strict=True)
    ]


def safe_rlhf_rubrics() -> dict[str, tuple[Rubric, PairwiseRubric]]:
    """
    What answers to SafeRLHF's prompts are judged by, helpful and harmless apart.

    Returns:
        `dict[str, tuple[Rubric, PairwiseRubric]]`: For `"helpful"` and `"harmless"` the rubric of a rating and that of a
        comparison.
    """

    def template(name: str) -> str:
        return files("trl_bpo").joinpath(f"templates/{name}.md").read_text(encoding="utf-8")

    return {
        "helpful": (
            Rubric("helpfulness", template("judge_helpfulness")),
            PairwiseRubric("pairwise_helpfulness", template("judge_pairwise_helpfulness")),
        ),
        "harmless": (load_rubric("safety"), PairwiseRubric("pairwise_safety", template("judge_pairwise_safety"))),
    }
