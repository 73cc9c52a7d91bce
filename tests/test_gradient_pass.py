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


import logging
import weakref

import numpy as np
import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from pairs import IdentityProjection, config, pairs, relative_error
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import profile
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trl_bpo import BPOTrainer
from trl_bpo.capture import target_modules
from trl_bpo.gradients import can_pack, gradient_pass, pair_batches, pair_gradients, response_gradients
from trl_bpo.projection import SparseProjection
from trl_bpo.responses import PairResponses, length_batches, one_a_row, unique_responses


def random_responses(n_pairs=6, prompt=(6, 17), seed=0):
    """Pairs of a prompt, of six to sixteen tokens, and two answers of three to twelve."""
    rng = np.random.default_rng(seed)
    input_ids, starts = [], []
    for _ in range(n_pairs):
        shared = rng.integers(3, 64, rng.integers(*prompt)).tolist()
        for _ in range(2):
            input_ids.append(shared + rng.integers(3, 64, rng.integers(3, 13)).tolist())
            starts.append(len(shared))
    return PairResponses(input_ids, starts, np.arange(0, 2 * n_pairs, 2), np.arange(1, 2 * n_pairs, 2))


RESPONSES = random_responses()
TOKENS = [len(ids) for ids in RESPONSES.input_ids]
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    # With the usual 0.02 the logits of so small a model hardly depend on its input, and tests would not notice.
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MODELS = {
    "llama": ("llama", SIZES),
    "wide": ("llama", {**SIZES, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}),
    "tied": ("llama", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 8}),
    "olmo2": ("olmo2", SIZES),
    "mistral": ("mistral", {**SIZES, "sliding_window": None}),
    "mistral-window": ("mistral", {**SIZES, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**SIZES, "head_dim": 8, "sliding_window": 8}),
    "gpt2": ("gpt2", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)),
    "bloom": ("bloom", dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)),
    "falcon": (
        "falcon",
        dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2),
    ),
    "lfm2": ("lfm2", {**SIZES, "full_attn_idxs": [1]}),
    "qwen3-moe": (
        "qwen3_moe",
        {**SIZES, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def build(name="llama", lora="all-linear", dtype=torch.float32, attention=None, **kwargs):
    """A random model with the fused LM head, and adapters unless `lora` is `None`."""
    model_type, sizes = MODELS[name]
    torch.manual_seed(0)
    model_config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(model_config, attn_implementation=attention)
    add_fused_lm_head(model)
    if lora is not None:
        # Dropout shows whether the features are computed in evaluation mode.
        model = get_peft_model(model, LoraConfig(r=4, target_modules=lora, lora_dropout=0.3, **kwargs))
        for weight_name, parameter in model.named_parameters():
            if "lora_B" in weight_name:  # at zero, the gradients of A would be zero
                nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def direct(model, responses=RESPONSES):
    """Gradient of each log-probability, one response at a time, without the code under test."""
    training, weights = model.training, [module.weight for module in target_modules(model).values()]
    model.eval()
    features = []
    for ids, start in zip(responses.input_ids, responses.starts, strict=True):
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        logp = sum(log_probs[t - 1, ids[t]] for t in range(start, len(ids)))
        features.append(torch.cat([g.flatten() for g in torch.autograd.grad(logp, weights)]))
    model.train(training)
    return torch.stack(features)


def features_of(model, responses=RESPONSES, **kwargs):
    """Unprojected, in batches of several responses."""
    projection = IdentityProjection(target_modules(model))
    options = {"pad_token_id": 0, "batch_tokens": 80, "disable_tqdm": True, **kwargs}
    return response_gradients(model, responses, projection, **options)[0]


# Memory


class Device:
    """A stand-in for one that runs out of memory when a pass has more than `limit` tokens, at the given moment."""

    def __init__(self, limit, where="collate", error=None):
        self.limit, self.where = limit, where
        self.error = (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.") if error is None else error
        )
        self.held, self.written, self.features, self.left_behind = [], [], {}, []

    def check(self, where, n_tokens):
        if where == self.where and n_tokens > self.limit:
            raise self.error

    def collate(self, rows):
        self.left_behind += [tensor for tensor in self.held if tensor() is not None]
        self.held.clear()
        batch = one_a_row(RESPONSES, rows, 0)
        self.n_tokens = batch.inputs["input_ids"].numel()
        self.check("collate", self.n_tokens)
        return batch

    def weigh(self, rows, pieces, sums):
        self.check("weigh", self.n_tokens)
        return [torch.ones_like(piece) for piece in pieces]

    def projection(self, model):
        device = self

        class Projection(SparseProjection):
            def weight_gradient(self, name, inputs, grad_outputs, scale=None):
                device.held += [weakref.ref(inputs), weakref.ref(grad_outputs)]
                # Not at once: what the layers before it have added is in the sketch already.
                if ".0.self_attn.q_proj" in name:
                    device.check("projection", device.n_tokens)
                return super().weight_gradient(name, inputs, grad_outputs, scale)

        return Projection(64)

    def write(self, rows, features, pieces, sums):
        self.check("write", self.n_tokens)
        assert len(pieces) == len(rows)
        self.written.append(rows)
        self.features.update(zip(rows, features, strict=True))

    def run(self, model, batches, **kwargs):
        gradient_pass(
            model,
            batches,
            self.collate,
            self.projection(model),
            self.write,
            tokens=TOKENS,
            weigh=self.weigh,
            disable_tqdm=True,
            **kwargs,
        )
        return torch.stack([self.features[row] for row in sorted(self.features)])


BATCHES = length_batches(RESPONSES.input_ids, 110)  # four or five responses each


@pytest.mark.parametrize("where", ["collate", "weigh", "projection"])
def test_out_of_memory_halves_the_batches_and_goes_on(where, caplog):
    model = build()
    expected = Device(10**6).run(model, BATCHES)
    assert not caplog.records
    device = Device(60, where)
    features = device.run(model, BATCHES)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert sorted(row for rows in device.written for row in rows) == list(range(12))
    assert all(len(rows) * max(TOKENS[row] for row in rows) <= 60 for rows in device.written)
    # The longest come first, so nothing is halved again later.
    assert [row for rows in device.written for row in rows] == [row for rows in BATCHES for row in rows]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    n_first = sum(TOKENS[row] for row in BATCHES[0])
    assert f"A batch of {n_first} tokens does not fit into memory" in warnings[0]
    assert "Set `gradient_batch_tokens` to half" in warnings[0] and len(warnings) == (2 if 2 * max(TOKENS) > 60 else 1)
    # What the failed pass held is free when the next one begins.
    assert device.left_behind == []


def test_out_of_memory_in_the_middle():
    # Batches before it are not computed again.
    batches = [[0], [1], *BATCHES]
    device = Device(60)
    device.run(build(), batches)
    assert device.written[:2] == [[0], [1]] and [0] not in device.written[2:]


def test_only_the_own_batches_are_written_after_halving():
    device = Device(60)
    device.run(build(), BATCHES, n_own=1)
    assert sorted(row for rows in device.written for row in rows) == sorted(BATCHES[0])


@pytest.mark.parametrize("where", ["collate", "weigh", "projection"])
def test_a_row_that_does_not_fit_is_one_clear_error(where):
    model = build()
    device = Device(max(TOKENS) - 1, where)
    with pytest.raises(
        RuntimeError, match=f"A response or pair of {max(TOKENS)} tokens does not fit into memory"
    ) as raised:
        device.run(model, BATCHES)
    assert "Lower `max_length`" in str(raised.value) and raised.value.__cause__ is device.error
    # Else `auto_find_batch_size` would start the training again with smaller batches, for nothing.
    assert should_reduce_batch_size(device.error) and not should_reduce_batch_size(raised.value)
    assert device.written == []


@pytest.mark.parametrize("where", ["collate", "weigh", "projection"])
def test_no_row_fits(where, caplog):
    # Not that of the estimate either.
    caplog.set_level(logging.INFO, "trl_bpo.gradients")
    with pytest.raises(RuntimeError, match="does not fit into memory") as raised:
        Device(0, where).run(build(), BATCHES)
    assert not should_reduce_batch_size(raised.value)


def test_in_lockstep_nothing_is_halved():
    device = Device(60)
    with pytest.raises(
        RuntimeError, match="A batch of .* tokens does not fit.*Lower `gradient_batch_tokens`"
    ) as raised:
        device.run(build(), BATCHES, lockstep=True)
    assert not should_reduce_batch_size(raised.value) and device.written == []


def state(model):
    return (
        {name: (id(p.grad), p.requires_grad) for name, p in model.named_parameters()},
        {
            name: (
                module.training,
                *map(len, (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)),
            )
            for name, module in model.named_modules()
        },
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("where", ["collate", "weigh", "projection", "write"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        # Has two arguments, so it is none of those that a smaller batch helps against.
        RuntimeError("CUDA out of memory.", 2),
        KeyboardInterrupt(),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=["error", "other", "interrupt", "memory"],
)
def test_leaves_no_trace_after_an_exception(where, error):
    model = build()
    model.train()
    part = model.get_base_model().model.layers[0]
    part.eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before = state(model)
    # Only what comes before the features are written is tried again with smaller batches, and put into words.
    helped = where != "write" and should_reduce_batch_size(error)
    with torch.no_grad(), pytest.raises(RuntimeError if helped else type(error)) as raised:
        Device(0 if where == "write" else max(TOKENS) - 1, where, error).run(model, BATCHES[:1])
    assert (raised.value is error) != helped
    assert state(model) == before
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)
    assert torch.equal(Device(10**6).run(model, BATCHES), Device(10**6).run(build(), BATCHES))


@pytest.mark.parametrize(("lora", "attention"), [("all-linear", "sdpa"), ("all-linear", "eager"), (None, "sdpa")])
@pytest.mark.parametrize("packed", [False, True])
def test_the_memory_estimate_is_within_a_factor_of_two(caplog, lora, attention, packed):
    caplog.set_level(logging.INFO, "trl_bpo.gradients")
    model = build("wide", lora, attention=attention)
    responses = random_responses(6, prompt=(60, 90))
    batches, collate, tokens = pair_batches(responses, 10**6, 0, packed)
    with profile(profile_memory=True) as profiler:
        gradient_pass(
            model,
            batches,
            collate,
            SparseProjection(64),
            lambda *_: None,
            tokens=tokens,
            weigh=weigh,
            disable_tqdm=True,
        )
    (record,) = (record for record in caplog.records if "Memory of the gradient pass" in record.getMessage())
    assert "activations" in record.getMessage() and record.args[1] == 6 * max(tokens)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert 0.5 < record.args[0] * 1e9 / allocated.max() < 2


# Which layers, and in which units


class Counting(IdentityProjection):
    """Notes which modules are projected."""

    def __init__(self, modules):
        super().__init__(modules)
        self.names = set()

    def weight_gradient(self, name, *args):
        self.names.add(name)
        return super().weight_gradient(name, *args)


@pytest.mark.parametrize("lora", ["all-linear", None])
def test_layers_are_a_part_of_the_whole_and_backward_stops_at_the_lowest(lora):
    model = build(lora=lora)
    whole = features_of(model)
    everything = target_modules(model)
    offsets = IdentityProjection(everything).offsets
    layers = (model if lora is None else model.get_base_model()).model.layers
    reached = []

    def watch(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: reached.append(module))

    handles = [layer.register_forward_hook(watch) for layer in layers]
    for wanted in ([0], [1], [0, 1]):
        modules = target_modules(model, wanted)
        assert 0 < len(modules) == sum(any(f".layers.{n}." in f".{name}" for n in wanted) for name in everything)
        reached.clear()
        projection = Counting(modules)
        options = {"pad_token_id": 0, "batch_tokens": 80, "layers": wanted, "disable_tqdm": True}
        features, _ = response_gradients(model, RESPONSES, projection, **options)
        assert projection.names == set(modules)
        expected = [whole[:, offsets[name] :][:, : module.weight.numel()] for name, module in modules.items()]
        assert torch.equal(features, torch.cat(expected, dim=1))
        # The gradient of the output of layer 0 is what layer 1 passes down.
        assert (layers[0] in reached) == (0 in wanted)
    for handle in handles:
        handle.remove()


def train(tiny_dir, folder, **kwargs):
    options = {"precondition_gradients": True, "depth_feature": "chosen", "reselect_every_steps": 100, **kwargs}
    lora = LoraConfig(r=4, target_modules="all-linear")
    return BPOTrainer(tiny_dir, args=config(folder, **options), train_dataset=pairs(), peft_config=lora)


@pytest.mark.parametrize("layers", [None, [1]])
def test_preconditioned_gradients_are_those_that_adam_divides(tiny_dir, tmp_path, layers):
    trainer = train(tiny_dir, tmp_path, max_steps=3, adam_epsilon=1e-6, adam_beta2=0.9, gradient_layers=layers)
    modules = target_modules(trainer.model, layers)
    trainer._projection = IdentityProjection(modules)
    weights = [module.weight for module in modules.values()]
    responses = unique_responses(trainer.train_dataset)
    chosen = PairResponses(
        [responses.input_ids[i] for i in responses.chosen], [responses.starts[i] for i in responses.chosen], None, None
    )

    def gradients():
        trainer.model.eval()
        rows = []
        for ids, start in zip(chosen.input_ids, chosen.starts, strict=True):
            log_probs = trainer.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            logp = sum(log_probs[t - 1, ids[t]] for t in range(start, len(ids)))
            rows.append([g.flatten() for g in torch.autograd.grad(logp, weights)])
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    # Adam has seen nothing yet.
    unscaled = torch.cat(gradients(), dim=1)
    assert relative_error(torch.from_numpy(trainer._pair_features()[:]), unscaled) < 1e-4
    trainer.train()
    assert trainer.state.global_step == 3
    features = torch.from_numpy(trainer._pair_features()[:])
    expected = []
    for weight, gradient in zip(weights, gradients(), strict=True):
        moment = trainer.optimizer.state[weight]
        assert moment["step"] == 3
        v_hat = moment["exp_avg_sq"] / (1 - 0.9**3)
        expected.append(gradient / (v_hat.sqrt() + 1e-6).flatten())
    assert relative_error(features, torch.cat(expected, dim=1)) < 1e-4
    assert relative_error(features, torch.cat(gradients(), dim=1)) > 1


def test_the_first_selection_is_not_preconditioned(tiny_dir, tmp_path):
    plain = train(tiny_dir, tmp_path / "plain", precondition_gradients=False)
    other = train(tiny_dir, tmp_path / "other")
    assert np.array_equal(plain.select_pairs().distances, other.select_pairs().distances)


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "lion_32bit"])
def test_preconditioning_needs_a_second_moment(tiny_dir, tmp_path, optim):
    # Before anything is trained.
    with pytest.raises(ValueError, match=f"second moment.*`optim='{optim}'`.*`optim='adamw_torch'`"):
        train(tiny_dir, tmp_path, optim=optim)


def test_preconditioning_with_an_optimizer_of_your_own(tiny_dir, tmp_path):
    trainer = train(tiny_dir, tmp_path, max_steps=2, reselect_every_steps=1)
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.optimizer = torch.optim.SGD(weights, lr=1e-3)
    with pytest.raises(ValueError, match="the optimizer of this run keeps none"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_preconditioning_of_a_large_weight():
    # One of more than 2^20 entries is projected on both sides; its scaled gradient has to be formed before that.
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(3, 5, 1024, generator=generator), torch.randn(3, 5, 1032, generator=generator)
    scale = torch.rand(1032, 1024, generator=generator)
    projection = SparseProjection(256)
    plain = projection.weight_gradient("w", x, dy)
    assert relative_error(projection.weight_gradient("w", x, dy, torch.full_like(scale, 2.0)), 2 * plain) < 1e-5
    # What is scaled column by column can be scaled beforehand.
    columns = scale[:1].expand_as(scale)
    assert (
        relative_error(
            projection.weight_gradient("w", x, dy, columns), projection.weight_gradient("w", x * scale[0], dy)
        )
        < 1e-5
    )
    assert relative_error(projection.weight_gradient("w", x, dy, scale), plain) > 0.3


# Which models


def weigh(rows, pieces, sums):
    return [torch.full_like(piece, 0.5 if i % 2 else -2.0) for i, piece in enumerate(pieces)]


@pytest.mark.parametrize(
    ("name", "attention", "lora"),
    [
        ("llama", "sdpa", "all-linear"),
        ("llama", "eager", None),
        ("tied", "sdpa", "all-linear"),
        ("tied", "eager", None),
        ("qwen3", "sdpa", None),
        ("qwen3", "eager", "all-linear"),
        ("olmo2", "sdpa", "all-linear"),
        ("olmo2", "eager", None),
        ("mistral", "sdpa", "all-linear"),
        ("gpt2", "sdpa", ["c_attn"]),
        ("gpt2", "eager", ["c_attn", "c_fc"]),
        ("falcon", "sdpa", None),
        ("qwen3-moe", "sdpa", ATTENTION),
        ("qwen3-moe", "eager", ATTENTION),
    ],
)
def test_models_whose_pairs_can_be_packed(name, attention, lora):
    model = build(name, lora, attention=attention)
    model.train()
    before = state(model)
    assert can_pack(model, RESPONSES, 0)
    # The packed pass, the plain one and autograd response by response.
    alone = direct(model)
    assert relative_error(features_of(model), alone) < 1e-4
    expected = -2.0 * alone[RESPONSES.chosen] + 0.5 * alone[RESPONSES.rejected]
    projection = IdentityProjection(target_modules(model))
    for packed in (True, False):
        options = {"pad_token_id": 0, "batch_tokens": 80, "packed": packed, "disable_tqdm": True}
        features = pair_gradients(model, RESPONSES, projection, weigh, **options)
        for row in range(len(expected)):
            assert relative_error(features[row], expected[row]) < 1e-4
    assert state(model) == before


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("mistral-window", "sdpa"),
        ("mistral-window", "eager"),
        ("gemma3", "sdpa"),
        ("gemma3", "eager"),
        ("lfm2", "sdpa"),  # convolutions run over what lies side by side
        ("bloom", "eager"),  # makes its biases from the mask
    ],
)
def test_models_whose_pairs_cannot_be_packed(name, attention):
    model = build(name, None, attention=attention)
    model.train()
    before = state(model)
    assert not can_pack(model, RESPONSES, 0)
    assert state(model) == before
    # The plain pass is exact for them.
    assert relative_error(features_of(model), direct(model)) < 1e-4


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_an_attention_without_masks_cannot_be_packed(attention):
    model = build()
    assert can_pack(model, RESPONSES, 0)
    model.config._attn_implementation = attention
    assert not can_pack(model, RESPONSES, 0)


