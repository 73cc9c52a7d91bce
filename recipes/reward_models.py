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


# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl_bpo",
# ]
# ///

"""
Two reward models with different backbones, trained on halves of the pairs that share no prompt: the scorer, to score
candidates, and the evaluator, to evaluate with alone, so that no policy is measured by what chose its training data.

On held-out prompts, their accuracy stands beside that of taking the longer, or the shorter, answer:

```bash
python recipes/reward_models.py \
    --dataset_name trl-lib/ultrafeedback_binarized Anthropic/hh-rlhf \
    --max_pairs 20000 \
    --scorer_model_name_or_path Qwen/Qwen3-0.6B \
    --evaluator_model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct \
    --evaluator_kwargs '{"learning_rate": 5e-5}' \
    --max_length 1024 \
    --output_dir reward-models
```

The folders `scorer` and `evaluator` of `output_dir` are models for [`~trl_bpo.RewardModelJudge`] (judge with the same
`max_length`), and `reward_models.json` holds the results. The same command again goes on where it was ended.
"""

import gc
import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import sort_checkpoints
from trl import ModelConfig, RewardConfig, RewardTrainer, TrlParser, get_peft_config

from trl_bpo import RewardModelJudge
from trl_bpo.bootstrap import bootstrap_interval
from trl_bpo.formats import drop_duplicate_pairs, load_rows, prepare_dataset
from trl_bpo.prompts import completion_text, pair_id, parse_tools, without_none
from trl_bpo.splits import check_no_overlap, normalize_prompt, split_by_prompt


ROLES = ("scorer", "evaluator")
# For backbones that never saw a conversation, such as BERT.
PLAIN_TEMPLATE = (
    "{{ cls_token or bos_token or '' }}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ sep_token or eos_token }}{% endfor %}"
)
# Answers whose lengths differ by at most this fraction of the longer one count as equally long.
LENGTH_TOLERANCE = 0.2
SETTINGS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "center_rewards_coefficient",
    "bf16",
    "seed",
)


@dataclass
class RewardModelsScriptArguments:
    r"""
    Arguments of this script, beside those of [`~trl.RewardConfig`] and [`~trl.ModelConfig`], which hold for both models.

    Parameters:
        dataset_name (`list[str]`):
            Hub ids, folders, or JSON, Parquet or CSV files with pairs in one of TRL's formats or HH-RLHF transcripts.
            Text becomes messages.
        source_name (`list[str]`, *optional*):
            What the results call each of them. Defaults to its id, or to the file's name.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split of all datasets, possibly a slice.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt, if there is one.
        max_pairs (`int`, *optional*):
            Pairs to draw at random from each dataset. By default, all are used.
        test_size (`float`, *optional*, defaults to `0.1`):
            Share of the distinct prompts that are held out.
        scorer_model_name_or_path (`str`):
            Backbone of the model to score candidates with.
        evaluator_model_name_or_path (`str`):
            Backbone of the model to evaluate with.
        scorer_kwargs (`dict` or `str`, *optional*):
            Options of [`~trl.RewardConfig`] and [`~trl.ModelConfig`] for the scorer alone, as JSON, such as
            `{"use_peft": true, "learning_rate": 1e-4}`.
        evaluator_kwargs (`dict` or `str`, *optional*):
            The same for the evaluator.
    """

    dataset_name: list[str] = field(metadata={"help": "Hub ids, folders or files with pairs."})
    scorer_model_name_or_path: str = field(metadata={"help": "Backbone of the model to score candidates with."})
    evaluator_model_name_or_path: str = field(metadata={"help": "Backbone of the model to evaluate with."})
    source_name: list[str] | None = field(
        default=None, metadata={"help": "What the results call each dataset. Defaults to its id or file name."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of all datasets, possibly a slice."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompt, if there is one."})
    max_pairs: int | None = field(default=None, metadata={"help": "Pairs to draw at random from each dataset."})
    test_size: float = field(default=0.1, metadata={"help": "Share of the distinct prompts that are held out."})
    scorer_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of RewardConfig and ModelConfig for the scorer alone, as JSON."}
    )
    evaluator_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of RewardConfig and ModelConfig for the evaluator alone, as JSON."}
    )

    def __post_init__(self) -> None:
        if self.scorer_model_name_or_path == self.evaluator_model_name_or_path:
            raise ValueError(
                "`scorer_model_name_or_path` and `evaluator_model_name_or_path` are the same. Name two backbones, so that "
                "the evaluator does not share the scorer's mistakes."
            )
        if self.source_name is None:
            self.source_name = [public_name(name) for name in self.dataset_name]
        if len(set(self.source_name)) != len(self.dataset_name) or len(self.source_name) != len(self.dataset_name):
            raise ValueError(
                f"`source_name` must give each of the {len(self.dataset_name)} datasets a name of its own, got "
                f"{self.source_name}."
            )
        # The parser reads JSON; who makes this object in Python may give either.
        for name in ("scorer_kwargs", "evaluator_kwargs"):
            value = getattr(self, name)
            setattr(self, name, (json.loads(value) if isinstance(value, str) else value) or {})


