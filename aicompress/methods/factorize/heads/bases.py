"""Bases of the directions of an attention head that stay, and where a bias of the head lets them stand."""

from __future__ import annotations

import torch
from torch import Tensor

from aicompress.methods.factorize.roots import Root

UNSEEN = 1e-3  # of a bias: a basis that holds less of it is given its direction


def directions(counted: Tensor, seen: Tensor, rank: int) -> Tensor:
    """T (rank, d) of orthonormal rows, so that tr(G (I − B T) C (I − B T)ᵀ) is least for some B.

    Args:
        counted: G, (d, d): what an error counts.
        seen: C, (d, d): moments of what is given.
        rank: directions that stay.
    """
    root, other = Root.of(counted, 0.0), Root.of(seen, 0.0)
    assert root.vectors is not None
    half = root.vectors * root.values  # G = half halfᵀ
    left = torch.linalg.svd(half.t() @ other.times(torch.eye(len(seen), dtype=seen.dtype)))[0][:, :rank]
    basis: Tensor = torch.linalg.qr(half @ left)[0].t()
    return basis


def placed(basis: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A basis of the same directions under which a bias stays as it is, and the rows of the head where it stands.

    The bias b of a layer is stored as before, and T b has to be what it holds at the rows that stay: those where it is
    largest. Turning and stretching the basis makes it so.

    Args:
        basis: T, (rank, d), orthonormal rows.
        bias: b, (d,), or None.
    """
    rank = len(basis)
    if bias is None or not bias.any():
        return basis, torch.arange(rank)
    bias = bias.double()
    kept = bias.abs().topk(rank).indices.sort().values
    if (basis @ bias).norm() < UNSEEN * bias.norm():
        basis = torch.linalg.qr(torch.cat([bias[None] / bias.norm(), basis[:-1]]).t())[0].t()
    return turn(basis @ bias, bias[kept]) @ basis, kept


def turn(now: Tensor, wanted: Tensor) -> Tensor:
    """A reflection, stretched, that takes one vector to another; the unit matrix where one of them is zero."""
    if not now.any() or not wanted.any():
        return torch.eye(len(now), dtype=now.dtype)
    between = now / now.norm() - wanted / wanted.norm()
    square = between.square().sum().clamp_min(torch.finfo(now.dtype).tiny)
    reflection = torch.eye(len(now), dtype=now.dtype) - 2 * torch.outer(between, between) / square
    stretched: Tensor = reflection * (wanted.norm() / now.norm())
    return stretched
