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
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from exactness import compute_in_float64, float64_trainer, label
from pairs import IdentityProjection, config, conversational, pairs
from peft import LoraConfig, PromptTuningConfig, TaskType
from recording import RecordingTrainer
from strategies_script import STRATEGIES, make, run
from test_pair_loss import direct, perturb

from trl_bpo import BPOTrainer
from trl_bpo.bpo_config import DATA_STRATEGIES, GRADIENT_STRATEGIES, POLICY_STRATEGIES
from trl_bpo.capture import target_modules
from trl_bpo.embedding import embed_texts
from trl_bpo.pool import PairPool, identify_pairs
from trl_bpo.responses import unique_responses
from trl_bpo.strategies import check_strategy, measure_by_data, measure_by_policy


CLUSTERED = (
    *("gradient", "gradient_farthest", "gradient_random", "random_like_gradient", "gradient_k_centre"),
    *("embedding", "embedding_farthest"),
)
# By the gradients, and drawn at random.
DRAWN = ("gradient_random", "random_like_gradient")
BY_FORWARD_PASS = [strategy for strategy in POLICY_STRATEGIES if strategy not in GRADIENT_STRATEGIES]


def scored(dataset, seed=0):
    """The pairs with the scores of both responses, of which the chosen one's need not be higher."""
    rng = np.random.default_rng(seed)
    for column in ("score_chosen", "score_rejected"):
        dataset = dataset.add_column(column, rng.permutation(len(dataset)).astype(float))
    return dataset


@pytest.fixture
def make_pool(tmp_path):
    return lambda dataset: PairPool(identify_pairs(dataset, config(tmp_path)))


def measure(strategy, pool, responses=None, encoder="", seed=0, number=0):
    args = SimpleNamespace(depth_strategy=strategy, depth_encoder=encoder, seed=seed)
    features = SimpleNamespace(responses=responses)
    return measure_by_data(SimpleNamespace(args=args, _pool=pool, _features=features, _num_selections=number))[:]


def highest(scores, n):
    return set(np.argsort(-scores, kind="stable")[:n].tolist())


# By scores and lengths


def test_score_margins(make_pool):
    pool = make_pool(scored(pairs()))
    expected = [row["score_chosen"] - row["score_rejected"] for row in pool.pairs]
    assert min(expected) < 0 < max(expected)
    assert measure("score_margin_high", pool).tolist() == expected
    assert measure("score_margin_low", pool).tolist() == [-margin for margin in expected]


def test_scores_of_any_number_type(make_pool):
    dataset = pairs(1, 2).add_column("score_chosen", [5, 3]).add_column("score_rejected", [1.5, 4.0])
    assert measure("score_margin_high", make_pool(dataset)).tolist() == [3.5, -1.0]


@pytest.mark.parametrize("strategy", ["score_margin_high", "score_margin_low", "best_worst_per_prompt"])
def test_scores_are_needed(strategy):
    dataset = scored(pairs())
    check_strategy(strategy, dataset)
    with pytest.raises(ValueError, match=rf"`depth_strategy='{strategy}'` .* no \['score_rejected'\] column"):
        check_strategy(strategy, dataset.remove_columns("score_rejected"))
    with pytest.raises(ValueError, match=r"no \['score_chosen', 'score_rejected'\] column"):
        check_strategy(strategy, pairs())
    for broken in (None, float("nan"), float("inf")):
        rows = dataset.to_list()
        rows[4]["score_rejected"] = rows[11]["score_rejected"] = broken
        with pytest.raises(ValueError, match="2 of 18 pairs have no finite `score_rejected`, first row 4. Drop them"):
            check_strategy(strategy, Dataset.from_list(rows))


def test_others_need_no_scores(encoder):
    for strategy in {*POLICY_STRATEGIES, *DATA_STRATEGIES} - {
        *("score_margin_high", "score_margin_low", "best_worst_per_prompt"),
    }:
        check_strategy(strategy, pairs())


