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


import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from explain_runs import hashed, largest_remainder, nearest, random_features, real_run, save_breadth, save_selections

from trl_bpo.bpo_config import DATA_STRATEGIES, POLICY_STRATEGIES
from trl_bpo.explain import explain
from trl_bpo.explain_text import WIDTH, cut
from trl_bpo.placement import _BY_SCORE, _WITHOUT_CUT
from trl_bpo.prompts import prompt_id
from trl_bpo.run_folder import RunFolder
from trl_bpo.strategies import RULE_OF_STRATEGY
from trl_bpo.visible import visible


STEPS_OF_REAL_RUN = [0, 3, 6]
BY_SCORE = sorted(_BY_SCORE)


# A real run: acceptance 4


@pytest.fixture(scope="module")
def real(tiny_dir, encoder, tmp_path_factory):
    return real_run(tiny_dir, encoder, tmp_path_factory.mktemp("real") / "run")


def columns(path, *names):
    return [pq.read_table(path)[name].to_pylist() for name in names]


def test_breadth_agrees_with_the_saved_distances(real):
    ids, clusters, distances = columns(
        real.path / "_breadth" / "prompts.parquet", "prompt_id", "breadth_cluster", "breadth_distance"
    )
    verdicts = set()
    for one, label, distance, expected in zip(
        ids, clusters, distances, nearest(ids, clusters, distances, 16), strict=True
    ):
        breadth = explain(real, one).breadth
        place = breadth.place
        assert (place.selected, place.rank, place.cut_rank, place.cut_distance) == expected
        assert (place.cluster, place.distance, place.cluster_size) == (label, distance, clusters.count(label))
        assert place.cluster_kept == largest_remainder(ids, clusters, 16)[label]
        assert place.reason == ("within_cut" if expected[0] else "beyond_cut")
        assert (breadth.num_prompts, breadth.num_kept) == (40, 16)
        verdicts.add(place.selected)
    assert verdicts == {True, False}


@pytest.mark.parametrize("step", STEPS_OF_REAL_RUN)
def test_depth_agrees_with_the_saved_distances(real, step):
    assert [saved.step for saved in real.selections] == STEPS_OF_REAL_RUN
    ids, clusters, distances = columns(
        real.path / "_selections" / f"step-{step:06d}.parquet", "pair_id", "depth_cluster", "depth_distance"
    )
    n_keep = round(0.3 * len(ids))
    trained_on = columns(real.path / "_selections" / f"step-{step:06d}" / "train.parquet", "pair_id")[0]
    assert len(trained_on) == n_keep
    for one, label, distance, expected in zip(
        ids, clusters, distances, nearest(ids, clusters, distances, n_keep), strict=True
    ):
        explanation = explain(real, one, step)
        ((pair,),) = [selection.pairs for selection in explanation.selections]
        place = pair.place
        assert (place.selected, place.rank, place.cut_rank, place.cut_distance) == expected
        assert place.selected == (one in trained_on)
        assert (place.cluster, place.distance, place.cluster_size) == (label, distance, clusters.count(label))
        assert place.reason == ("within_cut" if expected[0] else "beyond_cut")
        # The pair's prompt came through breadth.
        assert explanation.breadth.place.selected and explanation.breadth.place.reason == "within_cut"


def test_a_kept_and_a_dropped_id_in_words(real):
    ids, selected = columns(real.path / "_selections" / "step-000006.parquet", "pair_id", "depth_selected")
    for verdict, one in (("kept", ids[selected.index(True)]), ("dropped", ids[selected.index(False)])):
        explanation = explain(real, one[:10])
        assert explanation.id == one and explanation.kind == "pair"
        place = explanation.selections[-1].pairs[0].place
        lines = explanation.text.splitlines()
        assert lines[0].split() == ["Pair", one]
        assert "Breadth: kept (16 of 40 prompts are kept)" in lines
        assert [line.split()[4] for line in lines if line.startswith("Depth at step ")][:2] == [
            "kept" if selection.pairs[0].place.selected else "dropped" for selection in explanation.selections[:-1]
        ]
        last = explanation.text.split("Depth at step 6")[1]
        assert f"{place.cluster}: {place.cluster_size} pairs, {place.cluster_kept} of them kept" in last
        assert f"{place.distance:.6g}" in last and f"rank      {place.rank} " in last
        assert f"rank {place.cut_rank}, distance {place.cut_distance:.6g}: the last kept of the cluster" in last
        assert f"{verdict.capitalize()}: cluster {place.cluster} may keep" in last


