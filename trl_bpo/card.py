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

"""The card of a curated dataset."""

import dataclasses
import html
import re
from dataclasses import KW_ONLY, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset, List, Value
from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
)

from .report import gini, pairs_per_prompt


_TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md"
_TAGS = ["trl", "bpo", "preference", "dpo"]

_COLUMNS = {
    "prompt": "What the policy was asked",
    "chosen": "The better response",
    "rejected": "The worse response",
    "tools": "Tool schemas that come with the prompt",
    "prompt_id": "SHA-256 of the prompt: the same prompt has the same id in every dataset",
    "pair_id": "SHA-256 of the prompt and both responses",
    "judge": "Who scored the responses",
    "chosen_truncated": "Whether the better response was cut at the token limit",
    "rejected_truncated": "Whether the worse response was cut at the token limit",
    "score_chosen": "Score of the better response",
    "score_rejected": "Score of the worse response",
    "breadth_cluster": "Cluster of the prompt's embedding",
    "breadth_distance": "Distance of the prompt's embedding to the centre of its cluster",
    "breadth_rank": "Rank of the prompt by that distance, the nearest first",
    "breadth_selected": "Whether the prompt was kept",
    "depth_cluster": "Cluster of the pair's feature",
    "depth_distance": "Distance of the pair's feature to the centre of its cluster",
    "depth_score": "Score of the pair by which the highest were kept",
    "depth_rank": "Rank of the pair: by that distance in its cluster, the nearest first, or by its score",
    "depth_selected": "Whether the pair was kept",
}


def _package_versions() -> dict[str, str]:
    return {name: version(name) for name in ("trl_bpo", "trl", "transformers", "datasets", "torch")}


