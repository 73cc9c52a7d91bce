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

import os
import unicodedata
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset

from trl_bpo.splits import check_no_overlap, normalize_prompt, overlapping_rows, split_by_prompt


def _user(*texts):
    return [{"role": "user", "content": text} for text in texts]


def _pairs(num_prompts=40):
    # Prompt i has 1 + i % 4 rows; some of them are written differently.
    rows = [(f"Question {i}?" if j % 2 else f"question  {i}", j) for i in range(num_prompts) for j in range(1 + i % 4)]
    return Dataset.from_dict({"prompt": [prompt for prompt, _ in rows], "row": list(range(len(rows)))})


def _number(prompt):
    return int("".join(filter(str.isdigit, prompt)))


class TestNormalizePrompt:
    @pytest.mark.parametrize(
        "one, other",
        [
            ("What is 2 + 2?", "what  is\n2 + 2"),
            ("It's “fine”", 'it’s "FINE" …'),
            ("Straße", "STRASSE"),
            ("ﬁne １２", "fine 12"),
            ("caf\u00e9", unicodedata.normalize("NFD", "CAF\u00c9")),
            ("soft\u00adhy\u200bphen", "softhyphen"),
            ("Hello!", _user("hello")),
            ("a\nb", _user("a", "b")),
            ("hi", [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
            ("\n\nHuman: Hi there\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant:", _user("hi there", "why")),
        ],
    )
    def test_same(self, one, other):
        assert normalize_prompt(one) == normalize_prompt(other)

    @pytest.mark.parametrize(
        "one, other",
        [
            ("1 + 1", "1 = 1"),
            ("cost $5", "cost €5"),
            ("?", "!"),
            ("resume", "résumé"),
            ("how", "how how"),
            ("Human: hi", _user("hi")),
        ],
    )
    def test_different(self, one, other):
        assert normalize_prompt(one) != normalize_prompt(other)

    def test_only_user_turns_count(self):
        turns = _user("First", "second")
        system = {"role": "system", "content": "Be brief."}
        assistant = {"role": "assistant", "content": "Yes."}
        assert normalize_prompt([system, turns[0], assistant, turns[1]]) == "first second"

    def test_without_a_user_turn_all_turns_count(self):
        assert normalize_prompt([{"role": "system", "content": "Tell a story."}]) == "tell a story"

    def test_is_idempotent(self):
        text = "ǰ ῼ ŉ İstanbul ﷺ ½ — A.B"
        assert normalize_prompt(normalize_prompt(text)) == normalize_prompt(text)


class TestSplitByPrompt:
    def test_whole_prompts_on_one_side_and_no_row_lost(self):
        dataset = _pairs()
        split = split_by_prompt(dataset, 0.25)
        train, test = ({_number(prompt) for prompt in split[name]["prompt"]} for name in ("train", "test"))
        assert not train & test
        assert len(test) == 10 and len(train) == 30
        assert sorted([*split["train"]["row"], *split["test"]["row"]]) == list(range(len(dataset)))
        check_no_overlap(split["train"], split["test"])

    def test_count_of_prompts(self):
        split = split_by_prompt(_pairs(), 7)
        assert len({_number(prompt) for prompt in split["test"]["prompt"]}) == 7

    def test_sides_do_not_depend_on_the_order_of_rows(self):
        dataset = _pairs()
        here, there = (split_by_prompt(rows, 0.3)["test"] for rows in (dataset, dataset.shuffle(seed=1)))
        assert sorted(here["row"]) == sorted(there["row"])
        assert here["row"] == sorted(here["row"])

    def test_sides_do_not_depend_on_how_many_rows_a_prompt_has(self):
        dataset = _pairs()
        seen, rows = set(), []
        for row, prompt in enumerate(dataset["prompt"]):
            if _number(prompt) not in seen:
                seen.add(_number(prompt))
                rows.append(row)
        here, there = (
            {_number(prompt) for prompt in split_by_prompt(data, 0.3)["test"]["prompt"]}
            for data in (dataset, dataset.select(rows))
        )
        assert here == there

    def test_seed_decides(self):
        sides = [split_by_prompt(_pairs(), 0.3, seed=seed)["test"]["row"] for seed in (1, 1, 2)]
        assert sides[0] == sides[1] != sides[2]

    def test_conversational_prompts_in_another_column(self):
        dataset = Dataset.from_dict({"question": [_user("A?"), _user("a"), _user("b"), _user("c")]})
        split = split_by_prompt(dataset, 1, prompt_column="question")
        assert split["train"].column_names == ["question"]
        check_no_overlap(split["train"], split["test"], prompt_column="question")

    @pytest.mark.parametrize("test_size", [0, 0.0, 0.001, 1.0, 40, 41, -1, 1.5])
    def test_refuses_an_empty_side(self, test_size):
        with pytest.raises(ValueError, match=rf"`test_size={test_size}`.*of 40 distinct prompts"):
            split_by_prompt(_pairs(), test_size)

    def test_refuses_a_missing_column(self):
        with pytest.raises(ValueError, match="`dataset` has no column `question`, only `prompt`, `row`"):
            split_by_prompt(_pairs(), 0.3, prompt_column="question")


class TestCheckNoOverlap:
    def test_names_counts_and_rows_but_not_the_text(self):
        train = Dataset.from_dict({"prompt": ["new", "A SECRET?", "a secret", "other", "b"]})
        evaluation = Dataset.from_dict({"instruction": [_user("B."), _user("unseen"), _user("a secret")]})
        assert overlapping_rows(train, evaluation, evaluation_column="instruction") == [(1, 2), (2, 2), (4, 0)]
        with pytest.raises(ValueError, match="3 of 5 rows.*2 distinct.*1 .row 2 of.*`split_by_prompt`") as caught:
            check_no_overlap(train, evaluation, evaluation_column="instruction")
        assert "secret" not in str(caught.value).lower()

    def test_stays_short_with_many_rows(self):
        dataset = Dataset.from_dict({"prompt": ["long " * 500 + str(i) for i in range(100)]})
        with pytest.raises(ValueError, match="100 of 100 rows") as caught:
            check_no_overlap(dataset, dataset)
        assert len(str(caught.value)) < 600

    def test_the_remedy_helps(self):
        train, evaluation = _pairs(), _pairs(5)
        leaked = {row for row, _ in overlapping_rows(train, evaluation)}
        check_no_overlap(train.select([row for row in range(len(train)) if row not in leaked]), evaluation)

    def test_names_the_dataset_without_the_column(self):
        train, evaluation = _pairs(3), _pairs(3).rename_column("prompt", "question")
        with pytest.raises(ValueError, match="`evaluation` has no column `prompt`"):
            check_no_overlap(train, evaluation)


@pytest.mark.skipif(
    "TRL_BPO_TEST_DATA" not in os.environ, reason="The real files' folder is not set in TRL_BPO_TEST_DATA."
)
class TestRealFiles:
    @staticmethod
    def _load(name):
        path = Path(os.environ["TRL_BPO_TEST_DATA"]) / f"{name}.jsonl.gz"
        return load_dataset("json", data_files=str(path), split="train")

    def test_reward_bench_samples_answer_the_prompts_of_alpaca_eval(self):
        train, evaluation = self._load("rewardbench_bon16_tulu2"), self._load("alpacaeval_prompts")
        with pytest.raises(ValueError, match="805 of 805 rows"):
            check_no_overlap(train, evaluation, prompt_column="instruction")

    def test_pairs_of_safe_rlhf_repeat_their_prompts(self):
        dataset = self._load("pku_saferlhf_5k")
        assert (len(dataset), len(set(dataset["prompt"]))) == (5135, 930)
        by_row = dataset.train_test_split(test_size=0.2, seed=42)
        with pytest.raises(ValueError, match="of 4108 rows"):
            check_no_overlap(by_row["train"], by_row["test"])
        by_prompt = split_by_prompt(dataset, 0.2)
        assert len(by_prompt["train"]) + len(by_prompt["test"]) == 5135
        assert len(set(by_prompt["test"]["prompt"])) in range(184, 190)
        check_no_overlap(by_prompt["train"], by_prompt["test"])
