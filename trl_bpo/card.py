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
import re
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from huggingface_hub import DatasetCard, DatasetCardData

from .bpo_config import SELECTION_OPTIONS
from .manifest import installed_versions, public_value
from .markdown import alt_text, code, escaped, hub_link, is_hub_id, number, one_line, table
from .report import gini, histogram_of
from .report.numbers import statistics


_TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md"
_TAGS = ["trl", "trl-bpo", "bpo", "preference", "dpo"]
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|code|multilingual")
_NOT_IN_PAPER = "not specified by the paper"

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


@dataclass
class CuratedCardData:
    """
    What the card of a curated dataset shows. When the card is written, all texts are escaped and cut at 300 characters, and
    of absolute paths only the last part is shown.

    Args:
        pretty_name (`str`):
            Title of the card.
        policy_model (`str`, *optional*):
            Name of the model that wrote the responses. Leave it out for pairs that were there before, such as those of
            humans: the card then says that it is not recorded. A Hub id becomes the `base_model` of the metadata.
        num_pairs (`int`):
            Number of preference pairs.
        num_prompts (`int`):
            Number of prompts with at least one pair.
        source_datasets (`list[str]`, *optional*, defaults to `[]`):
            Names of the datasets that the prompts come from. Those that are Hub ids are in the metadata.
        source_revision (`str`, *optional*):
            Revision of the source data.
        source_split (`str`, *optional*):
            Split of the source data.
        judge (`str`, *optional*):
            Name of the judge that scored the responses. Without it the card says that it is not recorded.
        license (`str`, *optional*):
            Licence of the dataset, as an identifier of the Hub, or several with commas between them. Any other text is in
            the metadata as the name of an `other` licence. None is ever assumed: without it the card says that the
            publisher has to set it.
        license_is_inherited (`bool`, *optional*, defaults to `False`):
            Whether that is the licence of the source data, and not one that the publisher asked for.
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
        language (`list[str]`, *optional*, defaults to `[]`):
            Languages of the data, as codes of the Hub. None is ever assumed.
        policy_revision (`str`, *optional*):
            Commit of the policy.
        statistics (`list[tuple[str, float | None, float | None]]`, *optional*, defaults to `[]`):
            Measure, its value over the pool, and over the pairs that were kept, see [`~report.statistics`].
        provenance (`dict[str, str]`, *optional*, defaults to `{}`):
            SHA-256 digests and commits of what the data was made from, by name.
        selections (`list[tuple[str, int, int]]`, *optional*, defaults to `[]`):
            Name of the configuration, optimizer step and number of pairs of each selection in the repository.
            [`push_run`] sets it.
        has_pool (`bool`, *optional*, defaults to `False`):
            Whether the repository has the pairs that were selected from. [`push_run`] sets it.
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
    license_is_inherited: bool = False
    repo_id: str | None = None
    date: str | None = None
    depth_strategy: str = "gradient"
    funnel: list[tuple[str, int, str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    setting_notes: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    pairs_per_prompt: dict[int, int] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=installed_versions)
    language: list[str] = field(default_factory=list)
    policy_revision: str | None = None
    selected_for: str | None = None
    statistics: list[tuple[str, float | None, float | None]] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    selections: list[tuple[str, int, int]] = field(default_factory=list)
    num_pool: int | None = None
    has_pool: bool = False

    def to_dict(self) -> dict[str, Any]:
        """
        The data as JSON has it.

        Returns:
            `dict[str, Any]`: Name of the field -> value.
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "CuratedCardData":
        """
        The data that [`~CuratedCardData.to_dict`] gave, also after JSON made texts of the numbers that are keys.

        Args:
            content (`dict[str, Any]`):
                Name of the field -> value.

        Returns:
            [`CuratedCardData`]: The data.
        """
        rows = {name: [tuple(row) for row in content[name]] for name in ("funnel", "statistics", "selections")}
        histogram = {int(kept): prompts for kept, prompts in content["pairs_per_prompt"].items()}
        return cls(**{**content, **rows, "pairs_per_prompt": histogram})


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


