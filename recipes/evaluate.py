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
#     "trl_bpo[openai,report]",
# ]
# ///

"""
Compare models: answers to benchmarks, judged, with win rates over a base model.

# A model and an adapter against the model that they were trained from
```bash
OPENAI_API_KEY=... python recipes/evaluate.py \
    --base_model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --model_name_or_path Qwen2.5-0.5B-DPO Qwen2.5-0.5B-BPO \
    --benchmark ultrafeedback safe_rlhf alpaca_eval \
    --judge openai_pairwise --judge_model gpt-4.1 --judge_base_url https://api.openai.com/v1 \
    --output_dir evaluation
```

# MT-Bench, graded with its own prompts, from local files
```bash
OPENAI_API_KEY=... python recipes/evaluate.py \
    --model_name_or_path Qwen2.5-0.5B-BPO \
    --benchmark mt_bench=question.jsonl \
    --mt_bench_references gpt-4.jsonl --mt_bench_judge_prompts judge_prompts.jsonl \
    --judge openai --judge_model gpt-4.1 --judge_base_url https://api.openai.com/v1 \
    --output_dir evaluation
```
"""

import gc
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any


BENCHMARKS = ("mt_bench", "alpaca_eval", "hh_rlhf", "safe_rlhf", "ultrafeedback", "prompts")
# What MT-Bench's published prompts leave no room for.
RUBRIC_OPTIONS = ("rubric", "prompt_template", "num_votes", "expected_score")


