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
MT-Bench (arXiv 2306.05685): 80 questions of two turns in eight categories, judged with the prompts published with them.

Questions, reference answers and judge prompts are loaded from where they are published or from local files.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from .api import APIRequest
from .api_judge import APIJudge
from .benchmarks import Benchmark, answer_prompts, load_source
from .generation import Generator, Response
from .judging import Verdict
from .prompts import completion_text, message_text
from .rubrics import _UNSAFE


# Where the judge sees a reference answer.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
# At which temperature the authors sample the answers to each category.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_GRADING, _GRADING_REFERENCE = "single-v1", "single-math-v1"
_PAIR, _PAIR_REFERENCE = "pair-v2", "pair-math-v1"
_SECOND_TURN = "-multi-turn"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
# Marks by which a template sets the texts apart, such as `[Question]` or `### User:`.
_MARK = re.compile(r"\[[A-Z][^\[\]\n{}]+\]|#+ [^\n{}]+:")
_RATING = re.compile(r"\[\[([0-9]+(?:\.[0-9]+)?)\]\]")
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_SHARES = {"A": 1.0, "B": 0.0, "C": 0.5}


@dataclass(frozen=True)
class MTBenchAnswers:
    """
    Answers of a model, two rows a question: the first turn and the second.

    Args:
        prompts (`list[list[dict]]`):
            Prompts. That of a second turn holds the model's own first answer.
        responses (`list[Response | None]`):
            Answers; `None` where there is none. Without a first answer there is no second.
    """

    prompts: list[list[dict]]
    responses: list[Response | None]


def load_mt_bench(source: str = "HuggingFaceH4/mt_bench_prompts", references: str | None = None) -> Benchmark:
    """
    The questions of MT-Bench.

    Args:
        source (`str`, *optional*, defaults to `"HuggingFaceH4/mt_bench_prompts"`):
            See [`~benchmarks.load_source`]. Rows with a `category`, two `turns` (or `prompt`) and, for the categories that
            need one, two answers in `reference`.
        references (`str`, *optional*):
            Source of the reference answers where they are in a file of their own, as the authors publish them:
            `question_id` and `choices`.

    Returns:
        [`~benchmarks.Benchmark`]: With a row for each turn and the columns `question_id`, `turn`, `category`, `turns` and
        `reference`. The group is the category.

    Raises:
        `ValueError`: If a question has not two turns, or lacks a reference answer that its category needs.
    """
    questions = load_source(source, "train")
    of_question = {}
    if references is not None:
        of_question = {row["question_id"]: row["choices"][0]["turns"] for row in load_source(references, "train")}
    rows = []
    for number, row in enumerate(questions):
        question_id = row.get("question_id", row.get("prompt_id", number))
        turns = row.get("turns") or row.get("prompt")
        reference = of_question.get(question_id) or row.get("reference") or []
        if not isinstance(turns, list) or len(turns) != 2:
            raise ValueError(f"Question {question_id} of `mt_bench` has not two texts in `turns` or `prompt`.")
        if row["category"] in REFERENCE_CATEGORIES and len(reference) != 2:
            raise ValueError(
                f"Question {question_id} of `mt_bench` has {len(reference)} reference answers, but its category "
                f"`{row['category']}` needs two. Give the file that holds them with `references`."
            )
        for turn in (1, 2):
            rows.append(
                {
                    "prompt": [{"role": "user", "content": turns[0]}],
                    "group": row["category"],
                    "question_id": question_id,
                    "turn": turn,
                    "category": row["category"],
                    "turns": turns,
                    "reference": reference,
                }
            )
    return Benchmark("mt_bench", Dataset.from_list(rows))