def _licence_fields(licence: str | None) -> dict[str, Any]:
    licence = one_line(licence or "")
    if not licence:
        return {}
    names = [name.strip().lower() for name in licence.split(",")]
    # The Hub takes no other names than its own, but lets an `other` licence have one.
    if not all(map(_LICENCE.fullmatch, names)):
        return {"license": "other", "license_name": licence}
    return {"license": names[0] if len(names) == 1 else names}


def _front_matter(data: CuratedCardData) -> dict[str, Any]:
    models = [name for name in (data.policy_model, data.selected_for) if is_hub_id(name)]
    models = list(dict.fromkeys(models))
    fields = {
        "pretty_name": one_line(data.pretty_name),
        "language": [name for name in data.language if _LANGUAGE.fullmatch(name)],
        **_licence_fields(data.license),
        "task_categories": ["text-generation"],
        "tags": _TAGS,
        "size_categories": [_size_category(data.num_pairs)],
        "source_datasets": [name for name in data.source_datasets if is_hub_id(name)],
        "base_model": models[0] if len(models) == 1 else models,
    }
    return {name: value for name, value in fields.items() if value}


def _overview(data: CuratedCardData) -> list[tuple[str, ...]]:
    unknown = "not recorded"
    policy = hub_link(data.policy_model) if data.policy_model else unknown
    if data.policy_revision:
        policy += f" at {code(data.policy_revision)}"
    licence = escaped(data.license) if data.license else "as in the metadata of this card"
    rows: list[tuple[str, ...]] = [
        ("Pairs", number(data.num_pairs) + (f" of {number(data.num_pool)}" if data.num_pool is not None else "")),
        ("Prompts", number(data.num_prompts)),
        ("Source data", ", ".join(hub_link(name, "datasets/") for name in data.source_datasets) or unknown),
        ("Source revision", code(data.source_revision) if data.source_revision else unknown),
        ("Source split", code(data.source_split) if data.source_split else unknown),
        ("Policy that wrote the responses", policy),
        ("Selected for", hub_link(data.selected_for) if data.selected_for else unknown),
        ("Judge", code(data.judge) if data.judge else unknown),
        ("Languages", ", ".join(map(code, data.language)) or unknown),
        ("Licence of the source data" if data.license and data.license_is_inherited else "Licence", licence),
    ]
    return [*rows, ("Date", escaped(data.date))] if data.date else rows


def _configurations(data: CuratedCardData) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    if data.selections:
        rows.append(("`default`", number(data.num_pairs), "the last selection"))
    rows += [(code(name), number(pairs), f"the selection at step {step:,}") for name, step, pairs in data.selections]
    if data.has_pool:
        pool = "–" if data.num_pool is None else number(data.num_pool)
        rows.append(("`pool`", pool, "what was selected from, with the `depth_*` columns of the last selection"))
    return rows


def _licence_note(data: CuratedCardData) -> str:
    if not data.license:
        return (
            "If the metadata of this card names no licence, the publisher has to set one. The licence of the source data and "
            "the terms of any models that wrote or judged the responses apply."
        )
    if data.license_is_inherited:
        return (
            "The licence is that of the source data. The terms of any models that wrote or judged the responses apply beside "
            "it."
        )
    return (
        "The licence of the source data and the terms of any models that wrote or judged the responses apply beside the "
        "licence named above."
    )


def _public(data: CuratedCardData) -> CuratedCardData:
    # Where files lie is nobody else's business, but for a place that the publisher tells the reader to load.
    return CuratedCardData.from_dict({**public_value(data.to_dict()), "repo_id": data.repo_id})


