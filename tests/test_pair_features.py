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
Pair features against plain autograd of the trainer's own loss.

Every two options of `exactness.MATRIX` come together in some case here. All of its cases, and a real model, run by hand:

    pytest tests/test_pair_features.py -m slow -o log_file=exactness.log -o log_file_level=INFO
"""

import itertools
import logging
import os

import pytest
import torch
from datasets import Dataset
from exactness import (
    MATRIX,
    POOL,
    compute_in_float64,
    error,
    features_of,
    float64_trainer,
    label,
    language_model,
    largest_error,
    pairwise_cover,
)
from pairs import IdentityProjection, config, conversational, pairs, relative_error
from peft import LoraConfig
from test_pair_loss import direct, perturb
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from trl_bpo import BPOTrainer
from trl_bpo.capture import target_modules
from trl_bpo.feature_store import StoreMismatchError
from trl_bpo.responses import unique_responses


logger = logging.getLogger(__name__)

COVER = pairwise_cover(MATRIX)
# The fused head of TRL works in float32.
TOLERANCES = {"plain": 1e-9, "fused": 1e-5}


@pytest.fixture
def float64(monkeypatch):
    compute_in_float64(monkeypatch)


def choose(monkeypatch, packed, max_logits=None):
    """
    Have the features computed from packed pairs, or not, and with the fused head of TRL above a number of logits.

    These two internals are replaced because both weigh costs, and models as small as those here would take one side
    only: either side is as exact. They are left alone in the tests of the choice.
    """
    monkeypatch.setattr("trl_bpo.pair_features._packing_pays", lambda *_: packed)
    if max_logits is not None:
        monkeypatch.setattr("trl_bpo.gradients._MAX_LOGITS", max_logits)


@pytest.fixture(params=["responses", "packed"])
def layout(request, monkeypatch):
    choose(monkeypatch, request.param == "packed")
    return request.param


def tolerance(head, options):
    # TRL computes this divergence in float32 whatever it is given.
    return 1e-5 if options.get("f_divergence_type") == "alpha_divergence" else TOLERANCES[head]


def check(tiny_dir, path, monkeypatch, options, packed, max_logits, head, **setup):
    choose(monkeypatch, packed, max_logits)
    worst, passes = error(float64_trainer(tiny_dir, path, head=head, **setup, **options))
    assert worst < tolerance(head, options)
    assert passes == expected_passes(packed, options)


def expected_passes(packed, options):
    if packed:
        return "packed pairs"
    return "pairs" if "ld_alpha" in options else "responses"


def name(case):
    return "-".join(label(value) for factor, value in case.items() if factor != "head")


@pytest.mark.parametrize("case", [case for case in COVER if case["head"] == "plain"], ids=name)
def test_equals_autograd_over_a_plain_log_softmax(tiny_dir, tmp_path, monkeypatch, float64, case):
    check(tiny_dir, tmp_path, monkeypatch, **case)


@pytest.mark.parametrize("case", [case for case in COVER if case["head"] == "fused"], ids=name)
def test_equals_the_gradient_of_the_loss_of_dpo(tiny_dir, tmp_path, monkeypatch, case):
    check(tiny_dir, tmp_path, monkeypatch, **case)


def test_every_two_options_come_together():
    for first, second in itertools.combinations(MATRIX, 2):
        for values in itertools.product(MATRIX[first], MATRIX[second]):
            assert any((case[first], case[second]) == values for case in COVER), values


@pytest.mark.slow
@pytest.mark.parametrize("reference", MATRIX["reference"])
@pytest.mark.parametrize("adapter", MATRIX["adapter"])
@pytest.mark.parametrize("options", MATRIX["options"], ids=label)
def test_whole_matrix(tiny_dir, tmp_path, monkeypatch, options, adapter, reference):
    for head, attention in itertools.product(MATRIX["head"], MATRIX["attention"]):
        with monkeypatch.context() as patch:
            if head == "plain":
                compute_in_float64(patch)
            trainer = float64_trainer(tiny_dir, tmp_path, adapter, reference, attention, head=head, **options)
            gradients = direct(trainer)
            how = [MATRIX[factor] for factor in ("gradient_batch_tokens", "packed", "max_logits")]
            for batch_tokens, packed, max_logits in itertools.product(*how):
                choose(patch, packed, max_logits)
                trainer.args.gradient_batch_tokens = batch_tokens
                vars(trainer).pop("_features", None)  # it keeps the log-probabilities of the reference
                features, passes = features_of(trainer)
                worst = largest_error(features, gradients)
                case = (
                    label(options),
                    adapter,
                    reference,
                    head,
                    attention,
                    str(batch_tokens),
                    str(max_logits),
                    passes,
                )
                logger.info("%s: %.1e", " ".join(case), worst)
                assert worst < tolerance(head, options), case
                assert passes == expected_passes(packed, options)


# Which passes are chosen


LONG = "What about the sea and the wind, and the capital of France, and a list of numbers in Python, please?"


def from_texts(*rows):
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])


ONE_PAIR_A_PROMPT = from_texts((f"One. {LONG}", " the sea", " a list"), (f"Two. {LONG}", " Paris or so", " Python"))
# Four responses of one prompt, each of them in three pairs.
ALL_PAIRS = from_texts(
    *((LONG, *pair) for pair in itertools.combinations((" the sea", " a list", " Paris or so", " use Python"), 2))
)
WITHOUT_PROMPT = from_texts(("", " the sea and the wind", " a list"), ("", " Paris or so", " use Python"))


@pytest.mark.parametrize("attention", MATRIX["attention"])
@pytest.mark.parametrize(
    ("dataset", "options", "passes"),
    [
        (ONE_PAIR_A_PROMPT, {}, "packed pairs"),
        (ONE_PAIR_A_PROMPT, {"ld_alpha": 0.5}, "packed pairs"),
        (ONE_PAIR_A_PROMPT, {"depth_feature": "sum"}, "packed pairs"),
        (ONE_PAIR_A_PROMPT, {"depth_feature": "chosen"}, "responses"),
        (ALL_PAIRS, {}, "responses"),
        (ALL_PAIRS, {"depth_feature": "sum", "ld_alpha": 0.5}, "responses"),
        # Here the alternative is not four responses but twelve.
        (ALL_PAIRS, {"ld_alpha": 0.5}, "packed pairs"),
        (WITHOUT_PROMPT, {}, "responses"),
        (WITHOUT_PROMPT, {"ld_alpha": 0.5}, "pairs"),
    ],
)
def test_the_passes_that_cost_least_are_chosen(tiny_dir, tmp_path, float64, attention, dataset, options, passes):
    trainer = float64_trainer(tiny_dir, tmp_path, attention=attention, dataset=dataset, loss_type="ipo", **options)
    features, chosen = features_of(trainer)
    assert chosen == passes
    expected = {"pair": direct, "sum": sum_of_gradients, "chosen": chosen_gradients}[trainer.args.depth_feature]
    assert largest_error(features, expected(trainer)) < 1e-9


def test_a_sliding_window_is_not_packed(tiny_dir, tmp_path):
    # The window is counted in columns of the row, not in positions. The shortest pair, with which packing is tried out,
    # fits into it.
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    torch.manual_seed(0)
    settings = MistralConfig(**{**tiny_config(tokenizer).to_dict(), "model_type": "mistral", "sliding_window": 16})
    trainer = BPOTrainer(
        MistralForCausalLM(settings).double(),
        args=config(tmp_path, loss_type="ipo", normalize_gradients=False),
        train_dataset=Dataset.from_list([*ONE_PAIR_A_PROMPT, {"prompt": "Sort", "chosen": " it", "rejected": " a"}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.model.double()
    perturb(trainer.model)
    trainer._projection = IdentityProjection(target_modules(trainer.model))
    worst, passes = error(trainer)
    assert passes == "responses" and worst < 1e-5


# Pairs without a gradient


@pytest.mark.parametrize(
    "loss", [{"loss_type": "sigmoid"}, {"loss_type": "ipo"}, {"loss_type": "exo_pair"}], ids=label
)
@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_a_pair_of_the_same_response_has_no_gradient(tiny_dir, tmp_path, float64, layout, loss, ld_alpha):
    long = " the sea and the wind and the capital of France"
    rows = [
        *POOL,
        {"prompt": "Sort it, please.", "chosen": " the same answer", "rejected": " the same answer"},
        # The tokens that are left of these are the same.
        {"prompt": "Sort it, please.", "chosen": long, "rejected": f"{long} is Paris"},
    ]
    trainer = float64_trainer(
        tiny_dir,
        tmp_path,
        dataset=Dataset.from_list(rows),
        ld_alpha=ld_alpha,
        label_smoothing=0.1,
        max_length=14,
        depth_clusters=1,
        **loss,
    )
    check_zero_rows(trainer, [3, 4])


def test_pairs_beyond_the_margin_of_hinge_have_no_gradient(tiny_dir, tmp_path, float64, layout):
    trainer = float64_trainer(
        tiny_dir, tmp_path, "full", dataset=pairs(3, 2), loss_type="hinge", beta=1.0, depth_clusters=1
    )
    check_zero_rows(trainer, [4])


def check_zero_rows(trainer, zero):
    features, expected = features_of(trainer)[0], direct(trainer)
    # The true gradient is zero up to the rounding of autograd.
    others = [row for row in range(len(features)) if row not in zero]
    assert largest_error(features[others], expected[others]) < 1e-9
    assert (features[zero] == 0).all() and (expected[zero].norm(dim=1) < 1e-12).all()
    selection = trainer.select_pairs()
    assert selection.metrics["zero_gradients"] == len(zero)
    assert not selection.selected[zero].any() and (selection.clusters[zero] == -1).all()
    assert selection.selected.sum() == round(0.5 * len(features))


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "nca_pair"},
        {"loss_type": "bco_pair"},
        {"loss_type": "sft"},
        {"loss_type": ["sigmoid", "sft"]},
        {"loss_type": "sft", "ld_alpha": 0.5},
    ],
    ids=label,
)
def test_a_pair_of_the_same_response_has_the_gradient_that_its_loss_gives(tiny_dir, tmp_path, float64, layout, loss):
    # These losses do not only depend on the difference of the two.
    rows = [*POOL, {"prompt": "Sort it, please.", "chosen": " the same answer", "rejected": " the same answer"}]
    trainer = float64_trainer(tiny_dir, tmp_path, dataset=Dataset.from_list(rows), **loss)
    features, expected = features_of(trainer)[0], direct(trainer)
    assert expected[3].norm() > 0.01
    assert largest_error(features, expected) < 1e-9


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "discopop"},
        {"loss_type": "exo_pair", "label_smoothing": 0.1, "beta": 1.0},
        {"loss_type": "ipo", "beta": 2.0},
    ],
    ids=label,
)
def test_losses_whose_gradient_changes_its_sign(tiny_dir, tmp_path, float64, layout, loss):
    trainer = float64_trainer(tiny_dir, tmp_path / "loss", "full", dataset=pairs(3, 2), **loss)
    sigmoid = float64_trainer(tiny_dir, tmp_path / "sigmoid", "full", dataset=pairs(3, 2), loss_type="sigmoid")
    features, expected = features_of(trainer)[0], direct(trainer)
    towards_chosen = (expected * direct(sigmoid)).sum(dim=1) > 0
    assert 0 < towards_chosen.sum() < len(features)
    assert largest_error(features, expected) < 1e-9


# What is clustered


def log_prob_gradients(trainer, weights):
    modules = [module.weight for module in target_modules(trainer.model).values()]
    rows = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        log_probs = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(dim=1)
        gradients = torch.autograd.grad(log_probs @ log_probs.new_tensor(weights), modules)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(rows)


def sum_of_gradients(trainer):
    return log_prob_gradients(trainer, [1.0, 1.0])


def chosen_gradients(trainer):
    return log_prob_gradients(trainer, [1.0, 0.0])


@pytest.mark.parametrize("adapter", MATRIX["adapter"])
@pytest.mark.parametrize("options", [{"loss_type": "ipo"}, {"ld_alpha": 0.5, "use_weighting": True}], ids=label)
def test_sum_and_chosen_have_no_coefficient(tiny_dir, tmp_path, float64, layout, adapter, options):
    # A pair of the same response has a sum.
    rows = [*POOL, {"prompt": "Sort it, please.", "chosen": " the same answer", "rejected": " the same answer"}]
    dataset = Dataset.from_list(rows)
    for depth_feature, expected in (("sum", sum_of_gradients), ("chosen", chosen_gradients)):
        path = tmp_path / depth_feature
        trainer = float64_trainer(tiny_dir, path, adapter, dataset=dataset, depth_feature=depth_feature, **options)
        features, passes = features_of(trainer)
        assert passes == ("packed pairs" if (layout, depth_feature) == ("packed", "sum") else "responses")
        assert largest_error(features, expected(trainer)) < 1e-9


def count_passes(model):
    """Sequences that go through a model from now on, without their padding."""
    seen = []

    def hook(_, args, kwargs):
        for row, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(tuple(row[mask.bool()].tolist()))

    language_model(model).base_model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def test_chosen_runs_the_chosen_responses_only(tiny_dir, tmp_path, float64):
    trainer = float64_trainer(tiny_dir, tmp_path, reference="explicit", dataset=POOL, depth_feature="chosen")
    responses = unique_responses(trainer.train_dataset)
    seen, by_reference = count_passes(trainer.model), count_passes(trainer.ref_model)
    features_of(trainer)
    chosen = {tuple(responses.input_ids[index]) for index in responses.chosen}
    assert set(seen) == chosen and len(chosen) < len(responses.input_ids) and not by_reference


# The reference


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "sigmoid", "loss_weights": [0.5], "use_weighting": True},
        {"loss_type": "sigmoid", "ld_alpha": 0.5},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": "robust", "label_smoothing": 0.2, "ld_alpha": 0.0, "use_weighting": True},
    ],
    ids=label,
)
def test_direction_without_a_pass_of_the_reference(tiny_dir, tmp_path, float64, layout, loss):
    trainer = float64_trainer(tiny_dir, tmp_path, reference="explicit", normalize_gradients=True, **loss)
    seen = count_passes(trainer.ref_model)
    features, _ = features_of(trainer)
    assert not seen
    expected = direct(trainer)
    assert seen
    assert largest_error(*(torch.nn.functional.normalize(rows) for rows in (features, expected))) < 1e-9


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_reference_is_computed_once(tiny_dir, tmp_path, float64, layout, ld_alpha):
    trainer = float64_trainer(tiny_dir, tmp_path, "full", "explicit", loss_type="ipo", ld_alpha=ld_alpha, max_steps=3)
    trainer.train()
    seen = count_passes(trainer.ref_model)
    for _ in range(2):
        worst, _ = error(trainer)
        assert worst < 1e-9
    # All passes since are those of `direct`.
    assert len(seen) == 2 * 2 * len(POOL)


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_reference_that_follows_the_policy_is_computed_anew(tiny_dir, tmp_path, float64, layout, ld_alpha):
    trainer = float64_trainer(
        tiny_dir,
        tmp_path,
        "full",
        loss_type="ipo",
        ld_alpha=ld_alpha,
        max_steps=4,
        sync_ref_model=True,
        ref_model_sync_steps=2,
    )
    before = {name: weight.clone() for name, weight in trainer.ref_model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.ref_model.named_parameters())
    # An epoch has one step. The last selection was at step 3, and the reference has moved at step 4.
    seen = count_passes(trainer.ref_model)
    for _ in range(2):
        features, _ = features_of(trainer)
        n_passes = len(seen)
        assert n_passes == (6 if ld_alpha is not None else len(unique_responses(trainer.train_dataset).input_ids))
        assert largest_error(features, direct(trainer)) < 1e-9
        seen.clear()


def test_reference_of_a_run_that_was_stopped(tiny_dir, tmp_path, float64, layout):
    trainers = [float64_trainer(tiny_dir, tmp_path, reference="explicit", loss_type="ipo") for _ in range(3)]
    expected = direct(trainers[0])
    seen = [count_passes(trainer.ref_model) for trainer in trainers]
    # What this one leaves behind serves another of the same reference, and of no other.
    trainers[0]._pair_features()
    features, _ = features_of(trainers[1], keep=True)
    assert largest_error(features, expected) < 1e-9 and seen[0] and not seen[1]
    perturb(trainers[2].ref_model, seed=2)
    with pytest.raises(StoreMismatchError, match="model") as error:
        trainers[2]._pair_features()
    assert error.value.differing == ["model"]


def test_precomputed_reference_takes_no_pass(tiny_dir, tmp_path, float64, layout):
    trainer = float64_trainer(tiny_dir, tmp_path, "full", "precomputed", loss_type="ipo", max_steps=2)
    trainer.train()
    assert trainer.ref_model is None
    assert error(trainer)[0] < 1e-9


# Data


DATA_OPTIONS = [
    {"loss_type": "sigmoid"},
    {"loss_type": "ipo", "use_weighting": True},
    {"loss_type": "sigmoid_norm", "ld_alpha": 0.5},
    {"loss_type": "ipo", "ld_alpha": 0.0, "use_weighting": True},
]


@pytest.fixture(params=DATA_OPTIONS, ids=label)
def options(request):
    return request.param


def test_one_response_in_many_pairs(tiny_dir, tmp_path, float64, layout, options):
    rows = [*ALL_PAIRS, {"prompt": LONG, "chosen": " use Python", "rejected": " the sea"}]
    trainer = float64_trainer(tiny_dir, tmp_path, dataset=Dataset.from_list(rows), **options)
    assert len(unique_responses(trainer.train_dataset).input_ids) == 4
    assert error(trainer)[0] < 1e-9


def test_one_text_with_two_beginnings_of_its_completion(tiny_dir, tmp_path, float64, layout, options):
    dataset = from_texts(("Sort it", ", please.", " now."), ("Sort it, please", ".", " now."))
    trainer = float64_trainer(tiny_dir, tmp_path, dataset=dataset, **options)
    responses = unique_responses(trainer.train_dataset)
    first, second = responses.chosen
    assert responses.input_ids[first] == responses.input_ids[second] and first != second
    assert error(trainer)[0] < 1e-9


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation(tiny_dir, tmp_path, float64, layout, options, mode):
    cut = {"max_length": 18, "truncation_mode": mode}
    trainer = float64_trainer(tiny_dir, tmp_path, **cut, **options)
    responses = unique_responses(trainer.train_dataset, **cut)
    starts = [
        (responses.starts[a], responses.starts[b]) for a, b in zip(responses.chosen, responses.rejected, strict=True)
    ]
    assert max(map(len, responses.input_ids)) == 18 > min(map(len, responses.input_ids))
    # Cut at the end, the two prompts of a pair may begin at different tokens.
    assert any(a != b for a, b in starts) == (mode == "keep_end")
    assert error(trainer)[0] < 1e-9


def test_completions_without_a_prompt(tiny_dir, tmp_path, float64, layout, options):
    # The first token of a completion that starts at the beginning is predicted by nothing. The last chosen one is an
    # end of text alone, so nothing of it is.
    dataset = from_texts(("", " the sea", " a list of numbers"), ("", "", " Paris"), (LONG, " a poem", " so"))
    trainer = float64_trainer(tiny_dir, tmp_path, dataset=dataset, gradient_batch_tokens=1, **options)
    responses = unique_responses(trainer.train_dataset)
    assert sorted(responses.starts)[:4] == [0, 0, 0, 0] and min(map(len, responses.input_ids)) == 1
    assert error(trainer)[0] < 1e-9


def test_completions_of_one_token(tiny_dir, tmp_path, float64, layout, options):
    dataset = from_texts((LONG, "", " Paris or so"), ("Sort it, please.", " a list", ""))
    trainer = float64_trainer(tiny_dir, tmp_path, dataset=dataset, **options)
    responses = unique_responses(trainer.train_dataset)
    lengths = [len(ids) - start for ids, start in zip(responses.input_ids, responses.starts, strict=True)]
    assert sorted(lengths)[:2] == [1, 1] and max(lengths) > 1
    assert error(trainer)[0] < 1e-9


def test_conversational_pairs(tiny_dir, tmp_path, float64, layout, options):
    trainer = float64_trainer(tiny_dir, tmp_path, dataset=conversational(pairs(2, 2)), **options)
    assert error(trainer)[0] < 1e-9


# A real model


REAL = from_texts(
    (
        "\n\nHuman: What is the best way to remove a red wine stain from a white tablecloth?\n\nAssistant:",
        " Blot it, pour cold water through the back of the cloth, then soak it in oxygen bleach for an hour.",
        " I don't know. You could throw it away and buy a new one.",
    ),
    (
        "\n\nHuman: Can you explain why the sky is blue?\n\nAssistant: Light scatters.\n\nHuman: Why blue?\n\nAssistant:",
        " Air scatters short wavelengths more strongly than long ones, and blue light is short.",
        " Because the sky reflects the ocean, which is blue as everyone knows, and so it looks blue from below.",
    ),
    (
        "\n\nHuman: Write a haiku about autumn.\n\nAssistant:",
        " Leaves let go at last,\nthe pond takes each without word,\na crow counts the rest.",
        " Autumn is a season.",
    ),
    (
        "\n\nHuman: My sourdough never rises. What am I doing wrong?\n\nAssistant:",
        " Most often the starter is too young or the kitchen too cold. Feed it twice a day until it doubles in six hours.",
        " Use more flour, more water and more salt, then bake it hotter.",
    ),
)


@pytest.fixture(scope="module")
def real_dir():
    folder = os.environ.get("TRL_BPO_TEST_MODEL")
    if not folder:
        pytest.skip("needs the folder of a small real model, such as SmolLM2-135M, in `TRL_BPO_TEST_MODEL`")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "ipo"},
        {"loss_type": "sigmoid", "ld_alpha": 0.5},
        {"loss_type": "sigmoid", "use_weighting": True},
    ],
    ids=label,
)
def test_a_real_model_in_float32(real_dir, tmp_path, monkeypatch, options):
    trainer = BPOTrainer(
        AutoModelForCausalLM.from_pretrained(real_dir, dtype=torch.float32),
        args=config(tmp_path, normalize_gradients=False, **options),
        train_dataset=REAL,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # at zero, the gradients of A would be zero
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    trainer._projection = IdentityProjection(target_modules(trainer.model))
    expected = direct(trainer)
    for packed in (False, True):
        choose(monkeypatch, packed)
        features, passes = features_of(trainer)
        errors = [relative_error(*rows) for rows in zip(features, expected, strict=True)]
        logger.info("real model %s %s: %s", label(options), passes, " ".join(f"{value:.1e}" for value in errors))
        assert passes == expected_passes(packed, options) and max(errors) < 1e-4