@dataclass
class EvaluationArguments:
    r"""
    Arguments of this script.

    Parameters:
        model_name_or_path (`list[str]`):
            Models to evaluate: Hub ids or folders of models or of PEFT adapters, or, with `generator=openai`, names at the
            server.
        output_dir (`str`):
            Folder for what the script writes: `results.json`, `results.txt`, `results.png`, `answers/` and
            `alpaca_eval/`.
        base_model_name_or_path (`str`, *optional*):
            Model to compare them with.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type to load the weights in.

        > Parameters that control the prompts

        benchmark (`list[str]`, *optional*, defaults to `["ultrafeedback"]`):
            What to evaluate on: `mt_bench`, `alpaca_eval`, `hh_rlhf`, `safe_rlhf`, `ultrafeedback`, or `prompts`, your own.
            `NAME=SOURCE` loads it from a Hub id, a folder or a file.
        max_prompts (`int`, *optional*):
            Prompts to draw at random from each benchmark but MT-Bench. By default, all are used.
        train_dataset_name (`str`, *optional*):
            Dataset that the models were trained on, a Hub id, a folder or a file. Its prompts are left out.
        train_dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        alpaca_eval_reference_column (`str`, *optional*, defaults to `"output"`):
            Column of AlpacaEval's source that holds the answers to compare with.
        mt_bench_judge_prompts (`str`, *optional*):
            The published `judge_prompts.jsonl` of MT-Bench.
        mt_bench_references (`str`, *optional*):
            File with MT-Bench's reference answers, where the questions' source lacks them.

        > Parameters that control the answers

        max_new_tokens (`int`, *optional*, defaults to `1024`):
            Token limit of an answer.
        temperature (`float`, *optional*):
            Sampling temperature. By default 0.7, and for MT-Bench that of its authors for each category.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus of the sampling.
        generation_batch_size (`int`, *optional*, defaults to `16`):
            Sequences that are generated together.
        generator (`str`, *optional*, defaults to `"transformers"`):
            `transformers`, in this process, or `openai`, a server with an OpenAI-compatible API that serves all models.
        generator_base_url (`str`, *optional*):
            Address of that server.
        generator_kwargs (`dict` or `str`, *optional*):
            Further arguments of the generator, as JSON.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the sampling, of the drawing of prompts and of the bootstrap.
        cache_dir (`str`, *optional*):
            Folder in which answers and verdicts are kept. By default `_answers` in `output_dir`. Evaluations that share
            one answer for a model once.

        > Parameters that control the judge

        judge (`str`, *optional*, defaults to `"openai"`):
            `openai`, `openai_pairwise`, `reward_model` or `verifiable`, as in `bpo.py`.
        judge_model (`str`, *optional*):
            Model of the judge: its name at the API, or id or path of the reward model.
        judge_base_url (`str`, *optional*):
            Address of the API.
        judge_prompt_file (`str`, *optional*):
            File with another prompt template for the judge. MT-Bench has its own in any case.
        judge_concurrency (`int`, *optional*, defaults to `8`):
            Requests to the judge under way at once.
        judge_kwargs (`dict` or `str`, *optional*):
            Further arguments of the judge, as JSON.
        judge_max_cost (`float`, *optional*):
            US dollars that all verdicts may cost together, those of earlier runs in the same `cache_dir` included.
        confidence_level (`float`, *optional*, defaults to `0.95`):
            Coverage of the bootstrap intervals.
    """

    model_name_or_path: list[str] = field(metadata={"help": "Models or adapters to evaluate."})
    output_dir: str = field(metadata={"help": "Folder for the results."})
    base_model_name_or_path: str | None = field(default=None, metadata={"help": "Model to compare them with."})
    dtype: str = field(default="auto", metadata={"help": "Type to load the weights in."})

    # Parameters that control the prompts
    benchmark: list[str] = field(
        default_factory=lambda: ["ultrafeedback"],
        metadata={"help": f"What to evaluate on, as NAME or NAME=SOURCE. Names: {', '.join(BENCHMARKS)}."},
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Prompts to draw from each benchmark."})
    train_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset that the models were trained on. Its prompts are left out."}
    )
    train_dataset_split: str = field(default="train", metadata={"help": "Split of that dataset."})
    alpaca_eval_reference_column: str = field(
        default="output", metadata={"help": "Column of AlpacaEval's source with the answers to compare with."}
    )
    mt_bench_judge_prompts: str | None = field(
        default=None, metadata={"help": "The published judge_prompts.jsonl of MT-Bench."}
    )
    mt_bench_references: str | None = field(
        default=None, metadata={"help": "File with MT-Bench's reference answers, if the questions lack them."}
    )

    # Parameters that control the answers
    max_new_tokens: int = field(default=1024, metadata={"help": "Token limit of an answer."})
    temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature. If None, 0.7, and for MT-Bench its own."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the sampling."})
    generation_batch_size: int = field(default=16, metadata={"help": "Sequences that are generated together."})
    generator: str = field(
        default="transformers",
        metadata={"help": "What samples the answers.", "choices": ["transformers", "openai"]},
    )
    generator_base_url: str | None = field(
        default=None, metadata={"help": "Address of the server that serves the models, for `generator=openai`."}
    )
    generator_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Further arguments of the generator, as JSON."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of sampling, drawing and bootstrap."})
    cache_dir: str | None = field(default=None, metadata={"help": "Folder in which answers and verdicts are kept."})

    # Parameters that control the judge
    judge: str = field(
        default="openai",
        metadata={
            "help": "Who judges the answers.",
            "choices": ["openai", "openai_pairwise", "reward_model", "verifiable"],
        },
    )
    judge_model: str | None = field(
        default=None, metadata={"help": "Name of the judge at the API, or id or path of the reward model."}
    )
    judge_base_url: str | None = field(default=None, metadata={"help": "Address of the OpenAI-compatible API."})
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
    confidence_level: float = field(default=0.95, metadata={"help": "Coverage of the bootstrap intervals."})

    def __post_init__(self) -> None:
        # The parser reads JSON; who makes this object in Python may give either.
        for name in ("generator_kwargs", "judge_kwargs"):
            value = getattr(self, name)
            setattr(self, name, (json.loads(value) if isinstance(value, str) else value) or {})
        names = [item.partition("=")[0] for item in self.benchmark]
        for name in names:
            if name not in BENCHMARKS:
                raise ValueError(f"`benchmark` must be of {BENCHMARKS}, possibly with `=SOURCE`, got {name!r}.")
        if len(set(names)) < len(names):
            raise ValueError(
                f"`benchmark` names one twice: {names}. Evaluate on the other source in a run of its own."
            )
        if "prompts" in self.benchmark:
            raise ValueError("`benchmark=prompts` needs a source: give it as `prompts=SOURCE`.")
        if len(set(self.model_name_or_path)) < len(self.model_name_or_path):
            raise ValueError(f"`model_name_or_path` names a model twice: {self.model_name_or_path}.")
        if self.base_model_name_or_path in self.model_name_or_path:
            raise ValueError(
                "`model_name_or_path` has the base model, which is answered for in any case. Leave it out."
            )
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"`max_prompts` must be at least 1, got {self.max_prompts}.")
        if not 0 < self.confidence_level < 1:
            raise ValueError(f"`confidence_level` must be between 0 and 1, got {self.confidence_level}.")
        if self.generator_base_url is not None and self.generator != "openai":
            raise ValueError(f"`generator_base_url` needs `generator='openai'`, got {self.generator!r}.")
        if self.judge_prompt_file is not None and not self.judge.startswith("openai"):
            raise ValueError(f"`judge_prompt_file` needs a judge over an API, got {self.judge!r}.")
        if self.judge_max_cost is not None and not self.judge.startswith("openai"):
            raise ValueError(f"`judge_max_cost` needs a judge over an API, got {self.judge!r}.")
        if "mt_bench" in names and self.judge.startswith("openai") and self.mt_bench_judge_prompts is None:
            raise ValueError(
                "MT-Bench is judged with its published prompts: give `mt_bench_judge_prompts`, its `judge_prompts.jsonl`."
            )
        if self.base_model_name_or_path is None and self.judge == "openai_pairwise" and set(names) - {"alpaca_eval"}:
            raise ValueError("`judge='openai_pairwise'` compares with a baseline: give `base_model_name_or_path`.")


