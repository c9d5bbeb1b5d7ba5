"""Orthogonal matrices that spread every channel over all others: Hadamard matrices of any order that is known by rule.

A Hadamard matrix has entries ±1 and orthogonal rows. Products of orders are orders (Sylvester 1867); for a prime q
there is one of order q + 1 where q ≡ 3 mod 4, and of order 2(q + 1) where q ≡ 1 mod 4 (Paley 1933). Applied as a
Kronecker product of small factors it costs n log n, not n².
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PART = 64  # largest power of two that is one factor
PIECE = 1 << 22  # numbers turned at a time


@dataclass(frozen=True)
class OrthogonalMatrix:
    """An orthogonal matrix R of order n.

    Attributes:
        factors: orthogonal matrices whose Kronecker product is Q; the orders multiply to n.
        signs: (n,) of ±1.
        centred: R = Q diag(signs) Qᵀ, which keeps the vector of ones, so that subtracting a mean commutes with it; else
            R = diag(signs) Q.
    """

    factors: tuple[Tensor, ...]
    signs: Tensor
    centred: bool = False

    def right(self, rows: Tensor) -> Tensor:
        """x R for every row x of (..., n): some rows at a time, so that a large table needs no room for more of it."""
        flat = rows.reshape(-1, rows.shape[-1])
        rotated = torch.empty_like(flat, memory_format=torch.contiguous_format)
        step = max(1, PIECE // flat.shape[1])
        for start in range(0, len(flat), step):
            rotated[start : start + step] = self._rotated(flat[start : start + step])
        return rotated.reshape(rows.shape)

    def _rotated(self, rows: Tensor) -> Tensor:
        if not self.centred:
            return self._product(rows * self.signs, transposed=False)
        return self._product(self._product(rows, transposed=False) * self.signs, transposed=True)

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """R applied along an axis of a tensor: to rows for the last, Rᵀ W for the first of a matrix."""
        if tensor.ndim == 1:
            return self.right(tensor)
        rotated = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        rows, out = tensor.movedim(axis, -1), rotated.movedim(axis, -1)
        step = max(1, PIECE // math.prod(rows.shape[1:]))
        for start in range(0, len(rows), step):  # of all at once the transpose would be a further copy
            out[start : start + step] = self.right(rows[start : start + step])
        return rotated

    def _product(self, rows: Tensor, transposed: bool) -> Tensor:
        """x Q, or x Qᵀ: factor by factor along axes of their orders."""
        shape = rows.shape
        product = rows.reshape(-1, *(len(factor) for factor in self.factors))
        for number, factor in enumerate(self.factors):
            matrix = (factor.t() if transposed else factor).to(product.dtype)
            product = (product.movedim(number + 1, -1) @ matrix).movedim(-1, number + 1)
        return product.reshape(shape)


def rotation(width: int, centred: bool, generator: torch.Generator) -> OrthogonalMatrix:
    """A random one: a Hadamard matrix with random signs; where no rule gives its order, any orthogonal matrix.

    Args:
        width: n.
        centred: the vector of ones must stay.
        generator: draws the signs.
    """
    signs = torch.randint(0, 2, (width,), generator=generator).float() * 2 - 1
    if centred:
        signs[0] = 1  # the first column of every factor is constant, and so is that of their product
    return OrthogonalMatrix(factors_of(width, generator), signs, centred)


def factors_of(width: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Orthogonal matrices with a constant first column whose orders multiply to a width."""
    odd = width
    while odd % 2 == 0:
        odd //= 2
    order = next((m for m in _multiples(odd, width) if paley(m) is not None), None) if odd > 1 else 1
    if order is None:
        return (_dense(width, generator),)
    factors = [] if order == 1 else [normalized(paley(order))]  # type: ignore[arg-type]
    rest = width // order
    while rest > 1:
        part = min(rest, PART)
        factors.append(normalized(_sylvester(part)))
        rest //= part
    return tuple(factors) or (torch.ones(1, 1),)


def _multiples(odd: int, width: int) -> list[int]:
    """odd · 2^k that divide a width, the smallest first."""
    return [odd << k for k in range(width.bit_length()) if width % (odd << k) == 0]


def _sylvester(order: int) -> Tensor:
    hadamard = torch.ones(1, 1)
    while len(hadamard) < order:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return hadamard


def paley(order: int) -> Tensor | None:
    """A Hadamard matrix of this order by Paley's constructions, or None where neither gives one."""
    if order % 4:
        return None
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        skew = torch.zeros(order, order)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
        return torch.eye(order) + skew
    q = order // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        core = torch.zeros(q + 1, q + 1)
        core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1, _jacobsthal(q)
        one, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        return torch.kron(core, one) + torch.kron(torch.eye(q + 1), other)
    return None


def _jacobsthal(q: int) -> Tensor:
    """χ(i − j) for i, j modulo a prime: 1 for squares, −1 for others, 0 for 0."""
    character = torch.full((q,), -1.0)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def normalized(hadamard: Tensor) -> Tensor:
    """Rows with the sign that makes the first column one, divided by √n: an orthogonal matrix."""
    return hadamard * hadamard[:, :1] / math.sqrt(len(hadamard))


def _dense(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix whose first column is constant."""
    start = torch.randn(width, width, generator=generator, dtype=torch.float64)
    start[:, 0] = 1
    basis, upper = torch.linalg.qr(start)
    signed: Tensor = basis * upper.diagonal().sign()
    return signed.float()