def test_a_prompt_with_its_pairs(real):
    pool = real.pool.to_pylist()
    one = prompt_id("What about 0 red?")
    own = [row["pair_id"] for row in pool if row["prompt_id"] == one]
    if not own:
        one = pool[0]["prompt_id"]
        own = [row["pair_id"] for row in pool if row["prompt_id"] == one]
    explanation = explain(real, one)
    assert explanation.kind == "prompt" and len(explanation.selections) == 3
    for selection in explanation.selections:
        assert [pair.pair_id for pair in selection.pairs] == own
        selected = pq.read_table(real.path / "_selections" / f"step-{selection.step:06d}.parquet").to_pylist()
        kept = {row["pair_id"] for row in selected if row["depth_selected"]}
        assert [pair.place.selected for pair in selection.pairs] == [pair in kept for pair in own]
        assert f"  step {selection.step:<7} {len(kept & set(own))} kept" in explanation.text
    for pair in own:
        assert sum(line.startswith(f"  {pair[:12]}  ") for line in explanation.text.splitlines()) == 1


def test_a_prompt_that_breadth_dropped_has_no_pairs(real):
    ids, selected = columns(real.path / "_breadth" / "prompts.parquet", "prompt_id", "breadth_selected")
    explanation = explain(real, ids[selected.index(False)])
    assert explanation.breadth.place.reason == "beyond_cut" and explanation.selections == []
    assert "Breadth: dropped" in explanation.text and "the pool has no pair of this prompt" in explanation.text


def test_rows_and_duplicates(real):
    table = {row["prompt"]: row for row in real.breadth.prompts.to_pylist()}
    repeated = explain(real, table["What about 2 blue?"]["prompt_id"])
    assert (repeated.breadth.rows, repeated.breadth.duplicates) == (3, 1)
    assert "3 rows have this prompt; dropped as duplicates of another: 1." in repeated.text
    several = explain(real, table["What about 0 red?"]["prompt_id"])
    assert (several.breadth.rows, several.breadth.duplicates) == (3, 0)


# Every rule


def every(run, step=None):
    """Place of every pair of the last selection, or of that at a step, in the order of the pool."""
    step = run.selections[-1].step if step is None else step
    return [explain(run, one, step).selections[0].pairs[0].place for one in run.pool["pair_id"].to_pylist()]


def test_all_strategies_are_known():
    by_distance = {"gradient", "gradient_farthest", "embedding", "embedding_farthest"}
    assert set(_BY_SCORE) | set(_WITHOUT_CUT) | by_distance == {*POLICY_STRATEGIES, *DATA_STRATEGIES}
    without_cut = {strategy for strategy, rule in RULE_OF_STRATEGY.items() if rule != "farthest"}
    assert set(_WITHOUT_CUT) == without_cut
    assert set(RULE_OF_STRATEGY) - without_cut == {name for name in by_distance if name.endswith("_farthest")}


