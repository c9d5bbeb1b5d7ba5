"""Forward times summed over a checkpoint's matrix layers: for steps whose whole model is large, or cannot be built.

Of a large layer a block of rows is timed, and counted as often as the layer has such blocks.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.measure import WallTimes, interleaved
from aicompress.model.loading.running_layer import running_layer
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.environment import threads
from aicompress.report.model import Latency
from aicompress.weights import Weight
from aicompress.weights.coding.rows import row_slices

ROWS = 128  # inputs of a linear layer
SIDE = 16  # length of a convolution's input in each dimension
ROUNDS, WARMUP = 7, 2
HELD = 1 << 24  # weights of a layer that are timed at once: the multiplication of 128 inputs takes milliseconds
TIMED = ("linear", "conv", "head")  # an embedding is a look-up


@dataclass(frozen=True)
class Signature:
    """The signature of a layer: layers that share it take the same time.

    Attributes:
        kind: linear, conv or head.
        shape: of the dense parameter.
        dtype: of the dense parameter.
        stored: form, bits, groups, rank; empty for a plain tensor.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str


@dataclass
class _Side:
    """The layers of one checkpoint: one of each signature, and how many there are."""

    checkpoint: Checkpoint
    sample: dict[Signature, LayerInfo] = field(default_factory=dict)
    count: Counter[Signature] = field(default_factory=Counter)


def layers(before: Checkpoint, after: Checkpoint) -> Latency | None:
    """Sum of the forward times of all matrix layers, as they run from either checkpoint.

    Layers of equal shape and stored form are timed once and counted as often as they occur; those of equal shape are
    timed in turn. What lies between layers (attention, activations, look-ups) is left out. Of one with more than `HELD`
    weights the time is that of a block of its rows, in proportion; of a product, that of each factor so, added up. The
    95th percentile is the sum of the layers' own: an upper bound.

    Returns:
        None where one side has no matrix layer.
    """
    sides = [_side(before), _side(after)]
    if not all(side.sample for side in sides):
        return None
    timings: dict[Signature, WallTimes] = {}
    for shape in dict.fromkeys(signature.shape for side in sides for signature in side.sample):
        timings |= _timed(sides, shape)
    medians = [sum(side.count[signature] * timings[signature].median for signature in side.sample) for side in sides]
    highs = [sum(side.count[signature] * timings[signature].p95 for signature in side.sample) for side in sides]
    counts = [sum(side.count.values()) for side in sides]
    number = str(counts[0]) if counts[0] == counts[1] else f"{counts[0]} and {counts[1]}"
    what = f"sum over {number} matrix layers, {ROWS} rows, {threads()}"
    if any(math.prod(signature.shape) > HELD for side in sides for signature in side.sample):
        what += f"; of those above {HELD:,} weights a block, times their number"
    return Latency(what, 1e3 * medians[0], 1e3 * medians[1], 1e3 * highs[0], 1e3 * highs[1], ROUNDS)


def _side(checkpoint: Checkpoint) -> _Side:
    side = _Side(checkpoint)
    for info in checkpoint.layers(known_kinds(checkpoint)[0]):
        if info.kind not in TIMED or info.part not in ("", "out"):  # its parts run as one
            continue
        entry = checkpoint.manifest.entries.get(info.tensor)
        stored = json.dumps(entry.meta, sort_keys=True) if entry is not None else ""
        signature = Signature(info.kind, info.tensor_shape, info.dtype, stored)
        side.sample.setdefault(signature, info)
        side.count[signature] += 1
    return side


def _timed(sides: list[_Side], shape: tuple[int, ...]) -> dict[Signature, WallTimes]:
    """Time the layers of one shape in turn, each signature once."""
    samples = {
        signature: (side.checkpoint, info)
        for side in reversed(sides)
        for signature, info in side.sample.items()
        if signature.shape == shape
    }
    blocks = {signature: _blocks(checkpoint, info) for signature, (checkpoint, info) in samples.items()}
    times = iter(interleaved([call for parts in blocks.values() for call, _ in parts], ROUNDS, WARMUP))
    timings = {}
    for signature, parts in blocks.items():
        rounds = zip(*([count * seconds for seconds in next(times).samples] for _, count in parts), strict=True)
        timings[signature] = WallTimes(tuple(map(sum, rounds)))
    return timings


def _blocks(checkpoint: Checkpoint, info: LayerInfo) -> list[tuple[Callable[[], object], float]]:
    """Forward passes through as much of a layer as is held, each with how many of them the whole one takes."""
    if math.prod(info.tensor_shape) <= HELD:
        return [(_call(running_layer(checkpoint, info), info, _inputs(info)), 1.0)]
    outline = checkpoint.outline(info.tensor)
    parts = {} if outline is None or info.kind == "conv" else outline.parts()
    if parts:
        return [_block(checkpoint, info, weight, part) for part, weight in parts.items()]
    axis = int(info.transposed) if outline is None else None
    rows, length = checkpoint.row_blocks(info.tensor, HELD, axis)[0], _outputs(info)
    count = 1.0 if rows is None else length / (rows.stop - rows.start)
    return [(_call(running_layer(checkpoint, info, rows), info, _inputs(info)), count)]


def _block(checkpoint: Checkpoint, info: LayerInfo, weight: Weight, part: str) -> tuple[Callable[[], object], float]:
    """A forward pass through some rows of a part of a stored weight, and how many of them it takes."""
    multiple = checkpoint.row_multiple(info.tensor, part)
    rows = row_slices(*weight.shape, HELD, multiple)[0] if multiple else None
    count = 1.0 if rows is None else weight.shape[0] / (rows.stop - rows.start)
    return _call(running_layer(checkpoint, info, rows, part), info, weight.shape[1]), count


def _inputs(info: LayerInfo) -> int:
    """Columns of the whole matrix that a factor is a part of."""
    return info.shape[1] if not info.part else math.prod(info.tensor_shape) // _outputs(info)


def _call(layer: nn.Module, info: LayerInfo, columns: int) -> Callable[[], object]:
    """A forward pass on normally distributed inputs."""
    generator = torch.Generator().manual_seed(0)
    if info.kind == "conv":
        kernel = info.tensor_shape[2:]
        size: tuple[int, ...] = (1, info.tensor_shape[1], *(max(SIDE, k) for k in kernel))
    else:
        size = (ROWS, columns)
    dtype = info.dtype if info.dtype.itemsize > 1 else torch.float32
    inputs = torch.randn(size, generator=generator).to(dtype)

    @torch.inference_mode()
    def run() -> object:
        return layer(inputs)

    return run


def _outputs(info: LayerInfo) -> int:
    """Rows of the whole matrix that a factor is a part of."""
    return info.tensor_shape[1] if info.transposed else info.tensor_shape[0]
