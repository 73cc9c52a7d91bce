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
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from huggingface_hub import (
    DatasetCard,
    DatasetCardData,
)

from .bpo_config import SELECTION_OPTIONS
from .report import gini, pairs_per_prompt, statistics


if TYPE_CHECKING:
    from .depth import DepthSelection
    from .pool import PairPool


_BREADTH_OPTIONS = ("breadth_fraction", "breadth_clusters", "breadth_scope", "breadth_encoder", "num_responses", "temperature")
_TEMPLATE = Path(__file__).parent / "templates" / "dataset_card.md"
_TAGS = ["trl", "trl-bpo", "bpo", "preference", "dpo"]
# What stands between them is ours to replace; what a publisher wrote around them stays.
_BEGIN, _END = "<!-- trl_bpo:begin -->", "<!-- trl_bpo:end -->"
_NOT_PARQUET = r"\.(jsonl?|csv|tsv|txt|arrow|zip|gz|tar)\b"
# No name is longer. What is comes from data, and would bury the card.
_MAX_CHARACTERS = 300

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
        """
        The fields as JSON has them.

        Returns:
            `dict[str, Any]`: Field -> value.
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "CuratedCardData":
        """
        The data that [`~CuratedCardData.to_dict`] gave, after JSON.

        Args:
            content (`dict[str, Any]`):
                Field -> value.

        Returns:
            [`CuratedCardData`]: The data.
        """
        tables = {name: [tuple(row) for row in content[name]] for name in ("funnel", "statistics", "selections")}
        # JSON has no numbers as keys.
        histogram = {int(kept): prompts for kept, prompts in content["pairs_per_prompt"].items()}
        return cls(**{**content, **tables, "pairs_per_prompt": histogram})


def _one_line(value: Any) -> str:
    # Names come from files, servers and models. A line break would end a table row or the front matter; control and
    # direction characters would show something else than what is written.
    text = str(value)[: 10 * _MAX_CHARACTERS]
    text = "".join(char for char in " ".join(text.split()) if char.isprintable())
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"


def _text(value: Any) -> str:
    # HTML entities for what opens HTML, code or a table cell, since every renderer knows them; backslashes for the
    # rest of Markdown's punctuation, which keeps the source of the card readable.
    escaped = re.sub(r"([\\*_\[\]~$])", r"\\\1", _one_line(value))
    return html.escape(escaped, quote=False).replace("|", "&#124;").replace("`", "&#96;")


def _value(value: Any) -> str:
    if value is None:
        return ""
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


def _hub_ids(names: list[str]) -> list[str]:
    # A name without a namespace may as well be that of a file.
    return [name for name in names if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, flags=re.ASCII)]


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
        *([("Commit of the policy", _name(data.policy_revision))] if data.policy_revision else []),
        ("Judge", _name(data.judge) if data.judge else "not recorded"),
        ("Licence", _text(data.license) if data.license else "not set"),
    ]
    return [*rows, ("Date", _text(data.date))] if data.date else rows


def _configurations(data: CuratedCardData) -> list[tuple[str, ...]]:
    # A repository with one configuration needs no table.
    if not data.selections:
        return []
    rows = [("`default`", _value(data.selections[-1][2]), f"the last selection, at step {data.selections[-1][1]}")]
    rows += [(_name(name), _value(pairs), f"selection at step {step}") for name, step, pairs in data.selections]
    if data.has_pool:
        note = "all pairs that were selected from, with the columns of the last selection"
        rows.append(("`pool`", "", note))
    return rows


def create_dataset_card(
    features: Features,
    card_data: CuratedCardData,
    *,
    config_name: str = "default",
    pictures: dict[str, str] | None = None,
    configs: list[dict[str, Any]] | None = None,
) -> DatasetCard:
    """
    Write the card of a curated dataset.

    Args:
        features ([`~datasets.Features`]):
            Columns of the curated pairs and their types.
        card_data ([`CuratedCardData`]):
            What the card shows.
        config_name (`str`, *optional*, defaults to `"default"`):
            Configuration of the dataset that the card describes.
        pictures (`dict[str, str]`, *optional*):
            Path, beside the card, of each picture -> its alt text.
        configs (`list[dict[str, Any]]`, *optional*):
            Configurations of the repository and their files, for the front matter.

    Returns:
        [`~huggingface_hub.DatasetCard`]: The card.
    """
    data = card_data
    fields: dict[str, Any] = {
        "pretty_name": _one_line(data.pretty_name),
        "tags": _TAGS,
        "task_categories": ["text-generation"],
        "size_categories": [_size_category(data.num_pairs)],
    }
    if data.license is not None:
        fields["license"] = _one_line(data.license)
    if data.language:
        fields["language"] = [_one_line(language) for language in data.language]
    if sources := _hub_ids(data.source_datasets):
        fields["source_datasets"] = sources
    if data.policy_model and (base := _hub_ids([data.policy_model])):
        fields["base_model"] = base[0]
    if configs:
        fields["configs"] = configs
    descriptions = {**_COLUMNS, **data.columns}
    histogram = data.pairs_per_prompt
    arguments = [f'"{_literal(data.repo_id, "path/to/this/folder")}"']
    if config_name != "default":
        arguments.append(f'"{config_name}"')
    return DatasetCard.from_template(
        DatasetCardData(**fields),
        template_path=str(_TEMPLATE),
        begin=_BEGIN,
        end=_END,
        title=_text(data.pretty_name),
        config_name=config_name,
        strategy=None if data.depth_strategy == "gradient" else _name(data.depth_strategy),
        overview_table=_table(("Property", "Value"), _overview(data)),
        configs_table=_table(("Configuration", "Pairs", "Content"), _configurations(data)),
        funnel_table=_table(
            ("Stage", "Rows kept", "Note"),
            [(_text(stage), _value(rows), _text(note)) for stage, rows, note in data.funnel],
        ),
        settings_table=_table(
            ("Option", "Value", "Note"),
            [
                (_name(key), _name(value), _text(data.setting_notes.get(key, "")))
                for key, value in data.settings.items()
            ],
        ),
        statistics_table=_table(
            ("Measure", "Pool", "Kept"),
            [(_text(measure), _value(pool), _value(kept)) for measure, pool, kept in data.statistics],
        ),
        metrics_table=_table(
            ("Measure", "Value"), [(_text(key), _value(value)) for key, value in data.metrics.items()]
        ),
        provenance_table=_table(
            ("What", "SHA-256 or commit"), [(_text(key), _name(value)) for key, value in data.provenance.items()]
        ),
        pairs_table=_table(
            ("Pairs kept", "Prompts"), [(_value(kept), _value(prompts)) for kept, prompts in histogram.items()]
        ),
        pictures=[(path, _text(alt)) for path, alt in (pictures or {}).items()],
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


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def merge_card(existing: str | None, card: DatasetCard, dropped_configs: Collection[str] = ()) -> DatasetCard:
    """
    Put a card in the place of one that is in the repository, and keep what is not ours.

    Fields of the front matter that our card does not have stay, `license` and `language` among them; tags are added to. Of
    `configs` and `dataset_info` the entries of other configurations stay. Text around the section of `trl_bpo` stays; a
    card that has none gets it at its end.

    Args:
        existing (`str`, *optional*):
            The card in the repository, `None` if there is none.
        card ([`~huggingface_hub.DatasetCard`]):
            Our card.
        dropped_configs (`Collection[str]`, *optional*):
            Configurations that are no longer in the repository.

    Returns:
        [`~huggingface_hub.DatasetCard`]: The card to push.

    Raises:
        `ValueError`: If the front matter of the card in the repository cannot be read, or if the repository has data in
            another format.
    """
    if existing is None:
        return card
    try:
        old = DatasetCard(existing)
        theirs, ours = old.data.to_dict(), card.data.to_dict()
        for name, values in {"tags": theirs.get("tags"), "source_datasets": theirs.get("source_datasets")}.items():
            if values or name in ours:
                ours[name] = list(dict.fromkeys([*_as_list(values), *ours.get(name, [])]))
        replaced = {config["config_name"] for config in ours.get("configs", [])} | set(dropped_configs)
        others = [one for one in _as_list(theirs.pop("configs", None)) if one.get("config_name") not in replaced]
        # `load_dataset` goes by the features that are listed for a configuration, whatever its files hold.
        infos = theirs.pop("dataset_info", None)
        kept = [one for one in _as_list(infos) if one.get("config_name", "default") not in replaced]
    except Exception as error:
        raise ValueError(
            f"The front matter of the `README.md` in the repository cannot be read: {error}\nMend it or delete the file, "
            "then push again. It was not overwritten."
        ) from error
    if foreign := [one["config_name"] for one in others if re.search(_NOT_PARQUET, str(one.get("data_files")))]:
        raise ValueError(
            f"The repository has configurations of another format than Parquet: {foreign}. `load_dataset` reads all of a "
            "repository in one format, so that either they or the pushed data could not be loaded any more. Push to "
            "another repository."
        )
    metadata = {**theirs, **ours}
    if others or "configs" in ours:
        metadata["configs"] = [*others, *ours.get("configs", [])]
    if kept:
        # A lone entry stands in the card without a list.
        metadata["dataset_info"] = kept if isinstance(infos, list) else kept[0]
    before, begin, rest = old.text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        before, after = (old.text.rstrip() + "\n\n" if old.text.strip() else ""), "\n"
    _, begin, rest = card.text.partition(_BEGIN)
    section, end, _ = rest.partition(_END)
    front = DatasetCardData(**metadata).to_yaml()
    return DatasetCard(f"---\n{front}\n---\n{before.lstrip()}{begin}{section}{end}{after}")


def card_data_of_run(
    pool: "PairPool",
    pool_table: pa.Table,
    selection: "DepthSelection",
    manifest: dict[str, Any],
    args: Any,
    fields: dict[str, Any],
) -> CuratedCardData:
    """
    What a training knows of a selection, for its card.

    Args:
        pool ([`~pool.PairPool`]):
            The pairs that were selected from.
        pool_table (`pyarrow.Table`):
            What is known of them, see [`~selection_state.save_pool`].
        selection ([`DepthSelection`]):
            The selection.
        manifest (`dict[str, Any]`):
            Its manifest.
        args ([`BPOConfig`]):
            Arguments of the run.
        fields (`dict[str, Any]`):
            Fields of [`CuratedCardData`] that a training cannot know. They add to those of `funnel`, `settings` and
            `provenance` and replace the others.

    Returns:
        [`CuratedCardData`]: The data of the card.
    """
    fields, inputs = dict(fields), manifest["inputs"]
    kept = [pool.prompt_ids[row] for row in np.flatnonzero(selection.selected)]
    # Pairs that were built from saved scores say who gave them.
    if "judge" in pool.pairs.column_names:
        judges = pool.pairs.unique("judge")
        if len(judges) == 1 and isinstance(judges[0], str):
            fields.setdefault("judge", judges[0])
    funnel = list(fields.pop("funnel", [("pairs", pool.num_given, "as they came in")]))
    if dropped := pool.num_given - len(pool.pairs):
        funnel.append(("pairs that fit", len(pool.pairs), f"{dropped} whose prompt fills `max_length` dropped"))
    provenance = {
        "ids of the pairs that were selected from": inputs["pool"],
        "ids of the pairs that were kept": manifest["outputs"]["kept"],
        "chat template": inputs["chat_template"],
        "commit of the model that was trained": inputs["model_commit"],
        "model that the gradients were taken of": inputs.get("model_fingerprint"),
    }
    settings = {"model": inputs["model"], **manifest["parameters"], "processes": inputs["num_processes"]}
    data = CuratedCardData(
        pretty_name=f"Pairs that BPO kept for {Path(str(args.output_dir)).name}",
        depth_strategy=args.depth_strategy,
        num_pairs=len(kept),
        num_prompts=len(set(kept)),
        license=args.curated_dataset_license,
        date=manifest["date"],
        funnel=[*funnel, ("pairs kept (depth)", len(kept), f"by {args.depth_strategy} at step {manifest['step']}")],
        settings=fields.pop("settings", {}) | settings,
        setting_notes=dict.fromkeys((*SELECTION_OPTIONS, *_BREADTH_OPTIONS), "not specified by the paper") | {"seed": ""},
        metrics=dict(selection.metrics),
        statistics=statistics(pool_table, selection.selected),
        pairs_per_prompt=pairs_per_prompt(pool.prompt_ids, kept),
        versions=manifest["versions"],
        provenance=fields.pop("provenance", {}) | {name: value for name, value in provenance.items() if value},
    )
    if args.curated_dataset_license is not None:
        fields.pop("license", None)
    return dataclasses.replace(data, **fields)
