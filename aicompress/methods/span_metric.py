"""A metric over rows that leaves out a span, held as the span: errors in it are made up for by something else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpanMetric:
    """P = I − c W Wᵀ.

    Attributes:
        span: W, (rows, n) float64, with orthonormal columns.
        share: c, below 1.
    """

    span: Tensor
    share: float

    def __len__(self) -> int:
        return len(self.span)

    def matrix(self) -> Tensor:
        """P, (rows, rows) float64."""
        return torch.eye(len(self.span), dtype=self.span.dtype) - self.share * (self.span @ self.span.t())


@dataclass
class SpanMoves:
    """What rows that are still to come move by, for the errors of those before them.

    For errors E_B of some rows those of the others, R, lose least where they move by −P_RR⁻¹ P_RB E_B. With d added to
    the diagonal of P this is c W_R ((1 + d) I − c W_Rᵀ W_R)⁻¹ W_Bᵀ E_B, by Woodbury: no matrix (rows, rows) is needed.

    Attributes:
        left: W_Rᵀ W_R, (n, n) float64, of all rows at first.
        rows: how many there are.
        columns: of the errors.
        share: c.
        damping: d, as a part of the mean diagonal of P.
    """

    left: Tensor
    rows: int
    columns: int
    share: float
    damping: float

    def __post_init__(self) -> None:
        width, kind = len(self.left), self.left.dtype
        self.moves, self.errors = torch.zeros(2, width, self.columns, dtype=kind)
        mean = 1 - self.share * float(self.left.trace()) / max(1, self.rows)
        self.diagonal = (1 + self.damping * mean) * torch.eye(width, dtype=kind)

    def note(self, span: Tensor, error: Tensor) -> None:
        """Take the error of rows of W into account, when the next block begins; they come in order."""
        self.left -= span.t() @ span
        self.errors += span.t() @ error

    def begin(self) -> None:
        """Begin the next block of rows, which move by W times `moves`."""
        self.moves += self.share * torch.linalg.solve(self.diagonal - self.share * self.left, self.errors)
        self.errors.zero_()


@dataclass
class SpanFeedback:
    """The same for rows that are held.

    Attributes:
        weight: (rows, columns).
        metric: P.
        damping: as of `SpanMoves`.
    """

    weight: Tensor
    metric: SpanMetric
    damping: float

    def __post_init__(self) -> None:
        span = self.metric.span
        self.state = SpanMoves(span.t() @ span, len(span), self.weight.shape[1], self.metric.share, self.damping)

    def wanted(self, rows: slice) -> Tensor:
        """Rows with what those before them make them move by, float64."""
        return torch.addmm(self.weight[rows].double(), self.metric.span[rows], self.state.moves)

    def note(self, rows: slice, error: Tensor) -> None:
        """Take the error of rows into account, which come in order."""
        self.state.note(self.metric.span[rows], error)
        self.state.begin()


@dataclass
class MatrixFeedback:
    """The same for any metric.

    Attributes:
        target: the rows, (rows, columns) float64; those to come are changed.
        factor: upper triangular C with P⁻¹ = Cᵀ C, (rows, rows).
    """

    target: Tensor
    factor: Tensor

    def wanted(self, rows: slice) -> Tensor:
        """Rows with what those before them make them move by, float64."""
        return self.target[rows]

    def note(self, rows: slice, error: Tensor) -> None:
        """Take the error of rows into account, which come in order."""
        error = torch.linalg.solve_triangular(self.factor[rows, rows].t(), error, upper=False)
        self.target[rows.stop :].addmm_(self.factor[rows, rows.stop :].t(), error)
