"""Accumulate first and second moments of per-sample gradients, which may come in pieces."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from aicompress.layer import as_matrix
from aicompress.model.blocks.all_reduce import Team
from aicompress.model.loading.places import ExpertStack, Slot
from aicompress.model.sensitivity.loss import Sample
from aicompress.statistics import GradientStats

WIDEST = 1 << 14  # rows of a matrix whose outputs are looked at: a Gram matrix of no more than a gigabyte

Part = Callable[[Tensor], Tensor]  # gradient (out, in) of a whole weight -> that of a part of it


@dataclass(frozen=True)
class Watched:
    """A weight whose gradient is wanted.

    Attributes:
        place: its module's path in the model, its part of a merged parameter, or the experts that it holds.
        shape: the parameter's own shape.
        transposed: it is stored (in, out).
        part: called when its block comes up: how the gradient of a factor follows from that of the weight; None for a
            whole weight.
        outputs: the Gram matrix of the gradients in the rows of its output is wanted.
        moments: moments of the gradient itself are wanted, whether its outputs are seen or not.
    """

    place: str | Slot | ExpertStack
    shape: tuple[int, ...]
    transposed: bool = False
    part: Callable[[], Part] | None = None
    outputs: bool = False
    moments: bool = True

    @property
    def module(self) -> str:
        return self.place if isinstance(self.place, str) else self.place.module


class SpreadError(Exception):
    """A sample's gradient in a weight comes in several pieces, which cannot be squared one by one, nor all be held."""


@dataclass
class MomentSums:
    """Moments of one weight's gradient, or of those in its outputs, on their way.

    Attributes:
        watched: what is wanted.
        parameter: its weight, or what holds it.
        part: how the gradient of a factor follows; None for a whole weight.
        mean, square: sums so far.
        seen: samples whose gradient is among them.
        outputs: those of its outputs; None where they are not wanted.
        held: a sample's weight and gradient so far, by its number, where it comes in pieces; None where it does not.
    """

    watched: Watched
    parameter: nn.Parameter
    part: Part | None
    mean: Tensor | None = None
    square: Tensor | None = None
    seen: set[int] = field(default_factory=set)
    outputs: OutputGradients | None = None
    held: dict[int, tuple[float, Tensor]] | None = None

    def nodes(self) -> list[Node]:
        """Where in autograd's graphs its gradients arrive."""
        own = [get_gradient_edge(self.parameter).node] if self.parameter.requires_grad else []
        return own + ([] if self.outputs is None else self.outputs.nodes or [])

    def hold(self) -> None:
        """Add up the pieces of a sample's gradient from now on, before they are squared."""
        self.held = {}
        if self.outputs is not None:
            self.outputs.held = {}

    def take(self, sample: Sample) -> None:
        """Add a sample's gradient, if there is one."""
        if self.outputs is not None:
            self.outputs.take(sample.weight)
        given = self.parameter.grad
        if given is None:
            return
        place = self.watched.place
        matrix = (
            place.read(given, self.watched.shape)
            if isinstance(place, Slot)
            else place.parts(given).flatten(0, 1)
            if isinstance(place, ExpertStack)
            else as_matrix(given, self.watched.transposed)
        )
        matrix = (matrix if self.part is None else self.part(matrix)).cpu()
        if self.held is not None:
            before = self.held.get(sample.number)
            self.held[sample.number] = sample.weight, matrix if before is None else before[1] + matrix
            return
        if sample.number in self.seen:
            raise SpreadError
        self.seen.add(sample.number)
        self._add(sample.weight, matrix)

    def _add(self, weight: float, matrix: Tensor) -> None:
        """Add the whole gradient of a sample."""
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros(matrix.shape), torch.zeros(matrix.shape)
        self.mean.add_(matrix, alpha=weight)
        self.square.addcmul_(matrix, matrix, value=weight)

    def moments(self, count: int, team: Team) -> GradientStats:
        """Means over the samples of all processes; a weight that no sample reached has gradient 0."""
        while self.held:
            self._add(*self.held.popitem()[1])
        if self.outputs is not None:
            self.outputs.release()
        sums = [*self._own(), None if self.outputs is None else self.outputs.gram]
        if self.outputs is not None:
            self.outputs.handle.remove()
        return GradientStats(count, *(None if each is None else team.total(each) / count for each in sums))

    def _own(self) -> tuple[Tensor | None, Tensor | None]:
        """Sums of the weight's gradient and of its square; None where they were not wanted."""
        wanted = self.watched.moments or self.outputs is None
        if wanted and (self.mean is None or self.square is None):
            empty = self.parameter.new_zeros(self.watched.shape, device="cpu")
            place = self.watched.place
            flipped = self.watched.transposed and not isinstance(place, Slot)
            matrix = place.parts(empty).flatten(0, 1) if isinstance(place, ExpertStack) else as_matrix(empty, flipped)
            self.mean = (matrix if self.part is None else self.part(matrix)).clone()
            self.square = self.mean.clone()
        return self.mean, self.square


