"""Square roots of weight matrices, and the factors of a matrix whose error is weighted by them on both sides.

With H = S Sᵀ and G = Mᵀ M the least tr(G (W − U V) H (W − U V)ᵀ) of all U V of rank r has M U V S = SVD_r(M W S), by
Eckart and Young 1936, and is Σ_{i>r} σ_i² of M W S. The decomposition is the eigendecomposition of the smaller Gram
matrix of M W S in float64, as in svd.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aicompress.methods.factorize.decomposition import leading, squared_singular_values

EMPTY = 1e-12  # of the largest eigenvalue: a direction below it counts as one that nothing comes from


@dataclass(frozen=True)
class Root:
    """S with S Sᵀ = H + damping mean(diag H) I for a symmetric positive semi-definite H; found when it is asked for.

    Attributes:
        matrix: H, (n, n), or its diagonal (n,) where it has nothing beside it.
        damping: what is added.
    """

    matrix: Tensor
    damping: float

    @classmethod
    def of(cls, matrix: Tensor, damping: float) -> Root:
        """Of H + damping mean(diag H) I, (n, n)."""
        return cls(matrix, damping)

    @classmethod
    def diagonal(cls, diagonal: Tensor, damping: float) -> Root:
        """Of diag(h) + damping mean(h) I, for h (n,)."""
        return cls(diagonal, damping)

    @cached_property
    def _decomposed(self) -> tuple[Tensor | None, Tensor]:
        if self.matrix.ndim == 1:
            diagonal = self.matrix.double()
            return None, _roots(diagonal + self.damping * diagonal.mean())
        positive = self.matrix.to(torch.float64, copy=True)
        positive.diagonal().add_(self.damping * positive.diagonal().mean())
        values, vectors = torch.linalg.eigh(positive)
        return vectors, _roots(values)

    @property
    def vectors(self) -> Tensor | None:
        """Q of S = Q √Λ, (n, n) float64; None: the unit matrix."""
        return self._decomposed[0]

    @property
    def values(self) -> Tensor:
        """√λ, (n,) float64; 0 in empty directions."""
        return self._decomposed[1]

    def weighed(self, x: Tensor) -> Tensor:
        """X S Sᵀ, for X (rows, n), without the root."""
        diagonal = self.matrix if self.matrix.ndim == 1 else self.matrix.diagonal()
        own = x * self.matrix if self.matrix.ndim == 1 else x.to(self.matrix.dtype) @ self.matrix
        return own + self.damping * diagonal.mean() * x

    def times(self, x: Tensor) -> Tensor:
        """X S, for X (rows, n) float64."""
        return (x if self.vectors is None else x @ self.vectors) * self.values

    def undone(self, x: Tensor) -> Tensor:
        """X S⁻¹, for X (rows, n) float64; nothing comes of empty directions."""
        x = x * torch.where(self.values > 0, 1 / self.values, 0)
        return x if self.vectors is None else x @ self.vectors.t()

    def solve(self, x: Tensor) -> Tensor:
        """X H⁻¹, for X (rows, n)."""
        x = x.double()
        inverse = torch.where(self.values > 0, 1 / self.values, 0)
        return self.undone((x if self.vectors is None else x @ self.vectors) * inverse)


def _roots(values: Tensor) -> Tensor:
    return torch.where(values > EMPTY * values.max().clamp_min(0), values, 0).sqrt()


@dataclass(frozen=True)
class Weighting:
    """What an error of a layer's weight counts: its inputs' side, and its outputs' side where that counts too.

    Attributes:
        inputs: S of H, by the layer's columns.
        outputs: Mᵀ of G, by its rows; None: all alike.
    """

    inputs: Root
    outputs: Root | None = None

    def of(self, weight: Tensor) -> Tensor:
        """M W S, (out, in) float64."""
        product = self.inputs.times(weight.double())
        return product if self.outputs is None else self.outputs.times(product.t()).t()

    def error(self, change: Tensor) -> float:
        """tr(G E H Eᵀ) of a change E of the weight, (out, in): ‖M E S‖² without the roots."""
        right = self.inputs.weighed(change)
        left = change if self.outputs is None else self.outputs.weighed(change.t()).t()
        return float(torch.sum(right * left, dtype=torch.float64).clamp_min(0))

    def squares(self, weight: Tensor) -> Tensor:
        """σ² of M W S in descending order, (min(out, in),) float64: the error that each further rank removes."""
        return squared_singular_values(self.of(weight))

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """U (out, rank) and V (rank, in) of least weighted error, float32; columns of U are as long as rows of V."""
        product = self.of(weight)
        tall = product.shape[0] >= product.shape[1]
        gram = product.t() @ product if tall else product @ product.t()
        basis = leading(gram, rank)[1].flip(0).t()  # (min(out, in), rank), orthonormal columns
        out, inner = (product @ basis, basis.t()) if tall else (basis, basis.t() @ product)
        inner = self.inputs.undone(inner)
        out = out if self.outputs is None else self.outputs.undone(out.t()).t()
        return even(out, inner)


def even(out: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product with one size of every column of U and row of V; those of a zero product are zero."""
    ratio, back = balance(torch.linalg.vector_norm(out, dim=0), torch.linalg.vector_norm(inner, dim=1))
    return (out * ratio).float(), (inner * back[:, None]).float()


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """What columns of U and rows of V of these lengths, (rank,), are multiplied by, so that both have one length."""
    some = left * right > 0
    ratio = torch.where(some, (right / left).sqrt(), 0)
    return ratio, torch.where(some, 1 / ratio, 0)
