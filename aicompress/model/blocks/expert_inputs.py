"""Record the inputs of experts whose matrices are parts of one tensor, at the products that use them.

The plain implementation of experts in transformers runs `linear(x, merged[expert])` for each expert that has tokens, or
`x @ merged[expert]` where the matrices lie as (in, out); Llama 4 multiplies all experts at once, `bmm(x, merged)`, with
zeros for the tokens that are not an expert's. The call is watched, so what runs is the model's own code, whatever the
architecture. Experts that are multiplied in another way count as reached by no token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Part = tuple[Tensor, int]  # merged parameter (experts, ...), index of the expert

_PRODUCTS = frozenset({torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm})
_SUMS = frozenset({torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm})  # with what the product is added to


def product_of(function: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, bool] | None:
    """The input of a product, what it is multiplied by, and whether that is (in, out); None for other functions."""
    if function is functional.linear and len(args) >= 2:
        given, weight, transposed = args[0], args[1], False
    elif function in _PRODUCTS and len(args) == 2:
        given, weight, transposed = *args, True
    elif function in _SUMS and len(args) == 3:
        given, weight, transposed = *args[1:], True
    else:
        return None
    if not isinstance(given, Tensor) or not isinstance(weight, Tensor) or weight.ndim < 2:
        return None
    flipped = weight.stride(-1) != 1 and weight.stride(-2) == 1  # a view that turns the matrix
    return given, weight, transposed != flipped


class ExpertCalls(TorchFunctionMode):
    """Tells of every product with the matrix of one expert of a merged parameter.

    Args:
        parts: merged parameter and expert by layer name; layers of one part share their input.
        see: called with the layers' names and the input.
    """

    def __init__(self, parts: Mapping[str, Part], see: Callable[[Sequence[str], Tensor], None]) -> None:
        super().__init__()
        self._see = see
        self._merged: dict[int, tuple[Tensor, dict[int, list[str]]]] = {}
        for name, (merged, expert) in parts.items():
            _, experts = self._merged.setdefault(merged.untyped_storage().data_ptr(), (merged, {}))
            experts.setdefault(expert, []).append(name)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = product_of(function, args) if self._merged else None
        if product is not None:
            self._look(*product[:2])
        return function(*args, **(kwargs or {}))

    def _look(self, given: Tensor, weight: Tensor) -> None:
        entry = self._merged.get(weight.untyped_storage().data_ptr())
        if entry is None or not given.numel():
            return
        merged, experts = entry
        first = (weight.storage_offset() - merged.storage_offset()) // merged.stride(0)
        if weight.ndim == 2:
            self._tell(experts.get(first), given.reshape(-1, given.shape[-1]))
            return
        for number, rows in enumerate(given):
            self._tell(experts.get(first + number), rows[rows.any(dim=-1)])

    def _tell(self, names: Sequence[str] | None, rows: Tensor) -> None:
        if names and len(rows):
            self._see(names, rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._merged = {}