@dataclass
class OutputGradients:
    """Σ d dᵀ over the rows of a module's outputs on its way, d the gradient in a row.

    Attributes:
        handle: of the hook; to be removed.
        gram: (out, out) float32.
        pending: rows of the sample that is running, by its calls of the module.
        held: a sample's weight and rows so far, where they come in pieces; None where they do not.
        calls: how often the module was called.
        nodes: where in autograd's graphs they arrive; None once a sample is done.
    """

    gram: Tensor
    handle: RemovableHandle
    pending: dict[int, Tensor] = field(default_factory=dict)
    held: dict[int, tuple[float, Tensor]] | None = None
    calls: int = 0
    nodes: list[Node] | None = field(default_factory=list)

    @classmethod
    def of(cls, module: nn.Module, width: int) -> OutputGradients:
        """Watch a module that gives rows of some width; what is no longer held hears no more."""
        watching: list[weakref.ref[OutputGradients]] = []

        def see(call: int, gradient: Tensor) -> None:
            held = watching[0]()
            if held is not None:
                convolves = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
                rows = gradient.movedim(1, -1) if convolves else gradient
                held.pending[call] = rows.reshape(-1, width).float().cpu()

        def hook(own: nn.Module, given: Any, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            # Where nothing before it has gradients, it begins a graph.
            start = output if output.requires_grad else output.detach().requires_grad_()
            held = watching[0]()
            if held is not None:
                held.calls += 1
                if held.nodes is not None:
                    held.nodes.append(get_gradient_edge(start).node)
                start.register_hook(partial(see, held.calls))  # type: ignore[no-untyped-call]
            return None if start is output else start.clone()  # which may be changed in place

        made = cls(torch.zeros(width, width), module.register_forward_hook(hook))
        watching.append(weakref.ref(made))
        return made

    def take(self, weight: float) -> None:
        """Add what came of a sample."""
        self.nodes = None
        for call, rows in self.pending.items():
            if self.held is None:
                self.gram.addmm_(rows.t(), rows, alpha=weight)
            else:
                self.held[call] = weight, self.held[call][1] + rows if call in self.held else rows
        self.pending.clear()

    def release(self) -> None:
        """Add what was held."""
        while self.held:
            weight, rows = self.held.popitem()[1]
            self.gram.addmm_(rows.t(), rows, alpha=weight)


def _outputs(module: nn.Module, watched: Watched) -> OutputGradients | None:
    """What is seen of a layer's outputs: nothing of experts in one tensor, of embeddings, and of very wide layers."""
    shape = watched.shape[::-1] if watched.transposed else watched.shape
    if not watched.outputs or not isinstance(watched.place, str) or isinstance(module, nn.Embedding):
        return None
    return OutputGradients.of(module, shape[0]) if shape[0] <= WIDEST else None


def watch(model: Any, wanted: Mapping[str, Watched]) -> dict[str, MomentSums]:
    """Sums for weights that are in memory, which from now on get gradients where moments of them are wanted."""
    sums: dict[str, MomentSums] = {}
    for name, watched in wanted.items():
        leaf = "weight" if isinstance(watched.place, str) else watched.place.leaf
        module = model.get_submodule(watched.module)
        parameter = module._parameters[leaf]
        part = watched.part() if watched.part is not None else None
        outputs = _outputs(module, watched)
        if watched.moments or outputs is None:
            parameter.requires_grad_(True)
        sums[name] = MomentSums(watched, parameter, part, outputs=outputs)
    return sums


def harvest(sums: Mapping[str, MomentSums], sample: Sample) -> None:
    """Take a sample's gradients and clear them."""
    for each in sums.values():
        each.take(sample)
    for each in sums.values():
        each.parameter.grad = None


HELD = 1 << 30  # bytes of gradients that are held for their other pieces


class Pieces:
    """The graphs of one sample."""

    def __init__(self) -> None:
        self._graphs: list[set[Node]] = []

    def add(self, tree: Any) -> None:
        """Note the graph that tensors come from: it is gone back through by itself."""
        self._graphs.append(_behind(tree))

    def hold(self, sums: Mapping[str, MomentSums], samples: int) -> None:
        """Let the weights that several graphs go back to hold their pieces.

        Args:
            sums: weights that are watched.
            samples: how many there are.

        Raises:
            SpreadError: the pieces of all samples are too large.
        """
        spread = [
            each for each in sums.values() if sum(any(node in g for node in each.nodes()) for g in self._graphs) > 1
        ]
        self._graphs.clear()
        held = sum(4 * math.prod(each.watched.shape) for each in spread if each.parameter.requires_grad)
        if held * samples > HELD:
            raise SpreadError
        for each in spread:
            each.hold()


def _behind(tree: Any) -> set[Node]:
    tensors = [each for each in tree_leaves(tree) if isinstance(each, Tensor) and each.requires_grad]
    left, nodes = [get_gradient_edge(each).node for each in tensors], set[Node]()
    while left:
        node = left.pop()
        if node not in nodes:
            nodes.add(node)
            left += [each for each, _ in node.next_functions if each is not None]
    return nodes
