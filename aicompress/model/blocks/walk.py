"""Run a model block by block with calibration data, one block in memory at a time.

At each block, in the order in which the model runs them: load its weights from the file, run every batch through it
while hooks add up the statistics of the wanted layers, let the caller compress the layers, put the compressed weights
in, run again so that the next block sees the compressed prefix, drop the block. The original's activations can be
carried along (`cross`), so that a method may aim at the original's outputs from the compressed model's inputs (GPTAQ,
Li et al. 2025, arXiv:2504.02692; Qronos, Zhang et al. 2025, arXiv:2505.11695).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.measure import Counted
from aicompress.model.blocks.all_reduce import ALONE, Team, add_up
from aicompress.model.blocks.bf16_interior import given, interior
from aicompress.model.blocks.find import Block, find_blocks
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.model.blocks.input_statistics import Recorder
from aicompress.model.blocks.paused_forward import PausedForward, follow, gated
from aicompress.model.blocks.reconstruction import Stage, hidden
from aicompress.model.loading.definitions.config import configurations
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.loading.places import ExpertStack, Place, Slot
from aicompress.statistics import InputStats

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Walk:
    """What to walk, and what for.

    Attributes:
        model: on the meta device.
        loader: loads its parts.
        batches: keyword arguments of the model's forward; `attention_mask` marks real tokens.
        wanted: by layer name its module's path in the model, its part of a merged parameter, or the experts it holds.
        needs: statistics to collect: gram, norms, mean_abs, mean.
        cross: also carry the original model's activations and collect E[x x̂ᵀ].
        team: processes that walk together, each with batches of its own.
        rounded: linear layers and statistics multiply float32 numbers rounded to bfloat16.
        changes: later blocks see the layers as the visitor compressed them; where they do not, every block runs once.
        weights: how much each batch's rows count in the statistics; empty: all alike.
        tune: compresses the layers of a block in the visitor's place, with the block, its inputs and the outputs of the
            original model at hand; returns their new dense parameters by checkpoint name.
    """

    model: Any
    loader: PartialModel
    batches: Sequence[Batch]
    wanted: Mapping[str, Place]
    needs: frozenset[str]
    cross: bool = False
    team: Team = ALONE
    rounded: bool = False
    changes: bool = True
    weights: Sequence[float] = ()
    tune: Callable[[Mapping[str, InputStats], Stage], Mapping[str, Tensor]] | None = None

    @property
    def carries(self) -> bool:
        """Whether the original model's activations are carried along."""
        return self.cross or self.tune is not None


class Visitor(Protocol):
    """What the caller does at a block."""

    def finished(self, layers: Sequence[str]) -> Mapping[str, Tensor] | None:
        """Dense parameters of a block that an earlier run has compressed, by checkpoint name; None to visit it."""
        return None

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        """Compress the layers of one block; returns their new dense parameters by checkpoint name."""


@dataclass
class Gatherer(Visitor):
    """Keeps the statistics of all blocks, and changes nothing."""

    seen: dict[str, InputStats] = field(default_factory=dict)

    def visit(self, stats: Mapping[str, InputStats]) -> Mapping[str, Tensor]:
        self.seen |= stats
        return {}


@dataclass
class _State:
    """The streams of a walk, and how far they are."""

    compressed: list[PausedForward]
    original: list[PausedForward]
    waiting: set[str] = field(default_factory=set)  # wanted layers that have not been visited
    visited: set[str] = field(default_factory=set)
    differs: bool = False  # some layer before has been compressed


def walk(job: Walk, visitor: Visitor, progress: Counted = lambda done, total: None) -> None:
    """Visit every block that holds a wanted layer, in running order.

    Layers outside of all blocks, such as an output head, are visited last, together. What the model would run after the
    last wanted layer is left out.

    Raises:
        CompressError: the model cannot be walked with these batches.
    """
    blocks = find_blocks(job.model)
    prepare(job.model)
    inside = {name: next((b for b in blocks if b.owns(_path(place))), None) for name, place in job.wanted.items()}
    outside = [name for name, block in inside.items() if block is None]
    watched = [place for name in outside if isinstance(place := job.wanted[name], Slot | ExpertStack)]
    merged = {f"{place.module}.{place.leaf}" for place in watched}

    def between(name: str) -> bool:
        return not any(block.owns(name) for block in blocks)

    job.loader.load(between)
    recorder, count = _recorder(job, outside), len(job.batches)
    calls = [partial(job.model, **batch) for batch in job.batches] * (2 if job.carries else 1)
    with gated([block.module for block in blocks], calls) as streams:
        state = _State(streams[:count], streams[count:], set(job.wanted))
        with recorder:
            _start(job, state, recorder)
            job.loader.offload(lambda name: between(name) and name not in merged)  # embeddings, output heads
            while state.waiting and (arrival := state.compressed[0].arrival) is not None:
                block = blocks[arrival.block]
                _at_block(job, block, [n for n, b in inside.items() if b is block], state, visitor)
                progress(len(state.visited), len(blocks))
        if outside and visitor.finished(outside) is None:
            _visit(job, visitor, recorder)


def prepare(model: Any) -> None:
    """Set a model up to be run block by block."""
    for config in configurations(model):
        config.use_cache = False  # a block runs twice; a cache of keys and values would grow twice
        config._experts_implementation = "eager"  # one expert after another, so that they can be watched