@dataclass
class Answers:
    """Answers of one model, or of a published reference, to the prompts of a benchmark."""

    prompts: list
    # Without responses, where they are not of a model.
    texts: list[str | None]
    responses: list | None = None

    def statistics(self) -> dict[str, Any]:
        given = [text for text in self.texts if text is not None]
        found: dict[str, Any] = {
            "answered": len(given),
            "missing": len(self.texts) - len(given),
            "empty": sum(not text.strip() for text in given),
            "characters_mean": statistics.fmean(map(len, given)) if given else None,
            "characters_median": statistics.median(map(len, given)) if given else None,
        }
        if self.responses is not None:
            responses = [response for response in self.responses if response is not None]
            found["truncated"] = sum(response.truncated for response in responses)
            found["tokens_mean"] = (
                statistics.fmean(response.num_tokens for response in responses) if responses else None
            )
        return found


def load_benchmark(args: EvaluationArguments, item: str) -> Any:
    from trl_bpo.benchmarks import (
        draw,
        drop_seen,
        load_alpaca_eval,
        load_hh_rlhf,
        load_prompts,
        load_safe_rlhf,
        load_ultrafeedback,
    )
    from trl_bpo.formats import load_rows, prepare_dataset
    from trl_bpo.mt_bench import load_mt_bench

    name, _, source = item.partition("=")
    sources = [source] if source else []
    if name == "mt_bench":
        return load_mt_bench(*sources, references=args.mt_bench_references)
    if name == "alpaca_eval":
        benchmark = load_alpaca_eval(*sources, reference_column=args.alpaca_eval_reference_column)
    else:
        loaders: dict[str, Callable] = {
            "hh_rlhf": load_hh_rlhf,
            "safe_rlhf": load_safe_rlhf,
            "ultrafeedback": load_ultrafeedback,
            "prompts": load_prompts,
        }
        benchmark = loaders[name](*sources)
    if args.train_dataset_name is not None:
        trained_on = load_rows(args.train_dataset_name, args.train_dataset_split)
        benchmark = drop_seen(benchmark, prepare_dataset(trained_on).dataset["prompt"])
    return benchmark if args.max_prompts is None else draw(benchmark, args.max_prompts, args.seed)


def make_judges(args: EvaluationArguments, benchmark: Any, cache_dir: Path) -> dict[str, Any]:
    """The judges of a benchmark by the criterion, which is empty where there is only one."""
    from bpo import make_judge

    from trl_bpo.benchmarks import safe_rlhf_rubrics
    from trl_bpo.mt_bench import MTBenchJudge, load_judge_prompts

    over_api = args.judge.startswith("openai")
    # A folder of its own for each judge: a judge lists there what it had no verdict on.
    cache_dir = cache_dir / benchmark.name
    if benchmark.name == "mt_bench" and over_api:
        if args.judge_model is None:
            raise ValueError(f"`judge={args.judge!r}` needs `judge_model`: the name of the model that judges.")
        options = {name: value for name, value in args.judge_kwargs.items() if name not in RUBRIC_OPTIONS}
        judge = MTBenchJudge(
            args.judge_model,
            load_judge_prompts(args.mt_bench_judge_prompts),
            **{
                "base_url": args.judge_base_url,
                "max_concurrency": args.judge_concurrency,
                "max_cost": args.judge_max_cost,
                "cache_dir": str(cache_dir),
                **options,
            },
        )
        return {"": judge}
    of_your_own = args.judge_prompt_file is not None or {"rubric", "prompt_template"} & set(args.judge_kwargs)
    if benchmark.name == "safe_rlhf" and over_api and not of_your_own:
        judges = {}
        for criterion, (rubric, pairwise) in safe_rlhf_rubrics().items():
            option = {"rubric": rubric} if args.judge == "openai" else {"prompt_template": pairwise.template}
            own = replace(args, judge_kwargs={**args.judge_kwargs, **option})
            judges[criterion] = make_judge(own, benchmark.dataset, cache_dir / criterion)
        return judges
    return {"": make_judge(args, benchmark.dataset, cache_dir)}