@dataclass
class CuratedCardData:
    """
    What the card of a curated dataset shows. All texts are escaped when the card is written.

    Args:
        pretty_name (`str`):
            Title of the card.
        policy_model (`str`, *optional*):
            Name of the model that wrote the responses. Leave it out for pairs that were there before, such as those of
            humans: the card then says that it is not recorded.
        num_pairs (`int`):
            Number of preference pairs.
        num_prompts (`int`):
            Number of prompts with at least one pair.
        source_datasets (`list[str]`, *optional*, defaults to `[]`):
            Names of the datasets that the prompts come from.
        source_revision (`str`, *optional*):
            Revision of the source data.
        source_split (`str`, *optional*):
            Split of the source data.
        judge (`str`, *optional*):
            Name of the judge that scored the responses. Without it the card says that it is not recorded.
        license (`str`, *optional*):
            Licence of the dataset, as an identifier of the Hub. None is ever assumed: without it the card says that the
            licence of the source data applies and that the publisher has to set it.
        repo_id (`str`, *optional*):
            Repository that the card tells the reader to load. [`push_curated_dataset`] sets it.
        date (`str`, *optional*):
            When the data was made.
        depth_strategy (`str`, *optional*, defaults to `"gradient"`):
            What the pairs were selected by. Any other than that of the paper is named in the first lines of the card.
        funnel (`list[tuple[str, int, str]]`, *optional*, defaults to `[]`):
            Stage, rows kept and note, in the order of the stages.
        settings (`dict[str, Any]`, *optional*, defaults to `{}`):
            Options of the run and their values.
        setting_notes (`dict[str, str]`, *optional*, defaults to `{}`):
            Notes on some of the `settings`, such as that the paper does not specify them.
        metrics (`dict[str, Any]`, *optional*, defaults to `{}`):
            Measurements of the selection, such as the variance that the clusters explain beside that of Gaussian data
            with the same covariance.
        pairs_per_prompt (`dict[int, int]`, *optional*, defaults to `{}`):
            Number of kept pairs -> number of prompts, see [`~trl_bpo.report.pairs_per_prompt`].
        columns (`dict[str, str]`, *optional*, defaults to `{}`):
            Descriptions of columns. The columns that `trl_bpo` writes have one already.
        versions (`dict[str, str]`, *optional*):
            Versions of the packages. Defaults to the installed versions of `trl_bpo`, `trl`, `transformers`, `datasets`
            and `torch`.
    """

    pretty_name: str
    policy_model: str | None = None
    _: KW_ONLY
    num_pairs: int
    num_prompts: int
    source_datasets: list[str] = field(default_factory=list)
    source_revision: str | None = None
    source_split: str | None = None
    judge: str | None = None
    license: str | None = None
    repo_id: str | None = None
    date: str | None = None
    depth_strategy: str = "gradient"
    funnel: list[tuple[str, int, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    setting_notes: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    pairs_per_prompt: dict[int, int] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=_package_versions)
    language: list[str] = field(default_factory=list)
    policy_revision: str | None = None
    statistics: list[tuple[str, float | None, float | None]] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    selections: list[tuple[str, int, int]] = field(default_factory=list)
    has_pool: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "CuratedCardData":
        content = dict(content)
        content["pairs_per_prompt"] = {int(k): v for k, v in content["pairs_per_prompt"].items()}
        for name in ("funnel", "statistics", "selections"):
            content[name] = [tuple(row) for row in content[name]]
        return cls(**content)


def _one_line(value: Any) -> str:
    # Names come from files, servers and models. A line break would end a table row or the front matter; control and
    # direction characters would show something else than what is written.
    return "".join(char for char in " ".join(str(value).split()) if char.isprintable())


def _text(value: Any) -> str:
    # HTML entities for what opens HTML, code or a table cell, since every renderer knows them; backslashes for the
    # rest of Markdown's punctuation, which keeps the source of the card readable.
    escaped = re.sub(r"([\\*_\[\]~$])", r"\\\1", _one_line(value))
    return html.escape(escaped, quote=False).replace("|", "&#124;").replace("`", "&#96;")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _name(value)


def _name(name: Any) -> str:
    # Ordinary names are shown as code. What contains anything else is shown as escaped text.
    name = _one_line(name)
    return f"`{name}`" if re.fullmatch(r"[\w./:@+=,{}()' -]+", name) else _text(name)


def _literal(name: str | None, otherwise: str) -> str:
    # What stands inside a string of the card's Python code is an ordinary name or a placeholder.
    return name if name and re.fullmatch(r"[\w./-]+", name) else otherwise


def _table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [heading, tuple("---" for _ in heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _type(feature: Any) -> str:
    if isinstance(feature, Value):
        return feature.dtype
    if isinstance(feature, List):
        return f"list of {_type(feature.feature)}"
    if isinstance(feature, dict):
        return "{" + ", ".join(f"{key}: {_type(value)}" for key, value in feature.items()) + "}"
    return type(feature).__name__


def _size_category(num_rows: int) -> str:
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for bound, name in bounds if num_rows < bound), "n>10M")


def _overview(data: CuratedCardData) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("Pairs", _value(data.num_pairs)),
        ("Prompts", _value(data.num_prompts)),
        ("Source data", ", ".join(map(_name, data.source_datasets)) or "not recorded"),
        ("Source revision", _name(data.source_revision) if data.source_revision else "not recorded"),
        ("Source split", _name(data.source_split) if data.source_split else "not recorded"),
        ("Policy that wrote the responses", _name(data.policy_model) if data.policy_model else "not recorded"),
        ("Judge", _name(data.judge) if data.judge else "not recorded"),
        ("Licence", _text(data.license) if data.license else "not set"),
    ]
    return [*rows, ("Date", _text(data.date))] if data.date else rows


