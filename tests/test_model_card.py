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


import pytest
from huggingface_hub import ModelCard
from trl.trainer.utils import generate_model_card

from trl_bpo import BPOTrainer
from trl_bpo.model_card import add_training_data


def trl_card(path, base_model="org/base", dataset_name=None, hub_model_id="me/model"):
    """The card as TRL writes it for [`BPOTrainer`]."""
    paper = BPOTrainer._paper
    card = generate_model_card(
        base_model,
        "my-model",
        hub_model_id,
        dataset_name,
        ["trl", "dpo", "bpo"],
        wandb_url=None,
        trackio_url=None,
        trainer_name="BPO",
        trainer_citation=paper["citation"],
        paper_title=paper["title"],
        paper_id=paper["id"],
    )
    card.save(path)
    return card


def test_section_and_metadata(tmp_path):
    path = tmp_path / "README.md"
    before = trl_card(path, dataset_name="org/source")
    add_training_data(path, 502, 2009, curated_repo_id="me/kept")
    card = ModelCard.load(path)
    assert card.data.datasets == ["org/source", "me/kept"]
    assert {**card.data.to_dict(), "datasets": "org/source"} == before.data.to_dict()
    section = (
        "<!-- trl_bpo:begin -->\n## Training data\n\n"
        "The last selection kept 502 of 2,009 preference pairs (25.0%): those that lie nearest to the centres of clusters of "
        "their DPO gradients, which is the selection of [BPO](https://huggingface.co/papers/2411.10914).\n"
        "The curated dataset is [`me/kept`](https://huggingface.co/datasets/me/kept); its card tells how it was made.\n"
        "<!-- trl_bpo:end -->\n\n"
    )
    assert section + "## Training procedure\n" in card.text
    # The rest is TRL's.
    assert card.text.replace(section, "") == before.text


def test_again_replaces_what_was_added(tmp_path):
    path = tmp_path / "README.md"
    trl_card(path)
    add_training_data(path, 1, 10, curated_repo_id="me/kept")
    add_training_data(path, 5, 10, curated_repo_id="me/kept")
    again = path.read_text()
    assert again.count("## Training data") == 1 and "5 of 10" in again and "1 of 10" not in again
    assert ModelCard(again).data.datasets == ["me/kept"]
    add_training_data(path, 5, 10, curated_repo_id="me/kept")
    assert path.read_text() == again


@pytest.mark.parametrize("dataset_name", [None, "org/source"])
def test_a_model_that_is_not_on_the_hub(tmp_path, dataset_name):
    path = tmp_path / "README.md"
    trl_card(path, base_model=None, hub_model_id=None, dataset_name=dataset_name)
    assert "[None](https://huggingface.co/None)" in path.read_text() and 'model="None"' in path.read_text()
    add_training_data(path, 5, 10)
    text = path.read_text()
    assert "None" not in text
    assert "This model is a fine-tuned version of a model that is not on the Hub" in text
    assert ModelCard(text).data.get("datasets") == dataset_name


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(num_pairs=10, num_pool=10), "All 10 preference pairs were trained on: none were selected."),
        (dict(num_pairs=1, num_pool=8, strategy="random"), "but by another rule, to compare with: `random`."),
        (dict(num_pairs=1, num_pool=8, curated_repo_id="kept"), "The curated dataset is `kept`;"),
    ],
)
def test_other_cases(tmp_path, arguments, expected):
    path = tmp_path / "README.md"
    trl_card(path)
    add_training_data(path, **arguments)
    card = ModelCard.load(path)
    assert expected in card.text
    assert "datasets" not in card.data.to_dict()


def test_a_card_of_another_shape(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\ndatasets:\n- a/b\n---\n# Mine\n")
    for _ in range(2):
        add_training_data(path, 5, 10, curated_repo_id="me/kept")
    card = ModelCard.load(path)
    assert card.data.datasets == ["a/b", "me/kept"]
    assert card.text.startswith("# Mine\n\n<!-- trl_bpo:begin -->\n## Training data\n")
    assert card.text.count("Training data") == 1
