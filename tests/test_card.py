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
import random
import re

import numpy as np
import pyarrow as pa
import pytest
import yaml
from datasets import Dataset, Features, List, Value
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from pairs import config

from trl_bpo import DepthSelector
from trl_bpo.card import CuratedCardData, card_data_of_run, create_dataset_card
from trl_bpo.card_merge import merge_card
from trl_bpo.manifest import public_value, write_manifest
from trl_bpo.markdown import is_hub_id, one_line
from trl_bpo.pool import PairPool


MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {
        "prompt": MESSAGES,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "score_chosen": Value("float64"),
        "topic": Value("string"),
    }
)
CONFIGS = [
    {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}], "default": True},
    {"config_name": "step-000000", "data_files": [{"split": "train", "path": "step-000000/train-*"}]},
    {"config_name": "step-000012", "data_files": [{"split": "train", "path": "step-000012/train-*"}]},
    {"config_name": "pool", "data_files": [{"split": "train", "path": "pool/train-*"}]},
]
PICTURES = {
    "pairs_per_prompt.png": "Bar chart of the prompts by the number of pairs that they kept (0: 1,500; 1: 1; 3: 1)",
    "clusters.png": "Bar chart of the 3 clusters of pairs by size",
    "prompt_map.png": "Map of 1,502 prompts",
}


def make_card_data(**kwargs):
    defaults = dict(
        pretty_name="Arena pairs",
        policy_model="org/policy-1B",
        policy_revision="c0ffee",
        selected_for="org/policy-1B",
        num_pairs=4,
        num_prompts=2,
        num_pool=2009,
        source_datasets=["org/source", "prompts.jsonl"],
        source_revision="abc123",
        source_split="train[:10%]",
        judge="gpt-4.1",
        language=["en", "de"],
        license="cc-by-4.0",
        date="2026-05-04",
        funnel=[("source", 61135, "rows read"), ("breadth", 6113, "nearest to their centres"), ("depth", 4, "")],
        settings={"breadth_fraction": 0.123456, "num_responses": 4000, "normalize": True, "seed": None},
        setting_notes={"num_responses": "not specified by the paper"},
        metrics={"variance_explained": 0.054321, "variance_explained_gaussian": 0.061, "n_clusters": 32.0},
        pairs_per_prompt={0: 1500, 1: 1, 3: 1},
        statistics=[("score of the chosen response, mean", 7.25, 8.5), ("tokens, median", None, 81.0)],
        provenance={"template of the judge": "ab" * 32, "chat template": "cd" * 32},
        selections=[("step-000000", 0, 5), ("step-000012", 12, 4)],
        has_pool=True,
        repo_id="me/kept",
        columns={"topic": "Topic of the source row"},
        versions={"trl_bpo": "0.1.0", "trl": "1.16.0"},
    )
    return CuratedCardData(**{**defaults, **kwargs})


def make_card(features=FEATURES, configs=None, pictures=None, config_name="default", **kwargs):
    data = make_card_data(**kwargs)
    return create_dataset_card(features, data, config_name=config_name, configs=configs, pictures=pictures)


def split_card(card):
    _, front_matter, body = str(card).split("---\n", 2)
    return yaml.safe_load(front_matter), body