@dataclass
class Backbone:
    """One of the two models to train: its options, its tokenizer and where texts are cut."""

    role: str
    model_args: ModelConfig
    training_args: RewardConfig
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def encode(self, row: dict, answer: str) -> list[int]:
        # What `RewardModelJudge` makes of prompt and answer.
        text = self.tokenizer.apply_chat_template(
            without_none([*row["prompt"], *row[answer]]),
            tools=without_none(parse_tools(row["tools"])),
            tokenize=False,
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.max_length]

    def settings(self, pairs: Dataset) -> dict[str, Any]:
        """What decides which model comes out, to put beside the result and to know a training again."""
        ids = "".join(pair_id(row["prompt"], row["chosen"], row["rejected"], row["tools"]) for row in pairs)
        lora = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules") if self.model_args.use_peft else ()
        return {
            "backbone": public_name(self.model_args.model_name_or_path),
            "revision": self.model_args.model_revision,
            "pairs": hashlib.sha256(ids.encode()).hexdigest(),
            "max_length": self.max_length,
            **{name: getattr(self.training_args, name) for name in SETTINGS},
            **{name: getattr(self.model_args, name) for name in ("dtype", "use_peft", *lora)},
        }


def public_name(name: str) -> str:
    # The Hub id, or the last part of a local path: where your files lie is not for a result.
    return os.path.basename(name.rstrip("/")) if os.path.exists(name) else name


