"""A tiny random model of an architecture, to test which axes of its tensors belong to the residual stream.

A tiny model of two blocks has random weights. Residual coordinates in another order must compute the same; so must the
entries of every head in an order of its own, where heads are a share of the hidden width and are not rotated. An axis
as long as the width may be either: every matrix with two such axes is taken for a reader of the stream, for one that
adds to it, or for both (a pooling head), until the outputs stay. Where heads lie is told by moving whole ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError
from aicompress.model.architecture.small_models.bounded_run import BoundedRun
from aicompress.model.architecture.small_models.tiny_inputs import HINT, inputs_of
from aicompress.model.channels.graph import tensors_of
from aicompress.model.loading.definitions.definition import refusing

UNDECIDED = 7  # kinds of matrices that are told apart at most
MOST = 200  # combinations of what they can be that are tried
NARROW, WIDE = 8, 12
Side = Literal["stream", "inner"]
Parts = dict[tuple[str, int], Side]  # by family of tensors and axis
# What changes places inside: entries of every head, in sections, all queries before all keys, or where each head's
# query, key and value lie together; or whole groups of heads that share a key, likewise.
Layout = Literal["entries", "entries together", "sections", "together"]
OF_ENTRIES: tuple[Layout, ...] = ("entries", "entries together")
ROLES: tuple[tuple[Side, Side], ...] = (("stream", "inner"), ("inner", "stream"), ("stream", "stream"))  # in, out


def family(name: str) -> str:
    """What tensors of all blocks share: the name without numbers."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)


