"""Rotation of the residual stream: find its readers and writers, and test that the model computes the same.

A turn R (an orthogonal matrix) of the stream is taken up by all that writes it (W → Rᵀ W, embeddings E → E R) and
undone by all that reads it (W → W R). That is possible where everything reads it through a normalization whose weight
has been moved into the readers. Nothing here knows an architecture: parts are found by watching blocks run on random
weights, and a turned block must give the turned output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.errors import Refused
from aicompress.model.blocks.find import Block, find_blocks
from aicompress.model.blocks.paused_forward import Arrival, PausedForward, gated
from aicompress.model.equivalence.rotated_parameters import Reader, Rotatable, Turn
from aicompress.model.equivalence.scaling_groups import ChannelAxis, Search, call_axis, reads
from aicompress.model.equivalence.search import in_checkpoint, kind_of, prepare, sources_of
from aicompress.model.equivalence.trace import Seen, alike, changed, watched
from aicompress.model.loading.partial_model import PartialModel

HINT = "take a method that rotates nothing: `aicompress methods quantize` says when to take which"
TOLERANCE = 1e-3  # of the largest number
Turns = Callable[[int, bool], Turn]  # (width, whether the vector of ones must stay) -> a random turn


def find_rotatable(model: Any, loader: PartialModel, batch: Mapping[str, Tensor], turns: Turns) -> Rotatable:
    """Find what touches a model's residual stream, by names in its checkpoint.

    Args:
        model: on the meta device.
        loader: fills parts of it with float32 noise.
        batch: a few samples, as keyword arguments of its forward.
        turns: makes turns to try.

    Raises:
        Refused: the model computes something else when its residual stream is turned.
    """
    blocks = find_blocks(model)
    prepare(model)
    loader.load(lambda name: not any(block.owns(name) for block in blocks))
    try:
        return _RotationSearch(model, loader, blocks, batch, turns).residual()
    finally:
        loader.drop(lambda name: True)


@dataclass
class _RotationSearch:
    """One search."""

    model: Any
    loader: PartialModel
    blocks: Sequence[Block]
    batch: Mapping[str, Tensor]
    turns: Turns

    def residual(self) -> Rotatable:
        kinds = [kind_of(block.module) for block in self.blocks]
        first, inputs, outputs, by_kind = self._walk(kinds)
        width, centred = inputs.shape[-1], any(part.centred for part in by_kind.values())
        outer = self._outer(first, width, by_kind, centred)
        turn = self.turns(width, centred)
        parameters = dict(self.model.named_parameters())
        with changed(parameters, outer.changes(parameters.__getitem__, turn)), self._started() as stream:
            same = alike([_hidden(stream.arrival)], [turn(inputs, -1)], TOLERANCE)
            while (arrival := stream.arrival) is not None:
                stream.advance(_turned(outputs[kinds[arrival.block]], turn))
            seen: Seen = stream.result
        if not same or not alike(seen.output, first.output, TOLERANCE):
            raise Refused("what lies before or after the model's blocks does not turn with the residual stream", HINT)
        return self._named(kinds, by_kind, outer)

    @contextmanager
    def _started(self) -> Iterator[PausedForward]:
        call = partial(watched, self.model, partial(self.model, **self.batch))
        with gated([block.module for block in self.blocks], [call]) as (stream,):
            stream.start()
            yield stream

    def _walk(self, kinds: Sequence[Any]) -> tuple[Seen, Tensor, dict[Any, Any], dict[Any, Rotatable]]:
        """Once through the model: what its outer part does, the first block's input, each kind's output and parts."""
        outputs, by_kind, inputs = {}, {}, None
        with self._started() as stream:
            while (arrival := stream.arrival) is not None:
                block, kind = self.blocks[arrival.block], kinds[arrival.block]
                inputs = _hidden(arrival).clone() if inputs is None else inputs
                if kind not in by_kind:
                    self.loader.load(block.owns)
                    by_kind[kind], outputs[kind] = self._block(block.module, arrival)
                    self.loader.drop(block.owns)
                stream.advance(outputs[kind])
            seen: Seen = stream.result
        if inputs is None:
            raise Refused("the model's forward pass reaches none of its blocks", HINT)
        return seen, inputs, outputs, by_kind

    def _block(self, block: nn.Module, arrival: Arrival) -> tuple[Rotatable, Any]:
        """The parts of one block, and its output."""
        hidden = _hidden(arrival)
        search = Search(block, lambda: block(*arrival.args, **arrival.kwargs))
        width, parameters = hidden.shape[-1], dict(block.named_parameters())
        with torch.no_grad():
            output = search.run()
            readers = [reader for name in search.first.norms if (reader := _reader(search, name, width)) is not None]
            behind = {axis.parameter for reader in readers for axis in reader.matrices}
            writers = _writers(search.first, parameters, width, behind)
            for centred in (False, True):
                turn, rotatable = self.turns(width, centred), Rotatable(width, tuple(readers), writers, centred)
                moved = _replaced(arrival, hidden, turn(hidden, -1))
                with changed(parameters, rotatable.changes(parameters.__getitem__, turn)):
                    again = block(*moved.args, **moved.kwargs)
                if readers and writers and alike([_first(again)], [turn(_first(output), -1)], TOLERANCE):
                    return rotatable, output
        raise Refused(f"a block of type {type(block).__name__} does not turn with its residual stream", HINT)

    def _outer(self, seen: Seen, width: int, by_kind: Mapping[Any, Rotatable], centred: bool) -> Rotatable:
        """Embeddings, the last norm and the head."""
        parameters = dict(self.model.named_parameters())
        inside = [name for name in parameters if any(block.owns(name) for block in self.blocks)]
        offsets = {reader.weight.offset for part in by_kind.values() for reader in part.readers}
        readers: list[Reader] = []
        for name, output in seen.norms.items():
            matrices = _given(seen, parameters, output)
            if matrices and f"{name}.weight" not in inside:
                bias = ChannelAxis(f"{name}.bias", 0) if f"{name}.bias" in parameters else None
                readers.append(Reader(ChannelAxis(f"{name}.weight", 0, min(offsets)), bias, matrices))
        behind = {axis.parameter for reader in readers for axis in reader.matrices}
        writers = [
            ChannelAxis(f"{name}.weight", 1)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Embedding) and module.embedding_dim == width and f"{name}.weight" not in inside
        ]
        return Rotatable(width, tuple(readers), (*writers, *_writers(seen, parameters, width, behind)), centred)

    def _named(self, kinds: Sequence[Any], by_kind: Mapping[Any, Rotatable], outer: Rotatable) -> Rotatable:
        """All parts of the model by names in the checkpoint."""
        sources = sources_of(self.loader)
        readers: list[Reader] = []
        writers: list[ChannelAxis] = []
        for prefix, part in [
            ("", outer),
            *((f"{b.name}.", by_kind[k]) for b, k in zip(self.blocks, kinds, strict=True) if k in by_kind),
        ]:
            for reader in part.readers:
                own = self._axes((reader.weight, *((reader.bias,) if reader.bias else ())), prefix, sources)
                matrices = self._axes(reader.matrices, prefix, sources)
                readers.append(Reader(own[0], own[1] if reader.bias else None, matrices))
            writers += self._axes(part.writers, prefix, sources)
        return replace(outer, readers=tuple(readers), writers=tuple(writers))

    def _axes(
        self, axes: Sequence[ChannelAxis], prefix: str, sources: Mapping[str, Sequence[str]]
    ) -> tuple[ChannelAxis, ...]:
        stored = in_checkpoint(axes, prefix, sources, self.loader)
        if stored is None:
            names = ", ".join(prefix + axis.parameter for axis in axes[:3])
            raise Refused(f"{names}: the checkpoint keeps it in a form that cannot be turned", HINT)
        return stored


def _reader(search: Search, name: str, width: int) -> Reader | None:
    """A norm of the stream's width whose weight can move into what reads it."""
    calls = [call for call in search.first.calls if reads(call.given, search.first.norms[name])]
    if not calls or calls[0].given.shape[-1] != width:
        return None
    place = search.norm(name, calls)
    if place is None:
        return None
    weight, *bias = place.producers
    return Reader(weight, bias[0] if bias else None, place.consumers)