def write_json(path: Path, value: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def make_backbone(
    role: str, script_args: RewardModelsScriptArguments, training_args: RewardConfig, model_args: ModelConfig
) -> Backbone:
    options = getattr(script_args, f"{role}_kwargs")
    of_model = {key: value for key, value in options.items() if key in {entry.name for entry in fields(ModelConfig)}}
    of_training = {key: value for key, value in options.items() if key not in of_model}
    if unknown := sorted(set(of_training) - {entry.name for entry in fields(RewardConfig)}):
        raise ValueError(f"`{role}_kwargs` has {unknown}, which neither `RewardConfig` nor `ModelConfig` knows.")
    name = getattr(script_args, f"{role}_model_name_or_path")
    model_args = replace(model_args, model_name_or_path=name, **{"lora_task_type": "SEQ_CLS", **of_model})
    if model_args.load_in_8bit or model_args.load_in_4bit:
        raise ValueError("The adapter is merged into the saved model, so the weights cannot be quantized. Unset it.")
    training_args = replace(
        training_args, output_dir=str(Path(training_args.output_dir) / "_training" / role), **of_training
    )
    if training_args.chat_template_path is not None or training_args.eos_token is not None:
        raise ValueError(
            "`chat_template_path` and `eos_token` do not go with this script. Change the tokenizer instead."
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.model_revision)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    max_length = min(training_args.max_length or tokenizer.model_max_length, tokenizer.model_max_length)
    return Backbone(role, model_args, training_args, tokenizer, max_length)


def load_pairs(script_args: RewardModelsScriptArguments, seed: int) -> tuple[Dataset, dict[str, Any]]:
    """All pairs in one order and one format, and what was loaded and left out."""
    rows: list[dict] = []
    loaded = {}
    assert script_args.source_name is not None
    for source, name in zip(script_args.source_name, script_args.dataset_name, strict=True):
        prepared = prepare_dataset(
            load_rows(name, script_args.dataset_train_split),
            prompt_column=script_args.prompt_column,
            start_from="pairs",
            to_messages=True,
        )
        drawn = prepared.dataset.shuffle(seed=seed)
        drawn = drawn.select(range(min(script_args.max_pairs or len(drawn), len(drawn))))
        loaded[source] = {"pairs": len(prepared.dataset), "two_contexts": prepared.dropped, "drawn": len(drawn)}
        for row in drawn:
            tools = parse_tools(row.get("tools"))
            rows.append(
                {
                    "source": source,
                    **{key: without_none(row[key]) for key in ("prompt", "chosen", "rejected")},
                    "tools": None if tools is None else json.dumps(without_none(tools)),
                }
            )
    pairs = Dataset.from_list(rows)
    return pairs, loaded


def split_pairs(pairs: Dataset, test_size: float, seed: int) -> dict[str, Dataset]:
    """A half of the prompts for each model, and held-out prompts with one pair each, for intervals that hold."""
    split = split_by_prompt(pairs, test_size, seed)
    halves = split_by_prompt(split["train"], 0.5, seed)
    first: dict[str, int] = {}
    for number, prompt in enumerate(split["test"]["prompt"]):
        first.setdefault(normalize_prompt(prompt), number)
    parts = {"scorer": halves["train"], "evaluator": halves["test"], "heldout": split["test"].select(first.values())}
    check_no_overlap(parts["scorer"], parts["evaluator"])
    for role in ROLES:
        check_no_overlap(parts[role], parts["heldout"])
    return parts


def train(backbone: Backbone, pairs: Dataset, folder: Path) -> dict[str, Any]:
    """Train a reward model on its half, unless it is there, and save it as a whole to `folder`."""
    settings = backbone.settings(pairs)
    checkpoints = Path(backbone.training_args.output_dir)
    record = checkpoints / "settings.json"
    with PartialState().main_process_first():
        if record.is_file():
            before = json.loads(record.read_text(encoding="utf-8"))
            if changed := [name for name in settings if before.get(name) != json.loads(json.dumps(settings[name]))]:
                raise ValueError(
                    f"`output_dir` holds a training of the {backbone.role} with other {', '.join(changed)}. Repeat the "
                    "same command to go on with it, or name another `output_dir`."
                )
        else:
            checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(record, settings)
    if folder.is_dir():
        return settings
    columns = {f"{backbone.role}_{answer}": f"{answer}_ids" for answer in ("chosen", "rejected")}
    trainer = RewardTrainer(
        model=backbone.model_args.model_name_or_path,
        args=backbone.training_args,
        train_dataset=pairs.select_columns(list(columns)).rename_columns(columns),
        processing_class=backbone.tokenizer,
        peft_config=get_peft_config(backbone.model_args),
    )
    # The state is what a checkpoint's writing ends with, so one without it was cut short.
    whole = [path for path in sort_checkpoints(str(checkpoints)) if (Path(path) / "trainer_state.json").is_file()]
    trainer.train(resume_from_checkpoint=whole[-1] if whole else None)
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        backbone.tokenizer.save_pretrained(partial)
        os.replace(partial, folder)
    trainer.accelerator.wait_for_everyone()
    return settings


def wins(chosen: Any, rejected: Any) -> np.ndarray:
    """1 where the chosen answer has the higher value, 0.5 where the values are equal."""
    return (1 + np.sign(np.asarray(chosen, dtype=float) - np.asarray(rejected, dtype=float))) / 2


def measure(heldout: Dataset, outcomes: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean of each outcome with its interval: over all pairs, by source, and where length can or cannot tell."""
    chosen, rejected = (
        np.array([len(completion_text(answer)) for answer in heldout[column]]) for column in ("chosen", "rejected")
    )
    outcomes = {**outcomes, "longer": wins(chosen, rejected), "shorter": wins(rejected, chosen)}
    outcomes["agreement"] = (outcomes["scorer"] == outcomes["evaluator"]).astype(float)
    sources = np.array(heldout["source"])
    groups = {
        "all": np.ones(len(heldout), dtype=bool),
        **{source: sources == source for source in sorted(set(sources))},
        "equally long": np.abs(chosen - rejected) <= LENGTH_TOLERANCE * np.maximum(chosen, rejected),
        "chosen is longer": chosen > rejected,
        "chosen is shorter": chosen < rejected,
    }
    results: dict[str, Any] = {}
    for group, mask in groups.items():
        if not mask.any():
            continue
        results[group] = {"pairs": int(mask.sum())}
        for name, values in outcomes.items():
            low, high = bootstrap_interval(values[mask])
            results[group][name] = {"mean": float(values[mask].mean()), "low": low, "high": high}
    return results


def results_table(results: dict[str, Any]) -> str:
    columns = ["scorer", "evaluator", "longer", "shorter", "agreement"]
    width = max(map(len, results))
    lines = [f"{'held-out pairs':<{width}} {'n':>6}" + "".join(f"{column:>19}" for column in columns)]
    for group, row in results.items():
        cells = [f"{row[name]['mean']:.3f} [{row[name]['low']:.2f}, {row[name]['high']:.2f}]" for name in columns]
        lines.append(f"{group:<{width}} {row['pairs']:>6}" + "".join(f"{cell:>19}" for cell in cells))
    return "\n".join(lines)


def main(script_args: RewardModelsScriptArguments, training_args: RewardConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    backbones = [make_backbone(role, script_args, training_args, model_args) for role in ROLES]
    pairs, loaded = load_pairs(script_args, training_args.seed)
    distinct = drop_duplicate_pairs(pairs)

    def encode(row: dict) -> dict[str, list[int]]:
        return {
            f"{backbone.role}_{answer}": backbone.encode(row, answer)
            for backbone in backbones
            for answer in ("chosen", "rejected")
        }

    # Where a long prompt leaves no room for the answers, a model could neither learn nor be tested.
    encoded = distinct.map(encode, desc="Tokenizing")
    usable = encoded.filter(
        lambda row: all(row[f"{role}_chosen"] != row[f"{role}_rejected"] for role in ROLES),
        desc="Dropping pairs whose answers are cut off",
    )
    parts = split_pairs(usable, script_args.test_size, training_args.seed)

    models = {}
    for backbone in backbones:
        models[backbone.role] = train(backbone, parts[backbone.role], output_dir / backbone.role)
        # The trainer refers to itself, and its model would stay beside the next one.
        gc.collect()
    if not PartialState().is_main_process:
        return

    heldout = parts["heldout"]
    outcomes = {}
    for backbone in backbones:
        judge = RewardModelJudge(
            str(output_dir / backbone.role),
            max_length=backbone.max_length,
            batch_size=backbone.training_args.per_device_eval_batch_size,
            cache_dir=str(output_dir / "_scores" / backbone.role),
        )
        chosen, rejected = (
            judge(prompts=heldout["prompt"][:], completions=heldout[answer][:], tools=heldout["tools"][:])
            for answer in ("chosen", "rejected")
        )
        outcomes[backbone.role] = wins(chosen, rejected)
    results = measure(heldout, outcomes)
    write_json(
        output_dir / "reward_models.json",
        {
            "sources": loaded,
            "copies_dropped": len(pairs) - len(distinct),
            "cut_off_dropped": dict(Counter(distinct["source"]) - Counter(usable["source"])),
            "parts": {
                name: {
                    "pairs": len(part),
                    "prompts": len({normalize_prompt(prompt) for prompt in part["prompt"]}),
                    "sources": dict(Counter(part["source"])),
                }
                for name, part in parts.items()
            },
            "models": models,
            "length_tolerance": LENGTH_TOLERANCE,
            "heldout": results,
        },
    )
    print(results_table(results))
    print(f"Models and results: {output_dir}")


def make_parser() -> Any:
    return TrlParser((RewardModelsScriptArguments, RewardConfig, ModelConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