@pytest.mark.parametrize("strategy", ["embedding", "embedding_farthest"])
def test_embeddings_need_an_extra(monkeypatch, strategy):
    # What Python itself does for a package that cannot be imported.
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=rf"`depth_strategy='{strategy}'` requires .*'trl_bpo\[embeddings\]'"):
        check_strategy(strategy, pairs())


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 12, 6])
def test_longest_chosen_as_truncated(make_pool, max_length, truncation_mode):
    rng = np.random.default_rng(0)
    lengths = [(5, n, 12 - n) for n in range(1, 11)]
    rows = [
        {name: rng.integers(0, 99, n).tolist() for name, n in zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)}
        for row in lengths
    ]  # fmt: skip
    responses = unique_responses(Dataset.from_list(rows), max_length, truncation_mode)
    kept = measure("longest", make_pool(pairs(5, 2)), responses)
    room = {None: 99, 12: 12, 6: 6}[max_length]
    if truncation_mode == "keep_start":
        expected = [min(prompt + chosen, room) - prompt for prompt, chosen, _ in lengths]
    else:
        expected = [min(chosen, room) for _, chosen, _ in lengths]
    assert kept.tolist() == expected and len(set(expected)) > 1 or (max_length, truncation_mode) == (6, "keep_start")


def test_longest_in_a_trainer(tiny_dir, tmp_path):
    trainer = BPOTrainer(
        tiny_dir,
        args=config(tmp_path, depth_strategy="longest", max_length=30, depth_fraction=0.2),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4),
    )
    selection = trainer.select_pairs()
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    lengths = [int(batch["completion_mask"][0].sum()) for batch in batches]
    assert any(batch["attention_mask"][0].sum() == 30 for batch in batches) and len(set(lengths)) > 3
    assert selection.scores.tolist() == lengths
    assert min(np.asarray(lengths)[selection.selected]) >= max(np.asarray(lengths)[~selection.selected])


# At random


def test_random_draws_anew_and_random_once_does_not(make_pool):
    pool = make_pool(pairs())
    drawn = [highest(measure("random", pool, number=number), 9) for number in range(4)]
    assert len(set(map(frozenset, drawn))) == 4
    assert drawn[2] == highest(measure("random", pool, number=2), 9)
    once = [highest(measure("random_once", pool, number=number), 9) for number in range(4)]
    assert len(set(map(frozenset, once))) == 1
    assert once[0] != highest(measure("random_once", pool, seed=1), 9)


def test_random_is_uniform(make_pool):
    pool = make_pool(pairs())
    counts = Counter(row for seed in range(300) for row in highest(measure("random", pool, seed=seed, number=1), 6))
    # Each of 18 rows is drawn in a third of 300 cases, with a standard deviation of 8.
    assert len(counts) == 18 and max(abs(count - 100) for count in counts.values()) < 45


@pytest.mark.parametrize("strategy", ["random", "random_once", "equal_per_prompt", "best_worst_per_prompt"])
def test_rows_may_come_in_any_order(make_pool, strategy):
    dataset, order = scored(pairs()), np.random.default_rng(0).permutation(18)
    # No two margins are equal.
    dataset = dataset.remove_columns("score_chosen").add_column("score_chosen", np.arange(18) * np.sqrt(2))
    first, again = (measure(strategy, make_pool(rows)) for rows in (dataset, dataset.select(order)))
    assert np.array_equal(again, first[order])


def test_rows_of_equal_margins_may_come_in_any_order(make_pool):
    # As of a judge that gives whole marks.
    dataset = pairs().add_column("score_chosen", [5.0, 4.0] * 9).add_column("score_rejected", [2.0] * 18)
    order = np.random.default_rng(0).permutation(18)
    first, again = (measure("best_worst_per_prompt", make_pool(rows)) for rows in (dataset, dataset.select(order)))
    assert np.array_equal(again, first[order])


# Per prompt


