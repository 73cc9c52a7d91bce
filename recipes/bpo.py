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
#     "trl_bpo[embeddings,openai,report]",
# ]
# ///

"""
BPO end to end: from prompts, scored responses or preference pairs to a trained policy and a curated dataset.

# Quickstart: no hub, no key, no GPU
```bash
accelerate launch --num_cpu_threads_per_process 2 recipes/bpo.py --quickstart
```

# From prompts, with a judge behind an OpenAI-compatible API
```bash
accelerate launch recipes/bpo.py --config recipes/configs/ultrafeedback.yaml
```

# From preference pairs in a file
```bash
accelerate launch recipes/bpo.py \
    --dataset_name pairs.jsonl \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --use_peft \
    --depth_fraction 0.25 \
    --output_dir Qwen2.5-0.5B-BPO
```
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from trl import ScriptArguments

from trl_bpo.api.costs import dollars
from trl_bpo.clustering import SCOPES, check_fraction


@dataclass
class BPOScriptArguments(ScriptArguments):
    r"""
    Arguments of this script, beside those of [`~trl_bpo.BPOConfig`] and [`~trl.ModelConfig`].

    `dataset_name` is a Hub id, a folder, or a JSON, Parquet or CSV file; `dataset_train_split` may be a slice.

    Parameters:
        quickstart (`bool`, *optional*, defaults to `False`):
            Run the embedded example, with the options of `trl_bpo/quickstart/quickstart.yaml`.

        > Parameters that control the data

        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompt.
        start_from (`str`, *optional*, defaults to `"auto"`):
            Stage to start at: `prompts`, `responses`, `scores` or `pairs`. `auto` takes the furthest that the columns
            allow.
        to_messages (`bool`, *optional*, defaults to `False`):
            Turn text prompts into messages, so that the chat template of the policy applies.

        > Parameters that control breadth

        breadth_fraction (`float`, *optional*, defaults to `1.0`):
            Fraction of the distinct prompts to keep, in (0, 1]. 1.0 keeps all.
        breadth_encoder (`str`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            Sentence-transformers model id or path.
        breadth_clusters (`int`, *optional*):
            Number of clusters. If `None`, `round(sqrt(n / 2))`.
        breadth_near_duplicates (`float`, *optional*):
            Cosine similarity from which two prompts are near duplicates, of which one takes part. `None`: all do.
        breadth_scope (`str`, *optional*, defaults to `"per_cluster"`):
            `per_cluster` or `overall`.

        > Parameters that control the candidates

        num_responses (`int`, *optional*, defaults to `8`):
            Responses that the policy samples a prompt.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Token limit of a response.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus of the sampling.
        generation_batch_size (`int`, *optional*, defaults to `16`):
            Sequences that are generated together.
        generator (`str`, *optional*, defaults to `"transformers"`):
            `transformers`, in this process, or `openai`, a server with an OpenAI-compatible API that serves the policy,
            such as vLLM.
        generator_base_url (`str`, *optional*):
            Address of that server.
        generator_kwargs (`dict` or `str`, *optional*):
            Further arguments of [`~trl_bpo.TransformersGenerator`] or [`~trl_bpo.OpenAIGenerator`], as JSON, such as
            `{"model": "policy", "max_concurrency": 256}`.

        > Parameters that control the judge and the pairs

        judge (`str`, *optional*, defaults to `"openai"`):
            `openai` (any OpenAI-compatible API; the key comes from `OPENAI_API_KEY`), `openai_pairwise` (the same, by
            comparisons), `reward_model`, or `verifiable` (checks the instructions in the column `constraints` by
            program).
        judge_model (`str`, *optional*):
            Model of the judge: its name at the API, or id or path of the reward model.
        judge_base_url (`str`, *optional*):
            Address of the API.
        judge_prompt_file (`str`, *optional*):
            File with another prompt template for the judge.
        judge_concurrency (`int`, *optional*, defaults to `8`):
            Requests to the judge under way at once.
        judge_kwargs (`dict` or `str`, *optional*):
            Further arguments of [`~trl_bpo.OpenAIJudge`] or [`~trl_bpo.RewardModelJudge`], as JSON, such as
            `{"rubric": "ultrafeedback", "temperature": null}`.
        judge_max_cost (`float`, *optional*):
            US dollars that all verdicts may cost together. Before it would be passed, the run ends, and can be repeated
            with a larger one.
        judge_batch (`bool`, *optional*, defaults to `False`):
            Judge through the Batch API, at half the price. The run hands the responses in and ends; run it again until
            the verdicts are there.
        pair_rule (`str`, *optional*, defaults to `"uniform"`):
            `uniform`, `all`, `adjacent` or `best_worst`.
        min_margin (`float`, *optional*, defaults to `0.0`):
            Difference of scores below which two responses make no pair.
        allow_truncated_chosen (`bool`, *optional*, defaults to `False`):
            Whether a response that was cut at the token limit may be the chosen one.
    """

    quickstart: bool = field(
        default=False, metadata={"help": "Run the embedded example: no hub, no key and no GPU needed."}
    )

    # Parameters that control the data
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompt."})
    start_from: str = field(
        default="auto",
        metadata={"help": "Stage to start at: auto, prompts, responses, scores or pairs. auto: as the columns allow."},
    )
    to_messages: bool = field(
        default=False,
        metadata={"help": "Turn text prompts into messages, so that the chat template of the policy applies."},
    )

    # Parameters that control breadth
    breadth_fraction: float = field(
        default=1.0, metadata={"help": "Fraction of the distinct prompts to keep, in (0, 1]. 1.0 keeps all."}
    )
    breadth_encoder: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        metadata={"help": "Sentence-transformers model id or path."},
    )
    breadth_clusters: int | None = field(
        default=None, metadata={"help": "Number of clusters of prompts. If None, round(sqrt(n / 2))."}
    )
    breadth_scope: str = field(default="per_cluster", metadata={"help": "per_cluster or overall."})
    breadth_near_duplicates: float | None = field(
        default=None,
        metadata={"help": "Cosine similarity from which two prompts are near duplicates. If None, they are kept."},
    )

    # Parameters that control the candidates
    num_responses: int = field(default=8, metadata={"help": "Responses that the policy samples a prompt."})
    max_new_tokens: int = field(default=512, metadata={"help": "Token limit of a response."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the sampling."})
    generation_batch_size: int = field(default=16, metadata={"help": "Sequences that are generated together."})
    generator: str = field(
        default="transformers",
        metadata={"help": "What samples the responses.", "choices": ["transformers", "openai"]},
    )
    generator_base_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of the server that serves the policy, for `generator=openai`, or several with commas."
        },
    )
    generator_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the generator, as JSON."}
    )

    # Parameters that control the judge and the pairs
    judge: str = field(
        default="openai",
        metadata={
            "help": "Who scores the responses.",
            "choices": ["openai", "openai_pairwise", "reward_model", "verifiable"],
        },
    )
    judge_model: str | None = field(
        default=None, metadata={"help": "Name of the judge at the API, or id or path of the reward model."}
    )
    judge_base_url: str | None = field(
        default=None, metadata={"help": "Address of the OpenAI-compatible API, or several with commas between them."}
    )
    judge_prompt_file: str | None = field(
        default=None, metadata={"help": "File with another prompt template for the judge."}
    )
    judge_concurrency: int = field(default=8, metadata={"help": "Requests to the judge under way at once."})
    judge_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the judge, as JSON."}
    )
    judge_max_cost: float | None = field(
        default=None, metadata={"help": "US dollars that all verdicts may cost together."}
    )
    judge_batch: bool = field(
        default=False, metadata={"help": "Judge through the Batch API, in two runs, at half the price."}
    )
    pair_rule: str = field(default="uniform", metadata={"help": "uniform, all, adjacent or best_worst."})
    min_margin: float = field(
        default=0.0, metadata={"help": "Difference of scores below which two responses make no pair."}
    )
    allow_truncated_chosen: bool = field(
        default=False, metadata={"help": "Whether a response cut at the token limit may be the chosen one."}
    )

    def __post_init__(self) -> None:
        check_fraction("breadth_fraction", self.breadth_fraction)
        if self.breadth_scope not in SCOPES:
            raise ValueError(f"`breadth_scope` must be one of {SCOPES}, got {self.breadth_scope!r}.")
        for name in ("dataset_streaming", "ignore_bias_buffers"):
            if getattr(self, name):
                raise ValueError(f"`{name}` does not go with this script: BPO must see all rows. Unset it.")
        # The parser reads JSON; who makes this object in Python may give either.
        for name in ("generator_kwargs", "judge_kwargs"):
            value = getattr(self, name)
            setattr(self, name, (json.loads(value) if isinstance(value, str) else value) or {})
        if self.generator_base_url is not None and self.generator != "openai":
            raise ValueError(f"`generator_base_url` needs `generator='openai'`, got {self.generator!r}.")
        if self.judge_prompt_file is not None and not self.judge.startswith("openai"):
            raise ValueError(f"`judge_prompt_file` needs a judge over an API, got {self.judge!r}.")
        if self.judge_kwargs and self.judge == "verifiable":
            raise ValueError("`judge_kwargs` is not for `judge='verifiable'`, which has no options. Unset it.")
        if self.judge_batch and self.judge != "openai":
            raise ValueError(f"`judge_batch` needs `judge='openai'`, got {self.judge!r}.")
        if self.judge_max_cost is not None and not self.judge.startswith("openai"):
            raise ValueError(f"`judge_max_cost` needs a judge over an API, got {self.judge!r}.")


def addresses(text: str | None) -> list[str] | None:
    return None if text is None else [address.strip() for address in text.split(",")]


def make_judge(script_args: BPOScriptArguments, dataset: Any, cache_dir: Path) -> Any:
    from trl_bpo import OpenAIJudge, OpenAIPairwiseJudge, RewardModelJudge, VerifiableJudge

    if script_args.judge == "verifiable":
        if "constraints" not in dataset.column_names:
            raise ValueError(
                "`judge='verifiable'` needs a column `constraints`, as `trl_bpo.VerifiableJudge` takes it."
            )
        judge = VerifiableJudge()
        # It grades any text, so a constraint that cannot be checked shows before responses are sampled.
        judge(list(dataset["prompt"]), ["x"] * len(dataset), constraints=list(dataset["constraints"]))
        return judge
    if script_args.judge_model is None:
        raise ValueError(f"`judge={script_args.judge!r}` needs `judge_model`: the name of the model that judges.")
    kwargs = dict(script_args.judge_kwargs)
    if script_args.judge == "reward_model":
        return RewardModelJudge(script_args.judge_model, **{"cache_dir": str(cache_dir), **kwargs})
    if script_args.judge_prompt_file is not None:
        kwargs["prompt_template"] = Path(script_args.judge_prompt_file).read_text(encoding="utf-8")
    options = {
        "base_url": addresses(script_args.judge_base_url),
        "max_concurrency": script_args.judge_concurrency,
        "max_cost": script_args.judge_max_cost,
        "cache_dir": str(cache_dir),
        **kwargs,
    }
    if script_args.judge == "openai_pairwise":
        return OpenAIPairwiseJudge(script_args.judge_model, **options)
    return OpenAIJudge(script_args.judge_model, **options)


class Funnel:
    """What each stage left over and what it took, for the summary, the dataset card and the report."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self.start = time.perf_counter()

    def add(
        self,
        stage: str,
        rows: int,
        note: str,
        tokens: int | None = None,
        bill: Any = None,
        seconds: float | None = None,
    ) -> None:
        """`bill` is what an API charged, over all runs; `seconds` the time since the last stage, if not said otherwise."""
        seconds = time.perf_counter() - self.start if seconds is None else seconds
        self.start += seconds
        if bill is not None:
            tokens = bill.prompt_tokens + bill.completion_tokens
            note += f"; {bill.prompt_tokens:,} + {bill.completion_tokens:,} tokens"
            note += "" if bill.cost is None else f", {dollars(bill.cost)}"
        cost = None if bill is None else bill.cost
        self.stages.append(
            {"stage": stage, "rows": rows, "note": note, "seconds": seconds, "tokens": tokens, "cost": cost}
        )

    @property
    def rows(self) -> list[tuple[str, int, str]]:
        took = [
            f"{stage['seconds']:.0f} s" if stage["seconds"] < 60 else f"{stage['seconds'] / 60:.1f} min"
            for stage in self.stages
        ]
        return [
            (stage["stage"], stage["rows"], f"{stage['note']}; {time}")
            for stage, time in zip(self.stages, took, strict=True)
        ]


def main(script_args: BPOScriptArguments, training_args: Any, model_args: Any) -> None:
    import datasets
    import transformers
    from accelerate import PartialState
    from packaging.version import Version
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_bpo import (
        BPODataCollector,
        BPOTrainer,
        BreadthSelector,
        OpenAIGenerator,
        OpenAIJudge,
        OpenAIPairwiseJudge,
        TransformersGenerator,
        quickstart,
    )
    from trl_bpo.evaluation import comparison_table, evaluate_policy
    from trl_bpo.formats import drop_duplicate_pairs, load_rows, prepare_dataset
    from trl_bpo.hub import source_fields
    from trl_bpo.manifest import public_name, sha256_of_ids, sha256_of_text, write_json
    from trl_bpo.report import summary_table, write_report
    from trl_bpo.run_folder import BREADTH, BREADTH_STAGE, FUNNEL, SCORES_STAGE

    if training_args.disable_tqdm:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    funnel = Funnel()
    state = PartialState()
    model_name = model_args.model_name_or_path
    dataset_name = script_args.dataset_name
    heldout = None

    # Everything that can be refused is refused here, before any work.
    if script_args.quickstart:
        if dataset_name is not None or model_name is not None:
            raise ValueError(
                "`--quickstart` brings its own data and model. Leave it out to use `dataset_name` and yours."
            )
        with state.main_process_first():
            model_name = quickstart.export_policy(Path(training_args.output_dir) / "_policy")
        script_args.breadth_encoder = quickstart.encoder_path()
        dataset_name, dataset = "trl_bpo quickstart prompts", quickstart.load_prompts("train")
        heldout = quickstart.load_prompts("heldout")
        kinds = ["kinds of the training set" if seen else "kinds held out" for seen in heldout["seen"]]
        heldout = heldout.add_column("kinds", kinds)
    elif dataset_name is None:
        raise ValueError("`dataset_name` is required: a Hub id, a folder or a file. Or run with `--quickstart`.")
    else:
        dataset = load_rows(dataset_name, script_args.dataset_train_split, script_args.dataset_config)
    if model_name is None:
        raise ValueError("`model_name_or_path` is required: the SFT policy to sample from and to train.")

    def prepare(rows: Any, start_from: str) -> Any:
        return prepare_dataset(
            rows,
            prompt_column=script_args.prompt_column,
            start_from=start_from,
            to_messages=script_args.to_messages,
        )

    prepared = prepare(dataset, script_args.start_from)
    dataset, stage = prepared.dataset, prepared.stage
    collected = Path(training_args.output_dir) / "_collected"
    eval_dataset = None
    if training_args.eval_strategy != "no":
        if stage != "pairs":
            raise ValueError(f"`eval_strategy` needs pairs to evaluate on, but the data are {stage}. Set it to 'no'.")
        rows = load_rows(dataset_name, script_args.dataset_test_split, script_args.dataset_config)
        eval_dataset = prepare(rows, "pairs").dataset
    breadth = None
    if script_args.breadth_fraction != 1.0:
        breadth = BreadthSelector(
            script_args.breadth_fraction,
            script_args.breadth_encoder,
            n_clusters=script_args.breadth_clusters,
            scope=script_args.breadth_scope,
            near_duplicate_threshold=script_args.breadth_near_duplicates,
            seed=training_args.seed,
        )
    collector = BPODataCollector(
        num_responses=script_args.num_responses,
        pair_rule=script_args.pair_rule,
        min_margin=script_args.min_margin,
        allow_truncated_chosen=script_args.allow_truncated_chosen,
    )
    if stage in ("prompts", "responses"):
        collector.judge = make_judge(script_args, dataset, collected / "answers")
    model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    training_args.model_init_kwargs = model_init_kwargs
    quantization_config = get_quantization_config(model_args)
    trust_remote_code = training_args.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(
        model_name, revision=model_args.model_revision, trust_remote_code=trust_remote_code
    )

    sampling = {
        "max_new_tokens": script_args.max_new_tokens,
        "temperature": script_args.temperature,
        "top_p": script_args.top_p,
        "seed": training_args.seed,
    }

    def make_generator(model: Any, **options: Any) -> TransformersGenerator:
        kwargs = {
            **model_init_kwargs,
            "quantization_config": quantization_config,
            "trust_remote_code": trust_remote_code,
        }
        return TransformersGenerator(
            model,
            tokenizer,
            model_init_kwargs=kwargs if isinstance(model, str) else None,
            **{"batch_size": script_args.generation_batch_size, **sampling, **options},
        )

    if stage == "prompts":
        if script_args.temperature == 0:
            raise ValueError("`temperature=0` gives the same response every time. Raise it, so that pairs can differ.")
        options = {"cache_dir": str(collected / "answers"), **script_args.generator_kwargs}
        if script_args.generator == "openai":
            served = options.pop("model", model_name)
            collector.generator = OpenAIGenerator(
                served, base_url=addresses(script_args.generator_base_url), **{**sampling, **options}
            )
        else:
            collector.generator = make_generator(model_name, **options)
    dropped = f", {prepared.dropped} transcript pairs of two contexts dropped" if prepared.dropped else ""
    funnel.add("rows", len(dataset), f"from {public_name(dataset_name)}, start at {stage}{dropped}")

    # Breadth
    breadth_settings: dict[str, Any] = {}
    provenance: dict[str, str] = {}
    if breadth is not None:
        selection = breadth.select(dataset)
        if state.is_main_process:
            selection.save(Path(training_args.output_dir) / BREADTH)
        breadth_settings = {
            "breadth_fraction": breadth.fraction,
            "breadth_clusters": selection.n_clusters,
            "breadth_scope": breadth.scope,
            "breadth_encoder": public_name(breadth.encoder),
        }
        provenance["ids of the prompts"] = sha256_of_ids(selection.by_prompt["prompt_id"])
        dataset = selection.kept
        funnel.add(
            BREADTH_STAGE,
            selection.prompts_kept,
            f"of {selection.prompts} distinct; {selection.duplicates} duplicate rows, "
            + (f"{selection.near_duplicates} near duplicates, " if script_args.breadth_near_duplicates else "")
            + f"{selection.over_long} over-long",
        )

    # Candidates. What was paid for is on disk before it counts: the same command again asks only for what is missing.
    judge_name = public_name(script_args.judge_model or script_args.judge)
    before = None
    if stage == "prompts":
        if heldout is not None:
            before = evaluate_policy(
                collector.generator,
                collector.judge,
                heldout,
                collector.generator.model,
                tokenizer,
                group_column="kinds",
            )
            funnel.add("held-out prompts", len(heldout), "answered and judged before training")
        dataset = collector.generate(dataset)
        collector.generator = None
        if state.is_main_process:
            dataset.to_parquet(collected / "responses.parquet")
        report = collector.report
        funnel.add(
            "responses",
            report.responses,
            f"{report.generated_tokens:,} tokens, {report.truncated} cut at the limit",
            report.generated_tokens,
            report.generation,
        )
    if stage in ("prompts", "responses"):
        if script_args.judge_batch:
            status = collector.score_batch(dataset)
            if not status.is_ready:
                PartialState().print(status)
                return
        dataset = collector.score(dataset)
        if state.is_main_process:
            dataset.to_parquet(collected / "scores.parquet")
        scored = sum(score is not None for scores in dataset["scores"] for score in scores)
        funnel.add(
            SCORES_STAGE,
            scored,
            f"{collector.report.unscored} without; by {judge_name}",
            bill=collector.report.judging,
        )
    if stage != "pairs":
        dataset = collector.pair(dataset)
        pairs = collector.report.pairs
        funnel.add(
            "pairs",
            pairs.pairs,
            f"{pairs.ties} ties, {pairs.unscored} responses without a score, {pairs.truncated_chosen} with a cut-off winner, "
            f"{pairs.prompts_without_pair} prompts without a pair; the longer response is the chosen one in "
            f"{pairs.longer_chosen_share:.0%}",
        )

    distinct = drop_duplicate_pairs(dataset)
    if copies := len(dataset) - len(distinct):
        dataset = distinct
        funnel.add("distinct pairs", len(dataset), f"{copies} exact copies dropped")

    # Depth and DPO. A reward model would take the policy's room.
    if isinstance(collector.judge, OpenAIJudge | OpenAIPairwiseJudge):
        provenance["template of the judge"] = sha256_of_text(collector.judge.rubric.template)
    judge, collector.judge = (collector.judge if heldout is not None else None), None
    settings = ["num_responses", "temperature", "top_p", "max_new_tokens"] if stage == "prompts" else []
    settings += ["pair_rule", "min_margin"] if stage != "pairs" else []
    trainer = BPOTrainer(
        model=model_name,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_config,
        peft_config=get_peft_config(model_args),
    )
    # A local path is nobody's business but yours: only a dataset of the Hub is named as one.
    hub_dataset = None if script_args.quickstart or os.path.exists(dataset_name) else dataset_name
    card_fields: dict[str, Any] = {
        "source_datasets": [public_name(dataset_name)],
        "source_split": script_args.dataset_train_split,
        **(
            {}
            if hub_dataset is None or not state.is_main_process
            else source_fields(hub_dataset, training_args.hub_token)
        ),
        "funnel": funnel.rows,
        "settings": breadth_settings | {name: getattr(script_args, name) for name in settings},
        "provenance": provenance,
    }
    if stage == "prompts":
        card_fields["policy_model"] = quickstart.POLICY_NAME if script_args.quickstart else public_name(model_name)
    if stage in ("prompts", "responses"):
        card_fields["judge"] = judge_name
    if over_long := len(dataset) - len(trainer.train_dataset):
        funnel.add(
            "pairs that fit", len(trainer.train_dataset), f"{over_long} whose prompt fills `max_length` dropped"
        )
    trainer.curated_card_fields = card_fields
    if state.is_main_process:
        write_json(Path(training_args.output_dir) / FUNNEL, funnel.stages)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    tokens = max(int(entry.get("num_tokens", 0)) for entry in trainer.state.log_history)
    processes = f"{state.num_processes} process{'es' if state.num_processes > 1 else ''}"
    if trainer.selection is not None:
        kept = int(trainer.selection.selected.sum())
        funnel.add("pairs kept (depth)", kept, trainer.selection.summary, seconds=trainer.seconds_selecting)
    funnel.add("training steps", trainer.state.global_step, f"{tokens:,} tokens; on {processes}", tokens)

    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(model_name=Path(training_args.output_dir).name, dataset_name=hub_dataset)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=hub_dataset)

    if before is not None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        after = evaluate_policy(make_generator(model), judge, heldout, model, tokenizer, group_column="kinds")
        funnel.add("held-out prompts", len(heldout), "answered and judged after training")
        trainer.accelerator.print(comparison_table(before, after))
    trainer.accelerator.print(summary_table(funnel.rows))
    if state.is_main_process:
        write_json(Path(training_args.output_dir) / FUNNEL, funnel.stages)
        if trainer.selection is not None:
            try:
                print(f"Report: {write_report(training_args.output_dir)}")
            # The model is there, whatever a page may come to.
            except Exception as error:
                print(f"No report was written: {error}\nTry again with `trl-bpo report {training_args.output_dir}`.")
    curated = " and curated dataset" if trainer.selection is not None else ""
    trainer.accelerator.print(f"Model, cards{curated}: {training_args.output_dir}")
    # The group is taken down with the interpreter's lock held. A thread of gloo that needs the lock to let go of the last
    # collective's tensors would block that for ever; while everyone waits, the lock is free.
    trainer.accelerator.wait_for_everyone()
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()


def make_parser() -> Any:
    from trl import ModelConfig, TrlParser

    from trl_bpo import BPOConfig

    return TrlParser((BPOScriptArguments, BPOConfig, ModelConfig))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--quickstart" in arguments and "--config" not in arguments:
        arguments += ["--config", str(files("trl_bpo.quickstart") / "quickstart.yaml")]
    script_args, training_args, model_args = make_parser().parse_args_and_config(arguments)
    main(script_args, training_args, model_args)
