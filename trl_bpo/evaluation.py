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


"""What training did to a policy: judge scores, lengths, diversity and fluency on prompts that it did not train on."""

import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .generation import Generator, Response
from .judging import Judge, judge_responses
from .prompts import parse_tools, without_none


@dataclass(frozen=True)
class PolicyReport:
    """
    How a policy does on a set of prompts.

    Args:
        num_prompts (`int`):
            Number of prompts.
        num_responses (`int`):
            Number of responses over all prompts.
        num_unscored (`int`):
            Responses to which the judge gave no score. They count for everything but the scores.
        score_mean (`float`, *optional*):
            Mean over prompts of the prompt's mean score; `None` if no response has a score.
        score_stderr (`float`, *optional*):
            Standard error of `score_mean`, over prompts; `None` with fewer than two scored prompts.
        length_mean (`float`):
            Mean number of tokens of a response.
        distinct_1 (`float`):
            [`distinct_n`] of the responses' words.
        distinct_2 (`float`):
            [`distinct_n`] of the responses' pairs of neighbouring words.
        empty_rate (`float`):
            Share of the responses without a visible character.
        truncated_rate (`float`):
            Share of the responses that were cut off at the token limit.
        perplexity_median (`float`, *optional*):
            Median [`perplexity`] of the responses under the base model; `None` if all are empty. A policy that
            degenerates for the judge's sake gives itself away here.
        prompt_scores (`list[float | None]`):
            Mean score of each prompt, in the order of the dataset; `None` where no response has a score.
        groups (`dict[str, PolicyReport]`):
            The same for each value of the group column, in the order of their first appearance.
    """

    num_prompts: int
    num_responses: int
    num_unscored: int
    score_mean: float | None
    score_stderr: float | None
    length_mean: float
    distinct_1: float
    distinct_2: float
    empty_rate: float
    truncated_rate: float
    perplexity_median: float | None
    prompt_scores: list[float | None]
    groups: dict[str, "PolicyReport"] = field(default_factory=dict)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """
    Share of distinct n-grams among all n-grams of words of the texts, a measure of diversity.

    Args:
        texts (`Sequence[str]`):
            Texts, split at white space and compared without regard to case. No n-gram spans two texts. The measure
            falls with the amount of text: compare only sets of about the same size.
        n (`int`):
            Number of words in an n-gram.

    Returns:
        `float`: Between 0 and 1; 0 if there is no n-gram.
    """
    ngrams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.lower().split()
        ngrams.extend(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _token_ids(
    processing_class: PreTrainedTokenizerBase, prompt: str | list[dict], response: str, tools: str | list | None
) -> tuple[list[int], list[int]]:
    if isinstance(prompt, str):
        prompt_ids = processing_class(prompt)["input_ids"]
    else:
        rendered = processing_class.apply_chat_template(
            without_none(prompt), tools=without_none(parse_tools(tools)), add_generation_prompt=True, tokenize=False
        )
        # The template writes the special tokens itself.
        prompt_ids = processing_class(rendered, add_special_tokens=False)["input_ids"]
    return prompt_ids, processing_class(response, add_special_tokens=False)["input_ids"]


def perplexity(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: list[str | list[dict]],
    responses: list[str],
    batch_size: int = 8,
    tools: list | None = None,
) -> list[float | None]:
    """
    Perplexity of responses given their prompts: the exponential of the mean negative log-likelihood of their tokens.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, used as it is: the adapter of a PEFT model stays on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model, with a chat template if prompts are conversational.
        prompts (`list[str | list[dict]]`):
            Prompts in TRL's standard or conversational format, one a response.
        responses (`list[str]`):
            Responses. The end-of-sequence token does not count, as a response that was cut off has none.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of responses in a forward pass.
        tools (`list`, *optional*):
            Tool schemas for each response, as a list, its JSON string or `None`. They go into the chat template.

    Returns:
        `list[float | None]`: The perplexities; `None` for a response without a visible character.
    """
    sequences = {}
    rows = zip(prompts, responses, tools or [None] * len(prompts), strict=True)
    for index, (prompt, response, response_tools) in enumerate(rows):
        if response.strip():
            sequences[index] = _token_ids(processing_class, prompt, response, response_tools)
    # Sequences of about the same length share a batch, so that little is computed on padding.
    order = sorted(sequences, key=lambda index: sum(map(len, sequences[index])))
    result: list[float | None] = [None] * len(responses)
    was_training = model.training
    model.eval()
    try:
        with logging.tqdm(
            total=len(order), desc="Computing perplexities", disable=not PartialState().is_main_process
        ) as progress:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                losses = _mean_losses(model, [sequences[index] for index in batch])
                for index, loss in zip(batch, losses, strict=True):
                    result[index] = math.exp(min(loss, 700.0))  # The exponential overflows shortly above.
                progress.update(len(batch))
    finally:
        model.train(was_training)
    return result


@torch.no_grad()
def _mean_losses(model: PreTrainedModel | PeftModel, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
    length = max(len(prompt_ids) + len(response_ids) for prompt_ids, response_ids in sequences)
    shape = (len(sequences), length)
    # The token that stands on the padding does not matter: it is masked, and behind everything that counts.
    input_ids = torch.zeros(shape, dtype=torch.long, device=model.device)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt_ids, response_ids) in enumerate(sequences):
        end = len(prompt_ids) + len(response_ids)
        input_ids[row, :end] = torch.tensor(prompt_ids + response_ids)
        attention_mask[row, :end] = 1
        labels[row, len(prompt_ids) : end] = input_ids[row, len(prompt_ids) : end]
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    labels = labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1)).tolist()


