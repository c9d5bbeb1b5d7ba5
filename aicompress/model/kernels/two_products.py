"""Layers that are made of two others: low-rank factors one after the other, a base and a difference side by side."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aicompress.model.kernels.amx import TiledFactors
from aicompress.model.kernels.linear import FEW, Bfloat16Linear, FastLinear, PlainLinear, refuse_gradients

SAVED = 16 << 20  # multiply-adds of a thread that make up for a second call in bfloat16
SAVED_IN_TILES = 6 << 20  # the same where both products are one call, which oneDNN's outruns otherwise
SAVED_WIDE = 5 << 15  # the same in float32
READING = 4  # rows whose multiply-adds take as long as it takes to read the weights
FEW_ROWS = 8  # of inputs in bfloat16, of which more are over sooner in tiles


def turned(matrix: Tensor) -> Tensor:
    """The same matrix with each column's numbers side by side: thin products in float32 take 0.5 to 0.9 of the time."""
    return matrix.t().contiguous().t()


class LowRankLinear(FastLinear):
    """Two products, the right factor first.

    Plain factors in bfloat16 are packed: at one token oneDNN takes 15 µs for a product, and 21 µs otherwise, whatever
    its size, and two thin ones are little else. Small ones are held in float32 too, for few inputs: 1024 × 1024 at rank
    64 takes 0.3 of the time so at one token, and 0.4 at four. Where the processor has a matrix unit for it, both
    products are one call: 0.4 of the time at 64 inputs, and 0.7 at 512.

    Args:
        right, left: the factors.
        few: both as float32 matrices, right first; None: no products are made in float32.
        many: both products as one; None: they are always two.
        one: a product with the matrix that they make, for inputs of which two products save little; None: none.
    """

    one: FastLinear | None

    def __init__(
        self,
        right: FastLinear,
        left: FastLinear,
        few: tuple[Tensor, Tensor] | None = None,
        many: TiledFactors | None = None,
        one: FastLinear | None = None,
    ) -> None:
        super().__init__((left.out_features, right.in_features), None)
        self.right, self.left = right, left
        self.__dict__["bias"] = left.bias  # read here by a model's own code; a parameter of the factor alone
        self.kernel = f"low rank: {right.kernel}, {left.kernel}"
        self._plain = type(right) is type(left) and type(left) in (PlainLinear, Bfloat16Linear)
        self.few, self.few_bias, self._few_inputs = few, None, 0
        self.many = many
        saved = self.out_features * self.in_features - right.out_features * (self.out_features + self.in_features)
        enough = SAVED_WIDE if isinstance(one, PlainLinear) else SAVED if many is None else SAVED_IN_TILES
        alike = enough // max(1, saved)  # rows of a thread, of which two products take as long as one
        self._alike, self._reading = alike * self.in_features, READING * self.in_features
        rows = alike * torch.get_num_threads() - READING
        # Found at once so: to look a module up takes a tenth of a small product.
        self.__dict__["one"] = one if rows > 0 else None
        if few is not None:
            least = min(FEW_ROWS, FEW // sum(factor.numel() for factor in few))
            self.few_bias = None if self.bias is None else self.bias.detach().float()
            self._few_inputs = least * self.in_features
            self.kernel += f", float32 up to {least} rows"
        if self.one is not None:
            self.kernel += f", one product up to {rows} rows"
        if many is not None:
            self.kernel += f", tiles up to {many.most} rows"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), as `PlainLinear`: at one token a reshape costs a fifth of two thin products."""
        if not self._plain:
            return super().forward(x)
        refuse_gradients(x)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        numbers = x.numel()
        if numbers <= self._few_inputs and self.few is not None:
            right, left = self.few
            return F.linear(F.linear(x.float(), right), left, self.few_bias).to(x.dtype)
        if self.one is not None and numbers + self._reading <= self._alike * torch.get_num_threads():
            return self.one.multiply(x)
        if self.many is not None and x.dtype is torch.bfloat16 and self.many.serves(numbers // self.in_features):
            return self.many.multiply(x)
        return self.left.multiply(self.right.multiply(x))


class BaseDeltaLinear(FastLinear):
    """A product, and two factors' product beside it."""

    def __init__(self, base: FastLinear, delta: FastLinear) -> None:
        super().__init__((base.out_features, base.in_features), None)
        self.base, self.delta = base, delta
        self.__dict__["bias"] = base.bias  # as above
        self.kernel = f"base: {base.kernel}, {delta.kernel}"

    def multiply(self, x: Tensor) -> Tensor:
        return self.base.multiply(x) + self.delta.multiply(x)
