"""Compressed checkpoints written straight from stored forms, without any method in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint, CheckpointWriter
from aicompress.layer import LayerInfo
from aicompress.model.loading.definitions.parameter_kinds import layer_kinds
from aicompress.pipeline.step.output import Destination, Planned, arrange
from aicompress.weights import Dense, IntGrouped, LowRank, Sparse, Tied, Weight

Pick = Callable[[LayerInfo, Tensor], Weight | None]


def compress(source: Path, out: Path, pick: Pick, owners: Mapping[str, Mapping[str, str]] | None = None) -> Path:
    """Store every layer in the form that `pick` makes of its matrix (out, in); None leaves it dense.

    Args:
        source: a plain checkpoint.
        out: where the compressed one goes.
        pick: as above.
        owners: of parameters that take parts of others, those by part; '' of one that is another's.
    """
    checkpoint = Checkpoint.open(source)
    kinds = layer_kinds(checkpoint.config, checkpoint.parameters()) if checkpoint.config else None
    infos = {info.tensor: info for info in checkpoint.layers(kinds)}
    weights = {name: pick(info, checkpoint.layer(info).weight) for name, info in infos.items()}
    shared = owners or {}
    for name, parts in shared.items():
        for part, owner in parts.items():
            info, its = infos[name], weights[owner] or Dense(checkpoint.layer(infos[owner]).weight)
            own = weights[name] if part else Tied.of(its, info.tensor_shape, info.transposed)
            assert own is not None
            weights[name] = own.borrowing(part, its)
    planned = {
        name: Planned(spec, weights.get(name), infos.get(name), shared.get(name, {}))
        for name, spec in checkpoint.parameters().items()
    }
    output = arrange(checkpoint, Destination(out), planned, {"command": "test"})
    with CheckpointWriter(out, output.shards) as writer:
        for name, plan in planned.items():
            for disk, tensor in output.encode(name, plan.weight or checkpoint.read(name)).items():
                writer.put(disk, tensor)
        output.write_files(writer)
        writer.seal()
    return out


def integers(
    matrix: Tensor, bits: int, group: int = 0, symmetric: bool = True, activations: int | None = None
) -> Weight:
    """Round to the nearest integer code; the last group is narrower where the size does not divide the columns."""
    columns = matrix.shape[1]
    matrix = torch.nn.functional.pad(matrix, (0, -columns % (group or columns)))
    grouped = matrix.reshape(matrix.shape[0], -1, group or matrix.shape[1])
    half = 2 ** (bits - 1)
    if symmetric:
        scale = grouped.abs().amax(-1) / (half - 0.5)
        zero = None
        codes = (grouped / scale[..., None]).round().clamp(-half, half - 1)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / (2 * half - 1)
        zero = (-half - low / scale).round().to(torch.int8)
        codes = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(-half, half - 1)
    codes = codes.reshape(matrix.shape)[:, :columns].contiguous()
    return IntGrouped(codes.to(torch.int8), scale, zero, bits, group, activations)


def low_rank(matrix: Tensor, rank: int, bits: int | None = None) -> Weight:
    """A truncated SVD, its factors dense or of 8-bit codes."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    left, right = u[:, :rank] * s[:rank], v[:rank]
    if bits is not None:
        return LowRank(integers(left, bits), integers(right, bits))
    return LowRank(Dense(left.contiguous()), Dense(right.contiguous()))


def halved(matrix: Tensor) -> Weight:
    """The larger half of the elements."""
    return Sparse.of(matrix, matrix.abs() > matrix.abs().median())