def load_model(name: str, dtype: str) -> tuple[Any, Any]:
    from accelerate import PartialState
    from peft import AutoPeftModelForCausalLM, PeftConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    options = {"dtype": dtype, "device_map": PartialState().device}
    if find_adapter_config_file(name) is None:
        return AutoModelForCausalLM.from_pretrained(name, **options), AutoTokenizer.from_pretrained(name)
    # Not every adapter comes with the tokenizer that it was trained with.
    own = cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    return (
        AutoPeftModelForCausalLM.from_pretrained(name, **options),
        AutoTokenizer.from_pretrained(base if own is None else name),
    )


def answer_all(
    args: EvaluationArguments, model_name: str, benchmarks: list[Any], cache_dir: Path
) -> dict[str, Answers]:
    """Answers of a model to all benchmarks, by their names."""
    import torch

    from trl_bpo import OpenAIGenerator, TransformersGenerator
    from trl_bpo.benchmarks import answer_prompts
    from trl_bpo.mt_bench import answer_turns

    sampling = {"max_new_tokens": args.max_new_tokens, "top_p": args.top_p, "seed": args.seed}
    options = {**sampling, "cache_dir": str(cache_dir), **args.generator_kwargs}
    make_generator: Callable[[float], Any]
    if args.generator == "openai":

        def make_generator(temperature: float) -> Any:
            own = {"base_url": args.generator_base_url, "temperature": temperature, **options}
            return OpenAIGenerator(model_name, **own)

    else:
        model, tokenizer = load_model(model_name, args.dtype)

        def make_generator(temperature: float) -> Any:
            own = {"temperature": temperature, "batch_size": args.generation_batch_size, **options}
            return TransformersGenerator(model, tokenizer, **own)

    found = {}
    for benchmark in benchmarks:
        if benchmark.name == "mt_bench":
            turns = answer_turns(make_generator, benchmark.dataset, args.temperature)
            prompts, responses = turns.prompts, turns.responses
        else:
            prompts = list(benchmark.dataset["prompt"])
            temperature = 0.7 if args.temperature is None else args.temperature
            responses = answer_prompts(make_generator(temperature), prompts)
        texts = [None if response is None else response.text for response in responses]
        found[benchmark.name] = Answers(prompts, texts, responses)
    # The next model takes the room of this one.
    if args.generator == "transformers":
        del model, make_generator
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


