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

"""The study of gradient clusters: its measures on features whose clusters are known, its sketches, and a run of it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import WORDS, words
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from trl_bpo import BPOConfig, BPOTrainer
from trl_bpo.feature_store import StoreMismatchError
from trl_bpo.projection import SparseProjection


RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def study():
    """The two modules of the recipe, as `python recipes/gradient_clusters.py` finds them."""
    sys.path.insert(0, str(RECIPES))
    import gradient_clusters

    yield gradient_clusters
    sys.path.remove(str(RECIPES))


def rows_of(study, n, sources=None, seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    return study.Rows(
        ids=np.asarray([f"{number:05d}" for number in range(n)]),
        prompt_ids=np.asarray([f"{number // 2:05d}" for number in range(n)]),
        lengths=rng.integers(5, 100, n),
        embeddings=rng.standard_normal((n, 8)),
        sources=sources,
        **kwargs,
    )


def measure(study, features, rows, k, **kwargs):
    (row,) = study.evaluate(study.Variant("features", features, rows, **kwargs), [k], seeds=3, draws=6)
    return row


def planted(families=4, each=40, dim=60, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = 6 * rng.standard_normal((families, dim)) / np.sqrt(dim)
    sources = np.repeat(np.arange(families), each)
    return centres[sources] + spread * rng.standard_normal((len(sources), dim)) / np.sqrt(dim), sources


# Measures


def test_planted_families_are_recovered(study):
    features, sources = planted()
    row = measure(study, features, rows_of(study, 160, sources.astype(str)), 4)
    assert row["ari"] > 0.99 and row["ami_source"] > 0.99 and row["knn"] == 1.0 and row["knn_chance"] == 0.25
    assert row["ve"] > 1.2 * row["ve_null"] and row["z"] > 5 and row["jaccard"] > 0.95 > row["jaccard_null"]
    # What has nothing to do with the clusters stays at chance.
    assert abs(row["ami_length"]) < 0.1 and abs(row["ami_embedding"]) < 0.1
    assert abs(row["in_shortest"] - 0.25) < 0.15 and abs(row["in_longest"] - 0.25) < 0.15


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "dim", "decay"), [(120, 300, 0.0), (240, 30, 0.0), (120, 300, 0.5), (240, 30, 1.0)])
def test_gaussian_features_are_at_the_null(study, n, dim, decay, normalize):
    # More rows than dimensions and fewer, with a flat spectrum and with an uneven one.
    scales = np.arange(1, dim + 1) ** -decay
    rng = np.random.default_rng(1)
    found = [measure(study, rng.standard_normal((n, dim)) * scales, rows_of(study, n), 6, normalize=normalize)]
    found += [measure(study, rng.standard_normal((n, dim)) * scales, rows_of(study, n), 6, normalize=normalize)]
    ratios = [row["ve"] / row["ve_null"] for row in found]
    assert abs(np.mean(ratios) - 1) < 0.05, ratios
    assert all(abs(row["jaccard"] - row["jaccard_null"]) < 0.3 for row in found)
    if (dim, decay) == (300, 0.0):
        # A sample from the sample covariance would hide clusters: it exceeds features that have none.
        assert all(row["ve_redrawn"] > 1.15 * row["ve"] for row in found)


def test_small_features_are_kept_unless_they_are_normalised(study):
    rng = np.random.default_rng(2)
    features = rng.standard_normal((200, 40)) * rng.lognormal(0, 1, (200, 1))
    rows = rows_of(study, 200, rules={"largest_margin": rng.random(200)})
    raw, scaled = (measure(study, features, rows, 5, normalize=normalize) for normalize in (False, True))
    assert raw["in_smallest_norm"] > 0.7 and abs(scaled["in_smallest_norm"] - 0.25) < 0.12
    assert abs(raw["in_largest_margin"] - 0.25) < 0.12
    largest = measure(study, features, rows, 5, keep_largest=True)
    assert largest["in_smallest_norm"] == 0.0 and largest["ve"] == scaled["ve"]


def test_one_cluster_keeps_what_is_nearest_to_the_mean(study):
    features, _ = planted()
    row = measure(study, features, rows_of(study, 160), 1)
    assert row["in_nearest_to_mean"] == row["jaccard"] == 1.0 and row["ve"] == pytest.approx(0.0)
    assert "ari" not in row and "knn" not in row


def test_overlap_with_a_rule_is_counted(study):
    features, _ = planted()
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances = np.linalg.norm(x - x.mean(axis=0), axis=1)
    rules = {"largest_margin": -distances, "opposite": distances}
    row = measure(study, features, rows_of(study, 160, rules=rules), 1)
    assert row["in_largest_margin"] == 1.0 and row["in_opposite"] == 0.0


@pytest.mark.parametrize("transform", ["squared_cosines", "spectral"])
def test_sign_free_similarity_finds_families_of_either_sign(study, transform):
    features, sources = planted(each=60, spread=0.7)
    signs = np.random.default_rng(3).choice([-1.0, 1.0], len(features))[:, None]
    rows = rows_of(study, len(features), sources.astype(str))
    plain = measure(study, signs * features, rows, 4)
    free = measure(study, signs * features, rows, 4, transform=getattr(study, transform))
    assert free["ari"] > 0.9 > 0.75 > plain["ari"]
    upright = measure(study, features, rows, 4, transform=getattr(study, transform))
    assert upright["ve"] == pytest.approx(free["ve"])


def test_principal_components(study):
    features, sources = planted(spread=3.0)
    row = measure(study, features, rows_of(study, 160, sources), 4, transform=study.principal_components(3))
    plain = measure(study, features, rows_of(study, 160, sources), 4)
    assert row["ari"] > 0.99 and row["ve"] > plain["ve"] + 0.05 and row["ve_null"] > plain["ve_null"]


def test_clusters_of_one_pair_a_prompt(study):
    features, sources = planted(families=3, each=40)
    rows = rows_of(study, 120, sources)
    row = measure(study, features, rows, 3, one_a_prompt=True)
    assert row["ari"] > 0.99 and row["n"] == 120
    # What the second pairs of the prompts are like plays no part in the clusters.
    features[1::2] = np.random.default_rng(0).standard_normal((60, 60))
    row = measure(study, features, rows, 3, one_a_prompt=True)
    alone = measure(study, features[::2], rows.take(np.arange(0, 120, 2)), 3)
    assert row["ve"] == pytest.approx(alone["ve"]) and alone["ari"] > 0.99 and 0.2 < row["ari"] < 0.6
    assert measure(study, features, rows, 3)["ve"] < row["ve"] - 0.2


def test_rows_without_a_gradient_are_left_out(study):
    features, sources = planted()
    features[:3] = 0
    features[5, 0] = np.nan
    row = measure(study, features, rows_of(study, 160, sources), 4)
    assert (row["n"], row["left_out"]) == (156, 4) and row["ari"] > 0.99


# Sketches


def test_folded_sketch_is_the_sketch_of_the_smaller_dimension(study):
    # The gradients of single entries show where each of them goes, and with which sign.
    projection = SparseProjection(64, seed=3)
    entries = torch.eye(30).view(30, 5, 6)
    sketches = projection.weight_gradient("layer", torch.eye(6).expand(30, 6, 6), entries.transpose(1, 2)).numpy()
    folded = study.fold(sketches, 16)
    assert folded.shape == (30, 16) and (np.abs(folded).sum(axis=1) == 1).all()
    np.testing.assert_array_equal(np.abs(folded).argmax(axis=1), np.abs(sketches).argmax(axis=1) % 16)
    np.testing.assert_array_equal(folded.sum(axis=1), sketches.sum(axis=1))
    assert study.fold(np.ones((2, 3, 8)), 8).shape == (2, 3, 8)


def test_parts_of_the_layers_add_up(study, tiny_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    projection = study.PartsProjection(model, 32, seed=4)
    x, dy = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    name = "model.layers.1.self_attn.q_proj"
    parts = projection.weight_gradient(name, x, dy).view(2, 3, 32)
    # The second of two layers is in the middle third.
    assert parts[:, [0, 2]].abs().max() == 0
    torch.testing.assert_close(parts[:, 1], SparseProjection(32, seed=4).weight_gradient(name, x, dy))


# Runs


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some_pairs(path, prompts=12, per_prompt=2):
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"What about {p} {WORDS[p % len(WORDS)]}?",
            "chosen": f" {words(rng, 2, 9)}",
            "rejected": f" {words(rng, 2, 9)}",
            "source": "odd" if p % 2 else "even",
        }
        for p in range(prompts)
        for _ in range(per_prompt)
    ]
    return write(path, rows), rows


def arguments(study, folder, model, encoder, **kwargs):
    options = {
        "model_name_or_path": model,
        "encoder": encoder,
        "max_length": 64,
        "lora_r": 2,
        "sketch_dim": 256,
        "dim": 128,
        "clusters": [3],
        "kmeans_seeds": 3,
        "draws": 2,
        "output_dir": str(folder),
        "results": str(folder / "results" / "table"),
        "learning_rate": 1e-2,
        **kwargs,
    }
    return study.StudyArguments(**options)


@pytest.fixture(scope="module")
def done(study, tmp_path_factory, tiny_dir, encoder):
    """A run of the study over 24 pairs of 12 prompts, before and after two steps of warm-up."""
    folder = tmp_path_factory.mktemp("study")
    dataset, _ = some_pairs(folder / "pairs.jsonl")
    args = arguments(study, folder, tiny_dir, encoder, dataset=dataset, warmup_steps=[0, 2], device_name="a device")
    study.main(args)
    return folder, args


def test_run_reports_every_variant(done):
    folder, _ = done
    report = json.loads((folder / "results" / "table.json").read_text())
    assert report["device"] == "a device" and report["pairs"] == 24 and report["sources"] == {"even": 12, "odd": 12}
    assert [found["warmup_steps"] for found in report["studies"]] == [0, 2]
    assert [found["margin"] for found in report["studies"]] == ["logp_margin", "reward_margin"]
    for found in report["studies"]:
        names = {row["variant"] for row in found["rows"]}
        assert {"pair", "sum", "chosen", "responses", "embedding of the text", "pair, 256 dimensions"} <= names
        assert {
            "sum, middle third of layers",
            "pair, clusters of one pair a prompt",
            "pair, 1/2 of the prompts",
        } <= names
        # The model has two layers.
        assert "sum, last third of layers" not in names
        assert {row["clusters_asked"] for row in found["rows"]} == {"3", "default"}
        assert all(np.isfinite(value) for row in found["rows"] for value in row.values() if isinstance(value, float))
    page = (folder / "results" / "table.md").read_text()
    assert page.count("### ") == 4 and page.count("| pair, sign-free: spectral |") == 4


def test_features_are_those_of_the_product(study, done, tmp_path):
    folder, args = done
    sketches, meta = (
        np.load(folder / "step-000000" / "sketches.npy"),
        study.load_rows(str(folder / "step-000000" / "pairs.parquet")),
    )
    ours = {v.name: v.features for v in study.variants(sketches, meta, np.zeros((24, 9)), 128, seed=0)}["pair"]
    trainer = study.make_trainer(args, args.model_name_or_path, study.load_pairs(args, ""), 0)
    config = BPOConfig(
        str(tmp_path), projection_dim=128, depth_fraction=0.5, max_length=64, seed=42, bf16=False, report_to="none"
    )
    product = BPOTrainer(trainer.model, args=config, train_dataset=study.load_pairs(args, ""))
    theirs = product._pair_features()[:]
    # One draw of the projection, but for the dimension in which the buckets were drawn.
    product._projection = SparseProjection(256, 42)
    theirs = product._features.compute(product._projection, tmp_path / "wide")[:]
    assert product._pool.pair_ids.to_pylist() == meta["pair_id"][:]
    theirs, ours = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (study.fold(theirs, 128), ours))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_stopped_run_goes_on(study, done, tmp_path, monkeypatch):
    folder, args = done
    expected = {step: np.load(folder / step / "sketches.npy") for step in ("step-000000", "step-000002")}
    # As if the second pass had been killed in its middle, after the warm-up.
    records = folder / "step-000002" / "store" / "part-00000.rows"
    with records.open("r+b") as file:
        file.truncate(records.stat().st_size // 3)
    (folder / "step-000002" / "sketches.npy").unlink()
    monkeypatch.setattr(BPOTrainer, "train", lambda self: pytest.fail("what was trained is not trained again"))
    for steps, sketches, meta, embeddings in study.compute(args):
        np.testing.assert_array_equal(sketches, expected[f"step-{steps:06d}"])
        assert len(meta) == len(embeddings) == 24
    assert steps == 2 and np.abs(expected["step-000002"] - expected["step-000000"]).max() > 0


def test_other_options_do_not_go_on_from_the_same_folder(study, done):
    _, args = done
    with pytest.raises(StoreMismatchError, match="seed"):
        next(study.compute(study.StudyArguments(**{**vars(args), "seed": 7})))


def test_all_weights_and_scores(study, tmp_path, tiny_dir, encoder):
    _, rows = some_pairs(tmp_path / "pairs.jsonl", prompts=8, per_prompt=1)
    rows = [{**row, "score_chosen": 1.0 + number, "score_rejected": 1.0} for number, row in enumerate(rows)]
    for row in rows:
        del row["source"]
    dataset = write(tmp_path / "scored.jsonl", rows)
    args = arguments(study, tmp_path, tiny_dir, encoder, dataset=dataset, lora_r=0, num_pairs=6, variants=["pair"])
    study.main(args)
    report = json.loads((tmp_path / "results" / "table.json").read_text())
    (found,) = report["studies"]
    assert report["pairs"] == 6 and report["sources"] is None and found["margin"] == "score_margin"
    assert [row["variant"] for row in found["rows"]] == ["pair", "pair"] and "ari" not in found["rows"][0]


def test_families_out_of_a_folder(study, tmp_path):
    tokenizer = tiny_tokenizer()
    questions = [f"What is {number} and {WORDS[number]}?" for number in range(6)]
    pairs = [
        {"prompt": q, "chosen": f"good {i} {j}", "rejected": f"bad {i}"}
        for i, q in enumerate(questions)
        for j in (0, 1)
    ]
    write(tmp_path / "pku_saferlhf_5k.jsonl", pairs)
    write(tmp_path / "ultrafeedback_binarized_1200.jsonl", [*pairs, {**pairs[0], "rejected": ""}])
    transcripts = [
        {side: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}
        for row in pairs
    ]
    write(tmp_path / "hh_harmless_base_test.jsonl", transcripts)
    solved = [
        {"question": q, "responses": [{"text": "wrong 1", "score": 0.0}, {"text": "right 2", "score": 1.0}]}
        for q in questions
    ]
    unsolved = [{"question": "What?", "responses": [{"text": "wrong 3", "score": 0.0}]}, {"question": "Why?"}]
    write(tmp_path / "gsm8k.jsonl", [*solved, *unsolved])
    found = study.load_families(str(tmp_path), tokenizer, 5, 128, seed=0)
    assert found["source"][:] == [family for family in study.FAMILIES for _ in range(5)]
    assert len({json.dumps(row["prompt"]) + row["source"] for row in found}) == 20
    for row in found:
        want = ("right 2", "wrong 1") if row["source"] == "gsm8k" else ("good", "bad")
        assert row["chosen"][-1]["content"].startswith(want[0]) and row["rejected"][-1]["content"].startswith(want[1])
    with pytest.raises(ValueError, match="`pairs_per_family` is 9"):
        study.load_families(str(tmp_path), tokenizer, 9, 128, seed=0)


def test_arguments(study):
    with pytest.raises(ValueError, match="one of `dataset` and `data_dir`"):
        study.StudyArguments()
    with pytest.raises(ValueError, match="`kmeans_seeds` must be at least 3"):
        study.StudyArguments(dataset="pairs.jsonl", kmeans_seeds=2)
    with pytest.raises(ValueError, match="`dim=300` must divide `sketch_dim=4096`"):
        study.StudyArguments(dataset="pairs.jsonl", dim=300)