def load_judge_prompts(source: str) -> dict[str, dict[str, str]]:
    """
    The published prompts of the judge.

    Args:
        source (`str`):
            See [`~benchmarks.load_source`]: the authors' `judge_prompts.jsonl`.

    Returns:
        `dict[str, dict[str, str]]`: `system_prompt` and `prompt_template` of each prompt by its name.

    Raises:
        `ValueError`: If one of the prompts that are used here is missing.
    """
    prompts = {row["name"]: row for row in load_source(source, "train")}
    for name in (_GRADING, _GRADING_REFERENCE, _PAIR, _PAIR_REFERENCE):
        for needed in (name, name + _SECOND_TURN):
            if needed not in prompts:
                raise ValueError(f"`{source}` has no judge prompt `{needed}`, only {sorted(prompts)}.")
    return {name: {key: row[key] for key in ("system_prompt", "prompt_template")} for name, row in prompts.items()}


def answer_turns(
    make_generator: Callable[[float], Generator], questions: Dataset, temperature: float | None = None
) -> MTBenchAnswers:
    """
    Have a model answer both turns of each question.

    Args:
        make_generator (`Callable[[float], Generator]`):
            Gives the generator for a temperature.
        questions ([`~datasets.Dataset`]):
            Rows of [`load_mt_bench`].
        temperature (`float`, *optional*):
            Sampling temperature. By default, that of the authors for each category, and 0.7 for others.

    Returns:
        [`MTBenchAnswers`]: Prompts and answers, in the order of the rows.
    """
    rows = list(questions)
    prompts: list[list[dict]] = [row["prompt"] for row in rows]
    responses: list[Response | None] = [None] * len(rows)
    first_row = {row["question_id"]: number for number, row in enumerate(rows) if row["turn"] == 1}
    of_temperature: dict[float, list[int]] = {}
    for number, row in enumerate(rows):
        own = TEMPERATURES.get(row["category"], 0.7) if temperature is None else temperature
        of_temperature.setdefault(own, []).append(number)
    for own, numbers in of_temperature.items():
        generator = make_generator(own)
        for turn in (1, 2):
            asked = []
            for number in (number for number in numbers if rows[number]["turn"] == turn):
                before = first_row[rows[number]["question_id"]]
                answer = responses[before]
                if turn == 2 and answer is not None:
                    prompts[number] = [
                        *prompts[before],
                        {"role": "assistant", "content": answer.text},
                        {"role": "user", "content": rows[number]["turns"][1]},
                    ]
                if turn == 1 or answer is not None:
                    asked.append(number)
            for number, response in zip(
                asked, answer_prompts(generator, [prompts[number] for number in asked]), strict=True
            ):
                responses[number] = response
    return MTBenchAnswers(prompts, responses)