def _code_arguments(data: CuratedCardData, config_name: str, configs: list[dict[str, Any]]) -> str:
    # What stands inside a string of Python code is an ordinary name or a placeholder.
    repo_id = data.repo_id if data.repo_id and re.fullmatch(r"[\w./-]+", data.repo_id) else "path/to/this/folder"
    # Named where there are others, so that the code goes on working if one of these becomes the default.
    named = config_name != "default" or len(configs) > 1
    return f'"{repo_id}", "{config_name}"' if named else f'"{repo_id}"'


def create_dataset_card(
    features: Features,
    card_data: CuratedCardData,
    *,
    config_name: str = "default",
    pictures: dict[str, str] | None = None,
    configs: list[dict[str, Any]] | None = None,
) -> DatasetCard:
    """
    Write the card of a curated dataset. Names and texts of the data cannot break out of its front matter, Markdown or HTML.

    Args:
        features ([`~datasets.Features`]):
            Columns of the curated pairs.
        card_data ([`CuratedCardData`]):
            What the card shows.
        config_name (`str`, *optional*, defaults to `"default"`):
            Configuration of the dataset that the card describes.
        pictures (`dict[str, str]`, *optional*):
            Path beside the card -> alt text of each picture. Without them the card has the tables only.
        configs (`list[dict[str, Any]]`, *optional*):
            Configurations for the metadata: their names and files, as [`~datasets.load_dataset`] reads them.

    Returns:
        [`~huggingface_hub.DatasetCard`]: The card. To bring it together with the card that a repository has already, see
        [`~card_merge.merge_card`].
    """
    data, configs = _public(card_data), configs or []
    metadata = _front_matter(data) | ({"configs": configs} if configs else {})
    histogram, descriptions = data.pairs_per_prompt, {**_COLUMNS, **data.columns}
    model = data.selected_for or data.policy_model
    return DatasetCard.from_template(
        DatasetCardData(**metadata),
        template_path=str(_TEMPLATE),
        title=escaped(data.pretty_name),
        config_name=config_name,
        by_gradients=data.depth_strategy == "gradient",
        strategy=code(data.depth_strategy),
        overview_table=table(("Property", "Value"), _overview(data)),
        load_arguments=_code_arguments(data, config_name, configs),
        configs_table=table(("Configuration", "Pairs", "Content"), _configurations(data)),
        model=model if is_hub_id(model) else "path/to/the/policy",
        columns_table=table(
            ("Column", "Type", "Content"),
            [
                (code(name), code(_type(feature)), escaped(descriptions.get(name, "")))
                for name, feature in features.items()
            ],
        ),
        funnel_table=table(
            ("Stage", "Rows kept", "Note"),
            [(escaped(stage), number(rows), escaped(note)) for stage, rows, note in data.funnel],
        ),
        settings_table=table(
            ("Option", "Value", "Note"),
            [
                (code(name), code(value), escaped(data.setting_notes.get(name, "")))
                for name, value in data.settings.items()
            ],
        ),
        pictures=[(quote(one_line(path)), alt_text(alt)) for path, alt in (pictures or {}).items()],
        pairs_table=table(
            ("Pairs kept", "Prompts"), [(number(kept), number(prompts)) for kept, prompts in histogram.items()]
        ),
        mean=number(sum(kept * n for kept, n in histogram.items()) / max(1, sum(histogram.values()))),
        gini=number(gini(histogram)),
        statistics_table=table(
            ("Measure", "All pairs", "Kept pairs"),
            [
                (escaped(name), *("–" if value is None else number(float(value)) for value in values))
                for name, *values in data.statistics
            ],
        ),
        metrics_table=table(
            ("Measure", "Value"), [(escaped(name), number(value)) for name, value in data.metrics.items()]
        ),
        has_policy=bool(data.policy_model),
        has_judge=bool(data.judge),
        selected_for=hub_link(data.selected_for) if data.selected_for else "one policy",
        licence_note=_licence_note(data),
        provenance_table=table(
            ("What", "SHA-256, commit or name"),
            [(escaped(name), code(value)) for name, value in data.provenance.items()],
        ),
        has_manifest=bool(data.selections),
        versions_table=table(("Package", "Version"), [(code(name), code(v)) for name, v in data.versions.items()]),
    )