class Budget:
    """What all judges may cost together: each one is given what the ones before it have left over."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.reports: list[Any] = []

    @property
    def cost(self) -> float | None:
        costs = [report.cost for report in self.reports]
        return None if None in costs else sum(costs)

    def ask(self, judge: Any, call: Callable[[], Any]) -> Any:
        from trl_bpo.api_judge import APIJudge

        if not isinstance(judge, APIJudge):
            return call()
        if self.limit is not None:
            # With nothing left, what was paid for before can still be read.
            judge.client.max_cost = max(self.limit - (self.cost or 0.0), 1e-9)
        judge.report = None
        result = call()
        # Where all answers are the same, nothing is asked.
        self.reports += [] if judge.report is None else [judge.report]
        return result


def summarise(
    label: str, model: str, scores: list[float | None], groupings: list[list[str | None]], **options: Any
) -> Any:
    from trl_bpo.win_rate import interval_of
    from trl_bpo.win_rate_report import ScoreSummary

    def mean(values: list[float | None]) -> float | None:
        usable = [value for value in values if value is not None]
        return statistics.fmean(usable) if usable else None

    groups = {
        group: mean([score for score, name in zip(scores, grouping, strict=True) if name == group])
        for grouping in groupings
        for group in dict.fromkeys(grouping)
        if group is not None
    }
    missing = scores.count(None)
    interval = interval_of(scores, **options)
    return ScoreSummary(label, model, mean(scores), interval, len(scores) - missing, missing, groups)


def compare_pairs(
    judge: Any, answers: dict[str, Answers], pairs: list[tuple[str, str]], columns: dict[str, list]
) -> list[list[float | None]]:
    """Outcomes of each pair of models, asked for in one call. The same on both sides is a tie and is not shown."""
    from trl_bpo.mt_bench import MTBenchJudge
    from trl_bpo.win_rate import outcomes_from_comparisons

    count = len(next(iter(answers.values())).texts)
    sides = [[answers[name] for name in names] for names in zip(*pairs, strict=True)]
    prompts, other_prompts = ([prompt for own in side for prompt in own.prompts] for side in sides)
    texts, other_texts = ([text for own in side for text in own.texts] for side in sides)
    repeated = {name: values * len(pairs) for name, values in columns.items()}
    if isinstance(judge, MTBenchJudge):
        both = (prompts, texts, other_prompts, other_texts)
        outcomes = judge.compare(*both, repeated["category"], repeated["reference"])
    else:
        outcomes = outcomes_from_comparisons(judge, prompts, texts, other_texts, repeated.get("tools"))
    return [outcomes[start : start + count] for start in range(0, len(outcomes), count)]


def judge_benchmark(
    args: EvaluationArguments,
    benchmark: Any,
    judges: dict[str, Any],
    answers: dict[str, Answers],
    pairs: list[tuple[str, str]],
    budget: Budget,
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Comparisons, mean scores and what the judge said of each prompt."""
    from trl_bpo.win_rate import outcomes_from_scores, score_answers, tally
    from trl_bpo.win_rate_report import Comparison

    dataset = benchmark.dataset
    columns = {name: list(dataset[name]) for name in dataset.column_names if name not in ("prompt", "group")}
    groupings = [list(dataset["group"])]
    options: dict[str, Any] = {"level": args.confidence_level, "seed": args.seed}
    if benchmark.name == "mt_bench":
        groupings.insert(0, [f"turn {turn}" for turn in columns["turn"]])
        options["units"] = columns["question_id"]
    comparisons, summaries = [], []
    said: dict[str, Any] = {"scores": {}, "outcomes": {}}
    for criterion, judge in judges.items():
        label = f"{benchmark.name}, {criterion}" if criterion else benchmark.name
        if args.judge == "openai_pairwise":
            outcomes = budget.ask(judge, partial(compare_pairs, judge, answers, pairs, columns))
        else:
            prompts = [own.prompts for own in answers.values()]
            texts = [own.texts for own in answers.values()]
            values = budget.ask(judge, partial(score_answers, judge, prompts, texts, columns))
            scores = said["scores"][label] = dict(zip(answers, values, strict=True))
            summaries += [summarise(label, name, own, groupings, **options) for name, own in scores.items()]
            outcomes = [outcomes_from_scores(scores[model], scores[baseline]) for model, baseline in pairs]
        for (model, baseline), own_outcomes in zip(pairs, outcomes, strict=True):
            said["outcomes"][f"{label}: {model} against {baseline}"] = own_outcomes
            own, other = answers[model].texts, answers[baseline].texts
            parts = [tally(own_outcomes, own, other, groups=grouping, **options) for grouping in groupings]
            result = replace(parts[0], groups={name: group for part in parts for name, group in part.groups.items()})
            comparisons.append(Comparison(label, model, baseline, result))
    return comparisons, summaries, said


