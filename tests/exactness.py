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


"""What the exactness of pair features is tested over, and what they are compared with: plain autograd in float64."""

import itertools
import json
import types

import torch
from datasets import Dataset
from pairs import IdentityProjection, config, relative_error
from peft import LoraConfig
from test_pair_loss import LOSSES, direct, perturb
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from trl.trainer.utils import FusedCausalLMOutput

from trl_bpo import BPOTrainer
from trl_bpo.capture import target_modules
from trl_bpo.pair_features import remove_stores


OPTIONS = [
    *(loss for loss in LOSSES if loss["loss_type"] != "discopop"),
    # With the default of 0.05, its derivative comes so near to zero here that what float32 rounds shows. Among the losses
    # that change their sign it is tested with the default, in float64.
    {"loss_type": "discopop", "discopop_tau": 1.0},
    {"loss_type": "sigmoid", "use_weighting": True},
    {"loss_type": "ipo", "use_weighting": True},
    {"loss_type": "sigmoid", "ld_alpha": 0.5},
    {"loss_type": "ipo", "ld_alpha": 0.3, "use_weighting": True},
    {"loss_type": "sft", "ld_alpha": 0.5},
    {"loss_type": "sppo_hard", "ld_alpha": 0.0},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3], "ld_alpha": 0.5},
    {"loss_type": "sigmoid", "ld_alpha": 0.5, "f_divergence_type": "js_divergence"},
    {"loss_type": "aot", "label_smoothing": 0.1},
    {"loss_type": "ipo", "f_divergence_type": "forward_kl"},
    {"loss_type": "exo_pair", "label_smoothing": 0.2, "f_divergence_type": "js_divergence"},
    {"loss_type": ["robust", "ipo", "nca_pair"], "loss_weights": [0.5, 2.0, 0.3], "label_smoothing": 0.1},
    {"loss_type": "sigmoid_norm", "max_length": 12, "truncation_mode": "keep_end"},
]
MATRIX = {
    "options": OPTIONS,
    "adapter": ["lora", "dora", "full"],
    "reference": ["implicit", "explicit", "precomputed"],
    "head": ["plain", "fused"],
    "attention": ["sdpa", "eager"],
    "gradient_batch_tokens": [1, 4096],
    "packed": [False, True],
    # Logits of a batch that are kept: none, or all that models of this size have.
    "max_logits": [0, 2**26],
}
# A response in two pairs, answers of different lengths, and a prompt with one pair only.
POOL = Dataset.from_list(
    [
        {"prompt": "What about the wind?", "chosen": " a poem", "rejected": " sea and wind, list of numbers"},
        {"prompt": "What about the wind?", "chosen": " Paris is the capital of France", "rejected": " a poem"},
        {"prompt": "Sort it, please.", "chosen": " Use Python", "rejected": " red blue green"},
    ]
)


def label(value):
    """Short name of a value of the matrix."""
    if not isinstance(value, dict):
        return str(value)
    return "-".join(str(part) if name == "loss_type" else f"{name}={part}" for name, part in value.items())


def pairwise_cover(factors):
    """Few cases in which every two values of two factors come together, found greedily."""
    levels = [(name, index) for name, values in factors.items() for index in range(len(values))]
    missing = {frozenset(pair) for pair in itertools.combinations(levels, 2) if pair[0][0] != pair[1][0]}
    cases = []
    while missing:
        case = dict(min(sorted(pair) for pair in missing))
        for name in sorted(factors.keys() - case.keys()):
            chosen = list(case.items())
            worth = []
            for index in range(len(factors[name])):
                gain = sum(frozenset([(name, index), level]) in missing for level in chosen)
                # Among equals the one that has been used less, else the first would be in most cases.
                worth.append((gain, -sum(other[name] == index for other in cases)))
            case[name] = worth.index(max(worth))
        missing -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        cases.append(case)
    return [{name: values[case[name]] for name, values in factors.items()} for case in cases]


