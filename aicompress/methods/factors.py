"""Rounding of both factors of a product U V, so that the rounded product loses little.

The factors are rotated first (`rotated_factors`). Then the outer factor U is rounded by rows, under a metric that
leaves out what a new inner factor makes up for (`outer_metric`); the inner factor is fitted to the rounded outer one
(`refit_inner`) and rounded under the metric of that one (`inner_metric`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from aicompress.methods.factorize.weighting.roots import Root
from aicompress.methods.span_metric import SpanMetric
from aicompress.weights import Dense, LowRank, Weight

DAMPING = 0.01  # added to the Gram matrix, as a part of its mean diagonal
KEPT = 0.02  # of an error that an inner factor makes up for: so that U does not stray far
ALONE = 1e-12  # of the largest singular value: a direction below it is left out
ROWS = 3  # times the rank: rows whose R is found at once
EMPTY = 1e-9  # added to that of what the inner factor gives, where some directions give nothing


def rotated_factors(weight: LowRank, seed: int) -> LowRank:
    """The same product as U = P √Σ R and V = Rᵀ √Σ Qᵀ, with its singular values σ and a random rotation R.

    An error of one factor is multiplied by the other one, so that rounding costs least where both have the same size.
    The cost is in proportion to Σσ² where V has rows √σ qᵀ, each with scales of its own, and to (Σσ)² / r where R has
    spread the singular values over all rows.
    """
    out, inner = turns(triangle([weight.out.dense()]), triangle([weight.inner.dense().t()]), seed)
    return LowRank(
        like(weight.out.dense().double() @ out, weight.out), like(inner @ weight.inner.dense().double(), weight.inner)
    )


def triangle(blocks: Iterable[Tensor]) -> Tensor:
    """R of X = Q R, float64, for a matrix X (rows, rank) in blocks of rows: of R of those so far, and the next ones."""
    found, rows = torch.empty(0), list[Tensor]()
    for block in blocks:
        rows.append(block.double())
        if sum(map(len, rows)) > ROWS * block.shape[1]:  # so many that R adds little to them
            found, rows = _triangle(found, rows), []
    return _triangle(found, rows) if rows else found


def _triangle(found: Tensor, rows: Sequence[Tensor]) -> Tensor:
    whole = torch.cat([found, *rows]) if len(found) else torch.cat(list(rows))
    triangular: Tensor = torch.linalg.qr(whole, mode="r").R
    return triangular


def turns(left: Tensor, right: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What U is multiplied by from the right and V from the left, (rank, rank) float64, to be P √Σ R and Rᵀ √Σ Qᵀ.

    Args:
        left, right: R of U and of Vᵀ (`triangle`).
        seed: of the random rotation.
    """
    inside, sigma, across = torch.linalg.svd(left @ right.t(), full_matrices=False)
    rank = left.shape[1]
    square = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = torch.linalg.qr(square).Q[: len(sigma)]
    rotation *= torch.where(sigma > ALONE * sigma[0], 1 / sigma.sqrt(), 0)[:, None]
    return right.t() @ across.t() @ rotation, rotation.t() @ inside.t() @ left


def refit_outer(weight: LowRank, inner: Weight, gram: Tensor | None) -> LowRank:
    """The product with the outer factor U' of least E‖U V x − U' V̂ x‖², for an inner factor V̂ in the place of V.

    Args:
        weight: U V.
        inner: V̂, (rank, in).
        gram: E[x xᵀ], (in, in); None: nothing is known of x.
    """
    before, after = weight.inner.dense().double(), inner.dense().double()
    inputs = Root.diagonal(torch.ones(len(before[0])), 0.0) if gram is None else Root.of(gram.double(), DAMPING)
    weighed = inputs.weighed(after)  # V̂ H, (rank, in)
    target = weight.out.dense().double() @ (before @ weighed.t())
    fitted = Root.of(weighed @ after.t(), EMPTY).solve(target)
    return LowRank(like(fitted, weight.out), weight.inner)


