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

import pytest
import torch
from pairs import IdentityProjection, config, pairs, relative_error
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_bpo import BPOTrainer
from trl_bpo.capture import target_modules
from trl_bpo.pair_features import remove_stores
from trl_bpo.pair_loss import needs_reference, pair_coefficients
from trl_bpo.responses import unique_responses


LOSSES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 0.1},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "sppo_hard"},
    {"loss_type": "nca_pair"},
    {"loss_type": "bco_pair"},
    {"loss_type": "aot"},
    {"loss_type": "aot_unpaired"},
    {"loss_type": "discopop"},
    {"loss_type": "sigmoid_norm"},
    {"loss_type": "sft"},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
    {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence"},
    {"loss_type": "sigmoid", "max_length": 20},
]
SETUPS = ["lora", "full"]


def perturb(model, seed=0):
    """Move the policy away from its reference, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def make(tiny_dir, path, setup="lora", dataset=None, **kwargs):
    trainer = BPOTrainer(
        tiny_dir,
        AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32) if setup == "full" else None,
        config(path, **{"normalize_gradients": False, "gradient_batch_tokens": 64, **kwargs}),
        train_dataset=dataset or pairs(2, 2),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if setup == "lora" else None,
    )
    perturb(trainer.model)
    trainer._projection = IdentityProjection(target_modules(trainer.model))
    return trainer


def direct(trainer):
    """Gradient of the trainer's own loss of each pair as a batch of its own."""
    weights = [module.weight for module in target_modules(trainer.model).values()]
    rows = []
    for row in trainer.train_dataset:
        loss = trainer._compute_loss(trainer.model, trainer.data_collator([row]), return_outputs=False)
        rows.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


def features_of(trainer):
    features = torch.from_numpy(trainer._pair_features()[:])
    remove_stores(trainer._features_path, trainer.accelerator)
    return features


def check(trainer):
    features, expected = features_of(trainer), direct(trainer)
    assert features.shape == expected.shape and features.dtype == torch.float32
    for feature, gradient in zip(features, expected, strict=True):
        # Differences of log-probabilities near 100 in float32.
        assert relative_error(feature, gradient) < 5e-4


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(str(value) for value in loss.values()))
def test_features_equal_the_gradient_of_the_loss_of_the_pair(tiny_dir, tmp_path, setup, loss):
    check(make(tiny_dir, tmp_path, setup, **loss))


@pytest.mark.parametrize("setup", SETUPS)
def test_features_after_training_steps(tiny_dir, tmp_path, setup):
    trainer = make(tiny_dir, tmp_path, setup, loss_type="ipo", max_steps=2)
    before = direct(trainer)
    trainer.train()
    assert relative_error(direct(trainer), before) > 0.01
    check(trainer)


@pytest.mark.parametrize("setup", [*SETUPS, "precompute_only"])
def test_features_with_precomputed_reference(tiny_dir, tmp_path, setup):
    # In the last setup no reference model stays in memory: the reference is what was computed before training.
    check(make(tiny_dir, tmp_path, setup, loss_type="ipo", precompute_ref_log_probs=True))


def test_features_of_an_adapter_that_is_trained_further(tiny_dir, tmp_path):
    # The reference is a copy of the adapter as it was passed, not the model without it.
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32), LoraConfig(r=4))
    perturb(model, seed=1)
    trainer = BPOTrainer(
        model, args=config(tmp_path, loss_type="ipo", normalize_gradients=False), train_dataset=pairs(2, 2)
    )
    perturb(trainer.model)
    trainer._projection = IdentityProjection(target_modules(trainer.model))
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    check(trainer)
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == trainable


@pytest.mark.parametrize("loss", [{"loss_type": "sigmoid"}, {"loss_type": "robust", "label_smoothing": 0.2}])
def test_shortcut_without_a_reference_has_the_same_direction(tiny_dir, tmp_path, loss):
    general = make(tiny_dir, tmp_path / "general", **loss)
    shortcut = make(tiny_dir, tmp_path / "shortcut", normalize_gradients=True, **loss)
    assert needs_reference(general, False) and not needs_reference(shortcut, True)
    directions = [torch.nn.functional.normalize(features_of(trainer)) for trainer in (general, shortcut)]
    assert relative_error(*directions) < 1e-5
    # Not so before they are scaled.
    assert relative_error(features_of(general), features_of(shortcut)) > 0.5


@pytest.mark.parametrize("loss", [loss for loss in LOSSES[1:-1] if loss["loss_type"] != "robust"], ids=str)
def test_reference_is_needed_where_it_does_not_cancel(tiny_dir, tmp_path, loss):
    assert needs_reference(make(tiny_dir, tmp_path, **loss), True)


def test_robust_beyond_one_half_needs_the_reference(tiny_dir, tmp_path):
    # Its gradient points the other way.
    trainer = make(tiny_dir, tmp_path, loss_type="robust", label_smoothing=0.8)
    assert needs_reference(trainer, True)
    check(trainer)


def test_one_response_in_many_pairs(tiny_dir, tmp_path):
    rows = [
        {"prompt": "What?", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in [(" the sea", " a list"), (" the sea", " Paris or so"), (" Paris or so", " the sea")]
    ]
    trainer = make(tiny_dir, tmp_path, loss_type="ipo", dataset=pairs(1, 1).from_list(rows))
    assert len(unique_responses(trainer.train_dataset).input_ids) == 3
    check(trainer)


def test_metrics_of_the_trainer_are_left_alone(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, loss_type="ipo")
    trainer._metrics["train"]["loss"].append(1.0)
    trainer._total_train_tokens = 7
    before = {mode: dict(values) for mode, values in trainer._metrics.items()}
    features_of(trainer)
    assert {mode: dict(values) for mode, values in trainer._metrics.items()} == before
    assert trainer._total_train_tokens == 7 and not trainer.precompute_ref_logps


def test_state_is_restored_after_an_error(tiny_dir, tmp_path):
    trainer = make(tiny_dir, tmp_path, loss_type="ipo")
    responses = unique_responses(trainer.train_dataset)
    metrics = trainer._metrics
    with pytest.raises(IndexError):
        pair_coefficients(trainer, responses, torch.zeros(1), torch.zeros(1))
    assert trainer._metrics is metrics and not trainer.precompute_ref_logps