def of_sizes(sizes):
    """As many different pairs of each prompt, in an order that mixes the prompts."""
    rows = [
        {"prompt": f"p{p}", "chosen": f"a {i}", "rejected": f"b {i}"} for p, n in enumerate(sizes) for i in range(n)
    ]
    return scored(Dataset.from_list(rows).shuffle(seed=3))


@pytest.mark.parametrize("strategy", ["equal_per_prompt", "best_worst_per_prompt"])
@pytest.mark.parametrize("sizes", [[3] * 6, [9, 1, 4, 4, 2], [20, 1], [1] * 7])
def test_as_many_of_each_prompt(make_pool, strategy, sizes):
    pool = make_pool(of_sizes(sizes))
    total = dict(Counter(pool.prompt_ids))
    for seed in range(3):
        scores = measure(strategy, pool, seed=seed, number=seed)
        assert len(set(scores)) == len(scores)
        for n in range(1, len(scores) + 1):
            kept = Counter(pool.prompt_ids[row] for row in highest(scores, n))
            turns = max(kept.values())
            # No prompt is a second pair ahead of another that has one left.
            assert all(kept[prompt] >= min(turns - 1, total[prompt]) for prompt in total)


@pytest.mark.parametrize("strategy", ["equal_per_prompt", "best_worst_per_prompt"])
def test_a_turn_that_ends_early_favours_no_prompt(make_pool, strategy):
    # Ten prompts have nine pairs and ten have one, and the budget is half a turn.
    pool = make_pool(of_sizes([9] * 10 + [1] * 10))
    many = {prompt for prompt, n in Counter(pool.prompt_ids).items() if n == 9}
    kept = [pool.prompt_ids[row] for seed in range(200) for row in highest(measure(strategy, pool, seed=seed), 10)]
    assert len(set(kept)) == 20
    # The standard deviation is 0.008. Drawn by pairs, nearly all would be of those with many.
    assert np.mean([prompt in many for prompt in kept]) == pytest.approx(0.5, abs=0.06)


def test_equal_per_prompt_draws_among_the_pairs_of_a_prompt(make_pool):
    pool = make_pool(of_sizes([4] * 3))
    first = [frozenset(highest(measure("equal_per_prompt", pool, seed=seed), 3)) for seed in range(60)]
    counts = Counter(row for rows in first for row in rows)
    # 15 times each, with a standard deviation of 3.4.
    assert len(counts) == 12 and max(counts.values()) < 32
    # Drawn once: the same at each selection.
    assert np.array_equal(measure("equal_per_prompt", pool, number=5), measure("equal_per_prompt", pool))


@pytest.mark.parametrize("sizes", [[3] * 6, [9, 1, 4, 4, 2]])
def test_largest_margin_of_each_prompt_first(make_pool, sizes):
    pool = make_pool(of_sizes(sizes))
    margins = [row["score_chosen"] - row["score_rejected"] for row in pool.pairs]
    own = {prompt: [row for row, p in enumerate(pool.prompt_ids) if p == prompt] for prompt in pool.prompt_ids}
    scores = measure("best_worst_per_prompt", pool)
    for n in range(1, len(margins) + 1):
        kept = highest(scores, n)
        for rows in own.values():
            mine = sorted((margins[row] for row in rows if row in kept), reverse=True)
            assert mine == sorted((margins[row] for row in rows), reverse=True)[: len(mine)]


# By embeddings


def test_three_embeddings_side_by_side(make_pool, encoder):
    dataset = pairs(2, 2)
    features = measure("embedding", make_pool(dataset), encoder=encoder)
    assert features.shape == (4, 3 * 384) and features.dtype == np.float32
    expected = [embed_texts(dataset[column][:], encoder)[0] for column in ("prompt", "chosen", "rejected")]
    for part, column in zip(np.split(features, 3, axis=1), expected, strict=True):
        np.testing.assert_allclose(part, column, atol=1e-6)
    assert np.array_equal(measure("embedding_farthest", make_pool(dataset), encoder=encoder, number=3), features)


