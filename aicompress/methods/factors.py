"""Two factors made ready for rounding: their product stays, or comes nearer to what it was, and rounding costs less.

Of two factors the outer one is rounded first, by rows that make up for what an inner factor could not (`beyond`); then
the inner one is fitted to what it has become (`answered`), and rounded.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from aicompress.methods.factorize.weighting.roots import Root
from aicompress.weights import Dense, LowRank, Weight

DAMPING = 0.01  # added to the Gram matrix, as a part of its mean diagonal
KEPT = 0.02  # of an error that an inner factor makes up for: so that U does not stray far
EMPTY = 1e-9  # added to that of what the inner factor gives, where some directions give nothing


def turned(weight: LowRank, seed: int) -> LowRank:
    """The same product as U = P √Σ R and V = Rᵀ √Σ Qᵀ, with its singular values σ and a random rotation R.

    An error of one factor is multiplied by the other one. Rounding costs least where both are of one size, and in
    proportion to Σσ² in rows √σ qᵀ, each of which has scales of its own, but to (Σσ)² / r where R has spread them.
    """
    left, right = (torch.linalg.qr(x.double()) for x in (weight.out.dense(), weight.inner.dense().t()))
    inside, sigma, across = torch.linalg.svd(left.R @ right.R.t(), full_matrices=False)
    draw = torch.Generator().manual_seed(seed)
    square = torch.randn(weight.rank, weight.rank, generator=draw, dtype=torch.float64)
    rotation = torch.linalg.qr(square).Q[: len(sigma)] * sigma.sqrt()[:, None]
    out, inner = left.Q @ inside @ rotation, rotation.t() @ across @ right.Q.t()
    return LowRank(_like(out, weight.out), _like(inner, weight.inner))


def refitted(weight: LowRank, inner: Weight, gram: Tensor | None) -> LowRank:
    """The weight with another U: that of least E‖U V x − U' V̂ x‖² for an inner factor V̂ in V's place.

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
    return LowRank(_like(fitted, weight.out), weight.inner)


def beyond(weight: LowRank) -> Tensor:
    """P by which an error E of the rows of U counts, tr(P E Eᵀ): what no inner factor makes up for, and a little more.

    The best inner factor for U + E leaves (I − U U⁺) E V; P is (out, out) float64.
    """
    out = weight.out.dense().double()
    inside = out @ Root.of(out.t() @ out, EMPTY).solve(out).t()
    return torch.eye(len(out), dtype=out.dtype) - (1 - KEPT) * (inside + inside.t()) / 2


def felt(weight: LowRank, outer: Weight, gram: Tensor | None) -> Tensor:
    """P by which an error E of the rows of V' counts, tr(P E H Eᵀ), where Û V' stands for U V; (rank, rank) float64.

    By the outputs alone P is ÛᵀÛ. The loss feels some outputs more, by a matrix G that is not known here; but stored
    directions are those of least loss, which it feels one by one: Uᵀ G U is diagonal as V H Vᵀ is, and the same where
    each factor has the root of the singular values. So the direction i counts by σ_i = ‖u_i‖ (v_i H v_iᵀ)^½, and P is
    Tᵀ Σ T with T = U⁺ Û, which takes V' to V.

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


def answered(weight: LowRank, outer: Weight) -> LowRank:
    """The same product, as near as it can be had with another outer factor Û in U's place: V' = Û⁺ U V.

    It is nearest whatever the inputs are. The first factor is U Û⁺ Û in place of U, that part of Û which U can be
    turned into: what Û differs from it by is lost.

    Args:
        weight: U V.
        outer: Û, (out, rank).
    """
    before, after = weight.out.dense().double(), outer.dense().double()
    turn = Root.of(after.t() @ after, EMPTY).solve(before.t() @ after).t()  # Û⁺ U, (rank, rank)
    there = Root.of(before.t() @ before, EMPTY).solve(after.t() @ before).t()  # U⁺ Û
    return LowRank(_like(before @ there, weight.out), _like(turn @ weight.inner.dense().double(), weight.inner))


def _like(matrix: Tensor, factor: Weight) -> Dense:
    """A matrix in the dtype that a factor has."""
    (stored,) = factor.tensors().values()
    return Dense(matrix.to(stored.dtype).contiguous())


def are_plain(weight: Weight) -> TypeGuard[LowRank]:
    """Whether a weight is two factors of plain numbers."""
    return isinstance(weight, LowRank) and isinstance(weight.out, Dense) and isinstance(weight.inner, Dense)
