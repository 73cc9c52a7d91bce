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

import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from trl_bpo.formats import drop_duplicate_pairs, load_rows, prepare_dataset


ROWS = [{"prompt": f"question {i}", "extra": i} for i in range(4)]


def test_files_folders_and_slices_load_the_same_rows(tmp_path):
    dataset = Dataset.from_list(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    with gzip.open(tmp_path / "zipped.jsonl.gz", "wt") as file:
        file.write(lines)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved_dict")
    for name in ("rows.jsonl", "zipped.jsonl.gz", "rows.parquet", "saved", "saved_dict"):
        assert load_rows(str(tmp_path / name)).to_list() == ROWS, name
    assert load_rows(str(tmp_path / "rows.jsonl"), "train[:2]").to_list() == ROWS[:2]


def test_a_missing_file_and_an_unknown_type_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_rows(str(tmp_path / "absent.jsonl"))
    (tmp_path / "rows.xlsx").write_text("")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_rows(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="not a file of a known type"):
        load_rows(str(tmp_path / "rows.xlsx"))


@pytest.mark.parametrize(
    ("row", "stage"),
    [
        ({"prompt": "p"}, "prompts"),
        ({"prompt": "p", "responses": ["a", "b"]}, "responses"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1.0, None]}, "scores"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "pairs"),
        ({"chosen": "same a", "rejected": "same b"}, "pairs"),
    ],
)
def test_the_columns_decide_the_stage(row, stage):
    prepared = prepare_dataset(Dataset.from_list([row, row]))
    assert prepared.stage == stage and "prompt" in prepared.dataset.column_names


@pytest.mark.parametrize(("text", "score"), [("text", "score"), ("response", "overall_score"), ("content", "rating")])
def test_responses_that_carry_their_score_are_unpacked(text, score):
    row = {"instruction": "p", "completions": [{text: "a", score: 3, "model": "m"}, {text: "b", score: None}]}
    prepared = prepare_dataset(Dataset.from_list([row]), prompt_column="instruction")
    assert prepared.stage == "scores"
    assert prepared.dataset[0] == {"prompt": "p", "responses": ["a", "b"], "scores": [3, None]}


def test_responses_without_any_score_start_at_the_judge():
    row = {"prompt": "p", "responses": [{"text": "a"}, {"text": "b"}]}
    assert prepare_dataset(Dataset.from_list([row])).stage == "responses"


def test_transcripts_are_split_at_the_last_assistant_turn():
    context = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
    rows = [
        {"chosen": context + " I am well", "rejected": context + " I am not"},
        {"chosen": context + " yes", "rejected": "\n\nHuman: other\n\nAssistant: no"},
    ]
    prepared = prepare_dataset(Dataset.from_list(rows))
    assert prepared.dataset.to_list() == [{"chosen": " I am well", "rejected": " I am not", "prompt": context}]
    assert prepared.dropped == 1
    messages = prepare_dataset(Dataset.from_list(rows), to_messages=True).dataset[0]
    assert messages["prompt"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "how?"},
    ]
    assert messages["chosen"] == [{"role": "assistant", "content": "I am well"}]


def test_an_earlier_stage_sets_what_is_there_aside():
    pairs = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b", "extra": 1}])
    prepared = prepare_dataset(pairs, start_from="prompts", to_messages=True)
    assert prepared.stage == "prompts"
    assert prepared.dataset.to_list() == [{"prompt": [{"role": "user", "content": "p"}], "extra": 1}]
    scored = Dataset.from_list([{"prompt": "p", "responses": ["a"], "scores": [1.0]}])
    assert prepare_dataset(scored, start_from="responses").dataset.column_names == ["prompt", "responses"]


def test_a_prompt_column_that_is_asked_for_goes_first():
    dataset = Dataset.from_list([{"prompt": "not this", "instruction": "this"}])
    assert prepare_dataset(dataset, prompt_column="instruction").dataset.to_list() == [{"prompt": "this"}]


def test_what_a_later_stage_writes_is_set_aside():
    row = {"prompt": "p", "responses": ["a"], "truncated": [False], "scores": [1.0], "verdicts": ["x"], "judge": "j"}
    dataset = Dataset.from_list([{**row, "pair_id": "1", "score_chosen": 2.0}])
    assert set(prepare_dataset(dataset).dataset.column_names) == set(row)
    again = prepare_dataset(dataset, start_from="responses").dataset
    assert set(again.column_names) == {"prompt", "responses", "truncated"}
    assert prepare_dataset(dataset, start_from="prompts").dataset.column_names == ["prompt"]


def test_scores_beside_responses_with_other_keys_are_kept():
    dataset = Dataset.from_list([{"prompt": "p", "responses": [{"text": "a"}, {"text": "b"}], "scores": [1.0, 2.0]}])
    prepared = prepare_dataset(dataset)
    assert prepared.stage == "scores"
    assert prepared.dataset.to_list() == [{"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 2.0]}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "responses": ["a"]}, {"prompt": "p", "responses": []}], "Row 1 has an empty `responses`"),
        ([{"prompt": "p", "responses": ["a"], "scores": [1.0, 2.0]}], "Row 0 has 1 `responses` but 2 `scores`"),
        ([{"prompt": "p", "chosen": "a", "rejected": None}], "Row 0 has an empty `rejected`"),
        (
            [
                {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
                {"chosen": "plain", "rejected": "text"},
            ],
            "Row 1 is no transcript",
        ),
        ([{"prompt": "p", "responses": "['a', 'b']", "scores": "[1, 2]"}], "of type str, not a list. CSV cannot"),
        ([{"prompt": "p", "responses": ["a"], "scores": ["high"]}], "Row 0 has the score 'high'"),
        ([{"prompt": "p", "rejected": "b"}], "only one of `chosen` and `rejected`"),
        (
            [{"question": "q", "chosen": "yes", "rejected": "no"}],
            "1 of 1 pairs have no prompt.*question.*prompt_column",
        ),
    ],
)
def test_a_bad_row_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        prepare_dataset(Dataset.from_list(rows))


def test_errors_name_the_column_or_option():
    dataset = Dataset.from_list([{"question": "q"}])
    with pytest.raises(ValueError, match="no `prompt` column.*question.*prompt_column"):
        prepare_dataset(dataset)
    with pytest.raises(ValueError, match="is empty"):
        prepare_dataset(Dataset.from_dict({"prompt": []}))
    with pytest.raises(ValueError, match="streaming"):
        prepare_dataset(dataset.to_iterable_dataset())
    with pytest.raises(ValueError, match="`start_from` must be one of"):
        prepare_dataset(dataset, prompt_column="question", start_from="middle")
    with pytest.raises(ValueError, match="start_from='scores'.*lacks"):
        prepare_dataset(dataset, prompt_column="question", start_from="scores")
    pairs = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="does not apply to pairs"):
        prepare_dataset(pairs, start_from="scores")


def test_exact_copies_of_pairs_are_dropped():
    rows = [{"prompt": "p", "chosen": a, "rejected": b, "n": n} for n, (a, b) in enumerate(["xy", "yx", "xy", "xz"])]
    assert [row["n"] for row in drop_duplicate_pairs(Dataset.from_list(rows))] == [0, 1, 3]