def unique_names(paths: list[str]) -> list[str]:
    """Names for tables: the end of a path, or all of it where two ends are the same."""
    from trl_bpo.manifest import public_name

    names = [public_name(path) for path in paths]
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def file_name(name: str) -> str:
    return re.sub(r"[^\w.()-]+", "-", name).strip("-.") or "model"


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(path: Path, benchmark: Any, answers: dict[str, Answers], said: dict[str, Any]) -> None:
    """Everything there is to a prompt in one line, for people who want to look."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for number, row in enumerate(benchmark.dataset):
            content = {
                **row,
                "answers": {name: own.texts[number] for name, own in answers.items()},
                "scores": {
                    label: {name: values[number] for name, values in scores.items()}
                    for label, scores in said["scores"].items()
                },
                "outcomes": {label: values[number] for label, values in said["outcomes"].items()},
            }
            file.write(json.dumps(content, ensure_ascii=False) + "\n")


def without_rows(result: Any) -> dict[str, Any]:
    """A win rate for the file of the results: the prompts one by one are in `answers/`."""
    content = {
        key: value for key, value in asdict(result).items() if key not in ("outcomes", "lengths", "baseline_lengths")
    }
    return {**content, "groups": {name: without_rows(part) for name, part in result.groups.items()}}


def main(args: EvaluationArguments) -> None:
    from accelerate import PartialState

    from trl_bpo.benchmarks import alpaca_eval_outputs
    from trl_bpo.win_rate_report import answer_table, plot_evaluation, score_table, win_rate_table

    if PartialState().num_processes > 1:
        raise ValueError(
            "This script runs in one process. For several GPUs, serve the models and use `generator=openai`."
        )
    output_dir = Path(args.output_dir)
    cache_dir = Path(args.cache_dir) if args.cache_dir is not None else output_dir / "_answers"
    paths = [*([args.base_model_name_or_path] if args.base_model_name_or_path else []), *args.model_name_or_path]
    names = unique_names(paths)
    path_of = dict(zip(names, paths, strict=True))
    base = names[0] if args.base_model_name_or_path else None

    # Everything that can be refused is refused here, before any work.
    benchmarks = [load_benchmark(args, item) for item in args.benchmark]
    judges = {benchmark.name: make_judges(args, benchmark, cache_dir / "verdicts") for benchmark in benchmarks}

    answers: dict[str, dict[str, Answers]] = {benchmark.name: {} for benchmark in benchmarks}
    for name, path in path_of.items():
        for benchmark_name, found in answer_all(args, path, benchmarks, cache_dir / "answers").items():
            answers[benchmark_name][name] = found

    budget = Budget(args.judge_max_cost)
    comparisons, summaries = [], []
    results: dict[str, Any] = {"settings": asdict(args), "models": path_of, "benchmarks": {}}
    for benchmark in benchmarks:
        sets = answers[benchmark.name]
        pairs = [(name, base) for name in names if base is not None and name != base]
        if benchmark.name == "alpaca_eval":
            for name, own in sets.items():
                outputs = alpaca_eval_outputs(benchmark.dataset, own.texts, name)
                write_json(output_dir / "alpaca_eval" / f"{file_name(name)}.json", outputs)
            pairs += [(name, "reference") for name in names]
            sets["reference"] = Answers(list(benchmark.dataset["prompt"]), list(benchmark.dataset["reference"]))
        found, scored, said = judge_benchmark(args, benchmark, judges[benchmark.name], sets, pairs, budget)
        comparisons += found
        summaries += scored
        results["benchmarks"][benchmark.name] = {
            "source": next(item.partition("=")[2] for item in args.benchmark if item.startswith(benchmark.name))
            or None,
            "num_prompts": len(benchmark.dataset),
            "dropped": benchmark.dropped,
            "answers": {name: own.statistics() for name, own in sets.items()},
            "scores": [asdict(summary) for summary in scored],
            "win_rates": [{**vars(comparison), "result": without_rows(comparison.result)} for comparison in found],
        }
        write_rows(output_dir / "answers" / f"{benchmark.name}.jsonl", benchmark, sets, said)
    results["judging"] = {
        "requests": sum(report.requests for report in budget.reports),
        "sent": sum(report.sent for report in budget.reports),
        "cost": budget.cost,
    }

    tables = [answer_table(results["benchmarks"])]
    tables += [score_table(summaries)] if summaries else []
    tables += [win_rate_table(comparisons)] if comparisons else []
    text = "\n\n".join(tables)
    write_json(output_dir / "results.json", results)
    (output_dir / "results.txt").write_text(text + "\n", encoding="utf-8")
    if any(item.result.win_rate is not None for item in comparisons) or any(len(s.groups) > 1 for s in summaries):
        plot_evaluation(comparisons, summaries, output_dir / "results.png")
    print(text)
    print(f"\nTable, JSON, picture and answers: {output_dir}")


if __name__ == "__main__":
    from trl import TrlParser

    main(*TrlParser((EvaluationArguments,)).parse_args_and_config())