def _path(place: Place) -> str:
    return place if isinstance(place, str) else place.module


def _recorder(job: Walk, layers: Sequence[str]) -> Recorder:
    modules: dict[str, Any] = {}
    parts: dict[str, tuple[Tensor, int]] = {}
    experts: dict[str, list[str]] = {}
    for name in layers:
        place = job.wanted[name]
        if isinstance(place, Slot):
            parts[name] = job.model.get_submodule(place.module)._parameters[place.leaf], place.expert
        elif isinstance(place, ExpertStack):
            stack = place.parts(job.model.get_submodule(place.module)._parameters[place.leaf])
            experts[name] = [f"{name}.{number}" for number in range(place.count)]
            parts |= {part: (stack, number) for number, part in enumerate(experts[name])}
        else:
            modules[name] = job.model.get_submodule(_path(place))
    return Recorder(modules, job.needs, parts, experts, job.rounded)


def _start(job: Walk, state: _State, recorder: Recorder) -> None:
    """Run every batch up to the first block."""
    for number, batch in enumerate(job.batches):
        recorder.mask, recorder.weight = _mask(batch), job.weights[number] if job.weights else 1.0
        state.compressed[number].start()
        if state.original:
            recorder.repeated = True
            state.original[number].start()
            recorder.repeated = False
        recorder.batch_done()
    recorder.mask, recorder.weight = None, 1.0
    if state.compressed[0].arrival is None:
        raise CompressError("the model's forward pass never reaches one of its blocks", "check the calibration inputs")


def _at_block(job: Walk, block: Block, layers: list[str], state: _State, visitor: Visitor) -> None:
    """Load, record, compress, run again, drop."""
    job.loader.load(block.owns)
    first = block.name not in state.visited  # a block that the model runs again (ALBERT) is compressed once
    recorded = False
    state.visited.add(block.name)
    state.waiting -= set(layers)
    done = visitor.finished(layers) if layers and first else None
    outputs: list[Any] = []
    if layers and first and done is None:
        with interior(block.module, job.rounded), _recorder(job, layers) as recorder:
            outputs = _record(job, block, state, recorder)
        _visit(job, visitor, recorder, _stage(job, block, state, outputs))
        recorded = True
    elif state.original:
        with interior(block.module, job.rounded):
            outputs = _run(job, block, state.original)
    for name, tensor in (done or {}).items() if job.changes else ():
        job.loader.replace(name, tensor)
    if state.waiting and (job.changes or not recorded):
        _advance(job, block, layers, state, outputs)
    job.loader.drop(block.owns)


def _advance(job: Walk, block: Block, layers: list[str], state: _State, outputs: list[Any]) -> None:
    """Send all streams on to the next block; `outputs` are the original streams'."""
    same = bool(outputs) and not state.differs and not layers  # nothing is compressed yet
    if same:
        for own, original in zip(state.compressed, state.original, strict=True):
            follow(own, original)
    for stream, output in zip(state.original, outputs, strict=True):
        stream.advance(output)
    state.differs = state.differs or bool(layers)
    with interior(block.module, job.rounded), input_errors_refused():
        for number, stream in enumerate(state.compressed):
            stream.advance(outputs[number] if same else _run(job, block, [stream])[0])


def _visit(job: Walk, visitor: Visitor, recorder: Recorder, stage: Stage | None = None) -> None:
    add_up(recorder, job.team)
    stats = recorder.stats()
    written = job.tune(stats, stage) if job.tune and stage else visitor.visit(stats)
    for name, tensor in written.items() if job.changes else ():
        job.loader.replace(name, tensor)


def _stage(job: Walk, block: Block, state: _State, outputs: list[Any]) -> Stage | None:
    """What tuning needs of a block; None where it gives no hidden states to compare."""
    targets = [target for output in outputs if (target := hidden(output)) is not None]
    if job.tune is None or len(targets) < len(job.batches):
        return None
    inputs = [(s.arrival.args, s.arrival.kwargs) for s in state.compressed if s.arrival is not None]
    return Stage(block.name, block.module, inputs, targets, [_mask(b) for b in job.batches], job.rounded)


def _run(job: Walk, block: Block, streams: Sequence[PausedForward]) -> list[Any]:
    """The block's outputs for where each stream is; to be called in its `interior`."""
    arrivals = [stream.arrival for stream in streams if stream.arrival is not None]
    with input_errors_refused(), torch.no_grad():
        return [given(block.module, job.rounded, arrival.args, arrival.kwargs) for arrival in arrivals]


def _record(job: Walk, block: Block, state: _State, recorder: Recorder) -> list[Any]:
    """Add up the statistics of every batch; returns the original streams' outputs, if there are any."""
    outputs: list[Any] = []
    for number, stream in enumerate(state.compressed):
        recorder.mask = _mask(job.batches[number])
        recorder.weight = job.weights[number] if job.weights else 1.0
        if state.original and state.differs:
            recorder.keep = {}
            outputs += _run(job, block, [state.original[number]])
            recorder.originals, recorder.keep = recorder.keep if job.cross else None, None
        same = _run(job, block, [stream])
        if state.original and not state.differs:
            outputs += same  # nothing is compressed yet: both models have the same activations
            follow(state.original[number], stream)
        if state.waiting and not job.changes:
            stream.advance(same[0])
        recorder.batch_done()
    return outputs


def _mask(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()
