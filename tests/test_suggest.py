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

import numpy as np
import pytest
from datasets import Dataset
from explain_runs import random_features, save_breadth, save_selections
from safetensors.numpy import save_file

from trl_bpo.clustering import cluster, default_n_clusters
from trl_bpo.manifest import write_json
from trl_bpo.run_folder import RunFolder
from trl_bpo.selection_state import save_feature_sample
from trl_bpo.suggest import (
    elbow,
    gaussian_elbow,
    save_figure,
    suggest_for_prompts,
    suggest_for_run,
    suggested,
)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def planted(k, n=400, dim=32, spread=0.4, seed=0):
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((k, dim)))
    return unit(centres[np.arange(n) % k] + spread * rng.standard_normal((n, dim)) / dim**0.5)


# The curve


def test_default_numbers_of_clusters():
    for n in (8, 40, 337, 4096):
        ks = [k for k, _ in elbow(np.random.default_rng(0).standard_normal((n, 2)))]
        assert ks == sorted(set(ks)) and ks[0] == 2 and ks[-1] == n // 4
        assert default_n_clusters(n) in ks and len(ks) <= 11
        # In a geometric progression, as far as whole numbers allow.
        assert all(after <= 2.1 * before for before, after in zip(ks, ks[1:], strict=False))
    for n in (1, 2, 3, 5, 7):
        ks = [k for k, _ in elbow(np.random.default_rng(0).standard_normal((n, 2)))]
        assert ks == sorted(set(ks)) and 1 <= ks[0] and ks[-1] <= n and default_n_clusters(n) in ks


def test_the_curve_is_what_the_selections_log():
    x = planted(4)
    curve = elbow(x, [3, 9], seed=7)
    ids = [f"{i:05d}" for i in range(len(x))]
    assert curve == [(k, cluster(x, ids, k, 7).variance_explained) for k in (3, 9)]
    assert elbow(x, [3, 9], seed=7) == curve != elbow(x, [3, 9], seed=8)


def test_numbers_of_clusters_out_of_range():
    for k in (0, 41):
        with pytest.raises(ValueError, match=f"{k}"):
            elbow(planted(4, 40), [k])
    with pytest.raises(ValueError, match="There is no row"):
        elbow(np.empty((0, 3)))


def test_half_precision_is_enough():
    x = planted(4)
    close = dict(elbow(x.astype(np.float16), [2, 4]))
    for k, value in elbow(x, [2, 4]):
        assert close[k] == pytest.approx(value, abs=1e-3)


# The knee


@pytest.mark.parametrize("k", [4, 8, 20])
def test_planted_clusters_are_suggested(k):
    x = planted(k)
    curve = elbow(x)
    ks = [number for number, _ in curve]
    # Of those that were tried, the nearest, or the one above.
    assert 0.9 * k <= suggested(curve) <= min(number for number in ks if number >= k)
    gaussian = dict(gaussian_elbow(x, ks))
    assert dict(curve)[suggested(curve)] > 1.4 * gaussian[suggested(curve)]


def test_the_knee_does_not_move_with_the_largest_number():
    # On a linear axis it would.
    x = planted(8, 800)
    knees = {suggested(elbow(x, [2, 4, 8, 16, 32, 64, *more])) for more in ([], [128], [128, 200], [128, 200, 400])}
    assert knees == {8}


def test_a_logarithm_is_straight_in_the_logarithm():
    # As a cloud without clusters: no bend, and so what the linear axis says. Slightly bent, the bend.
    ks = [2, 4, 8, 16, 32, 64]
    straight = [(k, np.log(k) / 10) for k in ks]
    linear = max(ks, key=lambda k: (np.log(k / 2) / np.log(32)) - (k - 2) / 62)
    assert suggested(straight) == linear
    assert suggested([(k, value + 0.05 * (k >= 8)) for k, value in straight]) == 8


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(5, 0.3)], 5),
        ([(2, 0.1), (4, 0.2)], 2),
        ([(2, 0.1), (4, 0.2), (6, 0.3), (10, 0.5)], 2),
        ([(2, 0.3), (4, 0.3), (8, 0.3)], 2),
        ([(2, 0.3), (4, 0.2), (8, 0.1)], 2),
        ([(8, 0.9), (2, 0.1), (4, 0.85)], 4),
        ([(1, 0.0), (2, 0.8), (4, 0.9)], 2),
        ([(3, 0.1), (3, 0.1)], 3),
    ],
)
def test_curves_without_much_of_a_knee(curve, expected):
    assert suggested(curve) == expected and type(suggested(curve)) is int


def test_no_curve():
    with pytest.raises(ValueError, match="no point"):
        suggested([])


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("x", [np.ones((40, 3)), np.ones((1, 3)), np.eye(3)])
def test_degenerate_rows(x):
    curve = elbow(x)
    assert suggested(curve) in dict(curve)
    gaussian = gaussian_elbow(x, [k for k, _ in curve], normalize=False)
    assert all(0.0 <= value <= 1.0 for _, value in gaussian)


@pytest.mark.parametrize("dim", [16, 500])
def test_a_gaussian_does_not_exceed_its_gaussian(dim):
    x = unit(np.random.default_rng(1).standard_normal((400, dim)) * np.geomspace(1, 0.2, dim))
    curve = elbow(x)
    gaussian = gaussian_elbow(x, [k for k, _ in curve])
    assert [k for k, _ in gaussian] == [k for k, _ in curve]
    ratios = np.divide([value for _, value in curve], [value for _, value in gaussian])
    assert abs(ratios.mean() - 1) < 0.05 and abs(ratios - 1).max() < 0.2


# Of a run