def test_embeddings_of_conversations_and_tools(make_pool, encoder):
    tools = [{"type": "function", "function": {"name": "weather", "description": "The weather of a city"}}]
    rows = conversational(pairs(1, 2)).to_list()
    rows[1] |= {name: rows[0][name] for name in ("chosen", "rejected")}
    plain, _ = embed_texts([rows[0]["prompt"][0]["content"]], encoder)
    same = measure("embedding", make_pool(Dataset.from_list(rows)), encoder=encoder)
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)
    np.testing.assert_allclose(same[0, :384], plain[0], atol=1e-6)
    # Tools are a part of the prompt.
    for row, own in zip(rows, (None, json.dumps(tools)), strict=True):
        row["tools"] = own
    told = measure("embedding", make_pool(Dataset.from_list(rows)), encoder=encoder)
    np.testing.assert_allclose(told[0], same[0], atol=1e-6)
    np.testing.assert_allclose(told[1, 384:], same[1, 384:], atol=1e-6)
    assert told[1, :384] @ told[0, :384] < 0.95


def test_embeddings_are_cached(make_pool, tmp_path, encoder):
    pairs(2, 2).to_parquet(tmp_path / "data.parquet")

    def features(cut):
        dataset = load_dataset("parquet", data_files=str(tmp_path / "data.parquet"), cache_dir=str(tmp_path / "cache"))
        pool = make_pool(dataset["train"])
        pool.keep_rows_of(pool.numbered_pairs.select(range(cut)))
        return measure("embedding", pool, encoder=encoder)

    def cached():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("cache-*.arrow")}

    first, files = features(3), cached()
    assert first.shape == (3, 1152) and len(files) == 4  # prompts, ids, what the filter left, and embeddings
    # Another selection, and another run, embed nothing.
    for _ in range(2):
        assert np.array_equal(features(3), first) and cached() == files
    # Other pairs do.
    assert features(2).shape == (2, 1152) and len(cached()) == 6


# In a trainer


