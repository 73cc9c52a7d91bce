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

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from sklearn.metrics import adjusted_rand_score

from trl_bpo import BreadthSelector
from trl_bpo.clustering import budget
from trl_bpo.prompts import prompt_id
from trl_bpo.run_folder import RunFolder


TOPICS = {
    "cooking": ["bake a sourdough bread", "fry an egg", "roast a chicken", "make tomato soup", "season a steak"],
    "code": ["sort a list in Python", "reverse a linked list in C", "write a SQL join", "parse JSON in Java", "use git rebase"],
    "travel": ["plan a week in Rome", "find a cheap flight to Tokyo", "pack for Iceland", "book a hostel in Lisbon", "cross a border by bus"],
}  # fmt: skip
QUESTIONS = [f"A question about {topic}: how do I {task}?" for topic, tasks in TOPICS.items() for task in tasks]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather of a city"}}]


def prompts(*rows):
    return Dataset.from_list([row if isinstance(row, dict) else {"prompt": row} for row in rows])


def test_keeps_exactly_the_budget_and_says_so(encoder):
    for fraction in (0.01, 0.2, 0.5, 1.0):
        selection = BreadthSelector(fraction, encoder).select(prompts(*QUESTIONS))
        assert len(selection.kept) == selection.prompts_kept == budget(fraction, 15)
        assert len(selection.kept) + len(selection.dropped) == selection.rows == selection.prompts == 15
        assert selection.duplicates == selection.over_long == 0
        assert "breadth_dropped" not in selection.kept.column_names
        assert set(selection.dropped["breadth_dropped"]) <= {"distance"}


def test_annotates_every_row_in_its_place(encoder):
    dataset = prompts(*QUESTIONS).add_column("source", list(range(15)))
    selection = BreadthSelector(0.4, encoder, n_clusters=3).select(dataset)
    rows = selection.dataset
    assert rows["prompt"] == dataset["prompt"] and rows["source"] == list(range(15))
    assert rows.column_names == [
        *("prompt", "source", "prompt_id", "breadth_cluster", "breadth_distance", "breadth_rank"),
        *("breadth_selected", "breadth_dropped"),
    ]
    assert rows["prompt_id"] == [prompt_id(prompt) for prompt in QUESTIONS]
    labels, ranks = np.asarray(rows["breadth_cluster"]), np.asarray(rows["breadth_rank"])
    distances, selected = np.asarray(rows["breadth_distance"]), np.asarray(rows["breadth_selected"])
    assert selection.n_clusters == 3 and 0 < selection.variance_explained < 1
    assert adjusted_rand_score(np.repeat(range(3), 5), labels) > 0.4
    for label in range(3):
        members = np.flatnonzero(labels == label)
        assert sorted(ranks[members]) == list(range(len(members)))
        assert members[np.argsort(distances[members])].tolist() == members[np.argsort(ranks[members])].tolist()
        # The nearest are kept, as many as the size of the cluster calls for.
        assert np.array_equal(selected[members], ranks[members] < selected[members].sum())
        assert abs(selected[members].sum() - 0.4 * len(members)) < 1


def test_row_order_does_not_matter(encoder):
    dataset = prompts(*QUESTIONS)
    kept = BreadthSelector(0.3, encoder).select(dataset).kept["prompt"]
    shuffled = BreadthSelector(0.3, encoder).select(dataset.shuffle(seed=1)).kept["prompt"]
    assert set(kept) == set(shuffled)


def test_duplicates_count_once(encoder):
    dataset = prompts(*QUESTIONS, *[QUESTIONS[0]] * 20)
    selection = BreadthSelector(0.4, encoder, n_clusters=3).select(dataset)
    assert (selection.rows, selection.prompts, selection.duplicates, selection.prompts_kept) == (35, 15, 20, 6)
    assert len(selection.kept) == 6
    assert selection.dataset["breadth_dropped"][15:] == ["duplicate"] * 20
    # Twenty copies of a prompt do not pull the centre towards it.
    alone = BreadthSelector(0.4, encoder, n_clusters=3).select(prompts(*QUESTIONS))
    assert set(selection.kept["prompt"]) == set(alone.kept["prompt"])
    assert selection.dataset["breadth_distance"][:15] == alone.dataset["breadth_distance"]


def test_several_rows_a_prompt(encoder):
    rows = [
        {"prompt": question, "chosen": f"answer {i}", "rejected": "no"} for question in QUESTIONS for i in range(3)
    ]
    selection = BreadthSelector(0.4, encoder).select(prompts(*rows, rows[0]))
    assert (selection.prompts, selection.prompts_kept, selection.duplicates) == (15, 6, 1)
    assert len(selection.kept) == 18 and len(set(selection.kept["prompt"])) == 6
    assert selection.dataset["breadth_dropped"][-1] == "duplicate"