@pytest.mark.parametrize("strategy", ["gradient", "gradient_farthest", "embedding", "embedding_farthest"])
@pytest.mark.parametrize("fraction", [0.02, 0.3, 1.0])
def test_the_cut_of_a_cluster(tmp_path, strategy, fraction):
    run, (selection,) = save_selections(tmp_path, [random_features(30)], strategy, fraction=fraction)
    for row, place in enumerate(every(run)):
        own = selection.clusters == selection.clusters[row]
        kept = selection.selected & own
        assert place.selected == selection.selected[row] and place.rank == selection.ranks[row]
        assert place.distance == selection.distances[row] and place.rank_of_all is None and place.score is None
        assert (place.cluster_size, place.cluster_kept) == (own.sum(), kept.sum())
        if not kept.any():
            assert place.cut_rank is place.cut_distance is None and "comes to no pair" in place.sentence
            continue
        ends = (np.min, "farthest from") if strategy.endswith("farthest") else (np.max, "nearest to")
        assert place.cut_rank == ends[0](selection.ranks[kept])
        assert place.cut_distance == ends[0](selection.distances[kept])
        assert place.sentence.startswith("Kept: " if place.selected else "Dropped: ")
        if place.selected and not kept.all() and kept.sum() < own.sum():
            assert f"among those {ends[1]} the centre" in place.sentence


@pytest.mark.parametrize("strategy", ["gradient", "gradient_farthest"])
def test_the_cut_of_all(tmp_path, strategy):
    run, (selection,) = save_selections(tmp_path, [random_features(30)], strategy, scope="overall", fraction=0.3)
    sign = -1 if strategy.endswith("farthest") else 1
    ids = run.pool["pair_id"].to_pylist()
    order = sorted(range(30), key=lambda row: (sign * selection.distances[row], ids[row]))
    for row, place in enumerate(every(run)):
        assert place.rank_of_all == order.index(row) and place.rank == selection.ranks[row]
        assert place.cut_rank == 8 and place.cut_distance == selection.distances[order[8]]
        assert place.selected == (place.rank_of_all <= place.cut_rank)
        assert f"{'farthest from' if sign < 0 else 'nearest to'} the centres of their clusters" in place.sentence
    text = explain(run, ids[order[0]]).text
    assert f"0 of all, 0 is the {'farthest' if sign < 0 else 'nearest'}" in text and "the last kept of all" in text


@pytest.mark.parametrize("strategy", sorted(_WITHOUT_CUT))
@pytest.mark.parametrize("floor", [0, 1])
def test_rules_without_a_cut_have_none(tmp_path, strategy, floor):
    run, (selection,) = save_selections(tmp_path, [random_features(30)], strategy, floor=floor)
    ids = run.pool["pair_id"].to_pylist()
    for row, place in enumerate(every(run)):
        assert place.reason == "by_rule" and place.selected == selection.selected[row]
        assert place.cut_rank is place.cut_distance is place.cut_score is None
        verdict = "Kept: it is among" if place.selected else "Dropped: it is not among"
        assert place.sentence.startswith(f"{verdict} the 15 pairs of 30 that `{strategy}` keeps")
        assert ("`min_pairs_per_prompt=1`" in place.sentence) == bool(floor)
        # Cluster, distance and rank are what they are all the same.
        assert place.distance == selection.distances[row] and place.rank == selection.ranks[row]
        assert "cut  " not in explain(run, ids[row]).text


@pytest.mark.parametrize("strategy", BY_SCORE)
def test_scores(tmp_path, strategy):
    # With ties, which go by id.
    scores = np.random.default_rng(0).integers(0, 6, 30).astype(float) / 7
    run, (selection,) = save_selections(tmp_path, [scores], strategy, fraction=0.3)
    ids = run.pool["pair_id"].to_pylist()
    order = sorted(range(30), key=lambda row: (-scores[row], ids[row]))
    for row, place in enumerate(every(run)):
        assert place.selected == selection.selected[row] == (row in order[:9])
        assert place.score == scores[row] and place.rank == order.index(row)
        assert (place.cut_rank, place.cut_score) == (8, scores[order[8]])
        assert place.cluster is place.distance is place.cut_distance is None
        assert place.sentence.startswith("Kept: it is among" if place.selected else "Dropped: it is not among")
        text = explain(run, ids[row]).text
        assert f"score     {scores[row]:.6g}\n" in text and f"cut       rank 8, score {scores[order[8]]:.6g}" in text


