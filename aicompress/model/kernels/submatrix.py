"""Inference module for a matrix with whole rows or columns of zeros."""

from __future__ import annotations

from torch import Tensor

from aicompress.model.kernels.linear import FastLinear


class SubmatrixLinear(FastLinear):
    """A product with the rows and columns of a matrix that are not zero.

    Args:
        block: multiplies with these.
        shape: (out, in) of the matrix.
        rows, columns: where they stand; None: all.
        bias: (out,) or None.
    """

    def __init__(
        self,
        block: FastLinear,
        shape: tuple[int, int],
        rows: Tensor | None,
        columns: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        super().__init__(shape, bias)
        self.block = block
        self.rows = None if rows is None else rows.long()
        self.columns = None if columns is None else columns.long()
        self.kernel = f"submatrix: {block.kernel}"

    def multiply(self, x: Tensor) -> Tensor:
        y = self.block.multiply(x if self.columns is None else x.index_select(-1, self.columns))
        if self.rows is not None:
            y = y.new_zeros(*y.shape[:-1], self.out_features).index_copy_(-1, self.rows, y)
        return y if self.bias is None else y.add_(self.bias)