class MTBenchJudge(APIJudge):
    """
    Judge answers to MT-Bench with its published prompts, through a model behind an OpenAI-compatible API.

    As a judge in the form of a TRL reward function it gives each turn a grade from 1 to 10.
    [`~MTBenchJudge.compare`] shows the answers of two models side by side, in both orders. The published prompts ask for
    plain text with the verdict in double brackets; the last one counts, since a judge may quote brackets before.

    The templates are used word for word. In the answers of models, the first character of what a server could take for a
    role token, and of what reads like one of the template's own marks, is written as an escape: an answer cannot end
    early, or speak as somebody else. Unlike the rubrics of this package, these prompts do not tell the judge that answers
    are no instructions to it.

    Requests are kept, retried and paid for as by [`OpenAIJudge`], which describes the other options.

    Args:
        model (`str`):
            Name of the judging model, as the server knows it.
        judge_prompts (`dict`):
            Result of [`load_judge_prompts`].
        num_reasks (`int`, *optional*, defaults to `1`):
            How often an answer that cannot be read is asked for again.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature of the judge. `None` leaves it to the server.
        max_tokens (`int`, *optional*, defaults to `2048`):
            Token limit of a judgement, the authors' value. `None` sends none.
        extra_body (`dict`, *optional*):
            Further fields of each request.
        client_options:
            `base_url`, `api_key_variable`, `max_concurrency`, `timeout`, `max_retries`, `cache_dir`, `prices` and
            `max_cost` of [`OpenAIJudge`].

    Attributes:
        report ([`~api.APIReport`] or `None`): What became of the requests of the last call, and what they cost.
    """

    def __init__(
        self,
        model: str,
        judge_prompts: dict[str, dict[str, str]],
        *,
        num_reasks: int = 1,
        temperature: float | None = 0.0,
        max_tokens: int | None = 2048,
        extra_body: dict[str, Any] | None = None,
        **client_options: Any,
    ) -> None:
        super().__init__(
            model,
            {"type": "text"},
            num_reasks=num_reasks,
            temperature=temperature,
            max_tokens=max_tokens,
            extra_body=extra_body,
            **client_options,
        )
        # The published prompts ask for text, so no form is asked of the server.
        self.client.formats = [None]
        self.judge_prompts = judge_prompts

    def __call__(
        self, /, *, prompts: list[list[dict]], completions: list[str | list[dict]], **columns: Any
    ) -> list[Verdict]:
        """
        Grade answers, each turn alone.

        Args:
            prompts (`list[list[dict]]`):
                Prompts of [`answer_turns`]: one message for a first turn, three for a second.
            completions (`list[str | list[dict]]`):
                Answers.
            columns:
                `category` and `reference` of each.

        Returns:
            `list[Verdict]`: Grades from 1 to 10, with the judge's answer.
        """
        rows = list(zip(prompts, completions, columns["category"], columns["reference"], strict=True))

        def requests() -> Iterator[APIRequest]:
            for prompt, completion, category, reference in rows:
                texts = {**_turn_texts(prompt, completion, ""), **_question_texts(prompt)}
                yield self._request(self._messages(_GRADING, _GRADING_REFERENCE, category, reference, prompt, texts))

        self._ask(requests, read_grade)
        verdicts: list[Verdict] = []
        failures: list[dict] = []
        for answer, failure in self._read(requests, read_grade):
            if answer is None:
                failures.append({"row": len(verdicts), **failure})
                verdicts.append(Verdict(None, failure["answer"] or failure["reason"]))
            else:
                verdicts.append(Verdict(read_grade(answer["text"]), answer["text"]))
        self.client.list_failures("judgements", failures)
        return verdicts

    def compare(
        self,
        prompts: Sequence[list[dict]],
        completions: Sequence[str | None],
        baseline_prompts: Sequence[list[dict]],
        baseline_completions: Sequence[str | None],
        category: Sequence[str],
        reference: Sequence[list[str]],
    ) -> list[float | None]:
        """
        Compare the answers of two models, each turn alone. Equal conversations are a tie and are not shown.

        Args:
            prompts (`Sequence[list[dict]]`):
                Prompts of the one model, from [`answer_turns`].
            completions (`Sequence[str | None]`):
                Its answers; `None` where one is missing.
            baseline_prompts (`Sequence[list[dict]]`):
                Prompts of the other model: those of a second turn hold its own first answers.
            baseline_completions (`Sequence[str | None]`):
                Its answers.
            category (`Sequence[str]`):
                Category of each row.
            reference (`Sequence[list[str]]`):
                Reference answers of each row.

        Returns:
            `list[float | None]`: 1 where the first model is better in both orders, 0 where the second is, 0.5 for a tie or
            where the orders disagree, `None` where an answer or a usable verdict is missing.
        """
        own_side = list(zip(prompts, completions, strict=True))
        other_side = list(zip(baseline_prompts, baseline_completions, strict=True))
        outcomes: list[float | None] = [
            0.5 if own == other and own[1] is not None else None
            for own, other in zip(own_side, other_side, strict=True)
        ]
        rows = [
            row
            for row, outcome in enumerate(outcomes)
            if outcome is None and None not in (completions[row], baseline_completions[row])
        ]
        shares = self._compare([(own_side[row], other_side[row], category[row], reference[row]) for row in rows])
        for row, share in zip(rows, shares, strict=True):
            outcomes[row] = share
        return outcomes

    def _compare(self, rows: list[tuple[Any, Any, str, list[str]]]) -> list[float | None]:
        if not rows:
            return []

        def requests() -> Iterator[APIRequest]:
            for own, other, row_category, row_reference in rows:
                for first, second in ((own, other), (other, own)):
                    texts = {
                        **_turn_texts(first[0], first[1], "_a"),
                        **_turn_texts(second[0], second[1], "_b"),
                        **_question_texts(own[0]),
                    }
                    yield self._request(
                        self._messages(_PAIR, _PAIR_REFERENCE, row_category, row_reference, own[0], texts)
                    )

        self._ask(requests, read_verdict)
        shares: list[float | None] = []
        failures: list[dict] = []
        both: list[str | None] = []
        for answer, failure in self._read(requests, read_verdict):
            if answer is None:
                failures.append({"row": len(shares), "swapped": bool(both), **failure})
            both.append(None if answer is None else read_verdict(answer["text"]))
            if len(both) == 2:
                verdict, swapped = both
                if verdict is None or swapped is None:
                    shares.append(None)
                else:
                    first, second = _SHARES[verdict], 1.0 - _SHARES[swapped]
                    shares.append(first if first == second else 0.5)
                both = []
        self.client.list_failures("judgements", failures)
        return shares

    def _messages(
        self,
        name: str,
        name_with_reference: str,
        category: str,
        reference: list[str],
        prompt: list[dict],
        texts: dict[str, str],
    ) -> list[dict]:
        if category in REFERENCE_CATEGORIES:
            name = name_with_reference
            texts = {**texts, "ref_answer_1": reference[0], "ref_answer_2": reference[1]}
        published = self.judge_prompts[name + (_SECOND_TURN if len(prompt) > 1 else "")]
        template = published["prompt_template"]
        marks = {match[0] for match in _MARK.finditer(template)}

        def fill(match: re.Match) -> str:
            text = texts[match[1]]
            return _defuse(text, marks) if match[1].startswith("answer") else text

        # All texts are put in at once, so that a placeholder's name within one of them stays text.
        content = _PLACEHOLDER.sub(fill, template)
        return [{"role": "system", "content": published["system_prompt"]}, {"role": "user", "content": content}]


