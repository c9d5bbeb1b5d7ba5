"""Trace a running block: the inputs of its matrix products and the outputs of its normalizations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Call:
    """One product of a block's matrix with its input.

    Attributes:
        parameter: the matrix, (out, in), or (experts, out, in) of which one is used.
        given: its input as rows, (tokens, in).
        bias: parameter that is added, or None.
        transposed: the matrix is kept as (in, out).
    """

    parameter: str
    given: Tensor
    bias: str | None
    transposed: bool


@dataclass
class Seen:
    """One run of a block.

    Attributes:
        calls: products in the order of their computation.
        norms: output rows (tokens, width) by path of a module whose weight is a vector.
        output: every floating tensor that the block gave.
    """

    calls: list[Call] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)
    output: list[Tensor] = field(default_factory=list)


def watched(block: nn.Module, run: Callable[[], Any]) -> Seen:
    """Run a block and note what it does.

    Args:
        block: its parameters are those that are watched.
        run: calls it.
    """
    seen = Seen()
    with ExitStack() as stack:
        for name, module in block.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim == 1:
                stack.callback(module.register_forward_hook(_noting(name, seen)).remove)
        stack.enter_context(_Products(dict(block.named_parameters()), seen))
        with torch.no_grad():
            seen.output = list(_floating(run()))
    return seen


def _noting(name: str, seen: Seen) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.norms[name] = output.detach().reshape(-1, output.shape[-1]).clone()

    return note


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach().clone()
    elif isinstance(value, dict):
        for part in value.values():
            yield from _floating(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _floating(part)


class _Products(TorchFunctionMode):
    """Tells of every `linear`, and of every `addmm` as GPT-2's layers use it, that multiplies with a parameter."""

    def __init__(self, parameters: dict[str, Tensor], seen: Seen) -> None:
        super().__init__()
        self._seen = seen
        self._names = {
            tensor.untyped_storage().data_ptr(): name for name, tensor in parameters.items() if tensor.numel()
        }

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.linear:
            given, weight, *rest = (*args, *(kwargs[key] for key in ("input", "weight") if key in kwargs))
            self._note(given, weight, rest[0] if rest else kwargs.get("bias"), False)
        elif function is torch.addmm and len(args) == 3:
            self._note(args[1], args[2], args[0], True)
        return function(*args, **kwargs)

    def _note(self, given: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> None:
        name = self._name(weight)
        if name is not None and given.numel():
            rows = given.detach().reshape(-1, given.shape[-1]).clone()
            self._seen.calls.append(Call(name, rows, None if bias is None else self._name(bias), transposed))

    def _name(self, tensor: Tensor) -> str | None:
        return self._names.get(tensor.untyped_storage().data_ptr())


@contextmanager
def changed(
    parameters: Mapping[str, Tensor], changes: Iterable[tuple[str, Callable[[Tensor], Tensor]]]
) -> Iterator[None]:
    """Parameters with other numbers for a while. The tensors are exchanged, for rows of a table may share memory."""
    before: dict[str, Tensor] = {}
    try:
        for name, change in list(changes):
            before.setdefault(name, parameters[name].data)
            parameters[name].data = change(parameters[name].data)
        yield
    finally:
        for name, tensor in before.items():
            parameters[name].data = tensor


def alike(some: Sequence[Tensor], others: Sequence[Tensor], tolerance: float) -> bool:
    """Whether tensors are the same but for rounding, which is within a part of the largest number."""
    return len(some) == len(others) and all(
        one.shape == other.shape and bool((one - other).abs().max() <= tolerance * other.abs().max())
        for one, other in zip(some, others, strict=True)
        if other.numel() or one.numel()
    )