def test_a_mask_that_is_not_heeded_is_noticed():
    # What a configuration says may be wrong.
    model = build(lora=None)
    attention = model.model.layers[1].self_attn
    original = attention.forward
    attention.forward = lambda *args, attention_mask=None, **kwargs: original(*args, attention_mask=None, **kwargs)
    assert not can_pack(model, RESPONSES, 0)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_modules_that_are_trained_beside_the_adapters(module):
    model = build(lora=ATTENTION, modules_to_save=[module])
    # Neither the head nor the embeddings belong to the features.
    assert len(target_modules(model)) == 2 * 4 * 2
    assert relative_error(features_of(model), direct(model)) < 1e-4


def test_adapters_of_a_mixture_of_experts_are_told_apart_by_response():
    model = build("qwen3-moe", ATTENTION)
    whole = features_of(model, batch_tokens=10**6)
    assert relative_error(features_of(model, batch_tokens=1), whole) < 1e-5


# Half precision


def test_packing_is_chosen_and_agrees_under_autocast(tiny_dir, tmp_path, monkeypatch):
    # Long prompts with one pair each.
    dataset = pairs(prompts=12, per_prompt=1).map(lambda row: {"prompt": row["prompt"] * 6})

    def features(folder, **kwargs):
        trainer = BPOTrainer(
            tiny_dir,
            args=config(tmp_path / folder, gradient_batch_tokens=600, **kwargs),
            train_dataset=dataset,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        torch.manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        path = trainer._features._choose_path()
        return path, torch.from_numpy(trainer._pair_features()[:])

    path, exact = features("float32")
    path_half, half = features("bf16", bf16=True)
    assert path == path_half == "packed pairs"
    monkeypatch.setattr("trl_bpo.pair_features._packing_pays", lambda *_: False)
    path_alone, alone = features("alone", bf16=True)
    assert path_alone == "responses"
    assert half.dtype == alone.dtype == torch.float32
    cosine = nn.functional.cosine_similarity
    # Autocast has an effect, of the size of its rounding.
    assert not torch.equal(half, exact)
    for first, second in ((half, alone), (half, exact), (alone, exact)):
        assert relative_error(first, second) < 0.1
        assert (cosine(first, second) > 0.99).all()