def outer_metric(weight: LowRank) -> SpanMetric:
    """The metric P over the rows of the outer factor, of its error E: tr(P E Eᵀ) is what remains after a refit.

    The best inner factor for U + E leaves the error (I − U U⁺) E V. P also counts a small part of what the inner factor
    makes up for, so that U does not move far.
    """
    out = weight.out.dense().double()
    return SpanMetric(out @ to_span(out.t() @ out), 1 - KEPT)


def to_span(gram: Tensor) -> Tensor:
    """What U is multiplied by to be the W of that metric, with U U⁺ = W Wᵀ, (rank, rank), by UᵀU."""
    root = Root.of(gram, EMPTY)
    assert root.vectors is not None
    return root.vectors * torch.where(root.values > 0, 1 / root.values, 0)


@dataclass
class FactorMoments:
    """What U and Û tell of each other, (rank, rank) float64, added up over blocks of rows.

    Attributes:
        before, across, after: UᵀU, UᵀÛ and ÛᵀÛ.
    """

    before: Tensor
    across: Tensor
    after: Tensor

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> FactorMoments:
        """Of all rows, float64."""
        return cls(before.t() @ before, before.t() @ after, after.t() @ after)

    def inner(self) -> Tensor:
        """Û⁺ U, which takes V to V'."""
        return Root.of(self.after, EMPTY).solve(self.across).t()

    def outer(self) -> Tensor:
        """U⁺ Û, which takes U to the part of Û in its span."""
        return Root.of(self.before, EMPTY).solve(self.across.t()).t()

    def squares(self) -> tuple[float, float]:
        """‖U U⁺ Û − Û‖² and ‖U U⁺ Û‖²."""
        there = self.outer()
        kept, total = float((there * (self.before @ there)).sum()), float(self.after.trace())
        return max(0.0, total - 2 * float((there * self.across).sum()) + kept), kept


def inner_metric(weight: LowRank, outer: Weight, gram: Tensor | None) -> Tensor:
    """The metric P, (rank, rank) float64, of an error E of the inner factor V' in Û V': the loss grows by tr(P E H Eᵀ).

    If all outputs mattered equally, P would be ÛᵀÛ. The loss weights outputs by a matrix G that is not known here. The
    stored directions are those of least loss, so that Uᵀ G U is diagonal as V H Vᵀ is, and both are the same where each
    factor has the root of the singular values. So direction i has the weight σ_i = ‖u_i‖ (v_i H v_iᵀ)^½, and P is
    Tᵀ Σ T, with T = U⁺ Û, which takes V' to V.

    Args:
        weight: U V as they are stored, by the inputs and outputs that they were made for.
        outer: Û.
        gram: H, (in, in); None: nothing is known of the inputs.
    """
    after = outer.dense().double()
    if gram is None:
        return after.t() @ after
    before, inner = weight.out.dense().double(), weight.inner.dense().double()
    there = Root.of(before.t() @ before, EMPTY).solve(after.t() @ before).t()  # U⁺ Û, (rank, rank)
    sigma = (before.square().sum(0) * ((inner @ gram.double()) * inner).sum(1).clamp_min(0)).sqrt()
    return there.t() @ (sigma[:, None] * there)


def refit_inner(weight: LowRank, outer: Weight) -> LowRank:
    """The product that is nearest to U V with an outer factor Û in the place of U: the inner factor is V' = Û⁺ U V.

    It is the nearest one for any inputs. The outer factor that is returned is U U⁺ Û, the part of Û in the span of U;
    the rest of Û cannot be made up for.

    Args:
        weight: U V.
        outer: Û, (out, rank).
    """
    before = weight.out.dense().double()
    rounding = FactorMoments.of(before, outer.dense().double())
    inner = rounding.inner() @ weight.inner.dense().double()
    return LowRank(like(before @ rounding.outer(), weight.out), like(inner, weight.inner))


def like(matrix: Tensor, factor: Weight) -> Dense:
    """A matrix in the dtype that a factor has."""
    (stored,) = factor.tensors().values()
    return Dense(matrix.to(stored.dtype).contiguous())


def is_plain_product(weight: Weight | None) -> TypeGuard[LowRank]:
    """Whether a weight is two factors of plain numbers."""
    return isinstance(weight, LowRank) and isinstance(weight.out, Dense) and isinstance(weight.inner, Dense)
