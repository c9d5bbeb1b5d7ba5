"""Cyclic coordinate descent on tr((W − Ŵ) H (W − Ŵ)ᵀ), over the codes and over the scales.

CDQuant (Nair and Suggala 2024, arXiv:2406.17542): with all other columns fixed, the best value of column j is
ŵ_j + ((W − Ŵ) H)_j / H_jj, and the best code is the one nearest to it. Given the codes, the scales of a row solve
normal equations of as many unknowns as it has groups. Neither step can raise the loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aicompress.methods.quantize.grid.columns import ColumnGrid, round_columns

SOLVED = 1 << 20  # entries of normal matrices that are solved at a time, in float64


def sweep(wanted: Tensor, hessian: Tensor, levels: ColumnGrid, codes: Tensor) -> Tensor:
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


def fit_scales(pull: Tensor, hessian: Tensor, levels: ColumnGrid, codes: Tensor, dtype: torch.dtype) -> ColumnGrid:
    """Least-squares scales for given codes, rounded to the dtype they are stored in; a row keeps its own if they win.

    With S_g the steps of group g, the loss of a row is quadratic in its scales: A_gh = S_gᵀ H S_h, b_g = S_gᵀ H w. Rows
    that share one scale share the sum of their equations.

    Args:
        pull: H W, (in, out) float32.
        hessian: H, (in, in) float32, positive definite.
        levels: the grid.
        codes: (in, out).
        dtype: that scales are stored in.
    """
    groups, out = len(levels.scale), codes.shape[1]
    order, missing = _by_group(levels.group, groups)
    steps = levels.steps(codes)[order]
    steps[missing] = 0
    b = pull[order].mul_(steps).view(groups, -1, out).sum(1).t()  # (out, groups)
    a = _normal_matrices(hessian, order, steps.view(groups, -1, out))
    if levels.scale.shape[1] == 1:
        a, b = a.double().sum(0, keepdim=True), b.sum(0, keepdim=True)
    old, at_once = levels.scale.t(), max(1, SOLVED // groups**2)
    parts = zip(*(torch.split(whole, at_once) for whole in (a, b, old)), strict=True)
    new = torch.cat([_solved(a.double(), b.double(), old.double(), dtype) for a, b, old in parts])
    return replace(levels, scale=new.float().t().contiguous())


def _solved(a: Tensor, b: Tensor, old: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales (rows, groups) of least sᵀ A s - 2 b s, or the old ones where rounding makes those better; all float64."""
    diagonal = a.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(1e-6 * diagonal + (diagonal == 0))
    step = torch.linalg.solve(ridge.add_(a), (b - (a @ old[..., None])[..., 0])[..., None])[..., 0]
    new = (old + step).to(dtype).double()
    new = torch.where(new == 0, old, new)

    def loss(scale: Tensor) -> Tensor:
        return ((a @ scale[..., None])[..., 0] * scale).sum(1) - 2 * (b * scale).sum(1)

    return torch.where((loss(new) < loss(old))[:, None], new, old)


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


def _normal_matrices(hessian: Tensor, order: Tensor, steps: Tensor) -> Tensor:
    """S_gᵀ H S_h of every output, (out, groups, groups), from H and steps (groups, columns, out) in the given order."""
    groups, columns, out = steps.shape
    normal = torch.empty(out, groups, groups)
    for g in range(groups):
        begin = g * columns
        rows = hessian[order[begin : begin + columns]][:, order[begin:]]  # H is symmetric: what this group pulls at
        pulls = (rows.t() @ steps[g]).view(groups - g, columns, out)
        normal[:, g, g:] = normal[:, g:, g] = pulls.mul_(steps[g:]).sum(1).t()
    return normal


def refine(
    wanted: Tensor, hessian: Tensor, levels: ColumnGrid, codes: Tensor, rounds: int, dtype: torch.dtype
) -> tuple[Tensor, ColumnGrid]:
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
    pull = hessian @ wanted
    for _ in range(rounds):
        levels = fit_scales(pull, hessian, levels, codes, dtype)
        codes = sweep(wanted, hessian, levels, codes)
    return codes, fit_scales(pull, hessian, levels, codes, dtype)
