"""Record the inputs of experts whose matrices are parts of one merged tensor, at the products that use them.

The plain implementation of experts in transformers runs `linear(x, merged[expert])` for each expert that has tokens.
The call is watched, so what runs is the model's own code, whatever the architecture. Those that multiply all experts at
once cannot be watched: their experts count as reached by no token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Part = tuple[Tensor, int]  # merged parameter (experts, ...), index of the expert


class ExpertCalls(TorchFunctionMode):
    """Tells of every linear call whose weight is one expert of a merged parameter.

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
        if function is functional.linear and len(args) >= 2 and self._merged:
            self._look(args[0], args[1])
        return function(*args, **(kwargs or {}))

    def _look(self, given: Tensor, weight: Tensor) -> None:
        entry = self._merged.get(weight.untyped_storage().data_ptr())
        if entry is None or not given.numel():
            return
        merged, experts = entry
        names = experts.get((weight.storage_offset() - merged.storage_offset()) // merged.stride(0))
        if names:
            self._see(names, given)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._merged = {}