def train(tiny_dir, path, strategy, dataset=None, encoder="", **kwargs):
    trainer = RecordingTrainer(
        tiny_dir,
        args=config(path, depth_strategy=strategy, depth_encoder=encoder, **kwargs),
        train_dataset=scored(pairs()) if dataset is None else dataset,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("strategy", [*POLICY_STRATEGIES, *DATA_STRATEGIES])
def test_every_strategy_trains_on_its_budget(tiny_dir, tmp_path, encoder, strategy):
    # 6 of 18 pairs: three steps an epoch.
    trainer = train(tiny_dir, tmp_path, strategy, encoder=encoder, depth_fraction=1 / 3, learning_rate=5e-2)
    assert trainer.state.global_step == 6 and [step for step, _ in trainer.selections] == [0, 3]
    for step, rows in trainer.batches:
        assert len(rows) == 2 and set(rows) <= trainer.active(step)
    depth_columns = ["depth_cluster", "depth_distance"] if strategy in CLUSTERED else ["depth_score"]
    depth_columns += ["depth_rank", "depth_selected"]
    for step, selected in trainer.selections:
        assert len(selected) == 6
        saved = Dataset.from_parquet(
            str(tmp_path / f"_selections/step-{step:06d}.parquet"), cache_dir=str(tmp_path / "c")
        )
        assert saved.column_names == ["pair_id", "prompt_id", *depth_columns]
        assert saved["pair_id"][:] == trainer.train_dataset["pair_id"][:]
        assert set(np.flatnonzero(saved["depth_selected"][:]).tolist()) == selected
        if strategy not in CLUSTERED:
            assert selected == highest(np.asarray(saved["depth_score"][:]), 6) or len(set(saved["depth_score"])) < 18
            assert sorted(saved["depth_rank"][:]) == list(range(18))
            assert max(saved["depth_rank"][row] for row in selected) == 5
    (first, second), by_policy = (rows for _, rows in trainer.selections), strategy in POLICY_STRATEGIES
    assert (first != second) == (by_policy or strategy == "random")
    logged = {name for log in trainer.state.log_history for name in log if name.startswith("bpo/")}
    assert {"bpo/active_pairs", "bpo/not_finite"} <= logged
    assert ("bpo/variance_explained" in logged) == (strategy in CLUSTERED)
    # Nothing but the selections and the curated dataset stays.
    assert {path.name for path in tmp_path.glob("_*")} == {"_selections", "_curated_dataset"}
    assert trainer.curated_card_data().settings["depth_strategy"] == strategy


def test_farthest_in_a_trainer(tiny_dir, tmp_path, encoder):
    for strategy in ("gradient", "embedding"):
        near, far = (
            BPOTrainer(
                tiny_dir,
                args=config(tmp_path / name, depth_strategy=name, depth_encoder=encoder, depth_clusters=1),
                train_dataset=pairs(),
                peft_config=LoraConfig(r=4, target_modules="all-linear"),
            ).select_pairs()
            for name in (strategy, f"{strategy}_farthest")
        )
        assert np.array_equal(near.distances, far.distances)
        assert np.array_equal(near.selected, ~far.selected)


def test_controls_of_the_gradient_in_a_trainer(tiny_dir, tmp_path):
    gradient, random, like, k_centre = (
        BPOTrainer(
            tiny_dir,
            args=config(tmp_path / strategy, depth_strategy=strategy, depth_fraction=0.4, depth_clusters=2),
            train_dataset=pairs(),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        ).select_pairs()
        for strategy in ("gradient", *DRAWN, "gradient_k_centre")
    )
    for control in (random, like, k_centre):
        assert control.selected.sum() == gradient.selected.sum() == 7
        assert not np.array_equal(control.selected, gradient.selected)
        for name in ("clusters", "distances", "ranks"):
            assert np.array_equal(getattr(control, name), getattr(gradient, name)), name
    assert np.bincount(random.clusters[random.selected]).tolist() == (
        np.bincount(gradient.clusters[gradient.selected]).tolist()
    )
    prompts = np.arange(18) // 3
    assert sorted(Counter(prompts[like.selected]).values()) == sorted(Counter(prompts[gradient.selected]).values())


@pytest.mark.parametrize("strategy", ["random", *DRAWN])
def test_draws_follow_the_seed(tiny_dir, tmp_path, strategy):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        # A learning rate of zero: the gradients are the same, so that what differs is drawn.
        options = {
            "seed": seed,
            "reselect_every_steps": 1,
            "max_steps": 3,
            "depth_fraction": 0.3,
            "learning_rate": 0.0,
        }
        runs.append(train(tiny_dir, tmp_path / name, strategy, **options).selections)
    assert runs[0] == runs[1] and runs[0] != runs[2]
    assert len({frozenset(rows) for _, rows in runs[0]}) == 3


@pytest.mark.parametrize("strategy", ["gradient", "gradient_k_centre"])
def test_what_is_not_drawn_changes_with_the_policy_alone(tiny_dir, tmp_path, strategy):
    options = {"reselect_every_steps": 1, "max_steps": 3, "depth_fraction": 0.3}
    still = train(tiny_dir, tmp_path / "a", strategy, learning_rate=0.0, **options).selections
    assert len({frozenset(rows) for _, rows in still}) == 1
    moving = train(tiny_dir, tmp_path / "b", strategy, learning_rate=5e-2, **options).selections
    assert moving[0] == still[0] and len({frozenset(rows) for _, rows in moving}) > 1


@pytest.mark.parametrize("strategy", ["random", *DRAWN])
def test_random_counts_the_selections_of_training_alone(tiny_dir, tmp_path, strategy):
    whole = train(tiny_dir, tmp_path / "a", strategy)
    trainer = RecordingTrainer(
        tiny_dir,
        args=config(tmp_path / "b", depth_strategy=strategy),
        train_dataset=scored(pairs()),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    for _ in range(2):
        trainer.select_pairs()
    trainer.train()
    assert [rows for _, rows in trainer.selections] == [whole.selections[i][1] for i in (0, 0, 0, 1)]


def test_floor_of_a_score_strategy(tiny_dir, tmp_path):
    trainer = train(tiny_dir, tmp_path, "score_margin_high", depth_fraction=1 / 3, min_pairs_per_prompt=1)
    margins = [row["score_chosen"] - row["score_rejected"] for row in scored(pairs())]
    best = {max(range(start, start + 3), key=lambda row: margins[row]) for start in range(0, 18, 3)}
    assert trainer.selections[-1][1] == best


@pytest.mark.parametrize("strategy", ["gradient_random", "random_like_gradient", "gradient_k_centre"])
def test_floor_of_the_controls(tiny_dir, tmp_path, strategy):
    trainer = train(tiny_dir, tmp_path, strategy, depth_fraction=1 / 3, min_pairs_per_prompt=1)
    for _, rows in trainer.selections:
        assert sorted(row // 3 for row in rows) == list(range(6))


@pytest.mark.parametrize("strategy", ["random", *DRAWN, "gradient_k_centre"])
def test_resumed_run_draws_as_the_whole_one(tiny_dir, tmp_path, strategy):
    options = {"save_strategy": "steps", "save_steps": 1, "reselect_every_steps": 2, "max_steps": 6}
    whole = train(tiny_dir, tmp_path, strategy, **options)
    resumed = RecordingTrainer(
        tiny_dir,
        args=config(tmp_path / "again", depth_strategy=strategy, **options),
        train_dataset=scored(pairs()),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.batches == [(step, rows) for step, rows in whole.batches if step >= 3]
    assert resumed.selections == whole.selections[2:]


# Loss and implicit rewards


# The prompts are long and shared, so that one row a pair is cheaper; or hardly there beside long answers.
LONG_PROMPTS = Dataset.from_list(
    [
        {"prompt": f"{'What about the wind and the sea? ' * 3}{i}", "chosen": chosen, "rejected": rejected}
        for i, (chosen, rejected) in enumerate(
            [(" a poem", " sea and wind, list"), (" Paris is the capital of France", " a poem"), (" Python", " red")]
        )
    ]
)
LONG_ANSWERS = Dataset.from_list(
    [
        {"prompt": "?", "chosen": f" a poem {'of the sea ' * n}{i}", "rejected": f" red {'wind list ' * m}"}
        for i, (n, m) in enumerate([(14, 15), (16, 13), (12, 17)])
    ]
)


def values_of_trl(trainer):
    """Loss and reward margin that TRL computes for each pair as a batch of its own."""
    trainer.model.eval()
    values = []
    for row in trainer.train_dataset:
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
        values.append((loss.item(), trainer._metrics["eval"]["rewards/margins"][-1]))
    trainer._metrics["eval"].clear()
    trainer.model.train()
    return np.asarray(values).T


def check_against_trl(trainer, packed, tolerance):
    losses, margins = values_of_trl(trainer)
    expected = {"loss": losses, "implicit_reward_margin_high": margins, "implicit_reward_margin_low": -margins}
    for strategy, values in expected.items():
        trainer.args.depth_strategy = strategy
        measured = measure_by_policy(trainer)
        assert measured.dtype == np.float64
        np.testing.assert_allclose(measured, values, rtol=tolerance, atol=tolerance)
    header = json.loads((trainer._features_path / "step-000000" / "part-00000.json").read_text())
    assert header["packed"] == packed
    # Far enough from the reference for the comparison to tell.
    assert margins.std() > 1e-3 and losses.std() > 1e-3


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "two rows"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "sigmoid", "ld_alpha": 0.5},
        {"loss_type": "sigmoid", "use_weighting": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3], "ld_alpha": 0.3, "use_weighting": True},
        {"loss_type": "ipo", "reference": "explicit"},
        {"loss_type": "ipo", "f_divergence_type": "js_divergence", "beta": 0.4, "adapter": "full"},
        {"loss_type": "sigmoid", "ld_alpha": 0.5, "reference": "precomputed"},
        {"loss_type": "sigmoid_norm", "max_length": 40, "truncation_mode": "keep_end"},
    ],
    ids=label,
)
def test_loss_and_margin_are_those_of_trl(tiny_dir, tmp_path, monkeypatch, options, packed):
    compute_in_float64(monkeypatch)
    dataset = LONG_PROMPTS if packed else LONG_ANSWERS
    trainer = float64_trainer(tiny_dir, tmp_path, dataset=dataset, depth_strategy="loss", **options)
    check_against_trl(trainer, packed, 1e-9)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "two rows"])
