"""The input of a step, with tied weights counted and stored once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.model.loading.definition import tied_parameters
from aicompress.model.loading.mismatches import require_fits


def open_input(source: str | Path) -> tuple[Checkpoint, list[str]]:
    """Open a checkpoint; where it holds both of two tied parameters, the copy is hidden, so that no step writes it.

    Returns:
        The checkpoint, and a warning for every pair whose two differ: both are kept then.

    Raises:
        CheckpointError: missing, damaged, in a format this version does not read, or not of its architecture.
    """
    checkpoint = Checkpoint.open(source)
    require_fits(checkpoint)
    names = checkpoint.parameters()
    tied = tied_parameters(checkpoint.config, names) if checkpoint.config is not None else {}
    copies = {copy: kept for copy, kept in tied.items() if _same(checkpoint, copy, kept)}
    warnings = [
        f"{copy} and {kept} are tied in config.json but differ: both are kept"
        for copy, kept in tied.items()
        if copy not in copies
    ]
    return dataclasses.replace(checkpoint, copies=copies), warnings


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two parameters are stored in the same bytes."""
    first, second = checkpoint.stored_names(one), checkpoint.stored_names(other)
    return first.keys() == second.keys() and all(
        checkpoint.tensors[first[key]].spec == checkpoint.tensors[second[key]].spec
        and torch.equal(_raw(checkpoint.read(first[key])), _raw(checkpoint.read(second[key])))
        for key in first
    )


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
