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

"""Sparse random projection of gradients, one module at a time."""

import hashlib

import torch


# A weight with more entries than this is projected on both sides before its gradient is formed.
_MAX_EXACT_NUMEL = 2**20
_SIDE = 64


class SparseProjection:
    """
    Count sketch (a sparse Johnson-Lindenstrauss transform with one non-zero a column) of per-sample weight gradients.

    Every entry of every weight is given a bucket and a sign, drawn from a generator that is seeded by `seed` and the
    module's name. So the projection is linear, the same on every device, rank and batch size, and the gradient of a
    sample over all modules never exists: each module adds to the sketch as the backward pass reaches it. Inner products
    are preserved in expectation, with a variance of about `2 / dim` times the product of the squared norms.

    Weights of up to 2^20 entries (LoRA factors but for high ranks of wide layers) are sketched entry by entry. The
    gradient of a larger weight, `delta^T x` summed over the tokens, is sketched from 64-dimensional sketches of `delta`
    and of `x`, which is unbiased too but noisier. A side of up to 64 dimensions is taken as it is.

    Memory: 4 bytes an entry that is sketched, kept between batches.

    Args:
        dim (`int`):
            Dimension of the sketch.
        seed (`int`, *optional*, defaults to `42`):
            Seed of buckets and signs.
    """

    def __init__(self, dim: int, seed: int = 42) -> None:
        if dim < 1:
            raise ValueError(f"The dimension of the projection must be at least 1, got {dim}.")
        self.dim = dim
        self.seed = seed
        self.max_numel = _MAX_EXACT_NUMEL
        self._buckets: dict[tuple[str, int, int], torch.Tensor] = {}

    def _get_buckets(self, name: str, numel: int, dim: int, device: torch.device) -> torch.Tensor:
        # A bucket in [dim, 2 * dim) stands for bucket - dim with a negative sign: one number an entry instead of two.
        key = (name, numel, dim)
        if key not in self._buckets:
            digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            buckets = torch.randint(2 * dim, (numel,), generator=generator, dtype=torch.int32)
            self._buckets[key] = buckets.to(device)
        return self._buckets[key]

    def _sketch_last_dim(self, name: str, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        buckets = self._get_buckets(name, flat.shape[-1], dim, tensor.device)
        # `index_add_` with one index for all rows takes 5 to 20 times as long on a CPU.
        sketch = flat.new_zeros(len(flat), 2 * dim).scatter_add_(1, buckets.long().expand(len(flat), -1), flat)
        return (sketch[:, :dim] - sketch[:, dim:]).view(*tensor.shape[:-1], dim)

    def _sketch_side(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.shape[-1] <= _SIDE else self._sketch_last_dim(name, tensor, _SIDE)

    def weight_gradient(
        self, name: str, inputs: torch.Tensor, grad_outputs: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Sketch of the per-sample gradients of a linear layer's weight.

        Args:
            name (`str`):
                Name of the module, which with the seed decides buckets and signs.
            inputs (`torch.Tensor` of shape `(n, tokens, in_features)`):
                Inputs of the layer.
            grad_outputs (`torch.Tensor` of shape `(n, tokens, out_features)`):
                Gradients with respect to its outputs.
            scale (`torch.Tensor` of shape `(out_features, in_features)`, *optional*):
                Factor of each entry of the gradient. With it, the gradient of a weight of more than 2^20 entries is
                formed one sample at a time before it is sketched.

        Returns:
            `torch.Tensor` of shape `(n, dim)`: Sketch of `grad_outputs^T inputs`, summed over the tokens.
        """
        if grad_outputs.shape[-1] * inputs.shape[-1] <= _MAX_EXACT_NUMEL:
            gradients = torch.bmm(grad_outputs.transpose(1, 2), inputs)
            if scale is not None:
                gradients *= scale
            return self._sketch_last_dim(name, gradients.flatten(1), self.dim)
        if scale is None:
            grad_outputs = self._sketch_side(f"{name}/out", grad_outputs)
            gradients = torch.bmm(grad_outputs.transpose(1, 2), self._sketch_side(f"{name}/in", inputs))
        else:
            rows = []
            for x, dy in zip(inputs, grad_outputs, strict=True):
                scaled = self._sketch_side(f"{name}/in", (dy.T @ x) * scale)
                rows.append(self._sketch_side(f"{name}/out", scaled.T).T)
            gradients = torch.stack(rows)
        return self._sketch_last_dim(name, gradients.flatten(1), self.dim)
