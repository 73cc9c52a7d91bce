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

from trl_bpo.projection import SparseProjection


def activations(n=5, tokens=7, in_features=24, out_features=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Their mean is not zero: without random signs, entries that share a bucket would add up.
    return (
        torch.randn(n, tokens, in_features, generator=generator, dtype=torch.float64) + 0.5,
        torch.randn(n, tokens, out_features, generator=generator, dtype=torch.float64) + 0.5,
    )


def gradients(inputs, grad_outputs):
    return torch.einsum("nto,nti->noi", grad_outputs, inputs).flatten(1)


def test_is_linear_in_the_gradient():
    x, dy = activations()
    _, other = activations(seed=1)
    projection = SparseProjection(64)
    total = projection.weight_gradient("layer", x, 2 * dy - 3 * other)
    parts = 2 * projection.weight_gradient("layer", x, dy) - 3 * projection.weight_gradient("layer", x, other)
    torch.testing.assert_close(total, parts)


def test_tokens_are_summed():
    x, dy = activations()
    whole = SparseProjection(64).weight_gradient("layer", x, dy)
    parts = sum(SparseProjection(64).weight_gradient("layer", x[:, t : t + 1], dy[:, t : t + 1]) for t in range(7))
    torch.testing.assert_close(whole, parts)


def test_seed_and_name_decide_and_nothing_else():
    x, dy = activations()
    first = SparseProjection(64, seed=1)
    # Another projection sees the modules in another order, other samples first, and global random state moves on.
    second = SparseProjection(64, seed=1)
    second.weight_gradient("b", x[:2], dy[:2])
    torch.rand(3)
    names = {name: first.weight_gradient(name, x, dy) for name in ("a", "b")}
    assert torch.equal(second.weight_gradient("b", x, dy), names["b"])
    assert torch.equal(second.weight_gradient("a", x, dy), names["a"])
    assert not torch.allclose(names["a"], names["b"])
    assert not torch.allclose(SparseProjection(64, seed=2).weight_gradient("a", x, dy), names["a"])


def test_rows_do_not_depend_on_the_batch():
    x, dy = activations()
    whole = SparseProjection(64).weight_gradient("layer", x, dy)
    for row in range(len(x)):
        torch.testing.assert_close(
            SparseProjection(64).weight_gradient("layer", x[row : row + 1], dy[row : row + 1])[0], whole[row]
        )


def test_random_state_is_left_alone():
    state = torch.get_rng_state()
    SparseProjection(64).weight_gradient("layer", *activations())
    assert torch.equal(torch.get_rng_state(), state)


# The second weight has more than 2^20 entries, so it is projected on both sides.
@pytest.mark.parametrize(("in_features", "out_features", "seeds"), [(24, 16, 200), (1100, 1000, 60)])
def test_norms_and_inner_products_are_kept_on_average(in_features, out_features, seeds):
    x, dy = activations(2, 3, in_features, out_features)
    # The two samples share a part of their gradients, so that there is an inner product to keep.
    x[1], dy[1] = x[0] + 0.5 * x[1], dy[0] + 0.5 * dy[1]
    exact = gradients(x, dy)
    gram = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(seeds):
        sketch = SparseProjection(256, seed).weight_gradient("layer", x, dy)
        assert sketch.shape == (2, 256)
        gram += sketch @ sketch.T / seeds
    expected = exact @ exact.T
    scale = expected.diagonal().mean()
    assert expected[0, 1] > 0.5 * scale
    torch.testing.assert_close(gram / scale, expected / scale, atol=0.06, rtol=0)


def test_modules_do_not_interfere():
    # The sketch of two modules is the sum of their sketches: its squared norm is the sum of theirs on average.
    x, dy = activations(1)
    exact = 2 * gradients(x, dy).square().sum()
    norms = []
    for seed in range(200):
        projection = SparseProjection(256, seed)
        norms.append((projection.weight_gradient("a", x, dy) + projection.weight_gradient("b", x, dy)).square().sum())
    assert torch.stack(norms).mean() / exact == pytest.approx(1.0, abs=0.05)


def test_more_dimensions_are_more_exact():
    x, dy = activations(1)
    exact = gradients(x, dy).square().sum()

    def error(dim):
        norms = [SparseProjection(dim, seed).weight_gradient("a", x, dy).square().sum() / exact for seed in range(50)]
        return (torch.stack(norms) - 1).square().mean()

    assert error(1024) < error(64) / 4


def test_dimension_out_of_range():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SparseProjection(0)
