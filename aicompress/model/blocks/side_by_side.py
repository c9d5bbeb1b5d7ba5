"""Runs of several models that stop at the same modules and go on together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from aicompress.model.blocks.paused_forward import Arrival, PausedForward, gate


@dataclass(frozen=True)
class Runs:
    """The forward passes of one model over several batches.

    Attributes:
        modules: where they stop; those of the other models in the same order.
        calls: one forward pass each.
    """

    modules: Sequence[nn.Module]
    calls: Sequence[Callable[[], Any]]


Arrivals = dict[int, Arrival]  # by the number of the batch


def run_side_by_side(
    runs: Sequence[Runs], visit: Callable[[int, list[Arrivals]], Sequence[dict[int, Any]]]
) -> list[list[Any]]:
    """Run all models to their ends, one module after another.

    Args:
        runs: of each model.
        visit: (number of the module, for each model the batches that have come to it) -> what the module gives for
            each of these. A batch whose pass does not lead there, as in an expert, is not among them.

    Returns:
        What the calls of each model gave.
    """
    ungated = [gate(list(each.modules)) for each in runs]
    streams = [[PausedForward(call, "inputs") for call in each.calls] for each in runs]
    try:
        for stream in (each for model in streams for each in model):
            stream.start()
        while True:
            waiting = [stream.arrival.block for stream in streams[0] if stream.arrival is not None]
            if not waiting:
                break
            place = waiting[0]
            arrived = [
                {n: s.arrival for n, s in enumerate(model) if s.arrival is not None and s.arrival.block == place}
                for model in streams
            ]
            for model, given in zip(streams, visit(place, arrived), strict=True):
                for number, output in given.items():
                    model[number].advance(output)
        return [[stream.result for stream in model] for model in streams]
    finally:
        for remove in ungated:
            remove()
        for stream in (each for model in streams for each in model):
            stream.abandon()
