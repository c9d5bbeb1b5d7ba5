"""Sums of several processes: whoever saw a layer, all end with the same statistics."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.model.blocks.all_reduce import add_up
from aicompress.model.blocks.input_statistics import InputSums, Recorder

NEEDS = frozenset({"gram", "mean_abs", "max_abs"})


class Threads:
    """Two threads that exchange values in step."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=10)
        self.values: dict[int, Any] = {}

    def member(self, rank: int) -> Member:
        return Member(self, rank)


class Member:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.threads, self.rank = threads, rank

    def gather(self, value: Any) -> list[Any]:
        self.threads.values[self.rank] = value
        self.threads.barrier.wait()
        found = [self.threads.values[rank] for rank in (0, 1)]
        self.threads.barrier.wait()
        return found

    def total(self, tensor: Tensor) -> Tensor:
        one, two = self.gather(tensor)
        found: Tensor = one + two
        return found


def recorder(rows: dict[str, Tensor], leaders: dict[str, str]) -> Recorder:
    found = Recorder({}, NEEDS)
    for name, given in rows.items():
        found.sums[name] = InputSums(NEEDS)
        found.sums[name].add(given)
    found.leaders.update(leaders)
    return found


def together(recorders: list[Recorder]) -> list[BaseException]:
    threads, errors = Threads(), []

    def run(rank: int) -> None:
        try:
            add_up(recorders[rank], threads.member(rank))
        except CompressError as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return errors


def test_a_layer_that_one_process_never_saw_has_the_others_statistics() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(size, 4, generator=draw) for size in (5, 7, 3))
    mine = recorder({"a": first, "expert": third}, {"a": "a", "b": "a", "expert": "expert"})
    other = recorder({"a": second}, {"a": "a", "b": "a"})
    assert together([mine, other]) == []
    rows = torch.cat([first, second])
    for each in (mine, other):
        assert each.leaders == {"a": "a", "b": "a", "expert": "expert"}
        assert {name: sums.count for name, sums in each.sums.items()} == {"a": 12, "expert": 3}
        torch.testing.assert_close(each.sums["a"].tensors["gram"], rows.t() @ rows)
        torch.testing.assert_close(each.sums["a"].tensors["mean_abs"], rows.abs().sum(0))
        torch.testing.assert_close(each.sums["a"].tensors["max_abs"], rows.abs().amax(0))
        torch.testing.assert_close(each.sums["expert"].tensors["gram"], third.t() @ third)


def test_processes_that_disagree_on_shared_inputs_stop() -> None:
    rows = torch.ones(2, 4)
    errors = together([recorder({"a": rows}, {"a": "a", "b": "a"}), recorder({"b": rows}, {"a": "b", "b": "b"})])
    assert errors
    with pytest.raises(CompressError, match="disagree"):
        raise errors[0]
