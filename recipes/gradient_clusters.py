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
#     "trl_bpo[quickstart]",
# ]
# ///

r"""
What are gradient clusters? A study of the clusters that depth selection makes, over the choices that lead to them.

The gradients of all responses are sketched once for each policy (fresh, and after steps of warm-up); every variant is made of
these sketches. Each is clustered and a quarter of the pairs kept as depth selection does, and measured beside a null.

```bash
# Four planted task families out of a folder of real data
python recipes/gradient_clusters.py --data_dir data --warmup_steps 0 16 --output_dir gradient_clusters
# Preference pairs of your own; a column `source` names the family of each. `--lora_r 0` trains all weights.
python recipes/gradient_clusters.py --dataset pairs.parquet --model_name_or_path policy --output_dir gradient_clusters
```

A run that was stopped goes on from what lies in `output_dir`, which holds for each policy `sketches.npy` of shape
`(responses, parts of the layers, dim)` and `pairs.parquet`. The table is written to `<results>.json` and `<results>.md`.

| column | what | by chance |
| --- | --- | --- |
| `ve` | variance that K-means explains | `ve_null`: a Gaussian with that mean and covariance; `z` counts its standard deviations |
| `jaccard` | agreement of what two K-means seeds keep | `jaccard_null`: the same of that Gaussian; of random draws `fraction / (2 - fraction)` |
| `in_*` | share of the kept that a plain rule with the same budget keeps | `fraction` |
| `ami_*` | adjusted mutual information of the clusters with those of embeddings, with bins of length, and with the families | 0 |
| `ari` | adjusted Rand index of the clusters and the planted families | 0 |
| `knn` | share of rows whose family most of the five nearest neighbours have | `knn_chance`, the largest family |

The Gaussian is drawn given its sample mean and covariance (see `gaussian_like`), and its covariance is that after features
were scaled to unit length. So `ve` and `ve_null` agree for features that are Gaussian, or Gaussian but for their length.
`ve_redrawn` is a sample that is drawn from the sample covariance instead, and then scaled. It has a covariance of its own,
more uneven than that of the features, so that K-means explains more of it even where the features are Gaussian, unless
there are many more rows than dimensions.

What the folder has to hold, as JSON lines (`.jsonl` or `.jsonl.gz`):

| file | family | columns |
| --- | --- | --- |
| `hh_harmless_base_test` | HH-RLHF, harmless | `chosen`, `rejected` (transcripts) |
| `ultrafeedback_binarized_1200` | UltraFeedback | `prompt`, `chosen`, `rejected` |
| `pku_saferlhf_5k` | SafeRLHF, safe against unsafe | `prompt`, `chosen`, `rejected` |
| `gsm8k` | GSM8K, right against wrong | `question`, `responses` (of `text` and `score`), where there are any |
"""

import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from cluster_statistics import Rows, Variant, evaluate, principal_components, spectral, squared_cosines, unit
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from threadpoolctl import threadpool_limits
from torch import nn
from transformers import AutoTokenizer
from trl import TrlParser

from trl_bpo import BPOConfig, BPOTrainer, quickstart
from trl_bpo.capture import target_modules
from trl_bpo.clustering import default_n_clusters
from trl_bpo.embedding import embed_texts
from trl_bpo.feature_store import FeatureStore, rows_hash, tensors_hash
from trl_bpo.formats import drop_duplicate_pairs, load_rows, prepare_dataset
from trl_bpo.gradients import Pieces, gradient_pass
from trl_bpo.projection import SparseProjection
from trl_bpo.prompts import render_prompt
from trl_bpo.responses import PairResponses, length_batches, one_a_row, unique_responses


FAMILIES = {
    "hh_harmless": "hh_harmless_base_test",
    "ultrafeedback": "ultrafeedback_binarized_1200",
    "saferlhf": "pku_saferlhf_5k",
    "gsm8k": "gsm8k",
}
# Tokens that the prompt of a family's pair leaves for the answers.
MIN_ANSWER = 32
PARTS = ("first", "middle", "last")
REPORTED = (
    "fraction",
    "max_length",
    "dtype",
    "lora_r",
    "learning_rate",
    "pairs_per_step",
    "dim",
    "kmeans_seeds",
    "draws",
    "seed",
)
PACKAGES = ("trl_bpo", "trl", "transformers", "torch", "scikit-learn", "numpy")


