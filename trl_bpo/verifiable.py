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


"""A judge for instructions whose fulfilment a program can check, and grade, without a model or a network."""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from .prompts import completion_text, without_none


_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_BULLET = re.compile(r"[ \t]*[-*•+][ \t]+\S")
_NUMBER = re.compile(r"[ \t]*(\d{1,3})[.)][ \t]+\S")
_LIST_MARKER = re.compile(r"^[ \t]*(?:[-*•+]|\d{1,3}[.)])[ \t]+", re.MULTILINE)
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|approx|Mr|Mrs|Ms|Dr|Prof|St|P\.S)\.(?=\s)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)*]*\s+|(?<=[。！？])|\n+")
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)
_TITLE = re.compile(r"<<[^<>\n]*\w[^<>\n]*>>")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\w[^\[\]\n]*\]")
_OPENING_QUOTES, _CLOSING_QUOTES = '"“', '"”'
_MARKUP = "*_#`\"'“”‘’ \t\n"

# The most frequent function words. What a word tells is weighed per sentence, so that it does no harm that some of them
# belong to two languages.
_FUNCTION_WORDS = {
    "English": "the a an and or of to in is are was were it this that you your for with on as be at by from have has not "
    "but can will my we they he she his her their its i if there which who what when how",
    "Spanish": "el la los las un una unos unas y o de del al en es son está están fue que se su sus por para con como no "
    "más pero mi tu te lo le nos hay muy también este esta esto ser yo me si cuando porque",
    "French": "le la les un une des du de et ou à au aux en est sont était que qui se sa son ses pour par avec comme ne "
    "pas plus mais mon ma je tu il elle nous vous ils dans sur ce cette ces il y très aussi être l d c j qu n",
    "German": "der die das den dem des ein eine einen einem einer und oder von zu zum zur im in ist sind war waren es dass "
    "sich für mit auf als bei aus nicht auch aber ich du er sie wir ihr mein sein haben hat wird werden sehr wie an",
    "Italian": "il lo la i gli le un uno una e o di del della dei delle al alla in nel nella è sono era che si suo sua per "
    "con come non più ma mio tuo ci vi molto anche questo questa essere io mi se quando perché da dal dalla l d c",
    "Portuguese": "o a os as um uma uns umas e ou de do da dos das ao à em no na nos nas é são foi que se seu sua por para "
    "com como não mais mas meu teu muito também este esta isto ser eu me quando porque você está pelo pela",
}
_LANGUAGES = {name: frozenset(words.split()) for name, words in _FUNCTION_WORDS.items()}


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _sentences(text: str) -> list[str]:
    text = _ABBREVIATION.sub(lambda match: match[0].replace(".", ""), _LIST_MARKER.sub("", text))
    return [piece for piece in _SENTENCE_END.split(text) if _WORD.search(piece)]


def _within(number: int, low: int | None, high: int | None) -> float:
    # 1 inside of the range; outside it falls linearly, to 0 at no items and at twice the highest number.
    if low is not None and number < low:
        return number / low
    if high is not None and number > high:
        return max(0.0, 2 - number / high)
    return 1.0


def _word_count(response: str, min: int | None = None, max: int | None = None) -> float:
    return _within(len(_words(response)), min, max)


def _sentence_count(response: str, min: int | None = None, max: int | None = None) -> float:
    return _within(len(_sentences(response)), min, max)


def _paragraph_count(response: str, count: int) -> float:
    return _within(len([part for part in re.split(r"\n\s*\n", response) if part.strip()]), count, count)


def _bullet_list(response: str, count: int) -> float:
    lines = response.splitlines()
    bullets, numbers = (sum(1 for line in lines if marker.match(line)) for marker in (_BULLET, _NUMBER))
    return max(_within(bullets, count, count), 0.5 * _within(numbers, count, count))


def _numbered_list(response: str, count: int) -> float:
    lines = response.splitlines()
    numbers = [int(match[1]) for line in lines if (match := _NUMBER.match(line))]
    in_place = sum(1 for place, number in enumerate(numbers, start=1) if number == place) / max(1, len(numbers))
    bullets = sum(1 for line in lines if _BULLET.match(line))
    return max(_within(len(numbers), count, count) * in_place, 0.5 * _within(bullets, count, count))


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))


def _required_words(response: str, words: list[str]) -> float:
    return sum(1 for word in words if _occurrences(response, word)) / len(words)


def _forbidden_words(response: str, words: list[str]) -> float:
    return 0.5 ** sum(_occurrences(response, word) for word in words)


def _leading_agreement(words: list[str], expected: list[str]) -> float:
    agreeing = 0
    for word, other in zip(words, expected, strict=False):
        if word != other:
            break
        agreeing += 1
    return agreeing / max(1, len(expected))


def _starts_with(response: str, text: str) -> float:
    if re.match(re.escape(text.lstrip(_MARKUP)) + r"(?!\w)", response.lstrip(_MARKUP)):
        return 1.0
    return 0.9 * _leading_agreement(_words(response.lower()), _words(text.lower()))