@pytest.mark.parametrize("scope", ["per_cluster", "overall"])
@pytest.mark.parametrize("strategy", ["gradient", "gradient_farthest", "loss"])
def test_min_pairs_per_prompt(tmp_path, strategy, scope):
    measured = random_features(60, seed=3)
    measured = measured[:, 0] if strategy == "loss" else measured
    options = {"strategy": strategy, "scope": scope, "fraction": 0.4}
    plain, (without,) = save_selections(tmp_path / "plain", [measured], **options)
    run, (selection,) = save_selections(tmp_path / "floor", [measured], floor=1, **options)
    cuts = [(place.cut_rank, place.cut_distance, place.cut_score) for place in every(plain)]
    reasons = {(True, True): "within_cut", (False, False): "beyond_cut"}
    reasons |= {(False, True): "added", (True, False): "displaced"}
    found = []
    for row, place in enumerate(every(run)):
        found.append(place.reason)
        assert place.reason == reasons[bool(without.selected[row]), bool(selection.selected[row])]
        assert place.selected == selection.selected[row]
        # The cut is that of the rule, from which the floor departs.
        assert (place.cut_rank, place.cut_distance, place.cut_score) == cuts[row]
        assert ("`min_pairs_per_prompt=1`" in place.sentence) == (place.reason in ("added", "displaced"))
    assert {"added", "displaced"} <= set(found)
    added = run.pool["pair_id"][found.index("added")].as_py()
    assert "Kept beyond the cut" in explain(run, added).text
    prompt = run.pool["prompt_id"][found.index("added")].as_py()
    assert "kept for its prompt" in explain(run, prompt).text


def test_pairs_left_out(tmp_path):
    zero, broken = random_features(30), random_features(30, 1)
    zero[4], broken[4] = 0.0, np.nan
    both = zero.copy()
    both[5] = np.inf
    for number, (features, why) in enumerate([(zero, "is zero"), (broken, "is not finite"), (both, "is zero or not")]):
        run, _ = save_selections(tmp_path / str(number), [features])
        place = every(run)[4]
        assert (place.selected, place.reason) == (False, "left_out") and f"its gradient {why}" in place.sentence
        assert place.cluster is place.distance is place.rank is place.cut_rank is None
        assert "left_out" not in {other.reason for row, other in enumerate(every(run)) if row not in (4, 5)}
        assert "no usable gradient or score" in explain(run, hashed("b", 1)).text
    scores = np.arange(30.0)
    scores[4] = np.nan
    run, _ = save_selections(tmp_path / "scores", [scores], "loss")
    assert every(run)[4].sentence == "Dropped: its score is not finite, so that it took no part in the selection."
    assert "nan" not in explain(run, run.pool["pair_id"][4].as_py()).text


def test_several_steps(tmp_path):
    run, selections = save_selections(tmp_path, [random_features(30, seed) for seed in range(3)])
    one = run.pool["pair_id"][7].as_py()
    for step, selection in zip((0, 5, 10), selections, strict=True):
        explanation = explain(run, one, step)
        assert [found.step for found in explanation.selections] == [step]
        assert explanation.selections[0].pairs[0].place.distance == selection.distances[7]
        assert explanation.text.count("Depth at step") == 1 and f"Depth at step {step} (gradient" in explanation.text
    text = explain(run, one).text
    assert text.count("Depth at step") == 3
    assert text.index("Depth at step 0 ") < text.index("Depth at step 5 ") < text.index("Depth at step 10 (gradient")
    with pytest.raises(ValueError, match=r"no selection at step 3 .* Steps of its selections: 0, 5, 10\."):
        explain(run, one, 3)


def test_files_that_contradict_each_other(tmp_path):
    run, _ = save_selections(tmp_path, [random_features(30)])
    path = tmp_path / "_selections" / "step-000000.parquet"
    table = pq.read_table(path)
    flipped = [not kept for kept in table["depth_selected"].to_pylist()]
    pq.write_table(table.set_column(table.column_names.index("depth_selected"), "depth_selected", [flipped]), path)
    with pytest.raises(ValueError, match="selection at step 0 does not follow from the distances"):
        explain(run, run.pool["pair_id"][0].as_py())


