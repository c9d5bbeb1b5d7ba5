"""Factors of rows and columns that bring codes closest to what they were rounded from."""

from __future__ import annotations

import torch
from torch import Tensor


def refitted(wanted: Tensor, hessian: Tensor | None, values: Tensor, columns: bool) -> tuple[Tensor, Tensor]:
    """Factors of rows and columns that bring values closest to what they were rounded from.

    Args:
        wanted: W, (in, out).
        hessian: H, (in, in); None: the identity.
        values: Ŵ, (in, out).
        columns: fit factors of columns too.

    Returns:
        t (out,) and g (in,) of least tr((W − diag(t) Ŵ diag(g)) H (·)ᵀ), by turns; ones where nothing is known.
    """
    pull = wanted if hessian is None else hessian @ wanted
    t, g = torch.ones(wanted.shape[1]), torch.ones(wanted.shape[0])
    for _ in range(2 if columns and hessian is not None else 1):  # more change nothing
        scaled = values * g[:, None]
        norm = (scaled * (scaled if hessian is None else hessian @ scaled)).sum(dim=0)
        t = torch.where(norm > 0, (scaled * pull).sum(dim=0) / norm.clamp_min(1e-30), 1.0).clamp_(0.5, 2.0)
        if columns and hessian is not None:
            scaled = values * t
            normal = (hessian * (scaled @ scaled.t())).double()
            ridge = 1e-3 * normal.diagonal() + 1e-12 * normal.diagonal().mean() + 1e-30
            off = (scaled * pull).sum(dim=1).double() - normal.sum(dim=1)
            normal.diagonal().add_(ridge)
            g = (1 + torch.cholesky_solve(off[:, None], torch.linalg.cholesky(normal))[:, 0]).clamp_(0.0, 2.0).float()
    return t, g