def save_run(folder, embeddings, features, strategy="gradient", metrics=None):
    n = len(embeddings)
    table = {"prompt_id": [f"{i:064d}" for i in range(n)]}
    save_breadth(folder, table)
    metrics = {"prompts": n, "n_clusters": 8, **(metrics or {})}
    write_json(folder / "_breadth" / "metrics.json", metrics)
    save_file({"embeddings": embeddings.astype(np.float32)}, folder / "_breadth" / "sample.safetensors")
    save_feature_sample(folder / "_selections", features, True, 0)
    measured = features if strategy == "gradient" else features[:, 0]
    return save_selections(folder, [measured], strategy)[0]


def test_both_stages_of_a_run(tmp_path):
    run = save_run(tmp_path, planted(8), 3.0 * random_features(90, dim=40))
    breadth, depth = suggest_for_run(run)
    assert (breadth.stage, breadth.rows, breadth.sampled, breadth.used) == ("breadth", 400, 400, 8)
    assert breadth.suggested == min(k for k, _ in breadth.curve if k >= 8) and breadth.excess > 0.5
    assert (depth.stage, depth.rows, depth.sampled, depth.used) == ("depth", 90, 90, 4)
    assert [k for k, _ in depth.curve] == [k for k, _ in depth.gaussian]
    # Random features are no clusters.
    assert abs(depth.excess) < 0.15
    lines = breadth.text.splitlines()
    assert lines[0] == "Clusters for breadth: 400 prompts" and max(map(len, lines)) <= 100
    marked = [line.split() for line in lines if line.endswith("suggested") or "suggested," in line]
    ((k, value, null, *_),) = marked
    assert int(k) == breadth.suggested
    assert float(value) == pytest.approx(dict(breadth.curve)[int(k)], abs=1e-3)
    assert float(null) == pytest.approx(dict(breadth.gaussian)[int(k)], abs=1e-3)
    assert any(line.split()[0] == "14" and "default" in line for line in lines[3:])
    assert "% more than those of a Gaussian" in breadth.text


def test_what_is_no_more_than_a_gaussian_is_called_so(tmp_path):
    rng = np.random.default_rng(5)
    run = save_run(tmp_path, unit(rng.standard_normal((1000, 8))), random_features(30))
    breadth = suggest_for_run(run)[0]
    assert breadth.excess < 0.05 and "no clusters worth the name" in breadth.text


def test_a_sample_says_so(tmp_path):
    run = save_run(tmp_path, planted(4, 100), random_features(30), metrics={"prompts": 20_000})
    text = suggest_for_run(run)[0].text
    assert "20,000 prompts, a sample of 100 of them" in text and "The default is 100." in text


def test_a_run_by_scores_has_breadth_alone(tmp_path):
    # What an earlier run left of features is not of this one.
    run = save_run(tmp_path / "both", planted(4, 60), random_features(30), "loss")
    assert [suggestion.stage for suggestion in suggest_for_run(run)] == ["breadth"]
    run, _ = save_selections(tmp_path / "scores", [np.arange(30.0)], "loss")
    with pytest.raises(ValueError, match="'scores' clustered nothing"):
        suggest_for_run(run)


# Of a dataset


def prompts_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


QUESTIONS = [f"{what} {thing}?" for what in ("How do I bake", "Who painted", "Where is") for thing in "abcdefghijkl"]


def test_prompts_of_a_dataset(tmp_path, encoder):
    name = prompts_file(tmp_path / "rows.jsonl", [{"question": text} for text in [*QUESTIONS, *QUESTIONS[:9]]])
    suggestion = suggest_for_prompts(name, prompt_column="question", encoder=encoder)
    assert (suggestion.stage, suggestion.rows, suggestion.sampled) == ("breadth", 36, 36)
    # Three ways to ask.
    assert suggestion.suggested == 3 and suggestion.excess > 0.3
    # Neither the order nor repeats of the rows play a part.
    again = prompts_file(tmp_path / "again.jsonl", [{"prompt": text} for text in QUESTIONS[::-1]])
    assert dict(suggest_for_prompts(again, encoder=encoder).curve) == pytest.approx(dict(suggestion.curve), abs=1e-6)


def test_a_sample_of_a_dataset(tmp_path, encoder):
    name = prompts_file(tmp_path / "rows.jsonl", [{"prompt": text} for text in QUESTIONS])
    first, second, other = (suggest_for_prompts(name, encoder=encoder, sample=20, seed=seed) for seed in (1, 1, 2))
    assert (first.rows, first.sampled) == (36, 20) and first == second
    assert first.curve != other.curve
    for sample in (0, -1):
        with pytest.raises(ValueError, match="`sample` must be at least 1"):
            suggest_for_prompts(name, encoder=encoder, sample=sample)


def test_prompts_of_pairs_and_of_messages(tmp_path, encoder):
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "chosen": [{"role": "assistant", "content": "x"}],
            "rejected": [{"role": "assistant", "content": "y"}],
        }
        for text in QUESTIONS
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    suggestion = suggest_for_prompts(str(tmp_path / "saved"), encoder=encoder)
    assert suggestion.rows == 36 and suggestion.suggested == 3


# The picture


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(tmp_path, suffix):
    suggestion = suggest_for_run(save_run(tmp_path / "run", planted(4, 60), random_features(30)))[0]
    save_figure(suggestion, tmp_path / f"elbow.{suffix}")
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert (tmp_path / f"elbow.{suffix}").read_bytes().startswith(start)
    with pytest.raises(ValueError, match="not supported"):
        save_figure(suggestion, tmp_path / "elbow.xyz")


def test_reads_only_what_it_needs(tmp_path):
    # A run without the tables of its prompts and pairs.
    save_run(tmp_path, planted(4, 60), random_features(30))
    (tmp_path / "_breadth" / "prompts.parquet").unlink()
    assert len(suggest_for_run(RunFolder(tmp_path))) == 2