def sections(body):
    parts = re.split(r"^##+ (.+)$", body, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def table(text):
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return rows[:1] + rows[2:]


WHOLE_CARD = r"""---
language:
- en
- de
license: cc-by-4.0
size_categories:
- n<1K
source_datasets:
- org/source
task_categories:
- text-generation
pretty_name: Arena pairs
tags:
- trl
- trl-bpo
- bpo
- preference
- dpo
base_model: org/policy-1B
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  default: true
- config_name: step-000000
  data_files:
  - split: train
    path: step-000000/train-*
- config_name: step-000012
  data_files:
  - split: train
    path: step-000012/train-*
- config_name: pool
  data_files:
  - split: train
    path: pool/train-*
---

<!-- trl_bpo:begin - written by trl_bpo, anew at every push. Your own words are safe before and after it. -->

# Arena pairs

Preference pairs curated with **Balanced Preference Optimization (BPO)**, the method of
[BPO: Towards Balanced Preference Optimization between Knowledge Breadth and Depth in Alignment](https://huggingface.co/papers/2411.10914),
by `trl_bpo`, an extension of [TRL](https://huggingface.co/docs/trl).

A preference dataset usually has many prompts with one pair each. BPO spends the same number of pairs differently:
it keeps fewer, representative prompts (*breadth*: prompt embeddings are clustered and the prompts nearest to the
centres stay), collects several responses and pairs for each of them, and keeps the pairs that lie nearest to the
centres of clusters of their DPO gradients (*depth*). How many pairs a prompt keeps is the outcome, not a setting.

| Property | Value |
| --- | --- |
| Pairs | 4 of 2,009 |
| Prompts | 2 |
| Source data | [`org/source`](https://huggingface.co/datasets/org/source), `prompts.jsonl` |
| Source revision | `abc123` |
| Source split | `train[:10%]` |
| Policy that wrote the responses | [`org/policy-1B`](https://huggingface.co/org/policy-1B) at `c0ffee` |
| Selected for | [`org/policy-1B`](https://huggingface.co/org/policy-1B) |
| Judge | `gpt-4.1` |
| Languages | `en`, `de` |
| Licence | cc-by-4.0 |
| Date | 2026-05-04 |

## How to load it

```python
from datasets import load_dataset

dataset = load_dataset("me/kept", "default", split="train")
```

| Configuration | Pairs | Content |
| --- | --- | --- |
| `default` | 4 | the last selection |
| `step-000000` | 5 | the selection at step 0 |
| `step-000012` | 4 | the selection at step 12 |
| `pool` | 2,009 | what was selected from, with the `depth_*` columns of the last selection |

The pairs are in TRL's preference format, so [`DPOTrainer`](https://huggingface.co/docs/trl/dpo_trainer) trains on them
as they are:

```python
from trl import DPOConfig, DPOTrainer

trainer = DPOTrainer(
    model="org/policy-1B",
    args=DPOConfig(output_dir="bpo-model"),
    train_dataset=dataset,
)
trainer.train()
```

## Columns

| Column | Type | Content |
| --- | --- | --- |
| `prompt` | `list of {role: string, content: string}` | What the policy was asked |
| `chosen` | `list of {role: string, content: string}` | The better response |
| `rejected` | `list of {role: string, content: string}` | The worse response |
| `score_chosen` | `float64` | Score of the better response |
| `topic` | `string` | Topic of the source row |

## How it was made

| Stage | Rows kept | Note |
| --- | --- | --- |
| source | 61,135 | rows read |
| breadth | 6,113 | nearest to their centres |
| depth | 4 |  |

### Settings

| Option | Value | Note |
| --- | --- | --- |
| `breadth_fraction` | `0.123456` |  |
| `num_responses` | `4000` | not specified by the paper |
| `normalize` | `True` |  |
| `seed` | `None` |  |

## What was kept

![Bar chart of the prompts by the number of pairs that they kept (0: 1,500; 1: 1; 3: 1)](pairs_per_prompt.png)

![Bar chart of the 3 clusters of pairs by size](clusters.png)

![Map of 1,502 prompts](prompt_map.png)

### Pairs per prompt

| Pairs kept | Prompts |
| --- | --- |
| 0 | 1,500 |
| 1 | 1 |
| 3 | 1 |

Mean 0.002663 pairs a prompt, Gini coefficient 0.999, over all prompts of the pool from which the pairs were
selected.

### Scores and lengths

| Measure | All pairs | Kept pairs |
| --- | --- | --- |
| score of the chosen response, mean | 7.25 | 8.5 |
| tokens, median | – | 81 |

### Measured on the selection

| Measure | Value |
| --- | --- |
| variance\_explained | 0.05432 |
| variance\_explained\_gaussian | 0.061 |
| n\_clusters | 32 |

A share of variance explained by clusters says little by itself: read it beside that of Gaussian data with the same
covariance, which has no clusters. The same goes for the agreement of two seeds.

## Limits and biases

- The responses were written by a language model. They can be wrong, biased or harmful, the chosen ones too.
- Which response counts as better was decided by a judge with biases of its own, such as a liking for long answers.
- The pairs were selected for [`org/policy-1B`](https://huggingface.co/org/policy-1B). For another policy the same pairs need not be the representative ones.
- Whether this selection helps is open. In the measurements of `trl_bpo` itself, on one task with a policy of 0.7 M parameters, selecting pairs by their gradients was not better than drawing as many at random, and together with the selection of prompts it was worse; see `docs/evidence.md` there.
- The pairs are no random sample of the source data. What lies near a centre is typical: rare topics, phrasings and languages can be missing. The pairs are there to train on, not to measure a model or to count what people ask.
- `trl_bpo` filters neither personal data nor harmful texts. What the source data has of them can be here.
- The licence of the source data and the terms of any models that wrote or judged the responses apply beside the licence named above.

## Provenance

| What | SHA-256, commit or name |
| --- | --- |
| template of the judge | `abababababababababababababababababababababababababababababababab` |
| chat template | `cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd` |

Beside the data of each selection lies `manifest.json`: the digests of what it was made from and of what came out, all
parameters and all versions, to make the same selection again.

| Package | Version |
| --- | --- |
| `trl_bpo` | `0.1.0` |
| `trl` | `1.16.0` |

## Citation

```bibtex
@inproceedings{wang2025bpo,
    title        = {{BPO: Towards Balanced Preference Optimization between Knowledge Breadth and Depth in Alignment}},
    author       = {Sizhe Wang and Yongqi Tong and Hengyuan Zhang and Dawei Li and Xin Zhang and Tianlong Chen},
    year         = 2025,
    booktitle    = {NAACL 2025},
    eprint       = {arXiv:2411.10914},
    url          = {https://huggingface.co/papers/2411.10914},
}
```

<!-- trl_bpo:end -->"""


class TestCreateDatasetCard:
    def test_whole_card(self):
        assert str(make_card(configs=CONFIGS, pictures=PICTURES)) == WHOLE_CARD

    def test_metadata_as_the_hub_reads_it(self):
        card = DatasetCard(str(make_card(configs=CONFIGS)))
        assert card.data.to_dict() == {
            "pretty_name": "Arena pairs",
            "language": ["en", "de"],
            "license": "cc-by-4.0",
            "tags": ["trl", "trl-bpo", "bpo", "preference", "dpo"],
            "task_categories": ["text-generation"],
            "size_categories": ["n<1K"],
            "source_datasets": ["org/source"],
            "base_model": "org/policy-1B",
            "configs": CONFIGS,
        }
        assert MetadataConfigs.from_dataset_card_data(card.data).get_default_config_name() == "default"

    def test_least_card(self):
        data = CuratedCardData("Pairs", num_pairs=4, num_prompts=2)
        metadata, body = split_card(create_dataset_card(FEATURES, data))
        assert set(metadata) == {"pretty_name", "task_categories", "tags", "size_categories"}
        parts = sections(body)
        overview = dict(table(parts[""]))
        assert overview["Licence"] == "as in the metadata of this card"
        names = (
            "Policy that wrote the responses",
            "Selected for",
            "Judge",
            "Source data",
            "Source revision",
            "Languages",
        )
        assert {overview[name] for name in names} == {"not recorded"}
        assert "the publisher has to set one" in parts["Limits and biases"]
        assert list(parts) == [
            *("", "How to load it", "Columns", "How it was made", "Settings", "Limits and biases", "Provenance"),
            "Citation",
        ]
        assert "Date" not in overview and "manifest.json" not in body
        assert {"trl_bpo", "trl", "transformers", "datasets", "torch"} <= set(data.versions)
        assert "\n\n\n" not in body and "None" not in body

    @pytest.mark.parametrize("judge", ["gpt-4.1", None])
    @pytest.mark.parametrize("policy_model", ["org/policy-1B", None])
    def test_card_claims_nothing_that_is_not_recorded(self, policy_model, judge):
        card = make_card(policy_model=policy_model, policy_revision=None, judge=judge)
        parts = sections(split_card(card)[1])
        intro, limits = " ".join(parts[""].split()), parts["Limits and biases"]
        overview = dict(table(parts[""]))
        assert ("collects several responses" in intro) == (policy_model is not None)
        assert "the prompts nearest to the centres stay), " in intro
        assert "*depth*). How many pairs a prompt keeps is the outcome, not a setting. | Property" in intro
        assert ("written by a language model" in limits) == (policy_model is not None)
        assert ("decided by a judge" in limits) == (judge is not None)
        assert limits.count("is not recorded") == (policy_model, judge).count(None)
        assert [line[:2] for line in limits.strip().splitlines()] == ["- "] * 7
        assert (overview["Policy that wrote the responses"] == "not recorded") == (policy_model is None)

    @pytest.mark.parametrize("strategy", ["gradient", "random"])
    def test_evidence_is_told(self, strategy):
        parts = sections(split_card(make_card(depth_strategy=strategy))[1])
        assert ("not kept by their gradients but by another rule" in parts[""]) == (strategy == "random")
        limits = parts["Limits and biases"]
        assert "helps is open" in limits and "`docs/evidence.md`" in limits
        assert ("selecting pairs by their gradients was not better than drawing" in limits) == (strategy == "gradient")
        assert ("no rule was better than drawing" in limits) == (strategy == "random")
        assert ("no random sample" in limits) == (strategy == "gradient")

    def test_repository_and_configuration(self):
        assert 'load_dataset("me/kept", split="train")' in str(make_card())
        assert 'load_dataset("me/kept", "default", split="train")' in str(make_card(configs=CONFIGS))
        assert 'load_dataset("path/to/this/folder", split="train")' in str(make_card(repo_id=None))
        card = str(make_card(config_name="round2", selections=[], has_pool=False))
        assert 'load_dataset("me/kept", "round2", split="train")' in card
        assert "describes the configuration `round2`" in card
        assert "| Configuration |" not in card

    @pytest.mark.parametrize(
        "num_pairs, category",
        [(999, "n<1K"), (1000, "1K<n<10K"), (10**5, "100K<n<1M"), (10**6, "1M<n<10M"), (10**7, "n>10M")],
    )
    def test_size_category(self, num_pairs, category):
        assert make_card(num_pairs=num_pairs).data.size_categories == [category]

    @pytest.mark.parametrize(
        "licence, fields",
        [
            ("mit", {"license": "mit"}),
            ("Apache-2.0", {"license": "apache-2.0"}),
            ("mit, odc-by", {"license": ["mit", "odc-by"]}),
            ("Our terms: ask", {"license": "other", "license_name": "Our terms: ask"}),
            (None, {}),
            ("", {}),
        ],
    )
    def test_licence(self, licence, fields):
        metadata, body = split_card(make_card(license=licence))
        assert {name: value for name, value in metadata.items() if "license" in name} == fields
        assert dict(table(sections(body)[""]))["Licence"] == (licence or "as in the metadata of this card")

    def test_inherited_licence_is_called_that(self):
        _, body = split_card(make_card(license="mit", license_is_inherited=True))
        overview = dict(table(sections(body)[""]))
        assert overview["Licence of the source data"] == "mit" and "Licence" not in overview
        assert "The licence is that of the source data." in body

    def test_only_hub_ids_are_in_the_metadata(self, tmp_path, monkeypatch):
        (tmp_path / "data" / "local").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        names = [
            "org/data",
            str(tmp_path / "mine"),
            "squad",
            "a/b/c",
            "org/da ta",
            "https://x.example/y",
            "-a/b",
            "a/b--c",
        ]
        card = make_card(
            source_datasets=names, policy_model="/models/sft", selected_for="org/other", language=["en", "English"]
        )
        assert card.data.source_datasets == ["org/data"]
        assert card.data.base_model == "org/other"
        assert card.data.language == ["en"]
        source = dict(table(sections(split_card(card)[1])[""]))["Source data"]
        assert source.startswith("[`org/data`](https://huggingface.co/datasets/org/data), `mine`, `squad`, `a/b/c`,")
        assert "https<!-- -->://x.example/y" in source or "`https://x.example/y`" in source
        both = make_card(policy_model="org/policy", selected_for="org/other")
        assert both.data.base_model == ["org/policy", "org/other"]

    def test_no_local_path(self):
        path = "/home/somebody/secret/run7"
        data = make_card_data(
            pretty_name=path,
            policy_model=path,
            selected_for=path,
            judge=path,
            source_datasets=[path],
            settings={"model": path, "files": [path], "options": {"cache": path}},
            provenance={"what": path},
            funnel=[("rows", 1, path)],
        )
        card = str(create_dataset_card(FEATURES, data))
        assert "run7" in card and "/home" not in card and "somebody" not in card and "secret" not in card

    def test_json_round_trip(self):
        data = make_card_data()
        again = CuratedCardData.from_dict(json.loads(json.dumps(data.to_dict())))
        assert again == data
        assert list(again.pairs_per_prompt) == [0, 1, 3]
        assert str(create_dataset_card(FEATURES, again)) == str(create_dataset_card(FEATURES, data))


FRAGMENTS = [
    *(
        "\n---\n",
        "---",
        ": ",
        "!!python/object/apply:os.system ['id']",
        "&a",
        "*a",
        "- item",
        "# Title",
        "{a: [b",
        "%YAML",
    ),
    *(
        "[x](https://evil.example)",
        "![x](https://evil.example/x.png)",
        "<https://evil.example>",
        "https://evil.example",
    ),
    *(
        "http://evil.example/a_b",
        "HTTPS://EVIL.example",
        "www.evil.example",
        "WWW.evil.example",
        "me@evil.example",
        "[x]: /y",
    ),
    *("`", "``", "```", "~~~", "**b**", "__u__", "~~s~~", "|", "\\|", "\\", "\\`", "$x$", "\\(x\\)", "$$"),
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<!--",
        "-->",
        "<!-- trl_bpo:end -->",
        "</td>",
        "<",
    ),
    *(
        "<!-- trl_bpo:begin -->",
        "&lt;b&gt;",
        "&#124;",
        "&",
        "{{ card_data }}",
        "{% raw %}",
        "{% endraw %}",
        "{#",
        "{{",
        "}}",
    ),
    *("\u202e", "\u2066", "\u200b", "\ufeff", "\x00", "\x1b[31m", "\u2028", "\x85", "\r\n", "\t", "\ud800", "\u00a0"),
    *('"); import os; ("', "'", '"', "x", "Größe", "数据", "🙂", " ", ">", "> q", "1. a", "+ a", "===", "#"),
]
RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def card_of(text):
    """A card with what `text()` gives in every field that takes any text, and the texts that it must show."""
    values = {
        name: text() for name in ("pretty_name", "policy_model", "policy_revision", "selected_for", "judge", "date")
    }
    values |= {name: text() for name in ("source_revision", "source_split", "license", "depth_strategy")}
    values["source_datasets"] = [text(), text()]
    values["language"] = [text()]
    values["funnel"] = [(text(), 1, text())]
    setting = text()
    values["settings"] = {setting: text(), text() + "s": [text()]}
    values["setting_notes"] = {setting: text()}
    values["metrics"] = {text(): 0.5}
    values["statistics"] = [(text(), 1.0, 2.0)]
    values["provenance"] = {text(): text()}
    values["versions"] = {text(): text()}
    column = text()
    values["columns"] = {column: text()}
    data = make_card_data(**values, repo_id=text(), selections=[(text(), 0, 5)])
    features = Features({"prompt": Value("string"), column + "c": {text(): Value("string")}, column: Value("string")})
    alt = text()
    card = create_dataset_card(features, data, pictures={f"{text()}.png": alt}, configs=CONFIGS[:1])
    return DatasetCard(str(card)), values, alt


