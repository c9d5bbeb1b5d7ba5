"""Curvature of a layer's output error: E‖(W − Ŵ) x‖² = tr((W − Ŵ) H (W − Ŵ)ᵀ) with the Gram matrix H = E[x xᵀ]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.layer import Layer
from aicompress.statistics import InputStats

MAX_DAMPING = 1.0
PANEL = 256  # rows of a matrix that are copied at a time
LEAF = 256  # side of a triangle that is inverted at once; matrix products do the rest


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


def raw_gram(layer: Layer) -> Tensor:
    """H = E[x xᵀ], (in, in), as the statistics hold it; not to be modified.

    Raises:
        CompressError: no token reached the layer, or H holds NaN or infinity.
    """
    gram = statistics(layer).gram
    if gram is None:
        raise CompressError(f"{layer.info.name}: its input statistics hold no Gram matrix", "collect them with gram")
    if not all(torch.isfinite(gram[rows]).all() for rows in _panels(len(gram))):
        raise CompressError(f"{layer.info.name}: its inputs hold NaN or infinity", "calibrate in float32")
    return gram


def gram(layer: Layer) -> Tensor:
    """H = E[x xᵀ], (in, in) float64; errors as of `raw_gram`."""
    return raw_gram(layer).double()


def importance(layer: Layer) -> Tensor:
    """E[x²] of each input, (in,) float32: the diagonal of H.

    Raises:
        CompressError: no token reached the layer, or it holds NaN or infinity.
    """
    inputs = statistics(layer)
    squares = inputs.norms if inputs.norms is not None else gram(layer).diagonal()
    if not torch.isfinite(squares).all():
        raise CompressError(f"{layer.info.name}: its inputs hold NaN or infinity", "calibrate in float32")
    return squares.float()


class GradientMoments(NamedTuple):
    """Mean of g and of g², (out, in) float32, of single samples' gradients g in a layer's weight."""

    mean: Tensor
    square: Tensor


def gradients(layer: Layer) -> GradientMoments:
    """Moments of the gradients in a layer's weight.

    Raises:
        CompressError: there are none, or they hold NaN or infinity.
    """
    known = layer.gradients
    if known is None or known.mean is None or known.square is None:
        raise CompressError(f"{layer.info.name}: there are no gradients of it", "collect them from this checkpoint")
    if not (torch.isfinite(known.mean).all() and torch.isfinite(known.square).all()):
        raise CompressError(f"{layer.info.name}: its gradients hold NaN or infinity", "calibrate on other data")
    return GradientMoments(known.mean, known.square)


def loss(error: Tensor, gram: Tensor) -> float:
    """tr(E H Eᵀ): the mean squared output error of a layer whose weight is off by E (out, in)."""
    error = error.to(gram.dtype)
    return float(((error @ gram) * error).sum())


def energies(gram: Tensor) -> Tensor:
    """The diagonal of H, (in,) float64, where a dead input (H_jj = 0) has the mean of the others.

    An input whose squares float32 cannot hold as normal numbers is dead, too: their reciprocals would be infinite.
    """
    diagonal = gram.diagonal().double()
    alive = diagonal >= torch.finfo(torch.float32).tiny
    return torch.where(alive, diagonal, diagonal[alive].mean() if alive.any() else 1.0)


def damped(gram: Tensor, damping: float) -> Tensor:
    """H + λ mean(diag H) I in float64, with λ raised tenfold from `damping` until H is positive definite.

    A dead input (H_jj = 0) gets the mean of the others: its row and column are zero, so it stays apart from them. Two
    matrices in float64 are held at most.

    Raises:
        CompressError: no λ up to 1 makes H positive definite; it is not a Gram matrix.
    """
    positive = gram.to(torch.float64, copy=True)
    scratch = torch.empty_like(positive)

    def factorizes(diagonal: Tensor) -> bool:
        positive.diagonal().copy_(diagonal)
        return _factorize(scratch.copy_(positive))

    _raised(energies(gram), damping, factorizes)
    return positive


def inverse_factor(gram: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The upper triangular C with H⁻¹ = Cᵀ C, and the diagonal of H: damped as by `damped`, inputs in the given order.

    Reversing the order of the inputs turns L Lᵀ into U Uᵀ with U upper; then H⁻¹ = U⁻ᵀ U⁻¹ and C = U⁻¹, which is L⁻¹
    in reverse. All of it happens in one matrix in float64; a quarter of another one is held beside it.

    Args:
        gram: H without damping, (in, in); not modified.
        damping: λ to start from.
        order: (in,) the order of the inputs; None: their own.

    Returns:
        C, (in, in) float64, and the diagonal of H, (in,) float64.

    Raises:
        CompressError: as `damped`.
    """
    reverse = (torch.arange(len(gram)) if order is None else order).flip(0)
    factor = torch.empty(gram.shape, dtype=torch.float64)

    def factorizes(diagonal: Tensor) -> bool:
        permuted(gram, reverse, factor).diagonal().copy_(diagonal)
        return _factorize(factor)

    diagonal = _raised(energies(gram)[reverse], damping, factorizes)
    _invert(factor)
    _reverse(factor)
    return factor, diagonal.flip(0)


