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


import json
import random

import pytest

from trl_bpo.verifiable import KINDS, VerifiableJudge, check


# kind, arguments, a text that fulfils the constraint, a text that clearly does not
CASES = [
    ("word_count", {"min": 4, "max": 6}, "Bees aren't well-known for sleeping.", "word " * 40),
    ("word_count", {"min": 20}, "word " * 20, "Too short."),
    ("word_count", {"max": 3}, "Just three words.", "This one is very much longer than that."),
    (
        "sentence_count",
        {"min": 2, "max": 2},
        "Dr. Lee paid 3.50, e.g. for tea. She left!",
        "One. Two. Three. Four. Five.",
    ),
    ("sentence_count", {"max": 2}, "Only one sentence here", "One. Two. Three. Four. Five."),
    ("paragraph_count", {"count": 2}, "First part.\nStill first.\n\n\nSecond part.", "a\n\nb\n\nc\n\nd\n\ne"),
    ("bullet_list", {"count": 3}, "Here you are:\n- one\n* two\n • three", "One, two, three."),
    ("numbered_list", {"count": 3}, "1. one\n2) two\n3. three", "one\ntwo\nthree"),
    ("required_words", {"words": ["yeast", "baking soda"]}, "Yeast or baking soda?", "Yeasts and sodas for baking."),
    ("forbidden_words", {"words": ["sun", "rain"]}, "Sunny days, rainy nights.", "Sun, sun, rain, sun and rain."),
    ("starts_with", {"text": "It depends"}, '**"It depends", I said.', "Well, that is hard to say."),
    ("ends_with", {"text": "Just start today."}, "My advice? Just start today.\n", "Start whenever you like."),
    ("lowercase", {}, "all in small letters, 24 of them.", "Every Word Has A Capital."),
    ("uppercase", {}, "CLOSED UNTIL 8 A.M.!", "Closed until eight."),
    ("json_object", {"keys": ["host", "port"]}, '```json\n{"host": "a", "port": 1}\n```', "host: a, port: 1"),
    ("json_object", {"keys": ["host"]}, ' {"host": {"name": "b"}} ', "The host is b."),
    ("quoted", {}, '"To be or not to be."', 'He said "no" to me.'),
    ("quoted", {}, "“Curly ones count too.”", "Nothing at all"),
    ("language", {"language": "English"}, "The cat is on the table.", "Le chat est sur la table de la cuisine."),
    ("language", {"language": "Spanish"}, "El gato está en la mesa. No es muy grande.", "The cat is on the table."),
    (
        "language",
        {"language": "French"},
        "C'est l'hiver. Les enfants sont dans la rue.",
        "The children are in the street.",
    ),
    ("language", {"language": "German"}, "Die Katze ist nicht auf dem Tisch.", "La casa de mi madre es muy grande."),
    ("language", {"language": "Italian"}, "Il gatto è sul tavolo della cucina.", "The cat is on the table."),
    ("language", {"language": "Portuguese"}, "O gato não está na mesa do seu pai.", "中文没有这些词。"),
    ("title", {}, "<<A Day at Sea>>\nWe sailed at dawn.", "A Day at Sea\nWe sailed at dawn."),
    ("placeholders", {"count": 2}, "Dear [name], see you on [date].", "Dear Ann, see you on Monday []."),
    ("answer_line", {}, "Six times four is 24.\n**Answer:** 24", "It is 24."),
    ("answer_line", {"answer": "7.5"}, "Count them.\nanswer: 7.5 hours", "That is hard to tell."),
    ("postscript", {}, "Dear Tom,\nthanks!\n\nP.S. Bring cake.", "Dear Tom, thanks! PSA: bring cake."),
]


def grade(kind, response, /, **args):
    return check(kind, args, response)


@pytest.mark.parametrize(
    ("kind", "args", "good", "bad"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_good_answer_scores_ten_and_bad_one_low(kind, args, good, bad):
    constraints = [[{"kind": kind, "args": json.dumps(args)}]] * 3
    scores = VerifiableJudge()(prompts=["?"] * 3, completions=[good, bad, " \n"], constraints=constraints)
    assert scores[0] == 10
    assert 1 <= scores[1] < 3
    assert scores[2] == 1


def test_every_kind_has_a_case_and_is_documented():
    assert {case[0] for case in CASES} == set(KINDS)
    assert all(f"| `{kind}` |" in check.__doc__ for kind in KINDS)


def test_grades_fall_with_the_distance():
    counts = [grade("word_count", "word " * n, min=30, max=50) for n in (10, 20, 30, 50, 60, 75, 100, 200)]
    assert counts == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.8, 0.5, 0, 0])
    assert grade("sentence_count", "One. Two. Three.", min=2, max=2) == 0.5
    assert grade("bullet_list", "- a\n- b\n- c", count=4) == 0.75
    assert grade("bullet_list", "1. a\n2. b\n3. c\n4. d", count=4) == 0.5
    assert grade("numbered_list", "- a\n- b", count=2) == 0.5
    assert grade("numbered_list", "1. a\n1. b\n1. c\n4. d", count=4) == 0.5
    assert grade("required_words", "Tea.", words=["tea", "milk"]) == 0.5
    assert grade("forbidden_words", "The sun and the Sun.", words=["sun"]) == 0.25
    assert grade("uppercase", "HALF of THESE words") == 0.5
    assert grade("lowercase", "Ten words of which only the first has a capital") == pytest.approx(0.6)
    assert grade("placeholders", "Dear [name]", count=2) == 0.5
    assert grade("quoted", '"Never closed') == 0.5
    assert grade("title", "Here it is: <<Title>>") == 0.5
    assert grade("postscript", "Bye. P.S. I forgot.") == 0.5


