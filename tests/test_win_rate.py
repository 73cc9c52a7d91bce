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


"""Win rates: what counts as what, that nothing depends on the order, and that the better answers win."""

import gzip
import hashlib
import json
import os
import random
import re
from itertools import accumulate
from pathlib import Path

import pytest
from openai_server import OpenAIServer
from tiny import tiny_model_dir, tiny_reward_model_dir

from trl_bpo import OpenAIJudge, OpenAIPairwiseJudge, RewardModelJudge, TransformersGenerator
from trl_bpo.win_rate import interval_of, outcomes_from_scores, tally, win_rate
from trl_bpo.win_rate_report import (
    Comparison,
    ScoreSummary,
    answer_table,
    plot_evaluation,
    score_table,
    win_rate_table,
)


# A question, an answer and what an answer must say. Some answers say it early, some late.
KNOWLEDGE = [
    (
        "Why is the sky blue?",
        "Air molecules scatter short waves of sunlight far more than long ones. Blue light has a short wave, so it reaches "
        "the eye from all directions of the sky, while red light passes straight on.",
        ["scatter", "short", "blue", "red"],
    ),
    (
        "How do I boil an egg?",
        "Bring water to the boil, lower the egg in with a spoon, wait for seven minutes, and cool it in cold water before "
        "you peel it.",
        ["boil", "seven", "cold", "peel"],
    ),
    (
        "What is photosynthesis?",
        "Plants take up carbon dioxide and water, and with the energy of light, which chlorophyll absorbs, they make sugar. "
        "Oxygen is left over and goes into the air.",
        ["carbon", "light", "sugar", "oxygen"],
    ),
    (
        "Why do we have seasons?",
        "The axis of the Earth is tilted against its path around the Sun. In June the north leans towards the Sun and has "
        "long days, which is summer; in December it leans away, and the south has its summer.",
        ["tilted", "june", "december", "south"],
    ),
    (
        "How do I back up my files?",
        "Keep three copies: the one that you work on, one on another disk, and one at another place. Let a program do it "
        "every night, and try now and then whether you can restore a file.",
        ["three", "disk", "night", "restore"],
    ),
    (
        "What does a compiler do?",
        "It reads the source code, checks its types, and translates it into machine code, which it optimises so that the "
        "program runs fast.",
        ["source", "types", "machine", "optimises"],
    ),
]
PROMPTS = [question for question, _, _ in KNOWLEDGE]
ANSWERS = [answer for _, answer, _ in KNOWLEDGE]
NOISE = [f"answer {row} {word}" for row in range(40) for word in ("one", "two")]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")


def texts_of(request):
    # The JSON strings of prompt and responses stand on lines of their own.
    lines = [line for line in request["messages"][1]["content"].splitlines() if line.startswith('"')]
    return [json.loads(line) for line in lines]


def scores(table):
    return lambda prompts, completions, **columns: [table[completion] for completion in completions]


