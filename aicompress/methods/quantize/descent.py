"""Cyclic coordinate descent on tr((W − Ŵ) H (W − Ŵ)ᵀ), over the codes and over the scales.

CDQuant (Nair and Suggala 2024, arXiv:2406.17542): with all other columns fixed, the best value of column j is
ŵ_j + ((W − Ŵ) H)_j / H_jj, and the best code is the one nearest to it. Given the codes, the scales of a row solve
normal equations of as many unknowns as it has groups. Neither step can raise the loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aicompress.methods.quantize.columns import Grid, round_columns


def sweep(wanted: Tensor, hessian: Tensor, levels: Grid, codes: Tensor) -> Tensor:
    """Round every column once more, given all others.

    Args:
        wanted: W, (in, out) float32.
        hessian: H, (in, in) float32, positive definite.
        levels: the grid.
        codes: (in, out).

    Returns:
        New codes, (in, out).
    """
    diagonal = hessian.diagonal()
    values = levels.values(codes)
    targets = values + (hessian @ (wanted - values)) / diagonal[:, None]
    return round_columns(targets, hessian / -diagonal, levels, values)


def fit_scales(wanted: Tensor, hessian: Tensor, levels: Grid, codes: Tensor, dtype: torch.dtype) -> Grid:
    """Least-squares scales for given codes, rounded to the dtype they are stored in; a row keeps its own if they win.

    With S_g the steps of group g, the loss of a row is quadratic in its scales: A_gh = S_gᵀ H S_h, b_g = S_gᵀ H w. Rows
    that share one scale share the sum of their equations.
    """
    groups, out = len(levels.scale), codes.shape[1]
    order, missing = _by_group(levels.group, groups)
    steps = levels.steps(codes)[order]
    steps[missing] = 0
    b = (steps * (hessian @ wanted)[order]).view(groups, -1, out).sum(1).t()  # (out, groups)
    a = _normal_matrices(hessian[order[:, None], order], steps.view(groups, -1, out)).double()
    if levels.scale.shape[1] == 1:
        a, b = a.sum(0, keepdim=True), b.sum(0, keepdim=True)
    old = levels.scale.t().double()
    ridge = torch.diag_embed(1e-6 * a.diagonal(dim1=1, dim2=2) + (a.diagonal(dim1=1, dim2=2) == 0))
    step = torch.linalg.solve(a + ridge, (b.double() - (a @ old[..., None])[..., 0])[..., None])[..., 0]
    new = (old + step).to(dtype).double()
    new = torch.where(new == 0, old, new)

    def loss(scale: Tensor) -> Tensor:
        return ((a @ scale[..., None])[..., 0] * scale).sum(1) - 2 * (b * scale).sum(1)

    better = loss(new) < loss(old)
    return replace(levels, scale=torch.where(better[:, None], new, old).float().t().contiguous())


def _by_group(group: tuple[int, ...], groups: int) -> tuple[Tensor, Tensor]:
    """Columns of a group beside each other, as many for each, and which of them only fill up a narrower group."""
    member = torch.tensor(group)
    counts = member.bincount(minlength=groups)
    ordered = member.argsort(stable=True)
    first = counts.cumsum(0) - counts
    place = member[ordered] * int(counts.max()) + torch.arange(len(member)) - first[member[ordered]]
    order = torch.zeros(groups * int(counts.max()), dtype=torch.long)
    order[place] = ordered
    missing = torch.ones(len(order), dtype=torch.bool)
    missing[place] = False
    return order, missing


def _normal_matrices(hessian: Tensor, steps: Tensor) -> Tensor:
    """S_gᵀ H S_h of every output, (out, groups, groups), from steps (groups, columns, out) and H in their order."""
    groups, columns, out = steps.shape
    found = torch.zeros(out, groups, groups)
    for g in range(groups):
        begin = g * columns
        pulls = (hessian[begin:, begin : begin + columns] @ steps[g]).view(groups - g, columns, out)
        found[:, g:, g] = (pulls * steps[g:]).sum(1).t()
    return found + found.tril(-1).transpose(1, 2)


def refine(
    wanted: Tensor, hessian: Tensor, levels: Grid, codes: Tensor, rounds: int, dtype: torch.dtype
) -> tuple[Tensor, Grid]:
    """Fit scales and sweep codes in turn, `rounds` times; then fit the scales once more.

    Args:
        wanted: W, (in, out) float32.
        hessian: H, (in, in), positive definite.
        levels: the grid to start from.
        codes: (in, out) codes to start from.
        rounds: how often.
        dtype: that scales are stored in.
    """
    hessian = hessian.float()
    for _ in range(rounds):
        levels = fit_scales(wanted, hessian, levels, codes, dtype)
        codes = sweep(wanted, hessian, levels, codes)
    return codes, fit_scales(wanted, hessian, levels, codes, dtype)