def test_rows_that_differ_in_metadata_alone_are_duplicates(encoder):
    selection = BreadthSelector(1.0, encoder).select(
        prompts(*[{"prompt": QUESTIONS[0], "source": i} for i in range(2)], {"prompt": QUESTIONS[1], "source": 2})
    )
    assert selection.duplicates == 1 and selection.kept["source"] == [0, 2]


def test_conversations_system_prompts_and_tools(encoder):
    user = {"role": "user", "content": QUESTIONS[0]}
    system = {"role": "system", "content": "You are a pirate who only talks about ships and rum."}
    rows = [
        {"prompt": [user], "tools": None},
        {"prompt": [system, user], "tools": None},
        {"prompt": [user, {"role": "assistant", "content": "With care."}, {"role": "user", "content": "How long?"}]},
        {"prompt": [user], "tools": TOOLS},
        {"prompt": [user], "tools": []},
        *({"prompt": [{"role": "user", "content": question}], "tools": None} for question in QUESTIONS[1:6]),
    ]
    selection = BreadthSelector(1.0, encoder, n_clusters=1).select(prompts(*rows))
    # A system prompt, a history and tools each make another prompt; an empty list of tools does not.
    assert (selection.prompts, selection.duplicates) == (9, 1)
    assert len(set(selection.dataset["breadth_distance"][:4])) == 4
    texts = BreadthSelector(1.0, encoder, n_clusters=1).select(prompts(*QUESTIONS[:6]))
    conversations = BreadthSelector(1.0, encoder, n_clusters=1).select(prompts(rows[0], *rows[5:]))
    assert texts.dataset["breadth_distance"] == pytest.approx(conversations.dataset["breadth_distance"], abs=1e-6)


def test_over_long_prompts_are_embedded_by_their_last_tokens(encoder):
    filler = "the sea is wide and blue and cold " * 60
    long = [
        f"{start} {filler} {end}"
        for start, end in [("Cook", "fry an egg"), ("Code", "fry an egg"), ("Cook", "sort it")]
    ]
    selection = BreadthSelector(1.0, encoder, n_clusters=1).select(prompts(*long, *QUESTIONS))
    assert selection.over_long == 3
    cook, code, sort = selection.dataset["breadth_distance"][:3]
    assert cook == pytest.approx(code, abs=1e-6)
    assert abs(cook - sort) > 1e-4


def test_other_column_scope_and_seed(encoder):
    dataset = prompts(*QUESTIONS).rename_column("prompt", "question")
    selector = BreadthSelector(0.3, encoder, prompt_column="question", scope="overall", n_clusters=3, batch_size=4)
    rows = selector.select(dataset).dataset
    distances = np.asarray(rows["breadth_distance"])
    assert set(np.flatnonzero(rows["breadth_selected"])) == set(np.argsort(distances)[: budget(0.3, 15)])


def test_selecting_again_starts_afresh(encoder):
    first = BreadthSelector(0.3, encoder).select(prompts(*QUESTIONS))
    again = BreadthSelector(0.3, encoder).select(first.dataset)
    assert again.dataset.column_names == first.dataset.column_names
    assert again.dataset.to_dict() == first.dataset.to_dict()
    assert len(BreadthSelector(0.5, encoder).select(first.kept).kept) == 2


def test_embeddings_are_cached(encoder, tmp_path):
    prompts(*QUESTIONS).to_parquet(tmp_path / "data.parquet")

    def select(fraction):
        dataset = load_dataset("parquet", data_files=str(tmp_path / "data.parquet"), cache_dir=str(tmp_path / "cache"))
        return BreadthSelector(fraction, encoder).select(dataset["train"])

    def cached():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("cache-*.arrow")}

    first, files = select(0.3), cached()
    assert files
    assert select(0.3).dataset.to_dict() == first.dataset.to_dict()
    select(0.5)  # another budget needs no other embedding
    assert cached() == files


def test_errors(encoder):
    dataset = prompts(*QUESTIONS)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\]"):
            BreadthSelector(fraction, encoder)
    with pytest.raises(ValueError, match="`scope` must be one of"):
        BreadthSelector(0.5, encoder, scope="nearest")
    selector = BreadthSelector(0.5, encoder)
    with pytest.raises(ValueError, match="no `prompt` column, only .*'question'.*`prompt_column`"):
        selector.select(dataset.rename_column("prompt", "question"))
    with pytest.raises(ValueError, match="empty"):
        selector.select(dataset.select([]))
    with pytest.raises(ValueError, match="streaming"):
        selector.select(dataset.to_iterable_dataset())
    for empty in ("", None):
        with pytest.raises(ValueError, match="Row 2 has an empty `prompt`"):
            selector.select(prompts("a", "b", {"prompt": empty}))
    with pytest.raises(ValueError, match="Row 1 has an empty `prompt`"):
        selector.select(prompts({"prompt": [{"role": "user", "content": "a"}]}, {"prompt": []}))
    with pytest.raises(ValueError, match=r"`n_clusters=16` asks for more clusters than there are rows \(15\)"):
        BreadthSelector(0.5, encoder, n_clusters=16).select(prompts(*QUESTIONS, QUESTIONS[0]))


