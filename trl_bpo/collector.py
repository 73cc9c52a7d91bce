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


"""
Preference pairs out of prompts: sample responses, score them, pair them.

Every stage takes and gives a [`~datasets.Dataset`] and keeps the other columns of its rows.

| stage | columns in | columns out |
| --- | --- | --- |
| `generate` | `prompt`, `tools` (optional) | adds `responses`, `truncated` |
| `score` | `prompt`, `responses`, all others (for the judge) | adds `scores`, `verdicts`, `judge` |
| `pair` | `prompt`, `responses`, `scores`, `truncated` (optional), `tools` (optional) | one row a pair: `pair_id`, `prompt_id`, `prompt`, `chosen`, `rejected`, `score_chosen`, `score_rejected`, and with `truncated` also `chosen_truncated`, `rejected_truncated`; drops `responses`, `scores`, `truncated`, `verdicts` |
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import repeat

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, List, Value

from .api import APIReport, CollectionStopped, total_report
from .api.batch import BatchStatus
from .columns import beside, gathered, write_rows
from .generation import Generator, iter_responses
from .judging import Judge, has_text, iter_verdicts, judge_columns
from .openai_generator import OpenAIGenerator
from .openai_judge import OpenAIJudge
from .openai_pairwise_judge import OpenAIPairwiseJudge
from .pairing import PairReport, build_pairs, pair_indices
from .processes import main_process_first, meanwhile, on_main_process
from .prompts import prompt_id


logger = logging.getLogger(__name__)

_PAIR_COLUMNS = [
    "pair_id",
    "chosen",
    "rejected",
    "score_chosen",
    "score_rejected",
    "chosen_truncated",
    "rejected_truncated",
]


@dataclass
class CollectionReport:
    """
    What a collection did. The numbers of a stage are those of its last run.

    Args:
        responses (`int`, *optional*, defaults to `0`):
            Number of sampled responses.
        generated_tokens (`int`, *optional*, defaults to `0`):
            Number of sampled tokens.
        truncated (`int`, *optional*, defaults to `0`):
            Number of responses that were cut off at the token limit.
        unscored (`int`, *optional*, defaults to `0`):
            Number of responses, empty ones apart, to which the judge gave no score.
        pairs ([`PairReport`], *optional*):
            What became of the responses and of the candidate pairs.
        generation ([`~api.APIReport`], *optional*):
            Requests, tokens and money of the responses, over all processes, if they came over an API.
        judging ([`~api.APIReport`], *optional*):
            Requests, tokens and money of the verdicts, over all processes, if they came over an API.
        seconds (`dict[str, float]`, *optional*, defaults to `{}`):
            Wall-clock time of each stage.
    """

    responses: int = 0
    generated_tokens: int = 0
    truncated: int = 0
    unscored: int = 0
    pairs: PairReport | None = None
    generation: APIReport | None = None
    judging: APIReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class BPODataCollector:
    """
    Collect preference pairs for prompts: `num_responses` responses a prompt, scored by a judge and paired by rank.

    What the stages cost: [`~BPODataCollector.generate`] takes `num_responses` generations a prompt, and
    [`~BPODataCollector.score`] one judgement a response, which at a paid API is usually most of the bill.
    [`~BPODataCollector.pair`] is next to free. Select prompts before you collect.

    To lose nothing when a run is killed, give generator and judge a `cache_dir`: every answer is there before it counts,
    and the same call again goes on from there and ends with the same dataset. Without one, a stage that is interrupted
    starts over. A dataset that has been through a stage can be given to [`~BPODataCollector.collect`] to go on from there.

    Under `accelerate launch` the processes share the prompts, to generate for as well as to judge, and all end with the
    same dataset. If one of them stops, all raise its error once they have done their shares, however much longer one takes
    than another. On CPUs, create an `Accelerator` or the training arguments before anything else: nothing but these reads
    from the launcher that there are several processes.

    Prompts, responses and verdicts are read and written in parts, so that memory stays bounded. The columns of a stage are
    a file in the temporary folder of `datasets` (`TMPDIR`), one a machine, which ends with the process.

    Args:
        generator (`Callable`, *optional*):
            What samples responses, such as [`TransformersGenerator`]; see [`~generation.Generator`]. Needed for
            datasets without `responses`.
        judge (`Callable`, *optional*):
            What scores responses, such as [`OpenAIJudge`], [`RewardModelJudge`] or any TRL reward function; see
            [`~judging.Judge`]. Needed for datasets without `scores`. The columns of the dataset are passed on to it,
            except for `prompts` and `completions`, whose names are taken.
        num_responses (`int`, *optional*, defaults to `8`):
            Number of responses to sample for each prompt.
        pair_rule (`str`, *optional*, defaults to `"uniform"`):
            Which of the ranked responses are paired, see [`~pairing.pair_indices`].
        min_margin (`float`, *optional*, defaults to `0.0`):
            Smallest difference between the scores of a pair. Pairs with equal scores are never kept.
        allow_truncated_chosen (`bool`, *optional*, defaults to `False`):
            Whether a response that was cut off at the token limit may be the chosen one of a pair.

    Attributes:
        report ([`CollectionReport`]): What the stages did.

    Raises:
        `ValueError`: If an option is out of its range.

    Example:

    ```python
    >>> from trl_bpo import BPODataCollector, OpenAIJudge
    >>> from trl_bpo.generation import TransformersGenerator

    >>> collector = BPODataCollector(TransformersGenerator("Qwen/Qwen3-0.6B"), OpenAIJudge("gpt-4.1-mini"))
    >>> pairs = collector.collect(prompts)
    ```
    """

    def __init__(
        self,
        generator: Generator | None = None,
        judge: Judge | None = None,
        *,
        num_responses: int = 8,
        pair_rule: str = "uniform",
        min_margin: float = 0.0,
        allow_truncated_chosen: bool = False,
    ) -> None:
        if num_responses < 2:
            raise ValueError(
                f"`num_responses` must be at least 2, as a pair takes two responses, got {num_responses}."
            )
        pair_indices(0, pair_rule)
        if not min_margin >= 0:
            raise ValueError(f"`min_margin` must be at least 0, got {min_margin}.")
        self.generator = generator
        self.judge = judge
        self.num_responses = num_responses
        self.pair_rule = pair_rule
        self.min_margin = min_margin
        self.allow_truncated_chosen = allow_truncated_chosen
        self.report = CollectionReport()

    def generate(self, dataset: Dataset) -> Dataset:
        """
        Sample responses.

        Args:
            dataset ([`~datasets.Dataset`]):
                Prompts, in the column `prompt`; optionally the tool schemas of each, in the column `tools`.

        Returns:
            [`~datasets.Dataset`]: The dataset with the columns `responses` (`list[str]`) and `truncated` (`list[bool]`).

        Raises:
            `ValueError`: If there is no generator, or the dataset is empty, lacks `prompt` or has such columns already.
        """
        _check_dataset(dataset, needs=["prompt"], adds=["responses", "truncated"])
        if self.generator is None:
            raise ValueError("`generator` is needed to sample responses. Give one, or a dataset with `responses`.")
        generator = self.generator

        tokens = 0

        def sample(share: Dataset) -> Iterator[dict]:
            nonlocal tokens
            tools = share["tools"] if "tools" in share.column_names else None
            for row in iter_responses(generator, share["prompt"], self.num_responses, tools):
                tokens += sum(response.num_tokens for response in row)
                yield {
                    "responses": [response.text for response in row],
                    "truncated": [response.truncated for response in row],
                }

        features = Features({"responses": List(Value("string")), "truncated": List(Value("bool"))})
        with self._timed("generate"):
            sampled, self.report.generation = _share(dataset, sample, features, generator)
        self.report.responses = len(dataset) * self.num_responses
        self.report.generated_tokens = sum(gather_object([tokens]))
        self.report.truncated = sum(
            pc.sum(pc.list_flatten(part["truncated"])).as_py() for part in sampled.with_format("arrow").iter(1000)
        )
        if self.report.truncated:
            logger.warning(
                f"{self.report.truncated} of {self.report.responses} responses were cut off at the token limit."
            )
        return main_process_first(PartialState(), lambda: beside(dataset, sampled))

    def score(self, dataset: Dataset) -> Dataset:
        """
        Score responses.

        Args:
            dataset ([`~datasets.Dataset`]):
                Prompts, in the column `prompt`, and their `responses`.

        Returns:
            [`~datasets.Dataset`]: The dataset with the columns `scores` (`list[float | None]`), `verdicts` (what the
            judge said, `list[str | None]`) and `judge` (its name). Responses without a visible character are not judged.

        Raises:
            `ValueError`: If there is no judge, the dataset is empty, lacks a column or has such columns already, or the
                judge does not give one entry a response.
        """
        _check_dataset(dataset, needs=["prompt", "responses"], adds=["scores", "verdicts", "judge"])
        if self.judge is None:
            raise ValueError("`judge` is needed to score responses. Give one, or a dataset with `scores`.")
        judge = self.judge

        # Functions have a name, as have our judges; of other callables it is that of their class.
        name = getattr(judge, "__name__", type(judge).__name__)
        unscored = 0

        def rate(share: Dataset) -> Iterator[dict]:
            nonlocal unscored
            for verdicts, texts in zip(iter_verdicts(judge, share), share["responses"], strict=True):
                unscored += sum(
                    verdict.score is None and has_text(text) for verdict, text in zip(verdicts, texts, strict=True)
                )
                yield {
                    "scores": [verdict.score for verdict in verdicts],
                    "verdicts": [verdict.raw for verdict in verdicts],
                    "judge": name,
                }

        features = Features(
            {"scores": List(Value("float64")), "verdicts": List(Value("string")), "judge": Value("string")}
        )
        with self._timed("score"):
            scored, self.report.judging = _share(dataset, rate, features, judge)
        self.report.unscored = sum(gather_object([unscored]))
        return main_process_first(PartialState(), lambda: beside(dataset, scored))

    def score_batch(self, dataset: Dataset) -> BatchStatus:
        """
        Hand responses in to the Batch API of the judge, at half the price, and take in the verdicts that are ready.

        Call it again, in the same or in later runs, until [`~api.batch.BatchStatus.is_ready`]; then
        [`~BPODataCollector.score`] finds the verdicts in the judge's `cache_dir`, and asks for what is left over.

        Args:
            dataset ([`~datasets.Dataset`]):
                Prompts, in the column `prompt`, and their `responses`.

        Returns:
            [`~api.batch.BatchStatus`]: Where the jobs stand, the same on all processes.

        Raises:
            `ValueError`: If the judge is no [`OpenAIJudge`] with a `cache_dir`, or the dataset is empty or lacks a column.
            [`~api.CollectionStopped`]: If the verdicts could cost more than `max_cost`.
        """
        _check_dataset(dataset, needs=["prompt", "responses"], adds=["scores", "verdicts", "judge"])
        judge = self.judge
        if not isinstance(judge, OpenAIJudge):
            raise ValueError("`judge` must be an `OpenAIJudge` to judge through the Batch API.")

        def hand_in() -> BatchStatus:
            # First what has ended: a job that failed is handed in again.
            collected = judge.collect_batch().collected
            status = judge.submit_batch(**judge_columns(dataset))
            return replace(status, collected=collected)

        return on_main_process(PartialState(), hand_in)

    def pair(self, dataset: Dataset) -> Dataset:
        """
        Pair scored responses.

        Args:
            dataset ([`~datasets.Dataset`]):
                Prompts, in the column `prompt`, their `responses` and `scores`, and optionally `truncated`.

        Returns:
            [`~datasets.Dataset`]: One row a pair, see [`~pairing.build_pairs`].

        Raises:
            `ValueError`: If the dataset is empty, lacks a column or has columns that pairs would overwrite, or if no
                pair results.
        """
        _check_dataset(dataset, needs=["prompt", "responses", "scores"], adds=_PAIR_COLUMNS)

        def build() -> tuple[Dataset, PairReport]:
            return build_pairs(dataset, self.pair_rule, self.min_margin, self.allow_truncated_chosen)

        with self._timed("pair"):
            pairs, self.report.pairs = main_process_first(PartialState(), build)
        return pairs

    def collect(self, dataset: Dataset) -> Dataset:
        """
        Run the stages whose columns are missing, and pair.

        Args:
            dataset ([`~datasets.Dataset`]):
                Prompts, in the column `prompt`, or what [`~BPODataCollector.generate`] or [`~BPODataCollector.score`]
                gave.

        Returns:
            [`~datasets.Dataset`]: One row a pair, see [`~pairing.build_pairs`].

        Raises:
            `ValueError`: If a stage cannot run. Whatever can be seen beforehand is raised before any work.
        """
        missing = {name for name in ("responses", "scores") if name not in dataset.column_names}
        if "responses" in missing and "scores" not in missing:
            raise ValueError(
                "`dataset` has `scores` but no `responses` that they belong to. Add them or drop `scores`."
            )
        added = ["truncated"] if "responses" in missing else []
        added += ["verdicts", "judge"] if "scores" in missing else []
        _check_dataset(dataset, needs=["prompt"], adds=[*added, *_PAIR_COLUMNS])
        if "responses" in missing and self.generator is None:
            raise ValueError("`generator` is needed, as the dataset has no `responses`.")
        if "scores" in missing and self.judge is None:
            raise ValueError("`judge` is needed, as the dataset has no `scores`.")
        if "responses" in missing:
            dataset = self.generate(dataset)
        if "scores" in missing:
            dataset = self.score(dataset)
        return self.pair(dataset)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.report.seconds[stage] = time.perf_counter() - start


def _own_rows(dataset: Dataset, state: PartialState) -> np.ndarray:
    """Rows of this process. Those of one prompt stay together, so that it is asked for once, whatever their number."""
    n = len(dataset)
    if state.num_processes == 1:
        return np.arange(n)
    tools = dataset["tools"] if "tools" in dataset.column_names else repeat(None, n)
    ids = (
        int(prompt_id(prompt, its_tools)[:16], 16) for prompt, its_tools in zip(dataset["prompt"], tools, strict=True)
    )
    _, first_rows, groups = np.unique(np.fromiter(ids, np.uint64, n), return_index=True, return_inverse=True)
    # Prompts in the order in which they come, and each with its rows.
    order = np.argsort(first_rows[groups], kind="stable")
    is_first = np.diff(first_rows[groups][order], prepend=-1) != 0
    starts = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    return order[starts * state.num_processes // n == state.process_index]


def _share(
    dataset: Dataset, work: Callable[[Dataset], Iterator[dict]], features: Features, asker: Generator | Judge
) -> tuple[Dataset, APIReport | None]:
    """Have each process work on its share of the rows. Gives the results of all, in order, and what was asked for them."""
    state = PartialState()
    rows = _own_rows(dataset, state)
    error: Exception | None = None

    def write() -> Dataset | None:
        nonlocal error
        try:
            return write_rows(work(dataset.select(rows)) if len(rows) else iter(()), features)
        except Exception as raised:
            if state.num_processes == 1:
                raise
            # A process that stopped alone would leave the others waiting for it.
            error = raised
            return None

    own = meanwhile(state, write)
    report = None
    if len(rows) and isinstance(asker, (OpenAIGenerator, OpenAIJudge, OpenAIPairwiseJudge)):
        report = asker.report
    if state.num_processes == 1:
        assert own is not None
        return own, report
    kind = next((kind for kind in (CollectionStopped, ValueError) if isinstance(error, kind)), RuntimeError)
    stops = gather_object([None if error is None else (kind, state.process_index, str(error))])
    stops = [stop for stop in stops if stop is not None]
    if stops and error is None:
        kind, process, message = stops[0]
        error = kind(f"Process {process} has stopped: {message}")
    if error is not None:
        raise error
    assert own is not None
    reports = [one for one in gather_object([report]) if one is not None]
    return gathered(state, own, rows), total_report(reports) if reports else None


def _check_dataset(dataset: Dataset, needs: list[str], adds: list[str]) -> None:
    if not isinstance(dataset, Dataset):
        raise ValueError(f"`dataset` must be a `datasets.Dataset`, such as one split, got `{type(dataset).__name__}`.")
    for column in needs:
        if column not in dataset.column_names:
            raise ValueError(f"`dataset` has no column `{column}`. Its columns: {', '.join(dataset.column_names)}.")
    taken = [f"`{name}`" for name in adds if name in dataset.column_names]
    if taken:
        raise ValueError(
            f"`dataset` has columns that would be overwritten: {', '.join(taken)}. Rename or remove them."
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` is empty.")
