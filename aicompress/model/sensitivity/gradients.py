"""Per-sample gradients of a loss in a model's weights, with the graph and the weights of one block in memory.

A forward pass walks the blocks as calibration does and keeps what each block was given. A backward pass walks them in
reverse: a block is loaded again, run again with a graph (Chen et al. 2016, arXiv:1604.06174), differentiated and
dropped. What lies between the blocks (embeddings, final norms, heads, an encoder's output that every block of a decoder
attends to) keeps its graph throughout; its weights stay in memory. Samples run one at a time, so that their gradients
can be squared before they are added up.

A weight between the blocks that one sample goes back through several times, such as a convolution whose output is added
to that of the last block, has its gradient complete only when all of them are done: until then its pieces are held, by
sample. Where they are too large for that, or a weight has several places, such as a head tied to an embedding or a
block that runs again, the whole model is differentiated, one sample after another. Which it is follows from the graphs
of one forward pass, before anything is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from aicompress.errors import CompressError, Refused
from aicompress.measure import Counted
from aicompress.model.blocks.all_reduce import ALONE, Team
from aicompress.model.blocks.caches import leave, left_by, mapped
from aicompress.model.blocks.find import Block, find_blocks
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.model.blocks.paused_forward import PausedForward, gated
from aicompress.model.blocks.walk import prepare
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.loss import Objective, Sample
from aicompress.model.sensitivity.moments import MomentSums, Pieces, SpreadError, Watched, harvest, watch
from aicompress.statistics import GradientStats


@dataclass(frozen=True)
class Descent:
    """What to differentiate.

    Attributes:
        model: on the meta device.
        loader: loads its parts, in float32.
        samples: those of this process.
        wanted: weights by layer name.
        objective: the loss of a sample.
        team: processes that do this together, each with samples of its own.
    """

    model: Any
    loader: PartialModel
    samples: Sequence[Sample]
    wanted: Mapping[str, Watched]
    objective: Objective
    team: Team = ALONE


Keep = Callable[[Mapping[str, GradientStats]], None]


@dataclass
class _Call:
    """A block's turn in one sample's forward pass."""

    block: int
    given: tuple[Any, Any]  # args and kwargs, as the model made them
    leaves: list[Tensor | None]  # `_results` in flat order; each collects its gradient; None for what has none


def collect(job: Descent, keep: Keep, progress: Counted = lambda done, total: None) -> None:
    """Bring the moments of every wanted weight's gradient to `keep`, block by block from the last to the first.

    Raises:
        CompressError: a loss is not finite, or the processes differ in what they run.
    """
    blocks = find_blocks(job.model)
    prepare(job.model)
    count = sum(job.team.gather(len(job.samples)))
    if not _shared(job):
        try:
            _Reverse(job, blocks, count, keep, progress).run()
            return
        except SpreadError:
            job.loader.drop(lambda name: True)
    _whole(job, count, keep, progress)


def _shared(job: Descent) -> bool:
    """Whether a wanted weight has several names, such as a tied head."""
    names: dict[int, list[str]] = {}
    for name, parameter in job.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [list(pair) for pair in getattr(job.model, "all_tied_weights_keys", {}).items()]
    shared = {n.rpartition(".")[0] for group in (*names.values(), *tied) if len(group) > 1 for n in group}
    return any(watched.module in shared for watched in job.wanted.values())


def _finite(loss: Tensor, sample: Sample) -> Tensor:
    """The loss, unless it is no number, or the architecture runs blocks where autograd cannot follow, as Reformer."""
    if not loss.requires_grad:
        raise Refused("the model's loss has no gradients in its weights", "choose a method that reads none")
    if not torch.isfinite(loss.detach()):
        raise CompressError(
            f"the loss of calibration sample {sample.number} is {float(loss.detach())}", "check the data"
        )
    return loss


def _whole(job: Descent, count: int, keep: Keep, progress: Counted) -> None:
    """The plain way: everything in memory, one sample after another."""
    job.loader.load(lambda name: True)
    job.model.requires_grad_(False)
    sums = watch(job.model, job.wanted)
    for done, sample in enumerate(job.samples):
        with input_errors_refused():
            output = job.model(**sample.inputs)
        _finite(job.objective(output, sample), sample).backward()  # type: ignore[no-untyped-call]
        harvest(sums, sample)
        progress(done + 1, len(job.samples))
    keep({name: each.moments(count, job.team) for name, each in sums.items()})
    job.loader.drop(lambda name: True)


class _Reverse:
    """Forward and backward, block by block."""

    def __init__(self, job: Descent, blocks: Sequence[Block], count: int, keep: Keep, progress: Counted) -> None:
        self.job, self.blocks, self.count, self.keep, self.progress = job, blocks, count, keep, progress
        owners = {n: next((b for b in blocks if b.owns(w.module)), None) for n, w in job.wanted.items()}
        self.inside = {b.name: [n for n, owner in owners.items() if owner is b] for b in blocks}
        self.outside = [n for n, owner in owners.items() if owner is None]
        self.calls: list[list[_Call]] = [[] for _ in job.samples]
        self.pieces = Pieces()  # of the first sample, which stands for all

    def _of(self, names: Sequence[str]) -> dict[str, Watched]:
        return {name: self.job.wanted[name] for name in names}

    def run(self) -> None:
        job = self.job
        job.loader.load(lambda name: not any(block.owns(name) for block in self.blocks))
        job.model.requires_grad_(False)
        glue = watch(job.model, self._of(self.outside))
        calls = [_forward(job.model, sample) for sample in job.samples]
        with gated([block.module for block in self.blocks], calls) as streams:
            for number, stream in enumerate(streams):
                stream.start()
                self._ended(number, stream, glue)
            while (arrival := streams[0].arrival) is not None:
                self._forward(streams, arrival.block, glue)
        self._backward(glue)
        if glue:
            self.keep({name: each.moments(self.count, job.team) for name, each in glue.items()})

    def _forward(self, streams: Sequence[PausedForward], index: int, glue: Mapping[str, MomentSums]) -> None:
        """All samples through one block."""
        block = self.blocks[index]
        if self.inside[block.name] and any(call.block == index for call in self.calls[0]):
            raise SpreadError
        self.job.loader.load(block.owns)
        for number, stream in enumerate(streams):
            arrival = stream.arrival
            if arrival is None or arrival.block != index:
                raise CompressError("calibration samples take different ways through the model", "use samples alike")
            if number == 0 and glue:
                self.pieces.add((arrival.args, arrival.kwargs))
            with torch.no_grad(), input_errors_refused():
                output, left = _results(block, *mapped(torch.Tensor.detach, (arrival.args, arrival.kwargs)))
            output, left = tree_map_only(Tensor, _leaf, (output, left))
            leaves = [each if _differentiable(each) else None for each in tree_flatten((output, left))[0]]
            given = mapped(lambda tensor: tensor, (arrival.args, arrival.kwargs))  # what is shared as it is before
            self.calls[number].append(_Call(index, given, leaves))
            leave((*arrival.args, *arrival.kwargs.values()), left)
            stream.advance(output)
            self._ended(number, stream, glue)
        self.job.loader.drop(block.owns)
        self.progress(len(self.calls[0]), 3 * len(self.calls[0]) + 1)

    def _ended(self, number: int, stream: PausedForward, glue: Mapping[str, MomentSums]) -> None:
        """At the end of a forward pass its loss is differentiated at once, so that one sample's logits are held."""
        if stream.arrival is not None:
            return
        sample, output, stream.result = self.job.samples[number], stream.result, None
        if not self.calls[number]:
            raise CompressError(
                "the model's forward pass never reaches one of its blocks", "check the calibration inputs"
            )
        loss = _finite(self.job.objective(output, sample), sample)
        if number == 0 and glue:
            self.pieces.add(loss)
            self.pieces.hold(glue, self.count)
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]  # blocks may come from the same parts
        harvest(glue, sample)

    def _backward(self, glue: Mapping[str, MomentSums]) -> None:
        """All samples back through the blocks, the last one first."""
        total = len(self.calls[0])
        if any(len(calls) != total for calls in self.calls):
            raise CompressError("calibration samples take different ways through the model", "use samples alike")
        for position in range(total - 1, -1, -1):
            block = self.blocks[self.calls[0][position].block]
            self.job.loader.load(block.owns)
            block.module.requires_grad_(False)
            sums = watch(self.job.model, self._of(self.inside[block.name]))
            for number, calls in enumerate(self.calls):
                _back(block, calls.pop())
                harvest(sums, self.job.samples[number])
                harvest(glue, self.job.samples[number])
            if sums:
                self.keep({name: each.moments(self.count, self.job.team) for name, each in sums.items()})
            self.job.loader.drop(block.owns)
            self.progress(total + 2 * (total - position), 3 * total + 1)