def _ends_with(response: str, text: str) -> float:
    if re.search(r"(?<!\w)" + re.escape(text.rstrip(_MARKUP)) + r"\Z", response.rstrip(_MARKUP)):
        return 1.0
    return 0.9 * _leading_agreement(_words(response.lower())[::-1], _words(text.lower())[::-1])


def _lowercase(response: str) -> float:
    words = [word for word in _words(response) if word.lower() != word.upper()]
    if not words:
        return 0.0
    # About one word in eight of ordinary English carries a capital, so the scale ends at one in four.
    return max(0.0, 1 - 4 * sum(1 for word in words if word != word.lower()) / len(words))


def _uppercase(response: str) -> float:
    words = [word for word in _words(response) if word.lower() != word.upper()]
    return sum(1 for word in words if word == word.upper()) / len(words) if words else 0.0


def _parse_object(source: str) -> dict | None:
    try:
        value = json.loads(source)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_object(response: str, keys: list[str]) -> float:
    stripped = response.strip()
    fenced = _FENCED.search(stripped)
    whole = fenced[1] if fenced and fenced[0] == stripped else stripped
    embedded = fenced[1] if fenced else stripped[stripped.find("{") : stripped.rfind("}") + 1]
    for source, credit in ((whole, 1.0), (embedded, 0.8)):
        if (value := _parse_object(source)) is not None:
            return credit * (0.5 + 0.5 * sum(1 for key in keys if key in value) / len(keys))
    return 0.3 * sum(1 for key in keys if re.search(rf'"{re.escape(key)}"\s*:', response)) / len(keys)


def _quoted(response: str) -> float:
    stripped = response.strip()
    opened, closed = stripped[0] in _OPENING_QUOTES, stripped[-1] in _CLOSING_QUOTES and len(stripped) > 1
    return (opened + closed) / 2


def _language(response: str, language: str) -> float:
    right = known = 0
    for sentence in _sentences(response):
        words = re.findall(r"\w+", sentence.lower())
        hits = {name: sum(1 for word in words if word in vocabulary) for name, vocabulary in _LANGUAGES.items()}
        most = max(hits.values())
        # A sentence without any function word, such as a name or a formula, belongs to no language.
        known += len(words) if most else 0
        right += len(words) if most and hits[language] == most else 0
    return right / known if known else 0.0


def _title(response: str) -> float:
    match = _TITLE.search(response)
    if match is None:
        return 0.0
    return 1.0 if not _WORD.search(response[: match.start()]) else 0.5


def _placeholders(response: str, count: int) -> float:
    return min(1.0, len(_PLACEHOLDER.findall(response)) / count)


def _answer_line(response: str, answer: str | None = None) -> float:
    lines = [line.strip().strip("*_ ") for line in response.splitlines() if line.strip()]
    places = [place for place, line in enumerate(lines) if re.match(r"answer\W*:\W*\w", line, re.IGNORECASE)]
    if not places:
        return 0.2 if re.search(r"\banswer\b", lines[-1], re.IGNORECASE) else 0.0
    form = 1.0 if places[-1] == len(lines) - 1 else 0.6
    if answer is None:
        return form
    return form * (1.0 if _occurrences(lines[places[-1]], answer) else 0.5)


def _postscript(response: str) -> float:
    lines = [line.strip().strip("*_ ") for line in response.splitlines() if line.strip()]
    if any(re.match(r"P\.? ?S\.?[\s:,–—-]+\S", line) for line in lines[1:]):
        return 1.0
    return 0.5 if re.search(r"\bP\. ?S\.", response) else 0.0


KINDS: Mapping[str, Callable[..., float]] = {
    "word_count": _word_count,
    "sentence_count": _sentence_count,
    "paragraph_count": _paragraph_count,
    "bullet_list": _bullet_list,
    "numbered_list": _numbered_list,
    "required_words": _required_words,
    "forbidden_words": _forbidden_words,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "lowercase": _lowercase,
    "uppercase": _uppercase,
    "json_object": _json_object,
    "quoted": _quoted,
    "language": _language,
    "title": _title,
    "placeholders": _placeholders,
    "answer_line": _answer_line,
    "postscript": _postscript,
}


def _fits(value: Any, annotation: Any) -> bool:
    if annotation in (int, int | None):
        return type(value) is int and value > 0
    if annotation in (str, str | None):
        return isinstance(value, str) and bool(value.strip())
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item.strip() for item in value)


def _check_arguments(kind: str, args: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"`{kind}` is not a known kind of constraint.")
    parameters = dict(list(inspect.signature(KINDS[kind]).parameters.items())[1:])
    fit = isinstance(args, dict) and all(
        name in parameters and _fits(value, parameters[name].annotation) for name, value in args.items()
    )
    fit = fit and all(name in args or item.default is None for name, item in parameters.items())
    if fit and kind == "language":
        fit = args["language"] in _LANGUAGES
    if fit and kind in ("word_count", "sentence_count"):
        fit = bool(args) and args.get("min", 0) <= args.get("max", math.inf)
    if not fit:
        expected = ", ".join(str(item) for item in parameters.values()) or "none"
        raise ValueError(
            f"The arguments {json.dumps(args)} do not fit the kind `{kind}`, which takes: {expected}. Numbers are "
            "positive, texts and lists not empty."
        )


