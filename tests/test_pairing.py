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


import itertools
import random
from collections import Counter

import pytest
from datasets import Dataset, List, Value
from tiny import tiny_model_dir
from trl import DPOConfig, DPOTrainer

from trl_bpo.pairing import PAIR_RULES, build_pairs, pair_indices
from trl_bpo.prompts import pair_id, prompt_id


NAN = float("nan")
MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = '[{"type": "function", "function": {"name": "weather"}}]'


def dataset_of(*rows, prompt="Question?"):
    """One row a prompt out of lists of (text, score) or (text, score, truncated)."""
    columns = {
        "prompt": [prompt if isinstance(prompt, list) else f"{prompt} {index}" for index in range(len(rows))],
        "responses": [[response[0] for response in row] for row in rows],
        "scores": [[response[1] for response in row] for row in rows],
    }
    if len(rows[0][0]) == 3:
        columns["truncated"] = [[response[2] for response in row] for row in rows]
    return Dataset.from_dict(columns)


def texts(dataset):
    return list(zip(dataset["chosen"], dataset["rejected"], strict=True))


@pytest.mark.parametrize("m", range(8))
@pytest.mark.parametrize("rule", PAIR_RULES)
def test_pair_indices_counts(m, rule):
    pairs = pair_indices(m, rule)
    expected = {"uniform": m // 2, "all": m * (m - 1) // 2, "adjacent": max(0, m - 1), "best_worst": int(m >= 2)}
    assert len(pairs) == len(set(pairs)) == expected[rule]
    assert all(0 <= better < worse < m for better, worse in pairs)


def test_pair_indices():
    assert pair_indices(6, "uniform") == [(0, 3), (1, 4), (2, 5)]
    assert pair_indices(5, "uniform") == [(0, 3), (1, 4)]
    assert pair_indices(3, "all") == [(0, 1), (0, 2), (1, 2)]
    assert pair_indices(4, "adjacent") == [(0, 1), (1, 2), (2, 3)]
    assert pair_indices(4, "best_worst") == [(0, 3)]
    for m in range(8):
        used = list(itertools.chain(*pair_indices(m, "uniform")))
        assert len(used) == len(set(used))
    with pytest.raises(ValueError, match="`worst`.*`uniform`, `all`, `adjacent`, `best_worst`"):
        pair_indices(4, "worst")


def test_standard_format():
    dataset = dataset_of([("bad", 1), ("best", 9), ("good", 7), ("fair", 4)], [("x", 2), ("y", 3)])
    dataset = dataset.add_column("source", ["a", "b"]).add_column("verdicts", [["v"] * 4, ["v"] * 2])
    pairs, report = build_pairs(dataset)
    assert texts(pairs) == [("best", "fair"), ("good", "bad"), ("y", "x")]
    assert pairs["source"] == ["a", "a", "b"]
    assert pairs["score_chosen"] == [9, 7, 3] and pairs["score_rejected"] == [4, 1, 2]
    assert set(pairs.column_names) == {
        *("source", "pair_id", "prompt_id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected")
    }
    assert pairs["prompt_id"] == [prompt_id(prompt) for prompt in pairs["prompt"]]
    assert pairs["pair_id"][0] == pair_id("Question? 0", "best", "fair")
    assert len(set(pairs["pair_id"])) == 3
    assert (report.prompts, report.responses, report.pairs, report.prompts_without_pair) == (2, 6, 3, 0)
    assert report.pairs_per_prompt == {1: 1, 2: 1}
    assert report.longer_chosen_share == pytest.approx(1 / 3)


def test_conversational_format_with_tools_and_system_prompt():
    prompt = [
        {"role": "system", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": "Hello"},
        *MESSAGES,
    ]
    dataset = dataset_of([("x", 1), ("y", 2)], prompt=prompt).add_column("tools", [TOOLS])
    pairs, _ = build_pairs(dataset)
    (row,) = pairs
    assert row["prompt"] == prompt
    assert row["chosen"] == [{"role": "assistant", "content": "y"}]
    assert row["rejected"] == [{"role": "assistant", "content": "x"}]
    assert row["tools"] == TOOLS
    assert row["prompt_id"] == prompt_id(prompt, TOOLS) != prompt_id(prompt)
    assert row["pair_id"] == pair_id(prompt, row["chosen"], row["rejected"], TOOLS)
    assert pairs.features["prompt"] == dataset.features["prompt"]


def test_unusable_responses_are_counted():
    dataset = dataset_of(
        [("a", 5), ("b", None), ("c", NAN), ("", 9), (" \n", 9), ("a", 2), ("d", 1), ("e", float("inf")), ("b", 3)]
    )
    pairs, report = build_pairs(dataset)
    # "b" got a score the second time: the first, unscored one does not make it a copy.
    assert texts(pairs) == [("a", "d")]
    assert (report.unscored, report.empty, report.duplicate_responses, report.unused) == (3, 2, 1, 1)


def test_ties_and_margin():
    rows = [[("a", 5), ("b", 5)], [("c", 5), ("d", 4.5)], [("e", 5), ("f", 4)], [("g", 5)]]
    pairs, report = build_pairs(dataset_of(*rows), min_margin=1)
    assert texts(pairs) == [("e", "f")]
    assert (report.ties, report.below_margin, report.pairs, report.unused) == (1, 1, 1, 1)
    assert report.prompts_without_pair == 3 and report.pairs_per_prompt == {0: 3, 1: 1}
    assert len(build_pairs(dataset_of(*rows))[0]) == 2


def test_truncated():
    rows = [[("a", 5, True), ("b", 1, False)], [("c", 5, False), ("d", 1, True)]]
    pairs, report = build_pairs(dataset_of(*rows))
    assert texts(pairs) == [("c", "d")] and report.truncated_chosen == 1
    assert pairs["chosen_truncated"] == [False] and pairs["rejected_truncated"] == [True]
    assert "truncated" not in pairs.column_names
    pairs, report = build_pairs(dataset_of(*rows), allow_truncated_chosen=True)
    assert texts(pairs) == [("a", "b"), ("c", "d")] and report.truncated_chosen == 0
    assert pairs["chosen_truncated"] == [True, False]


@pytest.mark.parametrize("rule", PAIR_RULES)
def test_order_of_the_responses_does_not_matter(rule):
    responses = [("a", 5), ("b", 5), ("c", 5), ("d", 1), ("e", 1), ("f", 9)]
    found = {
        frozenset(texts(build_pairs(dataset_of(list(order)), rule)[0]))
        for order in itertools.islice(itertools.permutations(responses), 0, 720, 60)
    }
    assert len(found) == 1


def test_batches_without_any_pair():
    # The first 1,000 rows make a batch of their own.
    rows = [[("a", 1), ("b", 1)]] * 1000 + [[("a", 1), ("b", 2)]]
    for prompt in ("Question?", MESSAGES):
        pairs, report = build_pairs(dataset_of(*rows, prompt=prompt))
        assert len(pairs) == report.pairs == 1 and report.ties == 1000
    assert pairs.features["chosen"] == List({"role": Value("string"), "content": Value("string")})


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_dropped_silently(seed):
    rng = random.Random(seed)
    rows = [
        [
            (
                rng.choice(["", " ", "a", "bb", "ccc", "dddd", "e"]),
                rng.choice([None, NAN, 1, 2, 3.5]),
                rng.random() < 0.3,
            )
            for _ in range(rng.randrange(8))
        ]
        for _ in range(12)
    ]
    rows += [[("good", 9, False), ("bad", 1, False)]]
    rows.insert(0, [("good", 9, False), ("bad", 1, False)])
    rule, margin, allow = rng.choice(PAIR_RULES), rng.choice([0, 0.75, 2]), rng.random() < 0.5
    dataset = dataset_of(*rows)
    pairs, report = build_pairs(dataset, rule, margin, allow)

    # The usable responses and candidates, counted in another way than the code counts them.
    usable = [
        {text for text, score, _ in row if score is not None and score == score and text.strip()} for row in rows
    ]
    in_pairs = [set(itertools.chain(*pair_indices(len(row), rule))) for row in usable]
    candidates = sum(len(pair_indices(len(row), rule)) for row in usable)
    assert report.responses == sum(map(len, rows))
    assert report.responses == (
        report.unscored + report.empty + report.duplicate_responses + report.unused + sum(map(len, in_pairs))
    )
    assert candidates == report.pairs + report.ties + report.below_margin + report.truncated_chosen
    assert len(pairs) == report.pairs
    per_prompt = Counter(pairs["prompt"])
    assert report.pairs_per_prompt == dict(sorted(Counter(per_prompt[prompt] for prompt in dataset["prompt"]).items()))
    assert sum(report.pairs_per_prompt.values()) == report.prompts == len(rows)
    assert all(row["score_chosen"] - row["score_rejected"] >= max(margin, 1e-9) for row in pairs)
    assert allow or not any(pairs["chosen_truncated"])
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in pairs]
    assert report.longer_chosen_share == pytest.approx(sum(longer) / len(longer))


def test_no_pair_at_all():
    with pytest.raises(
        ValueError, match="No pair.*2 prompts with 5 `responses`: 3 without a score.* 1 candidate pairs"
    ):
        build_pairs(dataset_of([("a", None), ("b", None), ("c", None)], [("d", 1), ("e", 1)]))


def test_all_scores_none():
    # Arrow gives such a column no type.
    with pytest.raises(ValueError, match="2 without a score"):
        build_pairs(dataset_of([("a", None), ("b", None)]))


def test_bad_input():
    dataset = dataset_of([("a", 1), ("b", 2)], [("a", 1), ("b", 2)])
    broken = dataset.remove_columns("scores").add_column("scores", [[1.0, 2.0], [1.0]])
    with pytest.raises(ValueError, match="Row 1 has 2 `responses` but 1 `scores`"):
        build_pairs(broken)
    with pytest.raises(ValueError, match="Row 0 has 2 `responses` but 0 `truncated`"):
        build_pairs(dataset.add_column("truncated", [[], [True, False]]))
    with pytest.raises(ValueError, match="no column `scores`"):
        build_pairs(dataset.remove_columns("scores"))
    with pytest.raises(ValueError, match="overwrite: `chosen`"):
        build_pairs(dataset.add_column("chosen", ["x", "y"]))
    with pytest.raises(ValueError, match="Unknown pair rule"):
        build_pairs(dataset, "some")
    for margin in (-1, NAN):
        with pytest.raises(ValueError, match="`min_margin`"):
            build_pairs(dataset, min_margin=margin)


def test_prompt_id_of_the_breadth_stage_stays():
    dataset = dataset_of([("a", 1), ("b", 2)]).add_column("prompt_id", [prompt_id("Question? 0")])
    assert build_pairs(dataset)[0]["prompt_id"] == [prompt_id("Question? 0")]


@pytest.mark.parametrize("prompt", ["Question?", MESSAGES])
def test_pairs_train_with_trl(tmp_path, prompt):
    pairs, _ = build_pairs(dataset_of([("bad", 1), ("good", 2)], [("no", 1), ("yes", 2)], prompt=prompt))
    args = DPOConfig(
        str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    trainer = DPOTrainer(tiny_model_dir(tmp_path / "model"), args=args, train_dataset=pairs)
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"responses": ["a", "b"], "scores": [None, None]}, "what the judge answered"),
        ({"responses": ["a", "b"], "scores": [2, 2]}, "tells responses apart"),
        ({"responses": ["a", "b"], "scores": [2, 1], "truncated": [True, False]}, "Raise `max_new_tokens`"),
        ({"responses": ["a", "a"], "scores": [2, 1]}, "higher temperature"),
    ],
)
def test_the_advice_fits_the_cause(row, advice):
    with pytest.raises(ValueError, match=advice):
        build_pairs(Dataset.from_list([{"prompt": "p", **row}]))
