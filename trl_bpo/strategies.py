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
What measures depth: the values of `depth_strategy`. All but the first are there to compare with.

| strategy | keeps the pairs | changes with the policy |
| --- | --- | --- |
| `gradient` | whose gradients lie nearest to the centres of their clusters: BPO | yes |
| `gradient_farthest` | whose gradients lie farthest from them | yes |
| `gradient_random` | as many of each cluster as `gradient`, drawn at random, anew at each selection | yes |
| `random_like_gradient` | drawn at random, anew at each selection, with the numbers of pairs a prompt of `gradient`, which fall to other prompts | yes |
| `gradient_k_centre` | that cover the gradients: the one nearest to their mean, then always the one farthest from those kept | yes |
| `gradient_norm` | with the largest gradient, as estimated from its projection | yes |
| `loss` | with the highest loss | yes |
| `implicit_reward_margin_high`, `_low` | with the highest or lowest margin of the implicit rewards, `beta` times the difference of the log-ratios of policy and reference | yes |
| `embedding` | whose text, the embeddings of prompt, chosen and rejected side by side, lies nearest to the centres | no |
| `embedding_farthest` | whose text lies farthest from them | no |
| `score_margin_high`, `_low` | with the highest or lowest `score_chosen - score_rejected` | no |
| `longest` | with the longest chosen response, in tokens, as truncated | no |
| `random` | drawn at random, anew at each selection | - |
| `random_once` | drawn at random, the same at each selection | - |
| `equal_per_prompt` | as many of each prompt, drawn at random once: the simple balance of breadth and depth | - |
| `best_worst_per_prompt` | as many of each prompt, those with the highest `score_chosen - score_rejected` first | no |