def check(kind: str, args: dict[str, Any], text: str) -> float:
    """
    Grade how well a text fulfils one verifiable constraint.

    | kind | arguments | grade below 1 |
    | --- | --- | --- |
    | `word_count` | `min` and/or `max` | falls linearly with the distance, to 0 at no word and at twice `max` |
    | `sentence_count` | `min` and/or `max` | likewise; a line break ends a sentence |
    | `paragraph_count` | `count` | likewise; paragraphs are parted by blank lines |
    | `bullet_list` | `count` | likewise, on lines that begin with `-`, `*`, `+` or `•`; numbers instead of bullets: half of it |
    | `numbered_list` | `count` | likewise, times the share of the numbers that stand in their place; bullets: half of it |
    | `required_words` | `words` | share of the words (or phrases) that occur, in any case |
    | `forbidden_words` | `words` | halves with every occurrence |
    | `starts_with` | `text` | 0.9 times the share of the text's words that the response shares from its start on |
    | `ends_with` | `text` | 0.9 times the share of the text's words that the response shares from its end on |
    | `lowercase` | none | falls with the share of words with a capital, to 0 at a quarter |
    | `uppercase` | none | share of the words that are all capitals |
    | `json_object` | `keys` | half for an object, half for the share of keys; times 0.8 where text stands around it; no object: 0.3 times the share of keys written as `"key":` |
    | `quoted` | none | half for each of the opening and the closing double quote |
    | `language` | `language` | share of the words that stand in sentences of that language, by function words |
    | `title` | none | half for a title in `<<` and `>>` that is not the beginning |
    | `placeholders` | `count` | found placeholders such as `[name]` as a share of `count` |
    | `answer_line` | `answer`, *optional* | 0.6 for a line `Answer: ...` that is not the last, 0.2 for a last line that only has the word; half of it for a wrong answer |
    | `postscript` | none | half for a `P.S.` that does not begin a line below the first |

    Args:
        kind (`str`):
            Kind of the constraint, a key of `KINDS`.
        args (`dict[str, Any]`):
            Arguments of the constraint.
        text (`str`):
            Text to check. Any text is graded; one without a visible character fulfils nothing.

    Returns:
        `float`: Grade between 0 (not at all) and 1 (fulfilled).

    Raises:
        `ValueError`: If the kind is unknown or the arguments do not fit it.
    """
    _check_arguments(kind, args)
    return KINDS[kind](text, **args) if text.strip() else 0.0


class VerifiableJudge:
    """
    Judge that scores responses by the verifiable constraints of their prompts, in the form of a TRL reward function.

    The score is `1 + 9 * mean of the grades`, with one grade a constraint as [`check`] gives it: 10 where every
    constraint is fulfilled, 1 where none is, or where the response is empty.

    Examples:

    ```python
    >>> judge = VerifiableJudge()
    >>> constraints = [{"kind": "word_count", "args": '{"max": 5}'}, {"kind": "lowercase", "args": "{}"}]
    >>> judge(prompts=["Name a fruit."], completions=["an apple"], constraints=[constraints])
    [10.0]
    ```
    """

    def __call__(
        self,
        prompts: list[str | list[dict]],
        completions: list[str | list[dict]],
        constraints: list[list[dict[str, str]]],
        **kwargs: Any,
    ) -> list[float]:
        """
        Score responses.

        Args:
            prompts (`list[str | list[dict]]`):
                Prompts, one a response. They are not looked at.
            completions (`list[str | list[dict]]`):
                Responses in TRL's standard or conversational format.
            constraints (`list[list[dict[str, str]]]`):
                For each response the constraints of its prompt: dictionaries with the keys `kind` and `args`, where
                `args` is a JSON object as a string, so that all kinds have the same column type.
            **kwargs:
                Other columns, as TRL passes them on. They are not looked at.

        Returns:
            `list[float]`: A score from 1 to 10 for each response.

        Raises:
            `ValueError`: If a row has no constraint, or one of an unknown kind or with arguments that do not fit it.
        """
        scores = []
        for row, (completion, items) in enumerate(zip(completions, constraints, strict=True)):
            if not items:
                raise ValueError(f"Row {row} of `constraints` is empty: there is nothing to score the response by.")
            text = completion_text(completion)
            grades = [self._grade(row, item["kind"], item["args"], text) for item in items]
            scores.append(1 + 9 * sum(grades) / len(grades))
        return scores

    @staticmethod
    def _grade(row: int, kind: str, args: str | dict, text: str) -> float:
        try:
            return check(kind, json.loads(args) if isinstance(args, str) else without_none(args), text)
        except (TypeError, ValueError) as error:
            known = "" if kind in KINDS else f" Known kinds: {', '.join(KINDS)}."
            raise ValueError(
                f"Row {row} of `constraints` cannot be checked, kind `{kind}` with arguments {args!r}: "
                f"{str(error).rstrip('.')}.{known}"
            ) from error