def _given(seen: Seen, parameters: Mapping[str, Tensor], output: Tensor) -> tuple[ChannelAxis, ...]:
    """The matrices that are given an output."""
    return tuple({call_axis(parameters, call): None for call in seen.calls if reads(call.given, output)})


def _writers(
    seen: Seen, parameters: Mapping[str, Tensor], width: int, readers: Iterable[str]
) -> tuple[ChannelAxis, ...]:
    """Matrices that give as many channels as the stream has and do not read it, and their biases."""
    axes: dict[ChannelAxis, None] = {}
    for call in seen.calls:
        axis = parameters[call.parameter].ndim - (1 if call.transposed else 2)
        if parameters[call.parameter].shape[axis] == width and call.parameter not in readers:
            axes[ChannelAxis(call.parameter, axis)] = None
            if call.bias:
                axes[ChannelAxis(call.bias, 0)] = None
    return tuple(axes)


def _hidden(arrival: Arrival | None) -> Tensor:
    """The residual stream as a block is given it.

    Raises:
        Refused: the block is given nothing of the kind.
    """
    given = () if arrival is None else (*arrival.args, *arrival.kwargs.values())
    state = next((t for t in given if isinstance(t, Tensor) and t.is_floating_point() and t.ndim == 3), None)
    if state is None:
        raise Refused("the model's blocks are not given hidden states", HINT)
    return state


def _replaced(arrival: Arrival, old: Tensor, new: Tensor) -> Arrival:
    args = tuple(new if value is old else value for value in arrival.args)
    return replace(arrival, args=args, kwargs={k: new if v is old else v for k, v in arrival.kwargs.items()})


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _turned(output: Any, turn: Turn) -> Any:
    if isinstance(output, Tensor):
        return turn(output, -1)
    return type(output)((turn(output[0], -1), *output[1:]))