# Ids


def test_ids_and_their_beginnings(tmp_path):
    run, _ = save_selections(tmp_path, [random_features(30)])
    assert explain(run, "a00003").id == hashed("a", 3) and explain(run, "a00003").kind == "pair"
    assert explain(run, "b00003").id == hashed("b", 3) and explain(run, "b00003").kind == "prompt"
    with pytest.raises(ValueError, match="too short to be the beginning of one: give at least 6 characters"):
        explain(run, "a0000")
    with pytest.raises(ValueError, match="no prompt in .* has an id that begins with 'c00000'"):
        explain(run, "c00000")


def test_ambiguous_beginnings(tmp_path):
    ids = [f"source-{i:02d}" for i in range(30)]
    run, _ = save_selections(tmp_path, [random_features(30)], ids=ids)
    with pytest.raises(
        ValueError, match="'source-' is ambiguous, 30 ids begin with it: pair source-00, .*, and others"
    ):
        explain(run, "source-")
    with pytest.raises(ValueError, match="10 ids begin with it"):
        explain(run, "source-1")
    assert explain(run, "source-10").id == "source-10"


def test_whole_ids_of_any_length(tmp_path):
    # "1" and "12" begin others, and are prompts or pairs themselves.
    run, _ = save_selections(tmp_path, [random_features(30)], ids=[str(i) for i in range(30)])
    assert explain(run, "1").id == "1" and explain(run, "12").id == "12"


def test_pairs_that_repeat(tmp_path):
    features = random_features(30)
    features[1] = features[0]
    ids = [hashed("a", max(i, 1)) for i in range(30)]
    run, (selection,) = save_selections(tmp_path, [features], ids=ids)
    explanation = explain(run, ids[0])
    places = [pair.place for pair in explanation.selections[0].pairs]
    assert [pair.row for pair in explanation.selections[0].pairs] == [0, 1]
    assert [place.rank for place in places] == selection.ranks[:2].tolist() and places[0].rank != places[1].rank
    assert [place.selected for place in places] == selection.selected[:2].tolist()
    assert "The pool holds this pair 2 times" in explanation.text


# Breadth by hand


