"""A forward pass that pauses at every block: it hands over the block's inputs and goes on with its outputs.

Calibration must see every sample at block i before any sample reaches block i+1, and what happens between two blocks
(masks, rotary tables, position biases, an encoder's output that a decoder attends to) is the model's own business. So
each batch runs the model's real forward in a thread of its own that is parked at every block; one thread runs at a
time. Passes of several models can stop side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from aicompress.model.blocks.caches import changing, copied, pass_on, take_over
from aicompress.model.blocks.input_errors import input_errors_refused

_current = threading.local()


@dataclass(frozen=True)
class Arrival:
    """A stream has come to a block.

    Attributes:
        block: index into the blocks that are `gated`.
        args, kwargs: what the model passes to the block.
    """

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class PausedForward:
    """One batch on its way through the model.

    Args:
        call: runs the model's forward; its blocks are `gated`.
        data: what the model runs on, where it fails.
    """

    def __init__(self, call: Callable[[], Any], data: str) -> None:
        self._call, self._data = call, data
        self._resume = threading.Semaphore(0)
        self._parked = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._value: Any = None
        self._error: BaseException | None = None
        self._abandoned = False
        self.arrival: Arrival | None = None
        self.result: Any = None

    def start(self) -> None:
        """Run to the first block, or to the end.

        Raises:
            Refused: the model's own code fails on the way.
        """
        self._thread.start()
        self._wait()

    def advance(self, value: Any) -> None:
        """Give the current block's outputs and run to the next block, or to the end.

        Raises:
            Refused: the model's own code fails on the way.
        """
        self._value = value
        self.arrival = None
        self._resume.release()
        self._wait()

    def abandon(self) -> None:
        """Let go of a stream that will not be advanced any more."""
        if self._thread.is_alive():
            self._abandoned = True
            self._resume.release()
            self._thread.join()

    def _wait(self) -> None:
        self._parked.acquire()
        if self._error is not None:
            with input_errors_refused(self._data):
                raise self._error

    def _run(self) -> None:
        _current.stream = self
        try:
            with torch.no_grad():
                self.result = self._call()
        except _Abandoned:
            pass
        except BaseException as error:  # handed to the thread that waits, which raises it
            self._error = error
        finally:
            self._parked.release()

    def park(self, arrival: Arrival) -> Any:
        """Called in the stream's thread: hand over the block's inputs and wait for its outputs."""
        own, arrival = arrival, _each(copied, arrival)
        self.arrival = arrival
        self._parked.release()
        self._resume.acquire()
        if self._abandoned:
            raise _Abandoned
        for mine, theirs in zip(_values(own), _values(arrival), strict=True):
            take_over(mine, theirs)
        value, self._value = self._value, None
        return value


def follow(stream: PausedForward, other: PausedForward) -> None:
    """Let a stream go on with what the block of both left when it ran where another stream is, which is alike."""
    if stream.arrival is not None and other.arrival is not None:
        pass_on(_values(stream.arrival), _values(other.arrival))


class _Abandoned(BaseException):
    """Unwinds a parked stream."""


@contextmanager
def gated(
    blocks: Sequence[nn.Module], calls: Sequence[Callable[[], Any]], data: str = "calibration inputs"
) -> Iterator[list[PausedForward]]:
    """Streams that stop at the blocks, none of them started; calls from other threads run the blocks as usual.

    Args:
        blocks: where they stop.
        calls: one forward pass each.
        data: what they run on, where one fails.
    """
    for index, block in enumerate(blocks):
        block.forward = _gated(index, block.forward)
    streams = [PausedForward(call, data) for call in calls]
    try:
        yield streams
    finally:
        for block in blocks:
            del block.forward
        for stream in streams:
            stream.abandon()


def _gated(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    def stops(*args: Any, **kwargs: Any) -> Any:
        stream: PausedForward | None = getattr(_current, "stream", None)
        arrival = Arrival(index, args, kwargs)
        if stream is not None:
            return stream.park(arrival)
        given = _each(changing, arrival)
        return forward(*given.args, **given.kwargs)

    return stops


def _each(change: Callable[[Any], Any], arrival: Arrival) -> Arrival:
    """An arrival with every argument changed."""
    kwargs = {name: change(value) for name, value in arrival.kwargs.items()}
    return Arrival(arrival.block, tuple(map(change, arrival.args)), kwargs)


def _values(arrival: Arrival) -> list[Any]:
    return [*arrival.args, *arrival.kwargs.values()]


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
    with ExitStack() as gates:
        streams = [gates.enter_context(gated(each.modules, each.calls, "inputs")) for each in runs]
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
