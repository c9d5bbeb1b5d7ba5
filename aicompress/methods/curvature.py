"""Curvature of a layer's output error: E‖(W − Ŵ) x‖² = tr((W − Ŵ) H (W − Ŵ)ᵀ) with the Gram matrix H = E[x xᵀ]."""

from __future__ import annotations

import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.layer import InputStats, Layer

MAX_DAMPING = 1.0


def statistics(layer: Layer) -> InputStats:
    """A layer's input statistics.

    Raises:
        CompressError: there are none, or no calibration token reached the layer.
    """
    if layer.inputs is None or layer.inputs.count < 1:
        raise CompressError(
            f"{layer.info.name}: no calibration token reached this layer",
            "calibrate on more text, or exclude it and compress it with a data-free method",
        )
    return layer.inputs


def gram(layer: Layer) -> Tensor:
    """H = E[x xᵀ], (in, in) float64.

    Raises:
        CompressError: no token reached the layer, or H holds NaN or infinity.
    """
    found = statistics(layer).gram
    if found is None:
        raise CompressError(f"{layer.info.name}: its input statistics hold no Gram matrix", "collect them with gram")
    if not torch.isfinite(found).all():
        raise CompressError(f"{layer.info.name}: its inputs hold NaN or infinity", "calibrate in float32")
    return found.double()


def importance(layer: Layer) -> Tensor:
    """E[x²] of each input, (in,) float32: the diagonal of H.

    Raises:
        CompressError: no token reached the layer, or it holds NaN or infinity.
    """
    inputs = statistics(layer)
    found = inputs.norms if inputs.norms is not None else gram(layer).diagonal()
    if not torch.isfinite(found).all():
        raise CompressError(f"{layer.info.name}: its inputs hold NaN or infinity", "calibrate in float32")
    return found.float()


def loss(error: Tensor, gram: Tensor) -> float:
    """tr(E H Eᵀ): the mean squared output error of a layer whose weight is off by E (out, in)."""
    error = error.to(gram.dtype)
    return float(((error @ gram) * error).sum())


def damped(gram: Tensor, damping: float) -> Tensor:
    """H + λ mean(diag H) I, with λ raised tenfold from `damping` until H is positive definite.

    A dead input (H_jj = 0) gets the mean of the others: its row and column are zero, so it stays apart from them.

    Raises:
        CompressError: no λ up to 1 makes H positive definite; it is not a Gram matrix.
    """
    diagonal = gram.diagonal().clone()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else torch.ones((), dtype=gram.dtype)
    found = gram.clone()
    while True:
        found.diagonal().copy_(torch.where(alive, diagonal, mean) + damping * mean)
        if int(torch.linalg.cholesky_ex(found).info) == 0:
            return found
        if damping >= MAX_DAMPING:
            raise CompressError("a Gram matrix of layer inputs is not positive semi-definite", "collect it in float64")
        damping = max(10 * damping, 1e-6)


def inverse_factor(positive: Tensor) -> Tensor:
    """The upper triangular C with H⁻¹ = Cᵀ C, from one Cholesky factorization and no explicit inverse.

    Reversing the order of the inputs turns L Lᵀ into U Uᵀ with U upper; then H⁻¹ = U⁻ᵀ U⁻¹ and C = U⁻¹, which is L⁻¹
    in reverse. Three matrices of H's size are held at most, H among them.
    """
    lower = torch.linalg.cholesky(positive.flip(0, 1))
    inverse = torch.eye(len(positive), dtype=positive.dtype)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1)


def shifted(layer: Layer, hessian: Tensor, part: float) -> Tensor:
    """W* = W + part W (E[x̃ xᵀ] − H) H⁻¹, (out, in) float32: for part 1 the least E‖W x̃ − W* x‖².

    Raises:
        CompressError: the statistics do not hold E[x̃ xᵀ].
    """
    if part == 0:
        return layer.weight.contiguous()
    cross = statistics(layer).cross
    if cross is None:
        raise CompressError(
            f"{layer.info.name}: its statistics do not compare its inputs with the uncompressed model's",
            "collect them with cross, or set shift: 0",
        )
    change = layer.weight.double() @ (cross.double() - gram(layer))
    solved = torch.cholesky_solve(change.t(), torch.linalg.cholesky(hessian))
    return (layer.weight + part * solved.t()).float()