@dataclass
class StudyArguments:
    """Arguments of the study."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Preference pairs: a JSON, Parquet or CSV file, a folder, or a Hub id. Or give `data_dir`."},
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of real data, of which four task families are mixed."}
    )
    pairs_per_family: int = field(default=120, metadata={"help": "Pairs of each family."})
    num_pairs: int | None = field(
        default=None, metadata={"help": "Pairs of `dataset`, drawn at random. If None, all."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens to which prompt and answer are cut."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Policy. If None, the one of the quickstart."}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "Sentence encoder. If None, the one of the quickstart."}
    )
    dtype: str = field(default="float32", metadata={"help": "Type of the model's weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA on all linear layers. 0 trains all weights."})
    warmup_steps: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Steps of DPO on random pairs before the gradients, one study each."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the warm-up."})
    pairs_per_step: int = field(default=8, metadata={"help": "Pairs a step of the warm-up."})
    batch_tokens: int = field(default=1024, metadata={"help": "Tokens a batch of the gradient pass."})
    sketch_dim: int = field(default=4096, metadata={"help": "Dimension of the sketches, a power of two."})
    dim: int = field(default=2048, metadata={"help": "Dimension to which they are folded, but for variants of it."})
    fraction: float = field(default=0.25, metadata={"help": "Fraction of the pairs to keep."})
    clusters: list[int] = field(
        default_factory=lambda: [4, 8],
        metadata={"help": "Numbers of clusters, beside the default of round(sqrt(n / 2))."},
    )
    kmeans_seeds: int = field(default=5, metadata={"help": "Seeds of K-means."})
    draws: int = field(default=10, metadata={"help": "Draws of the Gaussian, with two seeds of K-means each."})
    variants: list[str] | None = field(
        default=None, metadata={"help": "Names of the variants to study. If None, all."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of everything else."})
    device_name: str | None = field(default=None, metadata={"help": "Name of the device, for the report."})
    output_dir: str = field(default="gradient_clusters", metadata={"help": "Folder of the sketches."})
    results: str = field(default="gradient_clusters", metadata={"help": "Path of the results, without a suffix."})

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.data_dir is None):
            raise ValueError(
                "Give one of `dataset` and `data_dir`: preference pairs, or the folder of the task families."
            )
        if self.kmeans_seeds < 3 or self.draws < 2:
            raise ValueError("`kmeans_seeds` must be at least 3 and `draws` at least 2, or nothing has a spread.")
        if self.sketch_dim % self.dim:
            raise ValueError(
                f"`dim={self.dim}` must divide `sketch_dim={self.sketch_dim}`, or a sketch cannot be folded."
            )


# Data


def _gsm8k_pairs(rows: Dataset) -> Dataset:
    pairs = []
    for row in rows:
        by_score = {score: [r["text"] for r in row["responses"] or () if r["score"] == score] for score in (0, 1)}
        if by_score[0] and by_score[1]:
            pairs.append({"prompt": row["question"], "chosen": by_score[1][0], "rejected": by_score[0][0]})
    return Dataset.from_list(pairs)


def load_families(data_dir: str, tokenizer: Any, pairs_per_family: int, max_length: int, seed: int) -> Dataset:
    """
    Pairs of four task families, one a prompt, whose answers have room for some tokens and differ within it.

    Args:
        data_dir (`str`):
            Folder with the files of the module's table.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy, with a chat template.
        pairs_per_family (`int`):
            Pairs of each family.
        max_length (`int`):
            Tokens to which prompt and answer will be cut.
        seed (`int`):
            Seed of the draw.

    Returns:
        [`~datasets.Dataset`]: Columns `prompt`, `chosen` and `rejected` (conversational) and `source`.

    Raises:
        `ValueError`: If a family has too few pairs.
    """

    def fits(row: dict) -> bool:
        turns = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        cut = [tokenizer.apply_chat_template(messages, return_dict=False)[:max_length] for messages in turns]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        return len(prompt) <= max_length - MIN_ANSWER and cut[0] != cut[1]

    families = []
    for family, name in FAMILIES.items():
        path = next(path for suffix in (".jsonl", ".jsonl.gz") if (path := Path(data_dir) / (name + suffix)).is_file())
        rows = load_rows(str(path))
        rows = _gsm8k_pairs(rows) if family == "gsm8k" else rows
        rows = rows.filter(lambda row: row["chosen"] and row["rejected"], desc="Dropping empty answers")
        columns = [name for name in ("prompt", "chosen", "rejected") if name in rows.column_names]
        pairs = prepare_dataset(rows.select_columns(columns), start_from="pairs", to_messages=True).dataset
        pairs = pairs.shuffle(seed=seed).filter(fits, desc=f"Measuring {family}")
        first = {json.dumps(prompt): number for number, prompt in reversed(list(enumerate(pairs["prompt"])))}
        if len(first) < pairs_per_family:
            raise ValueError(
                f"{family} has {len(first)} prompts of up to {max_length - MIN_ANSWER} tokens, and `pairs_per_family` is "
                f"{pairs_per_family}. Lower it, or raise `max_length`."
            )
        pairs = pairs.select(sorted(first.values())[:pairs_per_family])
        families.append(pairs.add_column("source", [family] * len(pairs)))
    return concatenate_datasets(families)


def load_pairs(args: StudyArguments, model: str) -> Dataset:
    if args.data_dir is not None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        return load_families(args.data_dir, tokenizer, args.pairs_per_family, args.max_length, args.seed)
    pairs = drop_duplicate_pairs(prepare_dataset(load_rows(str(args.dataset)), start_from="pairs").dataset)
    if args.num_pairs is not None and args.num_pairs < len(pairs):
        pairs = pairs.shuffle(seed=args.seed).select(range(args.num_pairs))
    return pairs


# Sketches


class PartsProjection(SparseProjection):
    """
    Sketches of the first, middle and last third of the decoder layers side by side.

    Bucket and sign of an entry depend on its module alone, so the sum of the parts is the sketch of all layers.
    """

    def __init__(self, model: nn.Module, dim: int, seed: int) -> None:
        super().__init__(dim * len(PARTS), seed)
        self.of_one = SparseProjection(dim, seed)
        self.parts, n_layers = {}, model.config.get_text_config().num_hidden_layers
        for layer in range(n_layers):
            for name in target_modules(model, [layer]):
                self.parts[name] = layer * len(PARTS) // n_layers

    def weight_gradient(
        self, name: str, inputs: torch.Tensor, grad_outputs: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        sketch = self.of_one.weight_gradient(name, inputs, grad_outputs, scale)
        placed = sketch.new_zeros(len(sketch), len(PARTS), self.of_one.dim)
        placed[:, self.parts[name]] = sketch
        return placed.flatten(1)


def fold(sketches: np.ndarray, dim: int) -> np.ndarray:
    """
    Fold count sketches to a smaller dimension that divides theirs.

    A bucket that is drawn uniformly is still so modulo `dim`, and the signs stay: adding up the buckets that fall together
    gives exactly a count sketch of that dimension.

    Args:
        sketches (`np.ndarray` of shape `(..., sketch_dim)`):
            The sketches.
        dim (`int`):
            Dimension to fold to.

    Returns:
        `np.ndarray` of shape `(..., dim)`: The folded sketches.
    """
    return sketches.reshape(*sketches.shape[:-1], -1, dim).sum(axis=-2)


def make_trainer(args: StudyArguments, model: str, pairs: Dataset, steps: int) -> BPOTrainer:
    # The trainer of the product tokenises, adapts and places the model, so that these are the gradients of a real run.
    config = BPOConfig(
        str(Path(args.output_dir) / "trainer"),
        depth_fraction=0.5,
        depth_strategy="random_once",
        reselect_every_epochs=0,
        max_length=args.max_length,
        max_steps=max(steps, 1),
        per_device_train_batch_size=args.pairs_per_step,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": args.dtype},
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        seed=args.seed,
    )
    lora = LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    set_seed(args.seed)
    return BPOTrainer(model, args=config, train_dataset=pairs, peft_config=lora if args.lora_r > 0 else None)


def warm_up(trainer: BPOTrainer, path: Path) -> None:
    # What was trained is kept, so that a run that is stopped later goes on from the very same weights.
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not path.is_file():
        trainer.train()
        save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path)
    with torch.no_grad():
        for name, value in load_file(path).items():
            weights[name].copy_(value)


def sketch_responses(
    trainer: BPOTrainer, responses: PairResponses, args: StudyArguments, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """
    Sketch the gradients of responses under the policy of a trainer, or what is missing of them in a folder.

    Args:
        trainer ([`BPOTrainer`]):
            The trainer.
        responses ([`PairResponses`]):
            The responses.
        args ([`StudyArguments`]):
            Dimension, seed and batch size.
        folder (`Path`):
            Folder of the [`FeatureStore`].

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Sketches of shape `(n_responses, 3, sketch_dim)`, one a part of the layers, and the
        log-probabilities of shape `(n_responses,)`.
    """
    model, ids = trainer.accelerator.unwrap_model(trainer.model), responses.input_ids
    projection = PartsProjection(model, args.sketch_dim, args.seed)
    header = {
        "model": tensors_hash(model.named_parameters()),
        "rows": rows_hash((start, *row) for start, row in zip(responses.starts, ids, strict=True)),
        "seed": args.seed,
        "batch_tokens": args.batch_tokens,
    }
    store = FeatureStore(folder, header, len(ids), projection.dim, scalars=("logp",))

    def write(rows: list[int], features: torch.Tensor, pieces: Pieces, _: Pieces | None) -> None:
        store.write(rows, features.numpy(), logp=np.asarray([piece.double().sum().item() for piece in pieces]))

    try:
        waiting = [batch for batch in length_batches(ids, args.batch_tokens) if not store.done[batch].all()]
        pad_token_id, tokens = trainer._tokenizer.pad_token_id, [len(row) for row in ids]
        gradient_pass(
            model, waiting, lambda rows: one_a_row(responses, rows, pad_token_id), projection, write, tokens=tokens
        )
        return store.read(range(len(ids))).reshape(len(ids), len(PARTS), -1), store.scalar("logp").copy()
    finally:
        store.close()


def describe_pairs(trainer: BPOTrainer, responses: PairResponses, logps: np.ndarray, ref_logps: np.ndarray) -> Dataset:
    # One row a pair. The weight is the derivative of the sigmoid loss by the log-probability of the rejected response.
    pool = trainer._pool.pairs
    lengths = np.asarray([len(ids) for ids in responses.input_ids]) - np.asarray(responses.starts)
    log_ratios = logps - ref_logps
    margins = trainer.beta * (log_ratios[responses.chosen] - log_ratios[responses.rejected])
    columns = {
        "pair_id": trainer._pool.pair_ids,
        "prompt_id": trainer._pool.prompt_ids,
        "chosen": responses.chosen,
        "rejected": responses.rejected,
        "tokens_chosen": lengths[responses.chosen],
        "tokens_rejected": lengths[responses.rejected],
        "logp_margin": logps[responses.chosen] - logps[responses.rejected],
        "reward_margin": margins,
        "weight": trainer.beta / (1 + np.exp(margins)),
    }
    if "source" in pool.column_names:
        columns["source"] = pool["source"][:]
    if {"score_chosen", "score_rejected"} <= set(pool.column_names):
        scores = [np.asarray(pool[name], dtype=np.float64) for name in ("score_chosen", "score_rejected")]
        columns["score_margin"] = scores[0] - scores[1]
    return Dataset.from_dict(columns)


def embed_pairs(pairs: Dataset, encoder: str) -> np.ndarray:
    texts = [[render_prompt(value) for value in pairs[name]] for name in ("prompt", "chosen", "rejected")]
    return np.concatenate([embed_texts(column, encoder)[0] for column in texts], axis=1)


def compute(args: StudyArguments) -> Iterator[tuple[int, np.ndarray, Dataset, np.ndarray]]:
    """
    Sketches of the responses, what is known of the pairs, and their embeddings, for each number of steps of warm-up.

    Args:
        args ([`StudyArguments`]):
            The arguments.

    Yields:
        `tuple[int, np.ndarray, Dataset, np.ndarray]`: Steps, sketches of shape `(n_responses, 3, sketch_dim)`, one row a
        pair, and embeddings of the pairs.
    """
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    model = args.model_name_or_path or str(quickstart.export_policy(output / "policy"))
    pairs = load_pairs(args, model)
    # The first policy is the reference of those that follow.
    ref_logps = None
    for steps in sorted({0, *args.warmup_steps}):
        folder = output / f"step-{steps:06d}"
        trainer = make_trainer(args, model, pairs, steps)
        responses = unique_responses(trainer.train_dataset, args.max_length)
        if steps > 0:
            folder.mkdir(exist_ok=True)
            warm_up(trainer, folder / "trained.safetensors")
        sketches, logps = sketch_responses(trainer, responses, args, folder / "store")
        ref_logps = logps if ref_logps is None else ref_logps
        meta = describe_pairs(trainer, responses, logps, ref_logps)
        np.save(folder / "sketches.npy", sketches)
        meta.to_parquet(folder / "pairs.parquet")
        if steps == 0:
            embeddings = embed_pairs(trainer._pool.pairs, args.encoder or quickstart.encoder_path())
            np.save(output / "embeddings.npy", embeddings)
        del trainer
        if steps in args.warmup_steps:
            yield steps, sketches, meta, embeddings


# Variants


COMBINATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "pair": lambda chosen, rejected: rejected - chosen,
    "sum": lambda chosen, rejected: chosen + rejected,
    "chosen": lambda chosen, rejected: chosen,
}


def rows_of_pairs(meta: Dataset, embeddings: np.ndarray) -> tuple[Rows, str]:
    """What is known of the pairs, and what their margin is: of scores, or else of the policy."""
    table = meta.with_format("numpy")
    column = "score_margin" if "score_margin" in meta.column_names else "reward_margin"
    if not np.any(table[column][:]):
        column = "logp_margin"  # A policy that is its own reference has no other.
    rows = Rows(
        ids=np.asarray(meta["pair_id"][:]),
        prompt_ids=np.asarray(meta["prompt_id"][:]),
        lengths=table["tokens_chosen"][:] + table["tokens_rejected"][:],
        embeddings=embeddings,
        sources=np.asarray(meta["source"][:]) if "source" in meta.column_names else None,
        rules={"largest_margin": table[column][:]},
    )
    return rows, column


def rows_of_responses(meta: Dataset, embeddings: np.ndarray, n: int) -> Rows:
    # A response stands for the first pair that it is in, of which it has prompt and family.
    pair, side = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    table = meta.with_format("numpy")
    for number, name in enumerate(("chosen", "rejected")):
        members, first = np.unique(table[name][:], return_index=True)
        pair[members], side[members] = first, number
    lengths = np.stack([table["tokens_chosen"][:], table["tokens_rejected"][:]])
    prompts, *answers = np.split(embeddings, 3, axis=1)
    return Rows(
        ids=np.asarray([f"{meta['pair_id'][p]}-{s}" for p, s in zip(pair.tolist(), side.tolist(), strict=True)]),
        prompt_ids=np.asarray(meta["prompt_id"][:])[pair],
        lengths=lengths[side, pair],
        embeddings=np.concatenate([prompts[pair], np.stack(answers)[side, pair]], axis=1),
        sources=np.asarray(meta["source"][:])[pair] if "source" in meta.column_names else None,
    )


def variants(sketches: np.ndarray, meta: Dataset, embeddings: np.ndarray, dim: int, seed: int) -> Iterator[Variant]:
    """
    All variants of the features of pairs that the sketches of their responses allow.

    Args:
        sketches (`np.ndarray` of shape `(n_responses, 3, sketch_dim)`):
            Sketches of the responses, one a part of the layers.
        meta ([`~datasets.Dataset`]):
            One row a pair.
        embeddings (`np.ndarray`):
            Embeddings of prompt, chosen and rejected side by side.
        dim (`int`):
            Dimension of all but the variants of it.
        seed (`int`):
            Seed of the subsets of prompts.

    Yields:
        [`Variant`]: The variants, of which the first is that of the defaults of [`BPOConfig`].
    """
    rows, _ = rows_of_pairs(meta, embeddings)
    table = meta.with_format("numpy")
    chosen, rejected, weights = table["chosen"][:], table["rejected"][:], table["weight"][:]
    whole = sketches.sum(axis=1)

    def features(kind: str, of_responses: np.ndarray, to: int = dim) -> np.ndarray:
        folded = fold(of_responses, to)
        return COMBINATIONS[kind](folded[chosen], folded[rejected])

    base = {kind: features(kind, whole) for kind in COMBINATIONS}
    for kind, x in base.items():
        yield Variant(kind, x, rows)
    yield Variant("embedding of the text", embeddings, rows)
    yield Variant("responses", fold(whole, dim), rows_of_responses(meta, embeddings, len(sketches)))
    for kind, x in base.items():
        # The gradient of the loss itself has the weight that the loss gives to the pair.
        x = x * weights[:, None] if kind == "pair" else x
        yield Variant(f"{kind}, not normalised", x, rows, normalize=False)
        norms = np.linalg.norm(x, axis=1, keepdims=True)
        yield Variant(f"{kind}, direction times root of norm", x / np.sqrt(norms.clip(1e-12)), rows, normalize=False)
        yield Variant(f"{kind}, largest norm of each cluster", x, rows, keep_largest=True)
    yield Variant("pair, sign-free: squared cosine", base["pair"], rows, transform=squared_cosines)
    yield Variant("pair, sign-free: spectral", base["pair"], rows, transform=spectral)
    yield Variant("sum, spectral", base["sum"], rows, transform=spectral)
    for number in (5, 20, 50):
        for kind, x in base.items():
            yield Variant(f"{kind}, {number} components", x, rows, transform=principal_components(number))
    for number, part in enumerate(PARTS):
        if not sketches[:, number].any():
            continue  # The model has fewer layers than parts.
        for kind in COMBINATIONS:
            yield Variant(f"{kind}, {part} third of layers", features(kind, sketches[:, number]), rows)
    for to in (256, 512, 1024, 2048, 4096, 8192):
        for kind in ("pair", "sum"):
            if to != dim and sketches.shape[-1] % to == 0:
                yield Variant(f"{kind}, {to} dimensions", features(kind, whole, to), rows)
    if rows.sources is not None:
        some = np.flatnonzero(np.all([x.any(axis=1) for x in base.values()], axis=0))
        _, own, sizes = np.unique(rows.sources[some], return_inverse=True, return_counts=True)
        for kind, x in base.items():
            # What structure is left where all pairs are of one family, as in most preference data.
            x = unit(x[some])
            means = np.eye(len(sizes))[own].T @ x / sizes[:, None]
            yield Variant(f"{kind}, less the mean of its family", x - means[own], rows.take(some), normalize=False)
    prompts = np.unique(rows.prompt_ids)
    # Where hardly a prompt has two pairs, these are the clusters of all pairs.
    if len(prompts) < 0.9 * len(rows.ids):
        for kind, x in base.items():
            yield Variant(f"{kind}, clusters of one pair a prompt", x, rows, one_a_prompt=True)
    drawn = np.random.default_rng(seed).permutation(prompts)
    for share in (4, 2):
        some = np.flatnonzero(np.isin(rows.prompt_ids, drawn[: len(prompts) // share]))
        for kind in ("pair", "sum"):
            yield Variant(f"{kind}, 1/{share} of the prompts", base[kind][some], rows.take(some))


# Report


COLUMNS = {
    "variant": "variant", "n": "n", "ve": "VE", "ve_null": "VE of Gaussian", "z": "z", "ve_redrawn": "redrawn Gaussian",
    "jaccard": "Jaccard of seeds", "jaccard_null": "of Gaussian", "ari": "ARI families", "ami_source": "AMI families",
    "knn": "5-NN family", "ami_embedding": "AMI embeddings", "ami_length": "AMI lengths", "in_smallest_norm": "in smallest norm",
    "in_shortest": "in shortest", "in_longest": "in longest", "in_largest_margin": "in largest margin",
    "in_nearest_to_mean": "in nearest to mean",
}  # fmt: skip


def _cell(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None or isinstance(value, str | int):
        return "" if value is None else str(value)
    if name in ("z", "knn"):
        return f"{value:.1f}" if name == "z" else f"{value:.2f}"
    digits = 3 if name.startswith("ve") else 2
    return f"{value:.{digits}f} ± {row[name + '_sd']:.{digits}f}"


def markdown(report: dict[str, Any]) -> str:
    """The report as tables, one for each policy and number of clusters."""
    blocks = []
    for study in report["studies"]:
        for n_clusters in dict.fromkeys(row["clusters_asked"] for row in study["rows"]):
            rows = [row for row in study["rows"] if row["clusters_asked"] == n_clusters]
            first = rows[0]
            title = f"{report['model']}, {study['warmup_steps']} steps of warm-up, k = {n_clusters}"
            chance = f"Chance: Jaccard {first['jaccard_chance']:.2f}, `in` {report['fraction']:.2f}, ARI and AMI 0"
            if "knn_chance" in first:
                chance += f", 5-NN {first['knn_chance']:.2f}"
            names = [name for name in COLUMNS if any(name in row for row in rows)]
            lines = [f"| {' | '.join(COLUMNS[name] for name in names)} |", f"|{' --- |' * len(names)}"]
            lines += [f"| {' | '.join(_cell(row, name) for name in names)} |" for row in rows]
            blocks.append("\n".join([f"### {title}", "", f"{chance}. Margin: `{study['margin']}`.", "", *lines]))
    settings = {name: value for name, value in report.items() if name != "studies"}
    return "\n\n".join(["# What are gradient clusters?", f"`{json.dumps(settings)}`", *blocks]) + "\n"


def study(args: StudyArguments, sketches: np.ndarray, meta: Dataset, embeddings: np.ndarray) -> list[dict[str, Any]]:
    """Rows of the table for the variants that are asked for."""
    table = []
    for variant in variants(sketches, meta, embeddings, args.dim, args.seed):
        if args.variants is not None and variant.name not in args.variants:
            continue
        asked = {str(k): k for k in args.clusters} | {"default": default_n_clusters(len(variant.features))}
        with threadpool_limits(limits=1):
            rows = evaluate(
                variant,
                list(asked.values()),
                fraction=args.fraction,
                seeds=args.kmeans_seeds,
                draws=args.draws,
                seed=args.seed,
            )
        table += [{"clusters_asked": name, **row} for name, row in zip(asked, rows, strict=True)]
        print(json.dumps(table[-1]))
    return table


def main(args: StudyArguments) -> None:
    studies = []
    for steps, sketches, meta, embeddings in compute(args):
        margin = rows_of_pairs(meta, embeddings)[1]
        studies.append({"warmup_steps": steps, "margin": margin, "rows": study(args, sketches, meta, embeddings)})
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
        sources = dict(Counter(meta["source"])) if "source" in meta.column_names else None
        report = {
            "model": Path(args.model_name_or_path or quickstart.POLICY_NAME).name,
            "device": args.device_name or device,
            "pairs": len(meta),
            "responses": len(sketches),
            "sources": sources,
            **{name: getattr(args, name) for name in REPORTED},
            "versions": {name: version(name) for name in PACKAGES},
            "studies": studies,
        }
        # After each policy, since the next may take long.
        path = Path(args.results)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    (study_args,) = TrlParser(StudyArguments).parse_args_and_config()
    main(study_args)