def _mean_and_stderr(values: list[float]) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return (values[0] if values else None), None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _report(
    responses: list[list[Response]], scores: list[list[float | None]], perplexities: list[list[float | None]]
) -> PolicyReport:
    flat = [response for row in responses for response in row]
    texts = [response.text for response in flat]
    usable = [[score for score in row if score is not None] for row in scores]
    prompt_scores = [statistics.fmean(row) if row else None for row in usable]
    score_mean, score_stderr = _mean_and_stderr([score for score in prompt_scores if score is not None])
    finite = [value for row in perplexities for value in row if value is not None]
    return PolicyReport(
        num_prompts=len(responses),
        num_responses=len(flat),
        num_unscored=len(flat) - sum(map(len, usable)),
        score_mean=score_mean,
        score_stderr=score_stderr,
        length_mean=statistics.fmean(response.num_tokens for response in flat),
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        empty_rate=statistics.fmean(not text.strip() for text in texts),
        truncated_rate=statistics.fmean(response.truncated for response in flat),
        perplexity_median=statistics.median(finite) if finite else None,
        prompt_scores=prompt_scores,
    )


def evaluate_policy(
    generator: Generator,
    judge: Judge,
    dataset: Dataset,
    base_model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    num_responses: int = 1,
    group_column: str | None = None,
    batch_size: int = 8,
) -> PolicyReport:
    """
    Sample responses of a policy and report their scores, lengths, diversity and fluency.

    Args:
        generator ([`Generator`]):
            Samples the policy.
        judge (`Callable`):
            Judge in the form of a TRL reward function: called with `prompts`, `completions` and the other columns of
            the dataset, all repeated for each response, it gives for each response a score, an object with a `score`,
            or `None`.
        dataset ([`~datasets.Dataset`]):
            Prompts to evaluate on, in the column `prompt`; optionally the tool schemas of each, in the column `tools`.
            Columns that the judge needs come along.
        base_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model under which the perplexity of the responses is computed: the policy before training. Of a PEFT model
            the adapter is switched off meanwhile.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the base model.
        num_responses (`int`, *optional*, defaults to `1`):
            Number of responses for each prompt.
        group_column (`str`, *optional*):
            Column by whose values the report is broken down as well, in `groups`.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of responses in a forward pass of the base model.

    Returns:
        [`PolicyReport`]: The report.

    Raises:
        `ValueError`: If the dataset is empty or lacks a column, or the judge gives too few or too many scores.
    """
    for column in ("prompt", group_column):
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"`dataset` has no column `{column}`. Its columns: {', '.join(dataset.column_names)}.")
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty: there is nothing to evaluate on.")
    prompts = list(dataset["prompt"])
    columns = {name: list(dataset[name]) for name in dataset.column_names if name != "prompt"}
    tools = columns.get("tools") or [None] * len(prompts)
    responses = generator(prompts, num_responses, tools)
    texts = [[response.text for response in row] for row in responses]
    scores = [[verdict.score for verdict in row] for row in judge_responses(judge, prompts, texts, columns)]
    with base_model.disable_adapter() if isinstance(base_model, PeftModel) else nullcontext():
        values = iter(
            perplexity(
                base_model,
                processing_class,
                [prompt for prompt, row in zip(prompts, texts, strict=True) for _ in row],
                [text for row in texts for text in row],
                batch_size,
                tools=[prompt_tools for prompt_tools, row in zip(tools, texts, strict=True) for _ in row],
            )
        )
    perplexities = [[next(values) for _ in row] for row in texts]

    members: dict[str, list[int]] = {}
    for index, value in enumerate(dataset[group_column] if group_column else []):
        members.setdefault(str(value), []).append(index)
    groups = {
        value: _report(
            [responses[index] for index in indices],
            [scores[index] for index in indices],
            [perplexities[index] for index in indices],
        )
        for value, indices in members.items()
    }
    return replace(_report(responses, scores, perplexities), groups=groups)


