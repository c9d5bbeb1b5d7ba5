"""The processes of a run: one alone, or the ranks of a torchrun, which average, add up and gather."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aicompress.model.blocks.all_reduce import Team


class Processes(Team):
    """The processes that train or calibrate as one: here this one alone."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all processes."""

    def send(self, tensor: Tensor) -> Tensor:
        """The first process's tensor; the others give one of its shape and dtype."""
        return tensor

    def wait(self) -> None:
        """Until all processes are here."""


class Ranks(Processes):
    """The processes of a torchrun, connected by Accelerate."""

    def __init__(self, device: torch.device) -> None:
        from accelerate import Accelerator

        self._accelerator: Any = Accelerator(cpu=device.type == "cpu")
        self.rank: int = self._accelerator.process_index
        self.size: int = self._accelerator.num_processes

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all processes: one transfer for all of them."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        mean = self._accelerator.reduce(flat, reduction="mean")
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        summed: Tensor = self._accelerator.reduce(tensor, reduction="sum")
        return summed

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def send(self, tensor: Tensor) -> Tensor:
        """The first process's tensor."""
        sent = tensor.contiguous()
        torch.distributed.broadcast(sent, src=0)
        return sent

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()


def started() -> int:
    """How many processes torchrun started; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes(device: torch.device) -> Processes:
    """The ranks that torchrun started, or this process alone."""
    return Ranks(device) if started() > 1 else Processes()


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0