def rendered(card):
    """Blocks, links and pictures, HTML, and visible texts of a card."""
    blocks, links, markup, texts = [], [], [], []
    for token in RENDERER.parse(card.text):
        blocks.append((token.type, token.tag, token.info))
        if token.type == "html_block":
            markup.append(token.content.strip())
        for child in token.children or []:
            if child.type == "html_inline":
                markup.append(child.content)
            elif child.type == "link_open":
                links.append(child.attrs["href"])
            elif child.type == "image":
                links.append("picture")
                texts.append("".join(part.content for part in child.children or []))
            elif child.type not in ("text", "code_inline", "link_close", "softbreak", "strong_open", "strong_close"):
                assert child.type in ("em_open", "em_close"), child
            # Where a renderer would make a link of a bare address.
            if child.type == "text":
                assert not re.search(r"\w://|\bwww\.|\S@\S", child.content, re.IGNORECASE), child.content
        if token.type == "inline":
            texts.append("".join(c.content for c in token.children if c.type in ("text", "code_inline")))
    return blocks, links, [one for one in markup if one != "<!-- -->"], texts


def expected_texts(values, alt):
    names = ["pretty_name", "judge", "date", "source_revision", "source_split", "license"]
    shown = [values[name] for name in names]
    shown += [part for row in values["funnel"] for part in row if isinstance(part, str)]
    shown += [part for name in ("settings", "setting_notes", "provenance", "versions") for part in values[name]]
    shown += [part for name in ("provenance", "versions", "setting_notes") for part in values[name].values()]
    shown += [*values["metrics"], values["statistics"][0][0], *values["columns"], *values["columns"].values()]
    return [one_line(public_value(value)) for value in shown] + [one_line(alt)]


