"""Layers that are made of two others: low-rank factors one after the other, a base and a difference side by side."""

from __future__ import annotations

from torch import Tensor

from aicompress.model.kernels.linear import Bfloat16Linear, FastLinear, PlainLinear, refuse_gradients


class LowRankLinear(FastLinear):
    """Two products, the right factor first.

    Plain factors in bfloat16 are packed: at one token oneDNN takes 15 µs for a product, and 21 µs otherwise, whatever
    its size, and two thin ones are little else.
    """

    def __init__(self, right: FastLinear, left: FastLinear) -> None:
        super().__init__((left.out_features, right.in_features), None)
        self.right, self.left = right, left
        self.__dict__["bias"] = left.bias  # read here by a model's own code; a parameter of the factor alone
        self.kernel = f"low rank: {right.kernel}, {left.kernel}"
        self._plain = type(right) is type(left) and type(left) in (PlainLinear, Bfloat16Linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), as `PlainLinear`: at one token a reshape costs a fifth of two thin products."""
        if not self._plain:
            return super().forward(x)
        refuse_gradients(x)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
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