Each keeps exactly the budget. Clusters play a part in the strategies of gradients and embeddings only, `depth_scope` in
those but `gradient_k_centre`. The columns of clusters mean the same in each: see `trl_bpo/rules.py` for what is kept.
"""

from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset

from .bpo_config import GRADIENT_STRATEGIES
from .clustering import rank_in_groups, row_norms
from .embedding import EmbeddingRows, embed_texts, encoder_fingerprint, require_sentence_transformers
from .ids import dense_ranks, read_column
from .pool import PairPool
from .prompts import render_prompt
from .rows import Rows
from .rules import draw_scores


logger = get_logger(__name__)

# What is kept of the strategies of clusters, by the `rule` of `DepthSelector`. Of the others it is the nearest.
RULE_OF_STRATEGY = {
    "gradient_farthest": "farthest",
    "embedding_farthest": "farthest",
    "gradient_random": "random",
    "random_like_gradient": "random_like_nearest",
    "gradient_k_centre": "k_centre",
}
_SCORE_COLUMNS = ("score_chosen", "score_rejected")


def check_strategy(strategy: str, pairs: Dataset) -> None:
    """
    Refuse a strategy that lacks what it needs, before a model is loaded.

    Args:
        strategy (`str`):
            Value of `depth_strategy`.
        pairs ([`~datasets.Dataset`]):
            The pairs.

    Raises:
        `ValueError`: If it goes by scores and a pair has none.
        `ImportError`: If it goes by embeddings and sentence-transformers is not installed.
    """
    if strategy.startswith("embedding"):
        require_sentence_transformers(f"`depth_strategy='{strategy}'`")
    if not strategy.startswith(("score_margin", "best_worst")):
        return
    if missing := set(_SCORE_COLUMNS) - set(pairs.column_names):
        raise ValueError(
            f"`depth_strategy='{strategy}'` goes by the scores of both responses, but `train_dataset` has no "
            f"{sorted(missing)} column. Score the responses first, or take another strategy."
        )
    for column in _SCORE_COLUMNS:
        values = read_column(pairs, column).to_numpy().astype(np.float64)
        if len(rows := np.flatnonzero(~np.isfinite(values))):
            raise ValueError(
                f"`depth_strategy='{strategy}'` goes by the scores of both responses, but {len(rows)} of {len(values)} "
                f"pairs have no finite `{column}`, first row {rows[0]}. Drop them first, or take another strategy."
            )


def _in_turns(scores: np.ndarray, pool: PairPool, seed: int) -> np.ndarray:
    # Scores under which every prompt gets its best pair before any gets its second best. Where the budget ends within a
    # turn, which prompts come first is drawn by prompt: by pair, those with many pairs would have many chances.
    distinct, prompts = np.unique(dense_ranks(pool.prompt_ids), return_inverse=True)
    return draw_scores(distinct, seed, 0)[prompts] - rank_in_groups(prompts, -scores, pool.pair_ids)


def _embed_pairs(batch: dict[str, list], encoder: str, content: str | None) -> dict[str, np.ndarray]:
    tools = batch.get("tools") or [None] * len(batch["prompt"])
    texts = [render_prompt(prompt, tool) for prompt, tool in zip(batch["prompt"], tools, strict=True)]
    for column in ("chosen", "rejected"):
        texts += [render_prompt(response) for response in batch[column]]
    embeddings, _ = embed_texts(texts, encoder, content=content)
    return {"_embedding": np.concatenate(np.split(embeddings, 3), axis=1)}


def measure_by_policy(trainer: Any) -> Rows | None:
    """
    What the policy makes of each pair. All processes must call this.

    Args:
        trainer ([`BPOTrainer`]):
            A trainer with a strategy that changes with the policy.

    Returns:
        [`Rows`], *optional*: Features of shape `(n_pairs, d)`, which are to be clustered, on the main process and `None`
        on the others; or scores of shape `(n_pairs,)`, of which the highest are kept.
    """
    strategy = trainer.args.depth_strategy
    if strategy in GRADIENT_STRATEGIES:
        features = trainer._pair_features()
        if strategy == "gradient_norm" and features is not None:
            return row_norms(features)
        return features
    losses, margins = trainer._features.at_this_step(trainer._features_path, trainer._features.losses_and_margins)
    scores = {
        "loss": losses,
        "implicit_reward_margin_high": margins,
        "implicit_reward_margin_low": -margins,
    }[strategy]
    # Rounding of the difference of two sums over tokens, in nats.
    half = trainer.model.dtype.itemsize < 4 or trainer.accelerator.mixed_precision != "no"
    if np.nanmax(scores) - np.nanmin(scores) < trainer.beta * (1.0 if half else 1e-2):
        logger.warning(
            f"What `depth_strategy='{strategy}'` goes by hardly differs between the pairs, and may be little but "
            "rounding, as where the policy is still its reference. Set `first_selection_step` to train on a random "
            "subset first."
        )
    return scores


def measure_by_data(trainer: Any) -> Rows:
    """
    What the data alone tell of each pair.

    Args:
        trainer ([`BPOTrainer`]):
            A trainer with a strategy that does not change with the policy.

    Returns:
        [`Rows`]: Features of shape `(n_pairs, d)`, which are to be clustered, or scores of shape `(n_pairs,)`, of which
        the highest are kept.
    """
    strategy, pool, seed = trainer.args.depth_strategy, trainer._pool, trainer.args.seed
    if strategy.startswith("embedding"):
        columns = [name for name in ("prompt", "chosen", "rejected", "tools") if name in pool.pairs.column_names]
        encoder = trainer.args.depth_encoder
        embedded = pool.pairs.select_columns(columns).map(
            _embed_pairs,
            batched=True,
            fn_kwargs={"encoder": encoder, "content": encoder_fingerprint(encoder)},
            remove_columns=columns,
            desc="Embedding pairs",
        )
        return EmbeddingRows([read_column(embedded, "_embedding")])
    if strategy == "longest":
        responses = trainer._features.responses
        lengths = responses.lengths - responses.starts
        return lengths[responses.chosen].astype(np.float64)
    if strategy == "random":
        # The draw 0 is that of the steps before the first selection.
        return draw_scores(pool.pair_ids, seed, trainer._num_selections + 1)
    drawn = draw_scores(pool.pair_ids, seed, 0)
    if strategy == "random_once":
        return drawn
    if strategy == "equal_per_prompt":
        return _in_turns(drawn, pool, seed)
    chosen, rejected = (read_column(pool.pairs, column).to_numpy().astype(np.float64) for column in _SCORE_COLUMNS)
    if strategy == "best_worst_per_prompt":
        return _in_turns(chosen - rejected, pool, seed)
    return chosen - rejected if strategy == "score_margin_high" else rejected - chosen