class TestHostileTexts:
    plain = rendered(card_of(lambda: "plain")[0])
    repeated = sorted([*FRAGMENTS, *("-a" + fragment + "b-" for fragment in FRAGMENTS)])

    def check(self, text):
        card, values, alt = card_of(text)
        blocks, links, markup, texts = rendered(card)
        assert blocks == self.plain[0]
        assert links == self.plain[1]
        assert markup == self.plain[2] and len(markup) == 2
        assert set(expected_texts(values, alt)) - {""} <= set(texts)
        assert all(char.isprintable() or char == "\n" for char in str(card))
        assert len(str(card)) < 40_000
        assert re.findall(r"<!-- trl_bpo:(\w+)", card.text) == ["begin", "end"]
        expected = {
            "pretty_name": one_line(public_value(values["pretty_name"])),
            "license": "other",
            "license_name": one_line(public_value(values["license"])),
            "tags": ["trl", "trl-bpo", "bpo", "preference", "dpo"],
            "task_categories": ["text-generation"],
            "size_categories": ["n<1K"],
            "configs": CONFIGS[:1],
        }
        if not expected["license_name"]:
            del expected["license"], expected["license_name"]
        elif re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", expected["license_name"].lower()):
            expected["license"] = expected.pop("license_name").lower()
        assert card.data.to_dict() == {name: value for name, value in expected.items() if value}

    @pytest.mark.parametrize("number", range(len(repeated)))
    def test_one_in_every_field(self, number):
        fragment = self.repeated[number]
        self.check(lambda: fragment)

    @pytest.mark.parametrize("seed", range(60))
    def test_random_mixtures(self, seed):
        rng = random.Random(seed)
        self.check(lambda: "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 8))))

    @pytest.mark.parametrize("title", ["#", "C #", "a ##", "- b", "1. c", "    d"])
    def test_title(self, title):
        tokens = RENDERER.parse(make_card(pretty_name=title).text)
        heading = next(number for number, token in enumerate(tokens) if token.type == "heading_open")
        assert "".join(child.content for child in tokens[heading + 1].children) == title.strip()

    def test_a_million_characters_are_cut(self):
        self.check(lambda: "<b>`long` " * 100_000)
        assert one_line("x" * 300) == "x" * 300
        assert one_line("x" * 301) == "x" * 299 + "…"

    @pytest.mark.parametrize(
        "name", ["a/b\n", "a/ü", "a/..", "../a", "a/b.git", "a/b#c", "a/" + "b" * 200, "a", "/a/b", None]
    )
    def test_no_hub_id(self, name):
        assert not is_hub_id(name)


class TestMergeCard:
    ours = make_card(configs=CONFIGS[:2], license=None)

    def merged(self, existing, card=None, **kwargs):
        merged = merge_card(existing, self.ours if card is None else card, **kwargs)
        again = DatasetCard(str(merged))
        assert again.data.to_dict() == merged.data.to_dict() and again.text == merged.text
        return merged

    @pytest.mark.parametrize("existing", [None, "", "\n", "\ufeff"])
    def test_no_card_before(self, existing):
        merged = self.merged(existing)
        assert merged.data.to_dict() == self.ours.data.to_dict()
        assert merged.text.strip() == self.ours.text.strip()

    def test_pushing_again_replaces_our_card(self):
        first = self.merged(None, make_card(pretty_name="First", configs=CONFIGS, license=None, num_pairs=5000))
        second = self.merged(str(first))
        assert str(second).count("trl_bpo:begin") == 1 and "First" not in str(second)
        assert second.text.strip() == self.ours.text.strip()
        assert second.data.pretty_name == "Arena pairs"
        assert second.data.size_categories == ["n<1K"]
        assert str(self.merged(str(second))) == str(second)

    def test_metadata_is_kept_and_added_to(self):
        existing = (
            "---\nlicense: mit\nlicense_link: LICENSE\nlanguage: [no, fr]\ntags: [own, dpo]\npretty_name: Mine\n"
            "task_categories: question-answering\nsource_datasets: [org/a, org/source]\nbase_model: org/base\nown_field:\n  a: 1\n"
            "train-eval-index: [{config: x}]\n---\n"
        )
        metadata = self.merged(existing).data.to_dict()
        assert metadata["license"] == "mit" and metadata["license_link"] == "LICENSE"
        assert metadata["language"] == ["no", "fr"]
        assert metadata["tags"] == ["own", "dpo", "trl", "trl-bpo", "bpo", "preference"]
        assert metadata["pretty_name"] == "Mine"
        assert metadata["task_categories"] == ["question-answering", "text-generation"]
        assert metadata["source_datasets"] == ["org/a", "org/source"]
        assert metadata["base_model"] == ["org/base", "org/policy-1B"]
        assert metadata["own_field"] == {"a": 1} and metadata["train-eval-index"] == [{"config": "x"}]
        assert metadata["size_categories"] == ["n<1K"]

    def test_licence(self):
        existing = "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n"
        named = make_card(license="cc-by-4.0")
        metadata = self.merged(existing, named).data.to_dict()
        assert metadata["license"] == "cc-by-4.0" and not {"license_name", "license_link"} & set(metadata)
        metadata = self.merged(existing, named, keep_license=True).data.to_dict()
        assert [metadata[name] for name in ("license", "license_name", "license_link")] == ["other", "mine", "LICENSE"]
        assert self.merged("---\ntags: [a]\n---\n", named, keep_license=True).data.license == "cc-by-4.0"

    def test_a_name_that_was_edited_stays(self):
        edited = str(self.ours).replace("pretty_name: Arena pairs", "pretty_name: Edited")
        assert self.merged(edited).data.pretty_name == "Edited"
        hostile = make_card(pretty_name="# a_*b* <c> | @d", configs=CONFIGS)
        assert self.merged(str(hostile)).data.pretty_name == "Arena pairs"

    def test_configurations(self, caplog):
        old = {"features": [{"name": "x", "dtype": "string"}]}
        existing = {
            "configs": [
                {"config_name": "extra", "data_files": "extra/*", "default": True},
                {"config_name": "default", "data_files": "old/*"},
                {"config_name": "step-000099", "data_files": "step-000099/*"},
            ],
            "dataset_info": [{"config_name": name, **old} for name in ("extra", "default", "step-000099")],
        }
        text = f"---\n{yaml.safe_dump(existing)}---\n"
        metadata = self.merged(text, dropped_configs={"step-000099"}).data
        assert metadata["configs"] == [{"config_name": "extra", "data_files": "extra/*"}, *CONFIGS[:2]]
        assert metadata["dataset_info"] == [{"config_name": "extra", **old}]
        assert MetadataConfigs.from_dataset_card_data(metadata).get_default_config_name() == "default"
        assert "'extra' was the default" in caplog.text

    def test_features_of_the_only_configuration_are_dropped(self):
        existing = "---\ndataset_info:\n  features:\n  - name: x\n    dtype: string\n---\n# Old"
        assert "dataset_info" not in self.merged(existing).data
        other = self.merged(existing, make_card(config_name="round2", configs=[{"config_name": "round2"}]))
        assert other.data["dataset_info"] == [{"features": [{"name": "x", "dtype": "string"}]}]

    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    @pytest.mark.parametrize(
        "front_matter", ["---\nlicense: mit\n---\n", "\ufeff---\nlicense: mit\n---\n", "---\n---\n", ""]
    )
    def test_text_by_hand_is_kept(self, front_matter, newline):
        existing = (front_matter + "# Mine\n\nMy text with --- in it.\n\n---\n\nMore \\1 text.\n").replace(
            "\n", newline
        )
        merged = self.merged(existing)
        own = "# Mine\n\nMy text with --- in it.\n\n---\n\nMore \\1 text."
        assert merged.text.startswith(f"\n{own}\n\n<!-- trl_bpo:begin")
        assert merged.text.rstrip().endswith("<!-- trl_bpo:end -->")
        assert merged.data.get("license") == ("mit" if "mit" in front_matter else None)
        # What is written after our part is kept as well, and our part is replaced, also where it has backslashes.
        more = str(merged) + "\nAfterwards.\n"
        again = self.merged(more, make_card(pretty_name="New \\1 \\g<0>", license=None))
        assert again.text.startswith(f"\n{own}\n\n<!-- trl_bpo:begin") and again.text.endswith("\n\nAfterwards.\n")
        assert again.text.count("trl_bpo:begin") == again.text.count("trl_bpo:end -->") == 1
        assert "# New" in again.text and "# Arena" not in again.text

    @pytest.mark.parametrize(
        "existing",
        [
            "---\nlicense: [mit\n---\n# Mine\n",
            "---\nlicense: mit\n# Mine\n",
            "---\n- a\n---\n",
            "---\ntrue: 1\n---\n",
            "---\nx: !!python/object/apply:os.system [id]\n---\n",
            "---\nself: 1\n---\n",
            "---\nconfigs: [a]\n---\n",
            "---\ndataset_info: a\n---\n",
            "# Mine\n<!-- trl_bpo:begin -->\nhalf\n",
            "# Mine\n<!-- trl_bpo:end -->\n<!-- trl_bpo:begin -->\n",
            "<!-- trl_bpo:begin --><!-- trl_bpo:end --><!-- trl_bpo:begin --><!-- trl_bpo:end -->",
        ],
    )
    def test_what_could_get_lost_is_refused(self, existing):
        with pytest.raises(
            ValueError, match=r"`README.md` that the dataset repository has.*Mend it on the Hub, or delete"
        ):
            merge_card(existing, self.ours)

    def test_the_cards_given_are_not_changed(self):
        before = str(self.ours)
        self.merged("---\ntags: [a]\nconfigs: [{config_name: b, default: true}]\n---\n")
        assert str(self.ours) == before


class TestCardDataOfRun:
    def run(self, tmp_path, fields=None, judges=("gpt-4.1",), **options):
        n = 12
        pairs = Dataset.from_dict(
            {
                "prompt": ["p"] * n,
                "chosen": ["c"] * n,
                "rejected": ["r"] * n,
                "prompt_id": [f"prompt-{i // 3}" for i in range(n)],
                "pair_id": [f"pair-{i}" for i in range(n)],
                "judge": [judges[i % len(judges)] for i in range(n)],
            }
        )
        pool = PairPool(pairs)
        pool.num_given = n + 1
        features = np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)
        selection = DepthSelector(0.5).select(features, pool.pair_ids, pool.prompt_ids)
        pool_table = pa.table({"chosen_tokens": range(10, 10 + n), "rejected_tokens": [10] * n})
        args = config(tmp_path / "my-run", depth_fraction=0.5, **options)
        inputs = {"pool": "aa", "model": "org/policy", "model_commit": "c0ffee", "chat_template": None}
        manifest = write_manifest(
            tmp_path / "manifest.json", "depth", inputs, {"depth_fraction": 0.5, "seed": 42}, {"kept": "bb"}, step=12
        )
        return card_data_of_run(pool, pool_table, selection, manifest, args, fields or {}), selection, manifest

    def test_what_a_training_knows(self, tmp_path):
        data, selection, manifest = self.run(tmp_path, curated_dataset_license="mit")
        assert data.pretty_name == "Pairs that BPO kept for my-run"
        assert (data.num_pairs, data.num_pool) == (6, 12)
        kept = np.flatnonzero(selection.selected)
        assert data.num_prompts == len({row // 3 for row in kept})
        assert sum(k * n for k, n in data.pairs_per_prompt.items()) == 6 and sum(data.pairs_per_prompt.values()) == 4
        assert data.funnel == [
            ("pairs", 13, "as they came in"),
            ("pairs that fit", 12, "1 whose prompt fills `max_length` dropped"),
            ("pairs kept (depth)", 6, "by gradient at step 12"),
        ]
        assert data.settings == {"depth_fraction": 0.5, "seed": 42}
        assert (
            data.setting_notes["depth_fraction"] == "not specified by the paper" and "seed" not in data.setting_notes
        )
        statistics = {name: values for name, *values in data.statistics}
        assert statistics["tokens of the chosen response, mean"] == pytest.approx([15.5, 10 + kept.mean()])
        assert data.provenance == {
            "ids of all pairs": "aa",
            "ids of the kept pairs": "bb",
            "commit of the model that they were selected for": "c0ffee",
        }
        assert data.selected_for == "org/policy" and data.policy_model is None and data.policy_revision is None
        assert data.judge == "gpt-4.1" and data.license == "mit" and not data.license_is_inherited
        assert data.versions == manifest["versions"] and data.date == manifest["date"][:10]
        assert CuratedCardData.from_dict(json.loads(json.dumps(data.to_dict()))) == data
        card = str(create_dataset_card(FEATURES, data))
        assert str(tmp_path) not in card and "| Pairs | 6 of 12 |" in card

    def test_fields_of_the_caller(self, tmp_path):
        fields = {
            "policy_model": "org/policy",
            "judge": "a person",
            "license": "cc-by-4.0",
            "license_is_inherited": True,
            "funnel": [("rows", 100, "read")],
            "settings": {"breadth_fraction": 0.1},
            "setting_notes": {"breadth_fraction": "ours"},
            "provenance": {"template of the judge": "cc"},
            "language": ["en"],
        }
        given = json.dumps(fields)
        data, _, _ = self.run(tmp_path, fields)
        assert data.policy_model == "org/policy" and data.policy_revision == "c0ffee"
        assert data.judge == "a person" and data.language == ["en"]
        assert data.license == "cc-by-4.0" and data.license_is_inherited
        assert [row[0] for row in data.funnel] == ["rows", "pairs that fit", "pairs kept (depth)"]
        assert data.settings == {"breadth_fraction": 0.1, "depth_fraction": 0.5, "seed": 42}
        assert data.setting_notes["breadth_fraction"] == "ours"
        assert data.provenance["template of the judge"] == "cc" and data.provenance["ids of all pairs"] == "aa"
        assert json.dumps(fields) == given
        # A licence that was asked for outdoes one that was inherited.
        data, _, _ = self.run(tmp_path, fields, curated_dataset_license="mit")
        assert data.license == "mit" and not data.license_is_inherited

    def test_several_judges_are_not_named_as_one(self, tmp_path):
        assert self.run(tmp_path, judges=("a", "b"))[0].judge is None