def test_partly_right_beginnings_and_ends():
    assert grade("starts_with", "It surely depends", text="It depends") == pytest.approx(0.45)
    assert grade("starts_with", "it depends", text="It depends") == pytest.approx(0.9)
    assert grade("starts_with", "Good newspapers", text="Good news") == pytest.approx(0.45)
    assert grade("ends_with", "so start today", text="Just start today.") == pytest.approx(0.6)
    assert grade("ends_with", "Unjust start today.", text="just start today.") == pytest.approx(0.6)
    assert grade("ends_with", "Bye. Forever yours, Cat", text="Forever yours, Cat.") == pytest.approx(0.9)


def test_json_is_graded_by_form_and_keys():
    keys = ["a", "b"]
    assert grade("json_object", '{"a": 1}', keys=keys) == 0.75
    assert grade("json_object", 'Here: {"a": 1, "b": 2} as asked.', keys=keys) == pytest.approx(0.8)
    assert grade("json_object", 'Sure!\n```json\n{"a": 1, "b": 2}\n```', keys=keys) == pytest.approx(0.8)
    assert grade("json_object", '{"a": 1, "b": }', keys=keys) == pytest.approx(0.3)
    assert grade("json_object", '["a", "b"]', keys=keys) == 0


def test_language_is_graded_by_share():
    mixed = "El perro está en la casa. The dog is in the house."
    assert grade("language", mixed, language="Spanish") == pytest.approx(0.5)
    assert grade("language", "Madrid 2024", language="Spanish") == 0


def test_answer_line_weighs_form_and_value():
    assert grade("answer_line", "Answer: 25\nHope that helps!") == 0.6
    assert grade("answer_line", "Sum.\nAnswer: 25", answer="24") == 0.5
    assert grade("answer_line", "So the answer is 24.", answer="24") == 0.2
    assert grade("answer_line", "Sum.\nAnswer: 244", answer="24") == 0.5


def test_score_is_the_mean_over_constraints():
    constraints = [{"kind": "word_count", "args": '{"max": 4}'}, {"kind": "lowercase", "args": "{}"}]
    judge = VerifiableJudge()
    assert judge(prompts=["?"], completions=["only three words"], constraints=[constraints]) == [10]
    assert judge(prompts=["?"], completions=["Only Three Words"], constraints=[constraints]) == [5.5]


def test_conversational_completions_and_other_columns():
    scores = VerifiableJudge()(
        prompts=[[{"role": "user", "content": "Hi"}]] * 2,
        completions=[[{"role": "assistant", "content": "hello"}], [{"role": "assistant", "content": ""}]],
        constraints=[[{"kind": "lowercase", "args": "{}"}]] * 2,
        topic=["a", "b"],
    )
    assert scores == [10, 1]


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("rhyme", "{}"),
        ("word_count", "{}"),
        ("word_count", '{"min": 5, "max": 3}'),
        ("word_count", '{"max": "5"}'),
        ("word_count", '{"max": 5, "about": 4}'),
        ("bullet_list", '{"count": 0}'),
        ("bullet_list", '{"count": true}'),
        ("bullet_list", "{}"),
        ("required_words", '{"words": []}'),
        ("required_words", '{"words": "tea"}'),
        ("starts_with", '{"text": " "}'),
        ("language", '{"language": "Klingon"}'),
        ("lowercase", "[]"),
        ("lowercase", "not JSON"),
    ],
)
@pytest.mark.parametrize("completion", ["Some text.", ""])
def test_wrong_constraints_are_named(kind, args, completion):
    good = [{"kind": "lowercase", "args": "{}"}]
    bad = [{"kind": kind, "args": args}]
    known = "" if kind in KINDS else ".*Known kinds: word_count, .*postscript"
    with pytest.raises(ValueError, match=f"Row 1 .*kind `{kind}`{known}"):
        VerifiableJudge()(prompts=["a", "b"], completions=["x", completion], constraints=[good, bad])


def test_row_without_constraints_is_an_error():
    with pytest.raises(ValueError, match="Row 0 of `constraints` is empty"):
        VerifiableJudge()(prompts=["a"], completions=["x"], constraints=[[]])


def test_any_text_gets_a_grade_between_0_and_1():
    rng = random.Random(0)
    alphabet = "aZ09 .,!?:\n\t-*•#[]{}<>\"'“”’`_()/\\\u0301\u200b\x00٣²ßéø中文🙂ﬁP.S."
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(300)]
    texts += [
        "[" * 100_000,
        '{"a":' * 50_000,
        "1" * 5000,
        '{"a": ' + "1" * 5000 + "}",
        "...",
        "***",
        "\x85",
        "1.",
        "- ",
    ]
    arguments = {case[0]: case[1] for case in CASES}
    for kind, args in arguments.items():
        for text in texts:
            assert 0 <= check(kind, args, text) <= 1, (kind, text)


def test_arguments_may_be_an_object_too():
    judge = VerifiableJudge()
    as_text = [[{"kind": "word_count", "args": '{"max": 2}'}]]
    as_object = [[{"kind": "word_count", "args": {"max": 2, "min": None}}]]
    assert judge(["p"], ["one two three"], as_text) == judge(["p"], ["one two three"], as_object)
