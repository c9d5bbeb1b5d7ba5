"""Bases of the directions of an attention head that stay, and where a bias of the head lets them stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aicompress.methods.factorize.weighting.roots import Root

UNSEEN = 1e-3  # of a bias: a basis that holds less of it is given its direction


def directions(counted: Sequence[Tensor], seen: Sequence[Tensor], total: int) -> list[Tensor]:
    """T (rank, d) of orthonormal rows for each group of heads, so that Σ tr(G (I − B T) C (I − B T)ᵀ) is least.

    Args:
        counted: G of each group, (d, d): what an error counts.
        seen: C of each, (d, d): moments of what is given.
        total: directions that stay of all groups; each keeps at least one.
    """
    halves, lefts, squares = [], [], []
    for errors, inputs in zip(counted, seen, strict=True):
        root, other = Root.of(errors, 0.0), Root.of(inputs, 0.0)
        assert root.vectors is not None
        halves.append(root.vectors * root.values)  # G = half halfᵀ
        left, values, _ = torch.linalg.svd(halves[-1].t() @ other.times(torch.eye(len(inputs), dtype=inputs.dtype)))
        lefts.append(left)
        squares.append(values.square())
    ranks = _ranks(torch.stack(squares), total)
    return [torch.linalg.qr(half @ left[:, :r])[0].t() for half, left, r in zip(halves, lefts, ranks, strict=True)]


def _ranks(squares: Tensor, total: int) -> list[int]:
    """How many of each row's numbers, (groups, d) in descending order, are among the largest; at least one of each."""
    further = squares[:, 1:].flatten()
    best = further.topk(total - len(squares)).indices // max(1, squares.shape[1] - 1)  # the rows that they lie in
    return [1 + int((best == row).sum()) for row in range(len(squares))]


def placed(basis: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A basis of the same directions under which a bias stays as it is, and the rows of the head where it stands.

    The bias b of a layer is stored as before, and T b has to be what it holds at the rows that stay: those where it is
    largest. Turning and stretching the basis makes it so.

    Args:
        basis: T, (rank, d), orthonormal rows.
        bias: b, (d,), or None.
    """
    if bias is not None and (basis @ bias).norm() < UNSEEN * bias.norm():
        basis = torch.linalg.qr(torch.cat([bias[None] / bias.norm(), basis[:-1]]).t())[0].t()
    change, kept = facing(basis, bias)
    return change @ basis, kept


def facing(basis: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What turns and stretches a basis (rank, d) so that a bias stays as it is, and the rows where it stands then."""
    if bias is None or not bias.any():
        return torch.eye(len(basis), dtype=basis.dtype), torch.arange(len(basis))
    kept = bias.abs().topk(len(basis)).indices.sort().values
    return turn(basis @ bias, bias[kept]), kept


def turn(now: Tensor, wanted: Tensor) -> Tensor:
    """A reflection, stretched, that takes one vector to another; the unit matrix where one of them is zero."""
    if not now.any() or not wanted.any():
        return torch.eye(len(now), dtype=now.dtype)
    between = now / now.norm() - wanted / wanted.norm()
    square = between.square().sum().clamp_min(torch.finfo(now.dtype).tiny)
    reflection = torch.eye(len(now), dtype=now.dtype) - 2 * torch.outer(between, between) / square
    stretched: Tensor = reflection * (wanted.norm() / now.norm())
    return stretched
