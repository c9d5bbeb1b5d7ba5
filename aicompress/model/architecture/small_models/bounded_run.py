"""Run a small random model no longer than a trial is worth.

With random weights a model may do without end what it ends in time when it is trained: one that draws how long a sound
lasts makes hours of it. So the work of a forward pass is counted while it runs, and too much of it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aicompress.errors import CheckpointError

MOST_WORK = 20_000_000_000  # multiplications or written numbers: about ten seconds of one core in float64
LARGEST = 2**27  # numbers in one tensor: 1 GiB in float64
OVERHEAD = 10_000  # multiplications that the call of any operator counts for


class EndlessRun(CheckpointError):
    """A forward pass that takes far longer than those of other models of its size."""


class BoundedRun(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, operators are counted, and not run where that would be more than so many multiplications in all.

    Args:
        told: what is run.
        hint: of the error.
        most: multiplications and written numbers.
        largest: numbers that one operator may write.

    Raises:
        EndlessRun: it is more.
    """

    def __init__(self, told: str, hint: str = "", most: float | None = None, largest: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work, self.told, self.hint = 0.0, told, hint
        self.most, self.largest = most or MOST_WORK, largest or LARGEST

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        product = PRODUCTS.get(func.overloadpacket)
        self._add(OVERHEAD + (product(args) if product else 0))
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            written = _numel(output)
            self._add(written, written)
        return output

    def _add(self, work: float, written: int = 0) -> None:
        self.work += work
        if self.work > self.most or written > self.largest:
            raise EndlessRun(f"{self.told} takes far longer than one of its size should", self.hint)


def _numel(value: Any) -> int:
    """Numbers in the largest tensor of an output."""
    if isinstance(value, Tensor):
        return value.numel()
    return max(map(_numel, value), default=0) if isinstance(value, list | tuple) else 0


def _of_matrices(first: int) -> Callable[[tuple[Any, ...]], float]:
    """Multiplications of (..., n, k) and (..., k, m), the first of which is an argument of this number."""
    return lambda args: float(args[first].numel() * args[first + 1].shape[-1])


def _of_attention(args: tuple[Any, ...]) -> float:
    """Those of queries (..., n, d) with keys (..., m, d), and with values."""
    return float(2 * args[0].numel() * args[1].shape[-2])


def _of_convolution(args: tuple[Any, ...]) -> float:
    """Those of inputs (batch, channels, *places) with kernels, whose strides leave out places or make more of them."""
    inputs, kernels, _, stride, _, _, transposed = args[:7]
    places: Iterable[int] = (inputs.shape[0], *inputs.shape[2:])
    return float(prod(places) * kernels.numel() / (1 if transposed else prod(stride)))


_aten = torch.ops.aten
PRODUCTS: Mapping[Any, Callable[[tuple[Any, ...]], float]] = {
    _aten.mm: _of_matrices(0),
    _aten.bmm: _of_matrices(0),
    _aten.addmm: _of_matrices(1),
    _aten.baddbmm: _of_matrices(1),
    _aten.convolution: _of_convolution,
    _aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    _aten._scaled_dot_product_attention_math: _of_attention,
}