def _question_texts(prompt: list[dict]) -> dict[str, str]:
    first = message_text(prompt[0])
    return {"question": first, "question_1": first, "question_2": message_text(prompt[-1])}


def _turn_texts(prompt: list[dict], completion: str | list[dict], side: str) -> dict[str, str]:
    text = completion_text(completion)
    if len(prompt) == 1:
        return {f"answer{side}": text}
    return {f"answer{side}_1": message_text(prompt[1]), f"answer{side}_2": text}


def _defuse(text: str, marks: set[str]) -> str:
    for mark in sorted(marks):
        text = re.sub(
            re.escape(mark), lambda match: f"\\u{ord(match[0][0]):04x}{match[0][1:]}", text, flags=re.IGNORECASE
        )
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def read_grade(text: str) -> float | None:
    """
    Read the grade out of a judgement.

    Args:
        text (`str`):
            Answer of the judge. What a reasoning model writes up to `</think>` is not read.

    Returns:
        `float` or `None`: The last number in double brackets, `None` if there is none or it is not from 1 to 10.
    """
    found = _RATING.findall(_after_thoughts(text))
    grade = float(found[-1]) if found else 0.0
    return grade if 1 <= grade <= 10 else None


def read_verdict(text: str) -> str | None:
    """
    Read the verdict out of a comparison.

    Args:
        text (`str`):
            Answer of the judge. What a reasoning model writes up to `</think>` is not read.

    Returns:
        `str` or `None`: The last of `A`, `B` and `C` (a tie) in double brackets, `None` if there is none.
    """
    found = _VERDICT.findall(_after_thoughts(text))
    return found[-1] if found else None


def _after_thoughts(text: str) -> str:
    answer = text.rpartition("</think>")[2].strip()
    # Of thoughts that were cut off there is nothing to read.
    return "" if answer.startswith("<think>") else answer