def create_dataset_card(
    features: Any,
    card_data: CuratedCardData,
    *,
    config_name: str = "default",
    pictures: dict[str, str] | None = None,
    metadata: dict[str, Any] | None = None,
    configs: list[dict[str, Any]] | None = None,
) -> DatasetCard:
    """
    Write the card of a curated dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            The curated pairs. Size and columns are read from it.
        card_data ([`CuratedCardData`]):
            What the card shows.
        config_name (`str`, *optional*, defaults to `"default"`):
            Configuration of the dataset that the card describes.
        picture (`str`, *optional*):
            Path, beside the card, of the picture of the pairs per prompt. Without it the card has the table only.
        metadata (`dict[str, Any]`, *optional*):
            Fields for the front matter that the card does not set itself, such as the `configs` and `dataset_info` of
            an earlier card. Its tags are kept, and so is its licence if `card_data` has none.

    Returns:
        [`~huggingface_hub.DatasetCard`]: The card.
    """
    metadata = metadata or {}
    # A card that was edited by hand may name several licences.
    license = metadata.get("license") if card_data.license is None else _one_line(card_data.license)
    data = dataclasses.replace(card_data, license=", ".join(license) if isinstance(license, list) else license)
    fields = {
        "pretty_name": _one_line(data.pretty_name),
        "tags": list(dict.fromkeys([*metadata.get("tags", []), *_TAGS])),
        "task_categories": ["text-generation"],
        "size_categories": [_size_category(card_data.num_pairs)],
    }
    if license:
        fields["license"] = license
    if configs:
        fields["configs"] = configs
    descriptions = {**_COLUMNS, **data.columns}
    histogram = data.pairs_per_prompt
    arguments = [f'"{_literal(data.repo_id, "path/to/this/folder")}"']
    if config_name != "default":
        arguments.append(f'"{config_name}"')
    bars = "; ".join(f"{kept}: {prompts:,}" for kept, prompts in histogram.items())
    return DatasetCard.from_template(
        DatasetCardData(**{**metadata, **fields}),
        template_path=str(_TEMPLATE),
        title=_text(data.pretty_name),
        config_name=config_name,
        strategy=None if data.depth_strategy == "gradient" else _name(data.depth_strategy),
        overview_table=_table(("Property", "Value"), _overview(data)),
        funnel_table=_table(
            ("Stage", "Rows kept", "Note"),
            [(_text(stage), _value(rows), _text(note)) for stage, rows, note in data.funnel],
        ),
        settings_table=_table(
            ("Option", "Value", "Note"),
            [
                (_name(key), _value(value), _text(data.setting_notes.get(key, "")))
                for key, value in data.settings.items()
            ],
        ),
        metrics_table=_table(
            ("Measure", "Value"), [(_text(key), _value(value)) for key, value in data.metrics.items()]
        ),
        pairs_table=_table(
            ("Pairs kept", "Prompts"), [(_value(kept), _value(prompts)) for kept, prompts in histogram.items()]
        ),
        picture=next(iter(pictures), None) if pictures else None,
        picture_alt=f"Bar chart of the prompts by the number of pairs that they kept ({bars})",
        mean=_value(sum(kept * n for kept, n in histogram.items()) / max(1, sum(histogram.values()))),
        gini=_value(gini(histogram)),
        columns_table=_table(
            ("Column", "Type", "Content"),
            [
                (_name(name), _name(_type(feature)), _text(descriptions.get(name, "")))
                for name, feature in features.items()
            ],
        ),
        load_arguments=", ".join(arguments),
        model=_literal(data.policy_model, "path/to/the/policy"),
        has_policy=bool(data.policy_model),
        has_judge=bool(data.judge),
        licence_note="The licence of the source data and the terms of any models that wrote or judged the responses "
        + ("apply beside the licence named above." if data.license else "apply; the publisher has to set a licence."),
        versions_table=_table(("Package", "Version"), [(_name(k), _name(v)) for k, v in data.versions.items()]),
    )


def merge_card(existing: str | None, card: DatasetCard, dropped_configs: set[str] = frozenset()) -> DatasetCard:
    return card


def card_data_of_run(pool: Any, pool_table: Any, selection: Any, manifest: Any, args: Any, fields: dict) -> CuratedCardData:
    dataset = selection.kept(pool.pairs)
    kept, fields = list(map(str, dataset["prompt_id"])), dict(fields)
    funnel = list(fields.pop("funnel", [("pairs", pool.num_given, "as they came in")]))
    if dropped := pool.num_given - len(pool.pairs):
        funnel.append(("pairs that fit", len(pool.pairs), f"{dropped} whose prompt fills `max_length` dropped"))
    data = CuratedCardData(
        pretty_name=f"Pairs that BPO kept for {Path(str(args.output_dir)).name}",
        depth_strategy=args.depth_strategy,
        num_pairs=len(kept),
        num_prompts=len(set(kept)),
        funnel=[*funnel, ("pairs kept (depth)", len(kept), f"by {args.depth_strategy} at step {manifest['step']}")],
        settings=fields.pop("settings", {}) | manifest["parameters"],
        license=args.curated_dataset_license,
        metrics=dict(selection.metrics),
        pairs_per_prompt=pairs_per_prompt(pool.prompt_ids, kept),
    )
    return dataclasses.replace(data, **fields)