def rms_norm(self, hidden_states):
    """The norm of Llama, in the type of its input."""
    return nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention with a mask that is added, in the type of its input."""
    key, value = (tensor.repeat_interleave(module.num_key_value_groups, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


def compute_in_float64(monkeypatch):
    """Take out of Llama what it computes in float32 even if its weights are float64."""
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_attention)


def plain_forward(self, *args, labels=None, shift_labels=None, fused_lm_head=False, **kwargs):
    """What the fused head of TRL gives, by a plain log-softmax in the type of the model."""
    if not fused_lm_head:
        return type(self).forward(self, *args, labels=labels, **kwargs)
    hidden = self.base_model(*args, **kwargs).last_hidden_state
    if shift_labels is None:
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    logits, ignored = self.lm_head(hidden), shift_labels == -100
    log_p = logits.log_softmax(dim=-1)
    log_probs = log_p.gather(-1, shift_labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    fields = {
        "log_probs": log_probs,
        "entropy": -(log_p.exp() * log_p).sum(dim=-1),
        "log_sum_sq_probs": (2 * log_p.detach()).logsumexp(dim=-1),
        "mean_logits": logits.mean(dim=-1),
        "is_top1": logits.argmax(dim=-1) == shift_labels,
    }
    return FusedCausalLMOutput(**{name: value.masked_fill(ignored, 0) for name, value in fields.items()})


def plain_forward_in_float32(self, *args, **kwargs):
    """The same, rounded at the end. TRL refuses log-probabilities in float64 with the alpha divergence."""
    output = plain_forward(self, *args, **kwargs)
    if isinstance(output, FusedCausalLMOutput):
        output.log_probs, output.log_sum_sq_probs = output.log_probs.float(), output.log_sum_sq_probs.float()
    return output


def language_model(model):
    """The causal language model behind an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def use_plain_head(trainer):
    """Replace the fused head of the policy and of its reference."""
    forward, collate = plain_forward_in_float32, trainer.data_collator
    if trainer.f_divergence_type != "alpha_divergence":
        forward = plain_forward

        # Precomputed reference log-probabilities come in float32, in which `aot` would subtract them.
        def collate_in_float64(rows):
            batch = collate(rows)
            return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}

        trainer.data_collator = collate_in_float64
    for model in filter(None, (trainer.model, trainer.ref_model)):
        language_model(model).forward = types.MethodType(forward, language_model(model))


def float64_trainer(
    tiny_dir, path, adapter="lora", reference="implicit", attention="sdpa", dataset=POOL, head="plain", **kwargs
):
    """A trainer in float64 whose policy has moved away from its reference."""

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float64, attn_implementation=attention)

    ref_model = None
    if reference == "explicit":
        ref_model = load()
        perturb(ref_model, seed=1)
    options = {"normalize_gradients": False, "precompute_ref_log_probs": reference == "precomputed", **kwargs}
    lora = LoraConfig(r=4, target_modules="all-linear", use_dora=adapter == "dora")
    trainer = BPOTrainer(
        load(),
        ref_model,
        config(path, **options),
        train_dataset=dataset,
        peft_config=None if adapter == "full" else lora,
    )
    trainer.model.to(torch.float64)
    perturb(trainer.model)
    trainer._projection = IdentityProjection(target_modules(trainer.model))
    if head == "plain":
        use_plain_head(trainer)
    return trainer


def features_of(trainer, keep=False):
    """The features, and which passes they were computed by. Nothing of them stays on disk, unless it is to be kept."""
    features = torch.from_numpy(trainer._pair_features()[:])
    header = trainer._features_path / f"step-{trainer.state.global_step:06d}" / "part-00000.json"
    path = json.loads(header.read_text())["features"]
    if not keep:
        remove_stores(trainer._features_path, trainer.accelerator)
    return features, path


def largest_error(features, expected):
    """Largest relative error of a row. Where the true gradient is zero, so must the feature be."""
    assert features.shape == expected.shape and features.dtype == torch.float64
    zero = (expected == 0).all(dim=1)
    assert (features[zero] == 0).all()
    return max((relative_error(*rows) for rows in zip(features[~zero], expected[~zero], strict=True)), default=0.0)


def error(trainer):
    """Largest relative error of the features of a trainer, and which passes they were computed by."""
    features, path = features_of(trainer)
    return largest_error(features, direct(trainer)), path