@dataclass(frozen=True)
class Sharing:
    """Heads that share a width.

    Attributes:
        heads, groups: how many there are, and how many keys they read; as many in each group.
        layout: what has to be free to change places on the axes that they lie on.
    """

    heads: int
    groups: int
    layout: Layout = "entries"

    def spans(self, worth: int) -> tuple[int, ...]:
        """Heads of a group in each section of an axis that is worth so many heads; none where it holds no groups."""
        each = self.heads // self.groups
        if worth == self.heads + 2 * self.groups:
            spans: tuple[int, ...] = (each, 1, 1)
        elif worth % self.heads == 0:
            spans = (each,) * (worth // self.heads)
        else:
            spans = (1,) * (worth // self.groups) if worth % self.groups == 0 and self.groups > 1 else ()
        return (sum(spans),) if self.layout == "together" and spans else spans


def parts_of(models: tuple[Any, Any], shared: Sharing) -> Parts | str:
    """The part that every axis plays which follows the hidden width, or why it cannot be told.

    Args:
        models: of `NARROW` and of `WIDE` coordinates for each head, on the meta device.
        shared: the heads that share the width, and how they may lie.
    """
    narrow, wide = models
    axes = _following(narrow.named_parameters(), wide.named_parameters())
    if shared.layout not in OF_ENTRIES:  # heads can go where a table that code computes stays, such as of positions
        axes |= _following(narrow.named_buffers(), wide.named_buffers())
    try:
        trial = _Trial(narrow, {name: lengths for name, lengths in axes.items() if lengths}, shared)
    except CheckpointError as error:
        return error.message
    axes = {name: axes[name] for name, _ in narrow.named_parameters()}
    double = {family(name) for name, lengths in axes.items() if len(lengths) > 1}
    likenesses = [kinds for kinds in _alike(sorted(double)) if len(kinds) <= UNDECIDED]
    if not likenesses:
        return f"{len(double)} kinds of matrices follow it on both sides: heads are a share of it"
    for kinds in likenesses:
        for parts in _assignments(narrow, axes, kinds, NARROW * shared.heads):
            if trial.stays(parts):
                return parts
    if not double:
        return "its coordinates do not all play one part"
    which = f"whichever of its {len(double)} kinds of square matrices hold heads"
    return f"with coordinates in another order the model computes otherwise, {which}"


def _following(narrow: Iterable[tuple[str, Tensor]], wide: Iterable[tuple[str, Tensor]]) -> dict[str, list[int]]:
    """Axes of tensors that follow the width."""
    shapes = {name: tensor.shape for name, tensor in wide if tensor is not None}
    return {
        name: [axis for axis, size in enumerate(tensor.shape) if shapes[name][axis] != size]
        for name, tensor in narrow
        if tensor.ndim == len(shapes.get(name, ()))
    }


def _alike(double: list[str]) -> list[list[list[str]]]:
    """Ways in which families of matrices can play one part, the one with fewest combinations first.

    Each family its own; or, of too many, those that lie in one module, or those whose modules have one name.
    """
    if len(double) <= UNDECIDED:
        return [[[name] for name in double]]
    inside: dict[str, list[str]] = {}
    named: dict[str, list[str]] = {}
    for name in double:
        inside.setdefault(name.rpartition(".")[0].rpartition(".")[0], []).append(name)
        named.setdefault(name.split(".")[-2], []).append(name)
    return sorted((list(inside.values()), list(named.values())), key=len)


def _assignments(model: Any, axes: Mapping[str, list[int]], kinds: list[list[str]], width: int) -> Iterator[Parts]:
    """Every way in which matrices with two axes can read the stream and add to it."""
    out_axes = {family(name): 1 if _is_transposed(model, name) else 0 for name in axes}
    whole = {family(name): parameter.shape for name, parameter in model.named_parameters()}
    options = [_possible(names, whole, out_axes, width) for names in kinds]
    ways = list(product(*options))  # most matrices only read or only write, and more of them read
    for roles in sorted(ways, key=lambda roles: (roles.count(ROLES[2]), roles.count(ROLES[1])))[:MOST]:
        parts: Parts = {}
        for names, (read, written) in zip(kinds, roles, strict=True):
            for name in names:
                out = out_axes[name]
                parts[name, 1 - out], parts[name, out] = read, written
                parts[f"{name.rpartition('.')[0]}.bias", 0] = written
        yield parts


def _possible(
    names: list[str], shapes: Mapping[str, tuple[int, ...]], out_axes: Mapping[str, int], width: int
) -> tuple[tuple[Side, Side], ...]:
    """What matrices of one kind can be: the stream has its width, fused projections and neurons have others."""
    inputs = {shapes[name][1 - out_axes[name]] for name in names}
    given = {shapes[name][out_axes[name]] for name in names}
    if given != {width}:
        return ROLES[:1]
    return ROLES[1:2] if inputs != {width} else ROLES


def _is_transposed(model: Any, name: str) -> bool:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"


class _Trial:
    """A tiny model that runs with its coordinates in another order.

    Raises:
        CheckpointError: it cannot be run.
    """

    def __init__(self, model: Any, axes: Mapping[str, list[int]], shared: Sharing) -> None:
        self.model, self.shared = in_memory(model), shared
        self.axes, self.width = axes, NARROW * shared.heads
        generator = torch.Generator().manual_seed(1)
        self.order = torch.randperm(self.width, generator=generator)
        entries = [head * NARROW + torch.randperm(NARROW, generator=generator) for head in range(shared.heads)]
        self.inner, self.turn = torch.cat(entries), torch.randperm(shared.groups, generator=generator)
        if bool((self.turn == torch.arange(shared.groups)).all()):
            self.turn = self.turn.roll(1)
        self.inputs = inputs_of(self.model)
        randomize(self.model)
        self.values = {name: tensor.clone() for name, tensor in self._tensors()}
        self.outputs = outputs_of(self.model, self.inputs)

    def stays(self, parts: Parts) -> bool:
        """Whether all outputs stay, or are in the stream's new order."""
        for name, tensor in self._tensors():
            value = self.values[name]
            for axis in self.axes[name]:
                index = self._order(parts.get((family(name), axis)), value.shape[axis])
                if index is None:
                    return False
                value = value.index_select(axis, index)
            tensor.copy_(value)
        return all(
            self._same(one, other) for one, other in zip(outputs_of(self.model, self.inputs), self.outputs, strict=True)
        )

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that moves with the width."""
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        return ((name, tensor) for name, tensor in tensors if self.axes.get(name))

    def _order(self, part: Side | None, length: int) -> Tensor | None:
        """The new order of an axis of this length; None where it cannot play the part."""
        if part == "inner" and self.shared.layout not in OF_ENTRIES:
            return self._turned(length)
        if length % self.width:
            return None if part == "stream" else torch.arange(length)  # a vector of one head's length
        if part == "inner" and self.shared.layout == "entries together":
            heads = torch.arange(self.shared.heads)[:, None, None] * (length // self.shared.heads)
            inside = (self.inner % NARROW).view(-1, 1, NARROW) + NARROW * torch.arange(length // self.width)[:, None]
            return (heads + inside).reshape(-1)
        order = self.inner if part == "inner" else self.order
        return torch.cat([order + self.width * copy for copy in range(length // self.width)])

    def _turned(self, length: int) -> Tensor:
        """The order of an axis whose groups have changed places."""
        runs, begin = [], 0
        for span in self.shared.spans(length // NARROW):
            entries = span * NARROW
            runs.append((begin + self.turn[:, None] * entries + torch.arange(entries)).reshape(-1))
            begin += entries * self.shared.groups
        return torch.cat(runs) if runs else torch.arange(length)

    def _same(self, after: Tensor, before: Tensor) -> bool:
        orders = [before, before[..., self.order]] if before.shape[-1] == self.width else [before]
        slack = 1e-6 * float(before.abs().max())
        return any(torch.allclose(after, wanted, rtol=1e-6, atol=slack) for wanted in orders)


def in_memory(model: Any) -> Any:
    """Another model of a configuration, in float64, which has values.

    Raises:
        CheckpointError: the architecture's code does not make one.
    """
    with refusing("its smallest model cannot be made"):
        made = type(model)(model.config).double().eval().requires_grad_(False)
    made.config._experts_implementation = "eager"  # grouped kernels have no float64
    return made


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs are one, up to rounding in float32; those of another shape count units, and say nothing."""
    slack = 1e-4 * float(other.abs().max()) if other.numel() else 0.0
    return one.shape != other.shape or torch.allclose(one.double(), other.double(), rtol=1e-4, atol=slack)


def randomize(model: nn.Module) -> None:
    """Random weights of a size that keeps activations alive; nothing at its initial value."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan = parameter.shape[-1] if parameter.ndim > 1 else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan**0.5)


@contextmanager
def _numbers_like(model: nn.Module) -> Iterator[None]:
    """Let numbers that a model's code makes, such as those of a mask, be of the kind of its parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(next((p.dtype for p in model.parameters() if p.is_floating_point()), before))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def outputs_of(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Everything that it gives.

    Raises:
        CheckpointError: it does not run on these alone, runs on and on, or gives NaN.
    """
    told = "a small model with random weights"
    with refusing(f"{told} does not run", HINT), _numbers_like(model), BoundedRun(told, HINT):
        outputs = tensors_of(dict(model(**inputs)))
    if any(output.isnan().any() for output in outputs):
        raise CheckpointError("a small model with random weights gives NaN", HINT)
    return outputs