def _judge_of(dataset: Any) -> str | None:
    # Pairs that were built from saved scores say who gave them.
    if dataset.features.get("judge") not in (Value("string"), Value("large_string")):
        return None
    judges = dataset.select_columns("judge").with_format("arrow")[:]["judge"].unique().to_pylist()
    return judges[0] if len(judges) == 1 else None


def _digests(manifest: dict[str, Any]) -> dict[str, str]:
    inputs, outputs = manifest["inputs"], manifest["outputs"]
    digests = {
        "ids of all pairs": inputs.get("pool"),
        "ids of the kept pairs": outputs.get("kept"),
        "file of the kept pairs": outputs.get("train.parquet"),
        "commit of the model that they were selected for": inputs.get("model_commit"),
        "weights of that model": inputs.get("model_fingerprint"),
        "chat template": inputs.get("chat_template"),
    }
    return {name: value for name, value in digests.items() if value is not None}


def card_data_of_run(
    pool: Any,
    pool_table: pa.Table,
    selection: Any,
    manifest: dict[str, Any],
    args: Any,
    fields: dict[str, Any],
) -> CuratedCardData:
    """
    What a training knows of its curated dataset, for the card.

    Args:
        pool ([`PairPool`]):
            The pairs that they were selected from.
        pool_table (`pyarrow.Table`):
            Scores and lengths of these, see [`~selection_state.save_pool`].
        selection ([`DepthSelection`]):
            The selection.
        manifest (`dict[str, Any]`):
            Its manifest, see [`~selection_state.save_selection`].
        args ([`BPOConfig`]):
            Arguments of the run.
        fields (`dict[str, Any]`):
            Fields of [`CuratedCardData`] that a training cannot know. Those of `funnel`, `settings`, `setting_notes` and
            `provenance` add to what it knows, a `license` gives way to `curated_dataset_license`, and the others replace it.

    Returns:
        [`CuratedCardData`]: The data of the card.
    """
    fields, selected = dict(fields), np.asarray(selection.selected)
    histogram = histogram_of(pool.prompt_ids, selected)
    num_kept = int(selected.sum())
    funnel = list(fields.pop("funnel", [("pairs", pool.num_given, "as they came in")]))
    if dropped := pool.num_given - len(pool.pairs):
        funnel.append(("pairs that fit", len(pool.pairs), f"{dropped} whose prompt fills `max_length` dropped"))
    funnel.append(("pairs kept (depth)", num_kept, f"by {args.depth_strategy} at step {manifest['step']}"))
    model, notes = manifest["inputs"].get("model"), dict.fromkeys(SELECTION_OPTIONS, _NOT_IN_PAPER)
    del notes["seed"]
    if args.curated_dataset_license is not None:
        fields |= {"license": args.curated_dataset_license, "license_is_inherited": False}
    if model and fields.get("policy_model") == model:
        fields.setdefault("policy_revision", manifest["inputs"].get("model_commit"))
    data = CuratedCardData(
        pretty_name=f"Pairs that BPO kept for {Path(str(args.output_dir)).resolve().name}",
        depth_strategy=args.depth_strategy,
        num_pairs=num_kept,
        num_prompts=sum(histogram.values()) - histogram[0],
        num_pool=len(pool.pairs),
        judge=_judge_of(pool.pairs),
        selected_for=model,
        date=manifest["date"][:10],
        funnel=funnel,
        settings=fields.pop("settings", {}) | manifest["parameters"],
        setting_notes=notes | fields.pop("setting_notes", {}),
        metrics=dict(selection.metrics),
        pairs_per_prompt=histogram,
        statistics=statistics(pool_table, selected),
        provenance=fields.pop("provenance", {}) | _digests(manifest),
        versions=manifest["versions"],
    )
    return dataclasses.replace(data, **fields)