def invert(positive: Tensor) -> Tensor:
    """Put H⁻¹ in the place of a positive definite H, and return it.

    Raises:
        CompressError: it is not positive definite.
    """
    if not _factorize(positive):
        raise CompressError("a Gram matrix of layer inputs is not positive definite", "raise the damping")
    torch.cholesky_inverse(positive.mT, upper=True, out=positive.mT)
    return positive


def permuted(matrix: Tensor, order: Tensor, out: Tensor) -> Tensor:
    """Rows and columns of a square matrix in the given order, written to `out`."""
    for rows in _panels(len(matrix)):
        out[rows] = matrix[order[rows]][:, order]
    return out


def _panels(rows: int) -> Iterator[slice]:
    for start in range(0, rows, PANEL):
        yield slice(start, min(start + PANEL, rows))


def _raised(diagonal: Tensor, damping: float, factorizes: Callable[[Tensor], bool]) -> Tensor:
    """The least damped diagonal with which a matrix can be factorized."""
    mean = diagonal.mean()
    while not factorizes(raised := diagonal + damping * mean):
        if damping >= MAX_DAMPING:
            raise CompressError("a Gram matrix of layer inputs is not positive semi-definite", "collect it in float64")
        damping = max(10 * damping, 1e-6)
    return raised


def _factorize(positive: Tensor) -> bool:
    """Put L of L Lᵀ in the place of a matrix; False where it is not positive definite.

    LAPACK goes by columns: its upper factor of the transpose is the lower one of the matrix, and no copy is made.
    """
    info = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(positive.mT, upper=True, out=(positive.mT, info))
    return int(info) == 0


def _invert(lower: Tensor) -> None:
    """Put L⁻¹ in the place of L, by halves: [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [−C⁻¹ B A⁻¹, C⁻¹]]."""
    if len(lower) <= LEAF:
        eye = torch.eye(len(lower), dtype=lower.dtype)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = len(lower) // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    _invert(second)
    torch.mm((second @ below).neg_(), first, out=below)


def _reverse(matrix: Tensor) -> None:
    """Put rows and columns of a square matrix in reverse order, in place."""
    size, half = len(matrix), len(matrix) // 2
    for rows in _panels(half):
        mirrored = slice(size - rows.stop, size - rows.start)
        above = matrix[rows].flip(0, 1)
        matrix[rows] = matrix[mirrored].flip(0, 1)
        matrix[mirrored] = above
    if size % 2:
        matrix[half] = matrix[half].flip(0)


def over(hessian: Tensor) -> Callable[[Tensor], Tensor]:
    """X ↦ X H⁻¹, for H (in, in) positive definite."""
    return lambda x: torch.cholesky_solve(x.to(hessian.dtype).t(), torch.linalg.cholesky(hessian)).t()


def shifted(layer: Layer, part: float, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """W* = W + part W (E[x̃ xᵀ] − H) H⁻¹, (out, in) float32: for part 1 the least E‖W x̃ − W* x‖².

    Args:
        layer: gives W, H and E[x̃ xᵀ].
        part: how far to go.
        solve: X ↦ X H⁻¹, H damped.

    Raises:
        CompressError: the statistics do not hold E[x̃ xᵀ].
    """
    if part == 0:
        return layer.weight.contiguous()
    cross, own = statistics(layer).cross, raw_gram(layer)
    if cross is None:
        raise CompressError(
            f"{layer.info.name}: its statistics do not compare its inputs with the uncompressed model's",
            "collect them with cross, or set shift: 0",
        )
    if cross is own:  # nothing before the layer is compressed
        return layer.weight.contiguous()
    change = layer.weight.to(own.dtype) @ (cross - own)
    return (layer.weight + part * solve(change)).float()