def number_of(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def with_position_bias(request):
    """A judge that sees quality, the hash of the answer, but prefers what stands first unless the other is far better."""
    _, first, second = texts_of(request)
    verdict = "B" if number_of(second) - number_of(first) > 1 << 30 else "A"
    return json.dumps({"reason": "", "verdict": verdict})


def covered(prompt, answer):
    """How much of what it must say an answer says, in tenths: a judgement on content, not on length."""
    terms = next(terms for question, _, terms in KNOWLEDGE if question == prompt)
    return sum(bool(re.search(rf"\b{term}\b", answer.lower())) for term in terms) / len(terms)


def rate(request):
    prompt, answer = texts_of(request)
    return json.dumps({"reason": "", "rating": 1 + round(9 * covered(prompt, answer))})


def compare(request):
    prompt, first, second = texts_of(request)
    difference = covered(prompt, first) - covered(prompt, second)
    return json.dumps({"reason": "", "verdict": "tie" if not difference else "A" if difference > 0 else "B"})


def is_mirrored(result, other):
    assert (result.wins, result.ties, result.losses, result.unjudged) == (
        other.losses,
        other.ties,
        other.wins,
        other.unjudged,
    )
    assert result.outcomes == [None if outcome is None else 1 - outcome for outcome in other.outcomes]
    assert result.win_rate == pytest.approx(1 - other.win_rate, abs=1e-12)
    assert result.interval == pytest.approx((1 - other.interval[1], 1 - other.interval[0]), abs=1e-12)
    assert (result.lengths, result.baseline_lengths) == (other.baseline_lengths, other.lengths)
    assert (result.length_mean, result.baseline_length_mean) == (other.baseline_length_mean, other.length_mean)
    # Which of the two is the longer one does not depend on what they are called.
    assert result.longer_win_share == other.longer_win_share
    assert list(result.groups) == list(other.groups)
    for name, group in result.groups.items():
        is_mirrored(group, other.groups[name])


def test_what_counts_as_what():
    judge = scores({"good": 3.0, "fair": 2.0, "equal": 2.0, "bad": 1.0, "none": None, "odd": float("nan")})
    result = win_rate(
        judge,
        [f"prompt {row}" for row in range(7)],
        ["good", "fair", "fair", "bad", "none", None, "good"],
        ["bad", "equal", "good", "fair", "good", "good", "odd"],
        groups=["x", "x", "y", "y", "y", None, None],
    )
    assert result.outcomes == [1.0, 0.5, 0.0, 0.0, None, None, None]
    assert (result.wins, result.ties, result.losses, result.unjudged) == (1, 1, 2, 3)
    assert result.win_rate == 1.5 / 4
    assert result.interval[0] < result.win_rate < result.interval[1]
    # The missing answer counts for no length, the unjudged ones do.
    assert result.lengths == [4, 4, 4, 3, 4, None, 4]
    assert result.length_mean == pytest.approx(23 / 6)
    # good beats bad, good beats fair (of the same length), fair beats bad: twice the longer one of two.
    assert result.longer_win_share == 1.0
    assert {name: group.outcomes for name, group in result.groups.items()} == {"x": [1.0, 0.5], "y": [0.0, 0.0, None]}
    assert result.groups["y"].win_rate == 0.0


def test_the_shorter_one_may_win():
    result = win_rate(
        scores({"short": 2, "much longer": 1, "also long": 3, "s": 0}),
        ["p", "q"],
        ["short", "s"],
        ["much longer", "also long"],
    )
    assert result.outcomes == [1.0, 0.0] and result.longer_win_share == 0.5


def test_nothing_judged_is_no_win_rate():
    result = win_rate(scores({"a": None, "b": 1.0}), ["p"], ["a"], ["b"])
    assert (result.win_rate, result.interval, result.longer_win_share, result.unjudged) == (None, None, None, 1)


def test_answers_must_belong_to_prompts():
    with pytest.raises(ValueError, match="same length and not empty, got 2, 1 and 2"):
        win_rate(scores({}), ["p", "q"], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="not empty"):
        win_rate(scores({}), [], [], [])


def test_equal_answers_are_ties_under_any_judge():
    draw, shown = random.Random(0), []

    def noisy(prompts, completions, **columns):
        shown.extend(completions)
        return [draw.random() for _ in completions]

    result = win_rate(noisy, PROMPTS, ANSWERS, ANSWERS)
    assert (result.wins, result.ties, result.losses) == (0, len(PROMPTS), 0)
    assert (result.win_rate, result.interval) == (0.5, (0.5, 0.5))
    assert shown == ANSWERS

    with OpenAIServer(with_position_bias) as server:
        judge = OpenAIPairwiseJudge("judge", base_url=server.base_url)
        result = win_rate(judge, PROMPTS, ANSWERS, ANSWERS)
        assert (result.ties, server.requests) == (len(PROMPTS), [])
        result = win_rate(judge, PROMPTS, [*ANSWERS[:-1], "other"], ANSWERS)
        assert result.outcomes[:-1] == [0.5] * (len(PROMPTS) - 1) and len(server.requests) == 2


@pytest.mark.parametrize("missing", [0, 5])
def test_exchanging_the_two_mirrors_the_result(missing):
    prompts = [f"prompt {row}" for row in range(40)]
    first, second = NOISE[::2], [text * (1 + row % 3) for row, text in enumerate(NOISE[1::2])]
    first[:missing] = [None] * missing
    groups = [("x", "y", None)[row % 3] for row in range(40)]
    with OpenAIServer(with_position_bias) as server:
        pairwise = OpenAIPairwiseJudge("judge", base_url=server.base_url)
        scoring = lambda prompts, completions, **columns: [number_of(text) % 5 for text in completions]  # noqa: E731
        for judge in (pairwise, scoring):
            result = win_rate(judge, prompts, first, second, groups=groups)
            is_mirrored(result, win_rate(judge, prompts, second, first, groups=groups))
            # The test sees every kind of outcome.
            assert min(result.wins, result.ties, result.losses) > 0 and result.unjudged == missing


def test_position_bias_makes_ties_and_no_winner():
    prompts = [f"prompt {row}" for row in range(20)]
    with OpenAIServer(lambda request: '{"reason": "", "verdict": "A"}') as server:
        judge = OpenAIPairwiseJudge("judge", base_url=server.base_url)
        result = win_rate(judge, prompts, NOISE[:20], NOISE[20:40])
    assert (result.win_rate, result.ties, len(server.requests)) == (0.5, 20, 40)


def test_a_model_against_itself(tmp_path):
    model = tiny_model_dir(tmp_path / "model")
    prompts = [[{"role": "user", "content": f"What is {row} and {row * row}?"}] for row in range(60)]
    answers = [
        [row[0].text for row in TransformersGenerator(model, max_new_tokens=8, seed=seed)(prompts, 1)]
        for seed in (1, 2)
    ]
    assert answers[0] != answers[1]
    reward = RewardModelJudge(tiny_reward_model_dir(tmp_path / "reward"))
    draw = random.Random(3)

    def noisy(**arguments):
        return [score + draw.gauss(0.0, 0.1) for score in reward(**arguments)]

    result = win_rate(noisy, prompts, *answers)
    assert result.wins + result.losses > 50
    low, high = result.interval
    assert low <= 0.5 <= high and high - low < 0.3


@pytest.mark.parametrize("pairwise", [False, True])
def test_better_answers_win_and_padding_does_not_help(pairwise):
    cut = [answer[: len(answer) // 3] for answer in ANSWERS]
    filler = "As was said before, this is a question that many people ask. "
    padded = [
        text + " " + filler * (1 + len(answer) // len(filler)) for text, answer in zip(cut, ANSWERS, strict=True)
    ]
    assert all(len(long) > len(answer) for long, answer in zip(padded, ANSWERS, strict=True))
    with OpenAIServer(compare if pairwise else rate) as server:
        kind = OpenAIPairwiseJudge if pairwise else OpenAIJudge
        judge = kind("judge", base_url=server.base_url)
        for worse, longer_wins in ((cut, 1.0), (padded, 0.0)):
            result = win_rate(judge, PROMPTS, ANSWERS, worse)
            assert (result.win_rate, result.longer_win_share) == (1.0, longer_wins)
        # Among the bad ones there is no winner: the filler says nothing.
        assert win_rate(judge, PROMPTS, padded, cut).ties == len(PROMPTS)


def test_units_that_belong_together_widen_the_interval():
    values = [1.0, 1.0, 0.0, 0.0] * 10
    alone = interval_of(values)
    together = interval_of(values, [row // 2 for row in range(40)])
    assert together[1] - together[0] > 1.2 * (alone[1] - alone[0])
    assert interval_of([None, None]) is None
    # Both turns of a question, one of them unjudged, are one unit.
    assert interval_of([1.0, None, 0.0, 0.0], ["a", "a", "b", "b"]) == interval_of([1.0, 0.0])


def test_options_of_the_interval():
    outcomes = outcomes_from_scores([1, 2, 3, 4, 0], [2, 1, 2, 3, 1])
    texts = ["x"] * 5
    wide, narrow = (tally(outcomes, texts, texts, level=level).interval for level in (0.95, 0.5))
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]


def results():
    result = tally([1.0, 0.5, None, 0.0], ["aa", "b", "c", "d"], ["a", "b", "cc", "dd"], groups=["x", "x", "y", "y"])
    empty = tally([None], [None], ["a"])
    return [Comparison("set, helpful", "new $x$", "old", result), Comparison("set", "none", "old", empty)]


def test_tables():
    lines = win_rate_table(results()).splitlines()
    assert re.sub(" +", " ", lines[2]).startswith("set, helpful new $x$ old 50.0 % ")
    # The winner was the longer one, the loser's answer the shorter one.
    assert lines[2].split()[-4:] == ["1", "2", "100.0", "%"]
    assert [line.split()[0] for line in lines[3:5]] == ["x", "y"]
    assert re.sub(" +", " ", lines[5]) == "set none old none none 0 0 0 1 none none none"
    summary = ScoreSummary("set", "new", 7.256, (6.0, 8.0), 10, 2, {"math": 3.0, "stem": None})
    table = re.sub(" +", " ", score_table([summary]))
    assert "set new 7.26 6.00 to 8.00 10 2" in table and " math new 3.00" in table and " stem new none" in table
    answers = {"answered": 1000, "missing": 1, "empty": 2, "truncated": 3, "characters_mean": 4.4}
    table = answer_table({"set": {"num_prompts": 1001, "answers": {"new": answers}, "dropped": {"empty prompt": 7}}})
    assert re.sub(" +", " ", table.splitlines()[2]) == "set new 1,001 1,000 1 2 3 4"
    assert table.splitlines()[3] == "Left out of set: 7 x empty prompt."


def test_picture(tmp_path):
    summary = ScoreSummary("set", "new $x$", 7.0, None, 10, 2, {"math": 3.0, "stem": None})
    plot_evaluation(results(), [summary], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    plot_evaluation([], [summary], tmp_path / "groups.png")
    assert (tmp_path / "groups.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_evaluation(results()[1:], [], tmp_path / "nothing.png")


@pytest.mark.skipif("TRL_BPO_TEST_DATA" not in os.environ, reason="needs the real files in TRL_BPO_TEST_DATA")
def test_whole_answers_of_alpaca_eval_beat_their_first_third():
    """
    The judge is how many of the words of an independent answer, that of text-davinci-003, an answer has. More text has
    more words, so the first third wins back what length alone gives when it is filled up with an answer to another prompt.
    """
    with gzip.open(Path(os.environ["TRL_BPO_TEST_DATA"]) / "alpacaeval_prompts.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]

    def words(text):
        return {word for word in re.findall("[a-z0-9]+", text.lower()) if len(word) > 3}

    def coverage(prompts, completions, independent, **columns):
        return [
            len(words(a) & words(b)) / max(1, len(words(b))) for a, b in zip(completions, independent, strict=True)
        ]

    prompts = [row["instruction"] for row in rows]
    columns = {"independent": [row["ref_text_davinci_003"] for row in rows]}
    whole = [row["ref_gpt4_1106_preview"] for row in rows]
    cut = [text[: len(text) // 3] for text in whole]
    # What stands behind each answer when all of them are written one after the other, round and round.
    ends = list(accumulate(map(len, whole)))
    everything = 2 * "".join(whole)
    filled = [(part + everything[end:])[: len(text)] for part, end, text in zip(cut, ends, whole, strict=True)]
    assert [len(text) for text in filled] == [len(text) for text in whole]
    result = win_rate(coverage, prompts, whole, cut, columns=columns)
    assert result.interval[0] > 0.8 and (result.losses, result.unjudged) == (0, 0)
    result = win_rate(coverage, prompts, whole, filled, columns=columns)
    assert result.interval[0] > 0.7 and result.losses < 0.1 * len(rows) and result.longer_win_share is None