def paired_difference(
    before_scores: Sequence[float | None], after_scores: Sequence[float | None]
) -> tuple[float, float | None]:
    """
    Mean change of the score over prompts, and its standard error.

    The same prompts before and after differ far less by chance than two sets of prompts do, so the standard error of
    the difference is smaller than that of either mean suggests.

    Args:
        before_scores (`Sequence[float | None]`):
            [`PolicyReport`]'s `prompt_scores` before training.
        after_scores (`Sequence[float | None]`):
            The same for the same prompts, in the same order, after training.

    Returns:
        `tuple[float, float | None]`: Mean difference, after minus before, and its standard error, `None` with a single
        prompt. Prompts without a score on either side are left out.

    Raises:
        `ValueError`: If the numbers of prompts differ, or no prompt has both scores.
    """
    if len(before_scores) != len(after_scores):
        raise ValueError(
            f"`before_scores` and `after_scores` must be of the same prompts, got {len(before_scores)} and "
            f"{len(after_scores)} scores."
        )
    differences = [
        after - before
        for before, after in zip(before_scores, after_scores, strict=True)
        if before is not None and after is not None
    ]
    mean, stderr = _mean_and_stderr(differences)
    if mean is None:
        raise ValueError("No prompt has a score in both `before_scores` and `after_scores`.")
    return mean, stderr


def comparison_table(before: PolicyReport, after: PolicyReport) -> str:
    """
    Plain text table of a policy before and after training on the same prompts.

    Scores are given as mean and standard error over prompts; the change of a score is the paired one of
    [`paired_difference`]. The other rows say at what price a score was won: a policy that merely writes longer, shorter,
    more alike or less fluent answers shows there.

    Args:
        before ([`PolicyReport`]):
            Report before training.
        after ([`PolicyReport`]):
            Report after training, on the same prompts.

    Returns:
        `str`: The aligned table with a heading, without a newline at its end.
    """

    def spread(mean: float | None, stderr: float | None) -> str:
        if mean is None:
            return "none"
        return f"{mean:.2f}" if stderr is None else f"{mean:.2f} ± {stderr:.2f}"

    rows = [("", "before", "after", "change")]
    groups = [("score, all prompts", before, after)]
    groups += [(f"score, {name}", report, after.groups[name]) for name, report in before.groups.items()]
    for name, old, new in groups:
        change = spread(*paired_difference(old.prompt_scores, new.prompt_scores))
        label = f"{name} ({old.num_prompts})"
        rows.append(
            (label, spread(old.score_mean, old.score_stderr), spread(new.score_mean, new.score_stderr), change)
        )
    for name, attribute in {
        "tokens a response": "length_mean",
        "distinct-1": "distinct_1",
        "distinct-2": "distinct_2",
        "empty responses": "empty_rate",
        "cut at the token limit": "truncated_rate",
        "perplexity under the base model": "perplexity_median",
    }.items():
        old_value, new_value = getattr(before, attribute), getattr(after, attribute)
        difference = None if old_value is None or new_value is None else new_value - old_value
        rows.append((name, spread(old_value, None), spread(new_value, None), spread(difference, None)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