@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5, "use_weighting": True}], ids=label)
def test_loss_and_margin_in_float32_with_the_head_of_trl(tiny_dir, tmp_path, options, packed):
    trainer = BPOTrainer(
        tiny_dir,
        # Small batches, with padding in them.
        args=config(tmp_path, depth_strategy="loss", gradient_batch_tokens=300, **options),
        train_dataset=LONG_PROMPTS if packed else LONG_ANSWERS,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3),
    )
    perturb(trainer.model)
    check_against_trl(trainer, packed, 2e-4)


def test_what_is_kept_by_loss_and_margin(tiny_dir, tmp_path):
    trainer = BPOTrainer(
        tiny_dir,
        args=config(tmp_path, depth_strategy="loss", depth_fraction=1 / 3),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    perturb(trainer.model)
    losses, margins = values_of_trl(trainer)
    for strategy, scores in (
        ("loss", losses),
        ("implicit_reward_margin_high", margins),
        ("implicit_reward_margin_low", -margins),
    ):
        trainer.args.depth_strategy = strategy
        assert set(np.flatnonzero(trainer.select_pairs().selected).tolist()) == highest(scores, 6)


def test_a_pass_by_forward_leaves_training_alone(tiny_dir, tmp_path):
    runs = []
    for calls in (0, 2):
        trainer = RecordingTrainer(
            tiny_dir,
            args=config(tmp_path / str(calls), depth_strategy="loss", first_selection_step=2, max_steps=6),
            train_dataset=pairs(),
            peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2),
        )
        for _ in range(calls):
            trainer.select_pairs()
        trainer.selections.clear()
        trainer.train()
        runs.append(
            (trainer.selections, trainer.batches, {n: p.detach() for n, p in trainer.model.named_parameters()})
        )
    assert runs[0][:2] == runs[1][:2] and [step for step, _ in runs[0][0]] == [2, 5]
    assert all(torch.equal(value, runs[1][2][name]) for name, value in runs[0][2].items())


