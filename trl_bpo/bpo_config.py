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

"""Configuration of [`BPOTrainer`]."""

import logging
from dataclasses import dataclass, field

from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from trl import DPOConfig

from .clustering import SCOPES, check_fraction
from .embedding import DEFAULT_ENCODER
from .feature_store import DTYPES


logger = logging.getLogger(__name__)

FEATURES = ("pair", "sum", "chosen")
HUB_STRATEGIES = ("end", "every_selection")
# By what the policy makes of the pairs, which takes a pass over them at each selection, and by the data alone.
GRADIENT_STRATEGIES = (
    *("gradient", "gradient_farthest", "gradient_random", "random_like_gradient", "gradient_k_centre"),
    "gradient_norm",
)
POLICY_STRATEGIES = (*GRADIENT_STRATEGIES, "loss", "implicit_reward_margin_high", "implicit_reward_margin_low")
DATA_STRATEGIES = (
    *("embedding", "embedding_farthest", "score_margin_high", "score_margin_low", "longest"),
    *("random", "random_once", "equal_per_prompt", "best_worst_per_prompt"),
)
# The only value of each option that goes with selection, and why.
# What a selection of a given policy depends on.
SELECTION_OPTIONS = (
    *("depth_fraction", "depth_strategy", "depth_clusters", "depth_scope", "min_pairs_per_prompt"),
    *("first_selection_step", "reselect_every_epochs", "reselect_every_steps", "depth_encoder", "depth_feature"),
    *("normalize_gradients", "projection_dim", "gradient_layers", "precondition_gradients", "gradient_dtype", "seed"),
)
_NOT_WITH_SELECTION = {
    "train_sampling_strategy": ("random", "the order of the selected pairs is drawn by BPOTrainer"),
    "ignore_data_skip": (False, "a resumed run would not find its place in the selection"),
}


