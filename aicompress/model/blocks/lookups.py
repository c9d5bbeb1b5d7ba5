"""Record which rows of an embedding are looked up, at the call that does it.

A subclass of Embedding may be given something else than the numbers of rows, such as a mask, or move them before it
looks them up. So the call is watched, and not the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Lookups(TorchFunctionMode):
    """Tells of every lookup in a weight."""

    def __init__(self, weight: Tensor, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._weight, self._see = weight, see

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is functional.embedding and len(args) >= 2 and args[1] is self._weight:
            self._see(args[0])
        return function(*args, **(kwargs or {}))


@contextmanager
def lookups(module: nn.Embedding, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell of every lookup while an embedding runs, in whatever thread that is.

    Args:
        module: the embedding.
        see: called with the numbers of the rows.
    """
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Lookups(module.weight, see):
            return forward(*args, **kwargs)

    module.forward = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