WARNING = "goes by hardly differs between the pairs"


@pytest.mark.parametrize("strategy", BY_FORWARD_PASS)
def test_rounding_is_called_so(tiny_dir, tmp_path, caplog, strategy):
    trainer = BPOTrainer(
        tiny_dir,
        args=config(tmp_path, depth_strategy=strategy),
        train_dataset=pairs(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.select_pairs()
    assert WARNING in caplog.text and f"`depth_strategy='{strategy}'`" in caplog.text
    assert "`first_selection_step`" in caplog.text
    caplog.clear()
    perturb(trainer.model)
    trainer.select_pairs()
    assert WARNING not in caplog.text


def test_steps_before_the_first_selection_make_it_more_than_rounding(tiny_dir, tmp_path, caplog):
    options = {"first_selection_step": 5, "learning_rate": 1e-1}
    train(tiny_dir, tmp_path, "implicit_reward_margin_high", **options)
    assert WARNING not in caplog.text


# Norm of the gradient


def exact(trainer):
    """The trainer with gradients that are not projected."""
    trainer._projection = IdentityProjection(target_modules(trainer.model))
    return trainer


@pytest.mark.parametrize("dataset", [pairs(3, 2), LONG_PROMPTS], ids=["responses", "packed pairs"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "robust", "label_smoothing": 0.1, "use_weighting": True},
        {"loss_type": "ipo"},
        {"loss_type": "sigmoid", "ld_alpha": 0.5},
    ],
    ids=label,
)
def test_norm_is_that_of_the_gradient_of_the_loss(tiny_dir, tmp_path, dataset, options):
    trainer = BPOTrainer(
        tiny_dir,
        # By default features are scaled to unit length, under which beta, margin and reference would cancel.
        args=config(tmp_path, depth_strategy="gradient_norm", beta=0.5, depth_fraction=1 / 3, **options),
        train_dataset=dataset,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    assert trainer.args.normalize_gradients
    perturb(trainer.model)
    expected = direct(trainer).norm(dim=1).numpy()
    assert expected.std() > 0.1 * expected.mean()
    sketched = measure_by_policy(trainer)
    # The sketch has 2048 entries, so that a norm is off by a few percent.
    np.testing.assert_allclose(sketched, expected, rtol=0.2)
    trainer.select_pairs()  # which clears what was kept
    measured = measure_by_policy(exact(trainer))
    np.testing.assert_allclose(measured, expected, rtol=1e-4)
    trainer.select_pairs()
    selection = trainer.selection
    assert set(np.flatnonzero(selection.selected).tolist()) == highest(expected, len(expected) // 3)
    np.testing.assert_allclose(selection.scores, expected, rtol=1e-4)


# Prompt tuning has no linear layer to take gradients of


def prompt_tuning(tiny_dir, path, strategy, encoder=""):
    return BPOTrainer(
        tiny_dir,
        args=config(path, depth_strategy=strategy, depth_encoder=encoder, max_steps=3, reselect_every_steps=2),
        train_dataset=scored(pairs()),
        peft_config=PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    )


@pytest.mark.parametrize("strategy", DATA_STRATEGIES)
def test_strategies_of_the_data_go_with_prompt_tuning(tiny_dir, tmp_path, encoder, strategy):
    trainer = prompt_tuning(tiny_dir, tmp_path, strategy, encoder)
    trainer.train()
    assert trainer.state.global_step == 3 and len(trainer.curated_dataset) == 9


@pytest.mark.parametrize("strategy", GRADIENT_STRATEGIES)
def test_strategies_of_gradients_need_a_linear_layer(tiny_dir, tmp_path, strategy):
    with pytest.raises(ValueError, match="no trainable `nn.Linear`"):
        prompt_tuning(tiny_dir, tmp_path, strategy)


def test_loss_and_margin_with_prompt_tuning(tiny_dir, tmp_path):
    check_against_trl(prompt_tuning(tiny_dir, tmp_path, "loss"), False, 2e-4)


# Two processes


@pytest.fixture(scope="module")
def processes(tiny_dir, encoder, tmp_path_factory):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("strategies")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(Path(__file__).with_name("strategies_script.py")), tiny_dir, encoder, str(folder)),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(folder / f"process-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_select_alike_and_as_one_does(processes, tiny_dir, encoder, tmp_path, strategy):
    first, second = (process[strategy] for process in processes)
    assert first["num_processes"] == second["num_processes"] == 2
    # Three steps an epoch.
    assert [step for step, _ in first["selections"]] == [0, 2, 4] and first["selections"] == second["selections"]
    assert first["measures"] == second["measures"] and first["events"] == second["events"]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    alone = run(make(tiny_dir, encoder, tmp_path, strategy, max_steps=1))
    assert alone["num_processes"] == 1
    assert alone["selections"] == first["selections"][:1]
    assert alone["measures"] == first["measures"][:1]
    assert alone["events"] == first["events"][:1]
    n_different = len({frozenset(rows) for _, rows in first["selections"]})
    assert n_different == 1 if strategy == "embedding" else n_different > 1
