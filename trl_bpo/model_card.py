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


"""What the card of a model trained with [`BPOTrainer`] says beside that of TRL."""

import re
from pathlib import Path

from huggingface_hub import ModelCard

from .markdown import code, hub_link, is_hub_id


_SECTION = re.compile(r"<!-- trl_bpo:begin -->.*?<!-- trl_bpo:end -->\n\n", re.DOTALL)
_NO_BASE_MODEL = "[None](https://huggingface.co/None)"
_PAPER = "[BPO](https://huggingface.co/papers/2411.10914)"


def _training_data(num_pairs: int, num_pool: int, strategy: str, curated_repo_id: str | None) -> str:
    if num_pairs == num_pool:
        lines = [f"All {num_pairs:,} preference pairs were trained on: none were selected."]
    else:
        share = f"{num_pairs:,} of {num_pool:,} preference pairs ({num_pairs / num_pool:.1%})"
        how = (
            f"those that lie nearest to the centres of clusters of their DPO gradients, which is the selection of {_PAPER}"
            if strategy == "gradient"
            else f"not by their gradients, as {_PAPER} has it, but by another rule, to compare with: {code(strategy)}"
        )
        lines = [f"The last selection kept {share}: {how}."]
    if curated_repo_id is not None:
        name = hub_link(curated_repo_id, "datasets/")
        lines.append(f"The curated dataset is {name}; its card tells how it was made.")
    return "\n".join(lines)


def add_training_data(
    path: str | Path,
    num_pairs: int,
    num_pool: int,
    *,
    strategy: str = "gradient",
    curated_repo_id: str | None = None,
) -> None:
    """
    Add to the model card that TRL wrote what the model was trained on: a section `Training data`, and the curated dataset
    among the `datasets` of the metadata. Called again it replaces what it added.

    Where TRL has no name for the base model or the model itself, since they are not on the Hub, the card says so in place of
    `None`.

    Args:
        path (`str` or `Path`):
            The `README.md`.
        num_pairs (`int`):
            Number of pairs that the last selection kept.
        num_pool (`int`):
            Number of pairs that it was made from. The same number says that there was none.
        strategy (`str`, *optional*, defaults to `"gradient"`):
            What the pairs were selected by, as `depth_strategy`.
        curated_repo_id (`str`, *optional*):
            Dataset repository of the curated pairs on the Hub.
    """
    card = ModelCard.load(path)
    text = _SECTION.sub("", card.text).replace(_NO_BASE_MODEL, "a model that is not on the Hub")
    text = text.replace('model="None"', 'model="path/to/this/model"')
    data = _training_data(num_pairs, num_pool, strategy, curated_repo_id)
    section = f"<!-- trl_bpo:begin -->\n## Training data\n\n{data}\n<!-- trl_bpo:end -->\n\n"
    before, heading, after = text.partition("## Training procedure\n")
    card.text = f"{before}{section}{heading}{after}" if heading else f"{text.rstrip()}\n\n{section}"
    if is_hub_id(curated_repo_id):
        datasets = card.data.get("datasets") or []
        datasets = [datasets] if isinstance(datasets, str) else datasets
        card.data.datasets = list(dict.fromkeys([*datasets, curated_repo_id]))
    card.save(path)
