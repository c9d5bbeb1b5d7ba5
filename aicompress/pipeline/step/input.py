"""The input of a step, with tied weights counted and stored once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.adapters.lora import Adapter
from aicompress.checkpoint.adapters.merging import with_adapter
from aicompress.checkpoint.files import read_parts
from aicompress.checkpoint.views.decoded import with_decoded
from aicompress.model.loading.definitions.parameter_kinds import tied_elsewhere, tied_parameters
from aicompress.model.loading.mismatches import require_fits, without_added_biases
from aicompress.pipeline.step.checks import known_kinds

COMPARED = 1 << 23  # bytes of each of two tensors that are read at a time


@dataclass(frozen=True)
class Adapted:
    """An input with adapters to merge into it.

    Attributes:
        path: the checkpoint.
        adapters: folders of adapters in the order in which they are merged, each with its weight.
    """

    path: str | Path
    adapters: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """How reports name it: "model + lora × 0.5"."""
        merged = (folder if weight == 1 else f"{folder} × {weight:g}" for folder, weight in self.adapters)
        return " + ".join([str(self.path), *merged])

    def open(self) -> Checkpoint:
        """The checkpoint with its adapters.

        Raises:
            CheckpointError: the checkpoint, or an adapter, cannot be read, or they do not fit.
        """
        checkpoint = Checkpoint.open(self.path)
        for folder, weight in self.adapters:
            tied = tied_elsewhere(checkpoint.config, checkpoint.parameters()) if checkpoint.config else {}
            checkpoint = with_adapter(checkpoint, Adapter.open(folder, weight), tied)
        return checkpoint


def open_input(source: str | Path | Adapted) -> tuple[Checkpoint, list[str]]:
    """Open a checkpoint; where it holds both of two tied parameters, the copy is hidden, so that no step writes it.

    Returns:
        The checkpoint, and a warning for every pair whose two differ: both are kept then.

    Raises:
        CheckpointError: missing, damaged, in a format this version does not read, or not of its architecture.
    """
    opened = (source if isinstance(source, Adapted) else Adapted(source)).open()
    require_fits(opened)
    checkpoint = _with_forms_of_layers(without_added_biases(opened))
    names = checkpoint.parameters()
    tied = tied_parameters(checkpoint.config, names) if checkpoint.config is not None else {}
    copies = {copy: kept for copy, kept in tied.items() if _same(checkpoint, copy, kept)}
    warnings = [
        f"{copy} and {kept} are tied in config.json but differ: both are kept"
        for copy, kept in tied.items()
        if copy not in copies
    ]
    return dataclasses.replace(checkpoint, copies=copies), warnings + _unlike_dtypes(checkpoint)


def _unlike_dtypes(checkpoint: Checkpoint) -> list[str]:
    """Warn of a config.json that names another dtype than all weights have: transformers loads them in that one."""
    config, specs = checkpoint.config or {}, checkpoint.parameters()
    said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    plain = {spec.dtype for name, spec in specs.items() if checkpoint.is_plain(name) and spec.dtype.is_floating_point}
    stored = sorted(str(dtype).removeprefix("torch.") for dtype in plain)
    wanted = getattr(torch, said, None)
    if checkpoint.manifest.entries or not plain or not isinstance(wanted, torch.dtype) or wanted in plain:
        return []
    return [f"config.json says {said} and the weights are {' and '.join(stored)}: transformers computes in {said}"]


def _with_forms_of_layers(checkpoint: Checkpoint) -> Checkpoint:
    """The view in which what another tool has quantized keeps its form only where it is a layer, as all forms do."""
    kept = checkpoint.foreign.kept
    if not kept:
        return checkpoint
    layers = {info.tensor for info in checkpoint.layers(known_kinds(checkpoint)[0])}
    return with_decoded(checkpoint, [name for name in kept if name not in layers])


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two parameters are stored in the same bytes."""
    first, second = checkpoint.stored_names(one), checkpoint.stored_names(other)
    return first.keys() == second.keys() and all(
        checkpoint.tensors[first[key]].spec == checkpoint.tensors[second[key]].spec
        and _same_bytes(checkpoint, first[key], second[key])
        for key in first
    )


def _same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors of one dtype and shape are equal, some of them read at a time where files hold them so."""
    if checkpoint.foreign.is_decoded(one) or checkpoint.foreign.is_decoded(other):
        return torch.equal(_raw(checkpoint.read(one)), _raw(checkpoint.read(other)))
    parts = [read_parts(checkpoint.tensors[name], name, COMPARED) for name in (one, other)]
    return all(torch.equal(_raw(first), _raw(second)) for (_, first), (_, second) in zip(*parts, strict=True))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