def _forward(model: Any, sample: Sample) -> Callable[[], Any]:
    def call() -> Any:
        # Gradients for what lies between the blocks; they run elsewhere, without.
        with torch.enable_grad(), input_errors_refused():
            return model(**sample.inputs)

    return call


def _back(block: Block, call: _Call) -> None:
    """Differentiate one call of a block, and go on through what the model did before it."""
    if all(leaf is None or leaf.grad is None for leaf in call.leaves):
        return
    pairs: list[tuple[Tensor, Tensor]] = []

    def own(given: Tensor) -> Tensor:
        if not given.requires_grad:
            return given
        leaf = given.detach().requires_grad_()
        pairs.append((given, leaf))
        return leaf

    with torch.enable_grad():
        outputs = tree_flatten(_results(block, *mapped(own, call.given)))[0]
    ends = [
        (output, leaf.grad)
        for output, leaf in zip(outputs, call.leaves, strict=True)
        if leaf is not None and leaf.grad is not None and output.requires_grad
    ]
    if not ends:
        return
    torch.autograd.backward([output for output, _ in ends], [grad for _, grad in ends])
    # Several blocks may go back through the same part, such as the end of an encoder: its graph is kept for them.
    starts = [(given, leaf.grad) for given, leaf in pairs if leaf.grad is not None]
    if starts:
        torch.autograd.backward([given for given, _ in starts], [grad for _, grad in starts], retain_graph=True)


def _results(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """A block's outputs, and what it leaves for later ones."""
    output = block.module(*args, **kwargs)
    return output, left_by((*args, *kwargs.values()))


def _leaf(output: Tensor) -> Tensor:
    leaf = output.detach()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf


def _differentiable(each: Any) -> bool:
    return isinstance(each, Tensor) and each.requires_grad