@dataclass
class BPOConfig(DPOConfig):
    r"""
    Configuration class for the [`BPOTrainer`].

    [`BPOConfig`] inherits every parameter from [`~trl.DPOConfig`] and adds those of the selection of pairs. The paper
    (arXiv 2411.10914) specifies none of their values.

    Parameters:
        > Parameters that control the selection

        depth_fraction (`float`, *optional*, defaults to `0.5`):
            Fraction of the pairs to train on, in (0, 1]: exactly `round(depth_fraction * n)` of the `n` pairs that TRL's
            length filter leaves. An epoch is one pass over them. `1.0` switches selection off and trains exactly like
            [`~trl.DPOTrainer`].
        depth_strategy (`str`, *optional*, defaults to `"gradient"`):
            What measures depth. `"gradient"` is BPO: the pairs whose gradients lie nearest to the centres of their K-means
            clusters. The others are there to compare with: `"gradient_farthest"`, `"gradient_random"` (as many of each
            cluster, drawn at random), `"random_like_gradient"` (as many pairs a prompt, drawn at random),
            `"gradient_k_centre"`, `"gradient_norm"`, `"loss"`, `"implicit_reward_margin_high"`,
            `"implicit_reward_margin_low"`, `"embedding"`, `"embedding_farthest"`, `"score_margin_high"`,
            `"score_margin_low"`, `"longest"`, `"random"` (drawn anew at each selection), `"random_once"`,
            `"equal_per_prompt"` and `"best_worst_per_prompt"`; see `trl_bpo/strategies.py`.
        depth_clusters (`int`, *optional*):
            Number of K-means clusters of the features. If `None`, `round(sqrt(n / 2))`.
        depth_scope (`str`, *optional*, defaults to `"per_cluster"`):
            `"per_cluster"` keeps the pairs nearest to each centre, in proportion to the size of its cluster.
            `"overall"` keeps the nearest of all.
        min_pairs_per_prompt (`int`, *optional*, defaults to `0`):
            Pairs that every prompt keeps at least. Refused if the budget cannot meet it.
        first_selection_step (`int`, *optional*, defaults to `0`):
            Optimizer steps on a random subset, of the size of the budget, before the first selection. A new LoRA adapter
            has `B = 0`, so that the gradients of `A` vanish at step 0 and the features are those of `B` alone.
        reselect_every_epochs (`int`, *optional*, defaults to `1`):
            Select anew under the current policy every this many epochs, at their boundaries. `0` selects only once. One
            selection by gradients costs about as much as one epoch over the pool.
        reselect_every_steps (`int`, *optional*):
            Select anew exactly every this many optimizer steps. If set, `reselect_every_epochs` is not used.
        depth_encoder (`str`, *optional*, defaults to `"sentence-transformers/all-MiniLM-L6-v2"`):
            Sentence-transformers model id or path, for the strategies of embeddings.

        > Parameters that control the gradient features

        depth_feature (`str`, *optional*, defaults to `"pair"`):
            What is clustered of each pair. `"pair"` is the gradient of its loss, the literal reading of the paper: a
            weighted difference of the gradients of the two responses. `"sum"` is their sum and `"chosen"` that of the
            chosen response alone; both leave in what the responses share, prompt and task.
        normalize_gradients (`bool`, *optional*, defaults to `True`):
            Whether to scale the gradient feature of each pair to unit length before clustering. Otherwise the pairs
            nearest to a centre are those with hardly any gradient.
        projection_dim (`int`, *optional*, defaults to `2048`):
            Dimension of the sparse random projection of the gradients.
        gradient_batch_tokens (`int`, *optional*, defaults to `4096`):
            Tokens a batch of the gradient pass, padding included, on each process. If a batch does not fit into memory,
            batches are cut in halves.
        gradient_layers (`list[int]`, *optional*):
            Decoder layers whose gradients make up the feature, counted from 0 at the input. If `None`, all. The backward
            pass stops at the lowest, so the upper half of the layers costs about a quarter less.
        precondition_gradients (`bool`, *optional*, defaults to `False`):
            Whether to divide each gradient entry as Adam would, by the root of its second moment as it is at the time.
            The selection before the first optimizer step takes the gradients as they are.
        gradient_dtype (`str`, *optional*, defaults to `"float32"`):
            Type in which the features of a selection are kept on disk, in `output_dir/_features`, until the next one:
            `"float32"`, or `"float16"` for half of the space.

        > Parameters that control the curated dataset

        curated_dataset_hub_id (`str`, *optional*):
            Dataset repository on the Hub, as `user/name`, to which the selections are pushed with their card: each as a
            configuration such as `step-000012`, the last one as `default`. If `None`, nothing is pushed. The token is
            `hub_token`, or that of `hf auth login` or `HF_TOKEN`. A push that fails does not stop the training; repeat it
            with `trl-bpo push`.
        curated_dataset_hub_strategy (`str`, *optional*, defaults to `"end"`):
            When to push: `"end"` of training, or `"every_selection"`, in the background.
        curated_dataset_hub_private_repo (`bool`, *optional*):
            Whether a new repository of the curated dataset is private. If `None`, as `hub_private_repo` says.
        curated_dataset_push_pool (`bool`, *optional*, defaults to `False`):
            Whether the pairs that were selected from are saved in `output_dir` and pushed as well, as the configuration
            `pool`.
        curated_dataset_license (`str`, *optional*):
            Licence of the curated dataset, as an identifier of the Hub, for its card. None is ever assumed.
    """

    # Parameters that control the selection
    depth_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Fraction of the pairs to train on, in (0, 1]. 1.0 switches selection off and trains exactly like "
            "DPOTrainer."
        },
    )
    depth_strategy: str = field(
        default="gradient",
        metadata={
            "help": "What measures depth. `gradient` is BPO; the others are there to compare with.",
            "choices": [*POLICY_STRATEGIES, *DATA_STRATEGIES],
        },
    )
    depth_clusters: int | None = field(
        default=None,
        metadata={"help": "Number of K-means clusters of the features. If None, round(sqrt(n / 2))."},
    )
    depth_scope: str = field(
        default="per_cluster",
        metadata={
            "help": "Whether to keep the pairs nearest to each centre or the nearest of all.",
            "choices": list(SCOPES),
        },
    )
    min_pairs_per_prompt: int = field(
        default=0,
        metadata={"help": "Pairs that every prompt keeps at least. Refused if the budget cannot meet it."},
    )
    first_selection_step: int = field(
        default=0,
        metadata={"help": "Optimizer steps on a random subset of the same size before the first selection."},
    )
    reselect_every_epochs: int = field(
        default=1,
        metadata={"help": "Select anew under the current policy every this many epochs. 0 selects only once."},
    )
    reselect_every_steps: int | None = field(
        default=None,
        metadata={"help": "Select anew every this many optimizer steps. If set, `reselect_every_epochs` is not used."},
    )

    depth_encoder: str = field(
        default=DEFAULT_ENCODER,
        metadata={"help": "Sentence-transformers model id or path, for the strategies of embeddings."},
    )

    # Parameters that control the gradient features
    depth_feature: str = field(
        default="pair",
        metadata={
            "help": "What is clustered of each pair: the gradient of its loss, the sum of the gradients of its "
            "responses, or that of the chosen one.",
            "choices": list(FEATURES),
        },
    )
    normalize_gradients: bool = field(
        default=True,
        metadata={"help": "Whether to scale the gradient feature of each pair to unit length before clustering."},
    )
    projection_dim: int = field(
        default=2048,
        metadata={"help": "Dimension of the sparse random projection of the gradients."},
    )
    gradient_batch_tokens: int = field(
        default=4096,
        metadata={"help": "Tokens a batch of the gradient pass, padding included, on each process."},
    )
    gradient_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers whose gradients make up the feature, counted from 0. If None, all."},
    )
    precondition_gradients: bool = field(
        default=False,
        metadata={"help": "Whether to divide each gradient entry by the root of Adam's second moment."},
    )
    gradient_dtype: str = field(
        default="float32",
        metadata={"help": "Type in which features are kept on disk.", "choices": list(DTYPES)},
    )

    # Parameters that control the curated dataset
    curated_dataset_hub_id: str | None = field(
        default=None,
        metadata={
            "help": "Dataset repository on the Hub to which the selections are pushed with their card. If None, nothing "
            "is pushed."
        },
    )
    curated_dataset_hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When to push the curated dataset: at the end of training or after every selection.",
            "choices": list(HUB_STRATEGIES),
        },
    )
    curated_dataset_hub_private_repo: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a new repository of the curated dataset is private. If None, as `hub_private_repo` says."
        },
    )
    curated_dataset_push_pool: bool = field(
        default=False,
        metadata={"help": "Whether the pairs that were selected from are saved and pushed as well."},
    )
    curated_dataset_license: str | None = field(
        default=None,
        metadata={"help": "Licence of the curated dataset, as an identifier of the Hub. None is ever assumed."},
    )

    def __post_init__(self) -> None:
        check_fraction("depth_fraction", self.depth_fraction)
        strategies = (*POLICY_STRATEGIES, *DATA_STRATEGIES)
        choices = {"depth_strategy": strategies, "depth_scope": SCOPES}
        choices |= {"depth_feature": FEATURES, "gradient_dtype": DTYPES}
        choices |= {"curated_dataset_hub_strategy": HUB_STRATEGIES}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {values}, got {getattr(self, name)!r}.")
        for name in ("first_selection_step", "reselect_every_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name in ("depth_clusters", "reselect_every_steps", "projection_dim", "gradient_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.curated_dataset_hub_id is not None:
            validate_repo_id(self.curated_dataset_hub_id)
            if (self.hub_token or get_token()) is None:
                raise ValueError(
                    "`curated_dataset_hub_id` is set, but there is no token to push with. Set `HF_TOKEN` or log in with "
                    "`hf auth login`."
                )
        if self.hub_token is not None:
            logger.warning(
                "`hub_token` is saved in clear in `training_args.bin`, which is in every checkpoint and is pushed with the "
                "model. Set the environment variable `HF_TOKEN` instead."
            )
        if self.depth_fraction < 1.0:
            for name, (value, reason) in _NOT_WITH_SELECTION.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"`{name}={getattr(self, name)!r}` does not go with selection: {reason}. Unset it, or set "
                        "`depth_fraction=1.0` to train without selection."
                    )
            parallelism = self.parallelism_config
            if parallelism is not None and max(parallelism.tp_size, parallelism.cp_size, parallelism.sp_size) > 1:
                raise ValueError(
                    "Tensor, context and sequence parallelism do not go with selection: each process has to see whole "
                    "responses and layers. Use FSDP 2 or ZeRO-3, or set `depth_fraction=1.0` to train without selection."
                )
        super().__post_init__()