def table_of_prompts(n=6, **columns):
    return {
        "prompt_id": [hashed("b", i) for i in range(n)],
        "prompt": [f"What about {i}?" for i in range(n)],
        "rows": [1] * n,
        "duplicates": [0] * n,
        "breadth_cluster": [0] * n,
        "breadth_distance": [i / 10 for i in range(n)],
        "breadth_rank": list(range(n)),
        "breadth_selected": [i < n // 2 for i in range(n)],
        **columns,
    }


def test_breadth_over_all_clusters(tmp_path):
    table = table_of_prompts(
        breadth_cluster=[0, 0, 0, 1, 1, 1],
        breadth_distance=[0.1, 0.2, 0.3, 5.0, 6.0, 7.0],
        breadth_rank=[0, 1, 2, 0, 1, 2],
    )
    save_breadth(tmp_path, table, scope="overall")
    run = RunFolder(tmp_path)
    kept, dropped = explain(run, "b00002"), explain(run, "b00003")
    assert kept.breadth.place.selected and kept.breadth.place.cut_rank == 2
    assert not dropped.breadth.place.selected and dropped.breadth.place.cluster_kept == 0
    assert (dropped.breadth.place.rank, dropped.breadth.place.rank_of_all) == (0, 3)
    assert dropped.breadth.place.cut_distance == 0.3
    assert "not among the 3 prompts of 6 nearest to the centres" in dropped.breadth.place.sentence
    assert "There is no selection of pairs in this run." in dropped.text


def test_breadth_that_contradicts_itself(tmp_path):
    save_breadth(tmp_path, table_of_prompts(breadth_selected=[False, True] * 3))
    with pytest.raises(ValueError, match="The breadth selection does not follow"):
        explain(RunFolder(tmp_path), "b00000")


def test_without_breadth(tmp_path):
    run, _ = save_selections(tmp_path, [random_features(30)])
    explanation = explain(run, "b00003")
    assert explanation.breadth is None and "There was no breadth selection in this run" in explanation.text


def test_prompts_that_came_or_went_between_the_stages(tmp_path):
    # Prompts 0 to 9 have pairs. Breadth saw 7 to 12, and kept 7, 8 and 11.
    numbers = [7, 8, 11, 9, 10, 12]
    save_breadth(tmp_path, table_of_prompts(prompt_id=[hashed("b", i) for i in numbers]))
    run, _ = save_selections(tmp_path, [random_features(30)])
    unseen = explain(run, "b00003")
    assert unseen.breadth is None and len(unseen.selections[0].pairs) == 3
    assert "The breadth selection did not see this prompt" in " ".join(unseen.notes)
    filtered = explain(run, "b00011")
    assert filtered.breadth.place.selected and filtered.selections == []
    assert "it was filtered out" in filtered.text.replace("\n", " ") and "scores" in filtered.text
    # The responses were scored.
    (tmp_path / "_collected").mkdir()
    rows = [{"prompt_id": hashed("b", i), "scores": [5.0, None, 5.0]} for i in numbers[:3]]
    Dataset.from_list(rows).to_parquet(tmp_path / "_collected" / "scores.parquet")
    assert "Its responses have the scores 5, none, 5." in explain(RunFolder(tmp_path), "b00011").text
    assert "responses have" not in explain(RunFolder(tmp_path), "b00007").text


# Text


HOSTILE = [
    "line\nbreak\ttab\rreturn",
    "\x1b[31mred\x1b[0m \x07bell \x00nul",
    "right\u202eto left\u2066 isolate \u200bzero\u200d width \ufeffmark",
    "fillers \u3164 and \u034f and \ufe0f",
    "漢字" * 100,
    "é" * 200,
    "e\u0301" * 100,
    "\u2028\u2029 separators \U000e0041 tag",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", ["a", "b"])
def test_hostile_prompts_are_one_visible_line(tmp_path, text, kind):
    save_breadth(tmp_path, table_of_prompts(10, prompt=[text] * 10))
    run, _ = save_selections(tmp_path, [random_features(30, seed) for seed in range(2)], prompts=[text] * 10)
    explanation = explain(run, hashed(kind, 3))
    assert explanation.prompt == text
    lines = explanation.text.split("\n")
    assert all(line.isprintable() for line in lines)
    for line in lines:
        wide = sum(2 if "\u2e80" <= char <= "\u9fff" else 0 if char == "\u0301" else 1 for char in line)
        assert wide <= WIDTH
    shown = lines[1 if kind == "b" else 2]
    assert shown.startswith("        " + visible(text)[:20])
    for char in "\x1b\x00\u202e\u2066\u200b\u200d\ufeff\u3164\u034f\ufe0f\u2028\U000e0041":
        assert char not in explanation.text


def test_long_ids_and_notes_fit(tmp_path):
    ids = [f"a very long name of a dataset, of a split and of a row \u202e {'x' * 80} {i}" for i in range(30)]
    run, _ = save_selections(tmp_path, [random_features(30)], ids=ids, strategy="gradient_random", floor=1)
    for one in (ids[3], hashed("b", 1)):
        lines = explain(run, one).text.split("\n")
        assert max(map(len, lines)) <= WIDTH and all(line.isprintable() for line in lines)


def test_visible_and_cut():
    assert visible("a\nb\x1b\u202e é漢") == "a\\nb\\x1b\\u202e é漢"
    assert cut("short", 5) == "short" and cut("longer", 5) == "long…"
    assert cut("漢字漢字", 5) == "漢字…" and cut("漢字", 4) == "漢字"
