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


import re
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset
from pairs import config, conversational, pairs
from peft import LoraConfig

from trl_bpo import BPOTrainer
from trl_bpo.pool import PairPool, identify_pairs
from trl_bpo.prompts import pair_id, prompt_id


@pytest.fixture
def args(tmp_path):
    return config(tmp_path)


def pool(dataset, args):
    return PairPool(identify_pairs(dataset, args))


# Identification


def test_ids_are_those_of_the_content(args):
    dataset = pairs(3, 2)
    for source in (dataset, conversational(dataset)):
        identified = identify_pairs(source, args)
        assert identified.select_columns(source.column_names).to_list() == source.to_list()
        for row, given in zip(identified, source, strict=True):
            assert row["prompt_id"] == prompt_id(given["prompt"])
            assert row["pair_id"] == pair_id(given["prompt"], given["chosen"], given["rejected"])
        assert len(set(identified["prompt_id"])) == 3 and len(set(identified["pair_id"])) == 6


def test_ids_that_are_there_stay_and_those_that_lack_are_added(args):
    dataset = pairs(2, 2).add_column("pair_id", ["a", None, "c", None])
    identified = identify_pairs(dataset, args)
    computed = identify_pairs(pairs(2, 2), args)
    assert identified["pair_id"][:] == ["a", computed["pair_id"][1], "c", computed["pair_id"][3]]
    assert identified["prompt_id"][:] == computed["prompt_id"][:]


def test_implicit_prompts_are_extracted(args):
    rows = [{side: f"Sort it, please. {row[side]}" for side in ("chosen", "rejected")} for row in pairs(1, 2)]
    rows[0] |= {"chosen": "Sort it, please. Use Python", "rejected": "Sort it, please. red"}
    identified = identify_pairs(Dataset.from_list(rows), args)
    assert identified[0]["prompt"] == "Sort it, please." and identified[0]["chosen"] == " Use Python"
    assert identified["prompt_id"][0] == prompt_id("Sort it, please.")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (pairs().select([]), "`train_dataset` is empty"),
        (pairs().to_iterable_dataset(), "without `streaming=True`, or set `depth_fraction=1.0`"),
        (pairs().remove_columns(["chosen", "prompt"]), r"no \['chosen'\] column, only \['rejected'\]"),
        (pairs().select_columns("prompt"), r"no \['chosen', 'rejected'\] column"),
        (pairs().add_column("image", [None] * 18), "Vision-language pairs cannot be selected"),
        (pairs().add_column("images", [None] * 18), "Vision-language pairs cannot be selected"),
    ],
)
def test_what_cannot_be_selected_from(args, dataset, message):
    with pytest.raises(ValueError, match=message):
        identify_pairs(dataset, args)


def test_copies_and_empty_prompts_are_counted(args, caplog):
    rows = pairs().to_list()
    identify_pairs(Dataset.from_list(rows), args)
    assert not caplog.records
    identify_pairs(Dataset.from_list([*rows, rows[3], rows[3], {**rows[0], "prompt": ""}]), args)
    assert "2 of 21 pairs repeat an earlier one" in caplog.text
    assert "1 of 21 pairs have an empty prompt" in caplog.text


# The pool


def test_pool_of_all_pairs(args, caplog):
    dataset = pool(pairs(), args)
    assert dataset.num_given == 18 and len(dataset.pairs) == 18
    assert dataset.pair_ids.to_pylist() == dataset.pairs["pair_id"][:]
    assert dataset.prompt_ids.to_pylist() == dataset.pairs["prompt_id"][:]
    dataset.keep_rows_of(dataset.numbered_pairs)
    assert len(dataset.pairs) == 18 and not caplog.records


def test_rows_that_are_left(args, caplog):
    dataset = pool(pairs(), args)
    pair_ids, prompt_ids, source = (
        dataset.pair_ids.to_pylist(),
        dataset.prompt_ids.to_pylist(),
        dataset.pairs.to_list(),
    )
    rows = [0, 1, 4, 5, 9, 17]
    left = dataset.numbered_pairs.filter(lambda _, row: row in rows, with_indices=True)
    assert "chosen" in left.column_names
    dataset.keep_rows_of(left)
    assert dataset.num_given == 18
    assert dataset.pairs.to_list() == [source[row] for row in rows]
    assert dataset.pair_ids.to_pylist() == [pair_ids[row] for row in rows]
    assert dataset.prompt_ids.to_pylist() == [prompt_ids[row] for row in rows]
    assert "12 of 18 pairs were dropped by TRL" in caplog.text and "from the other 6." in caplog.text


def test_ids_are_texts(args):
    dataset = pool(pairs(1, 3).add_column("pair_id", [7, 8, 9]).add_column("prompt_id", [1, 1, 1]), args)
    assert dataset.pair_ids.to_pylist() == ["7", "8", "9"] and dataset.prompt_ids.to_pylist() == ["1"] * 3


def test_fingerprint(args):
    first = pool(pairs(), args)
    again = pool(pairs().add_column("source", ["x"] * 18), args)
    assert first.fingerprint == again.fingerprint and re.fullmatch("[0-9a-f]{64}", first.fingerprint)
    order = np.random.default_rng(0).permutation(18)
    others = [pairs().select(order), pairs().select(range(17)), pairs(seed=1), conversational(pairs(seed=1))]
    assert len({first.fingerprint, *(pool(other, args).fingerprint for other in others)}) == 5
    before = first.fingerprint
    first.keep_rows_of(first.numbered_pairs.select(range(17)))
    assert first.fingerprint == pool(pairs().select(range(17)), args).fingerprint != before


# In a trainer


@pytest.mark.parametrize("n_long", [0, 5])
def test_funnel_of_the_curated_dataset(tiny_dir, tmp_path, n_long):
    rows = pairs().to_list()
    # Their prompt alone fills `max_length`.
    long = [{"prompt": f"{'sea ' * 60}{i}", "chosen": " a", "rejected": " b"} for i in range(n_long)]
    trainer = BPOTrainer(
        tiny_dir,
        args=config(tmp_path, max_length=50, depth_strategy="random", depth_fraction=0.3),
        train_dataset=Dataset.from_list([*rows[:9], *long, *rows[9:]]),
        peft_config=LoraConfig(r=4),
    )
    assert len(trainer.train_dataset) == 18
    trainer.select_pairs()
    funnel = trainer.curated_card_data().funnel
    expected = [("pairs", 18 + n_long), ("pairs that fit", 18), ("pairs kept (depth)", 5)]
    if n_long == 0:
        del expected[1]
    assert [(name, n) for name, n, _ in funnel] == expected
    notes = {name: note for name, _, note in funnel}
    assert notes["pairs kept (depth)"] == "by random at step 0"
    if n_long:
        assert notes["pairs that fit"] == "5 whose prompt fills `max_length` dropped"
    # What came before the pairs is the user's to tell.
    trainer.curated_card_fields["funnel"] = [("prompts", 99, "asked"), ("pairs", 18 + n_long, "of them")]
    funnel = trainer.curated_card_data().funnel
    assert [(name, n) for name, n, _ in funnel] == [("prompts", 99), *expected]
    assert all(before >= after for before, after in pairwise(n for _, n, _ in funnel))