def test_without_the_extra():
    code = (
        "import sys; sys.modules['sentence_transformers'] = None\n"
        "from trl_bpo.breadth import BreadthSelector\n"
        "try:\n    BreadthSelector(0.5)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'trl_bpo[embeddings]'" in result.stdout, result.stderr


def test_saved_selection_is_read_back(encoder, tmp_path):
    long = "why " * 100
    dataset = prompts(*QUESTIONS, QUESTIONS[0], long)
    selection = BreadthSelector(0.4, encoder, n_clusters=3).select(dataset)
    selection.save(tmp_path / "_breadth")
    saved = RunFolder(tmp_path).breadth
    assert saved.prompts.equals(selection.by_prompt)
    table = saved.prompts.to_pandas().set_index("prompt_id")
    assert len(table) == selection.prompts == saved.metrics["prompts"]
    assert table["rows"].sum() == len(dataset) and table["duplicates"].sum() == selection.duplicates == 1
    for row in selection.dataset:
        here = table.loc[row["prompt_id"]]
        for name in ("breadth_cluster", "breadth_distance", "breadth_rank"):
            assert here[name] == row[name]
        assert here["prompt"] == row["prompt"][:200]
        # The copy of a prompt that is kept is dropped, the prompt is not.
        assert here["breadth_selected"] == row["breadth_selected"] or row["breadth_dropped"] == "duplicate"
    # All prompts are in the sample, at unit length; the map is the best plane through them.
    assert saved.sample.shape == (selection.prompts, 384)
    assert np.allclose(np.linalg.norm(saved.sample, axis=1), 1, atol=1e-5)
    centred = saved.sample - saved.sample.mean(axis=0)
    top = np.linalg.svd(centred, compute_uv=False)[:2]
    assert np.allclose(np.sqrt((table[["x", "y"]].to_numpy() ** 2).sum(axis=0)), top, rtol=1e-3)
    kept = sorted(set(selection.kept["prompt_id"]))
    assert saved.manifest["outputs"]["kept"] == hashlib.sha256("".join(kept).encode()).hexdigest()


def test_one_prompt_has_a_place_on_the_map(encoder, tmp_path):
    selection = BreadthSelector(1.0, encoder).select(prompts("only one"))
    selection.save(tmp_path / "_breadth")
    assert selection.by_prompt.select(["x", "y"]).to_pydict() == {"x": [0.0], "y": [0.0]}


def test_near_duplicates_do_not_take_part(encoder):
    near = [question.replace("how do I", "how can I") for question in QUESTIONS[:6]]
    dataset = prompts(*QUESTIONS, *near)
    selection = BreadthSelector(0.4, encoder, n_clusters=3, near_duplicate_threshold=0.95).select(dataset)
    rows = selection.dataset.to_list()
    assert selection.prompts == 21 and selection.near_duplicates == 6 and selection.duplicates == 0
    # The budget is that of those that are left.
    assert selection.prompts_kept == len(selection.kept) == budget(0.4, 15)
    for question, other in zip(rows[:6], rows[15:], strict=True):
        first, second = sorted([question, other], key=lambda row: row["prompt_id"])
        assert second["breadth_dropped"] == "near_duplicate" and first["breadth_dropped"] != "near_duplicate"
        assert [first[name] == second[name] for name in ("breadth_cluster", "breadth_distance", "breadth_rank")] == [
            True
        ] * 3
    # As if they had never been there.
    alone = BreadthSelector(0.4, encoder, n_clusters=3).select(
        prompts(*(row["prompt"] for row in rows if row["breadth_dropped"] != "near_duplicate"))
    )
    assert set(alone.kept["prompt_id"]) == set(selection.kept["prompt_id"])


def test_spherical_clusters(encoder):
    selection = BreadthSelector(0.4, encoder, n_clusters=3, metric="cosine").select(prompts(*QUESTIONS))
    assert adjusted_rand_score([row // 5 for row in range(15)], selection.dataset["breadth_cluster"]) > 0.6
    with pytest.raises(ValueError, match="`metric` must be one of"):
        BreadthSelector(0.4, encoder, metric="manhattan")
