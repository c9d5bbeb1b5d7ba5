"""Read integer weights in the compressed-tensors layout, written by this package or by another tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aicompress.checkpoint.compressed_tensors.targets import Targets
from aicompress.checkpoint.manifest import Entry
from aicompress.errors import CheckpointError, Unsupported
from aicompress.weights import IntGrouped, TensorSpec
from aicompress.weights.stored.int_grouped import groups_of, require_groups

CT_SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight")


def ct_entries(
    config: dict[str, Any], specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], dtype: torch.dtype
) -> dict[str, Entry]:
    """Entries of a checkpoint in the compressed-tensors layout, ours or another tool's.

    Raises:
        CheckpointError: a scheme this version does not decode.
    """
    try:
        targets = Targets.of(config)
    except MALFORMED as error:
        raise _malformed("the checkpoint", error) from error
    entries: dict[str, Entry] = {}
    for name in specs:
        module = name.removesuffix(".weight_scale")
        if module == name:
            continue
        try:
            meta = _ct_meta(module, targets.group_of(module), specs, read)
        except MALFORMED as error:
            raise _malformed(module, error) from error
        entries[f"{module}.weight"] = Entry(TensorSpec(dtype, (meta["shape"][0], meta["shape"][1])), False, meta)
    return entries


MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)


def _malformed(what: str, error: Exception) -> CheckpointError:
    reason = f": {error}" if type(error) is ValueError and str(error) else ""
    return CheckpointError(
        f"{what} is quantized, but its config group is malformed{reason}", "its config.json is inconsistent"
    )


def _ct_meta(
    module: str, group: dict[str, Any], specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Facts of one integer weight, from its config group and its tensors."""
    weights, activations = group["weights"], group.get("input_activations")
    packed = f"{module}.weight_packed" in specs
    known = weights.get("strategy") in ("tensor", "channel", "group") and weights.get("type") == "int"
    if not known or not (packed or specs[f"{module}.weight"].dtype is torch.int8):
        raise Unsupported(f"{module} is quantized in a way that is not supported", _READ)
    out, columns = (
        (int(size) for size in read(f"{module}.weight_shape").tolist()) if packed else specs[f"{module}.weight"].shape
    )
    bits, size = int(weights["num_bits"]), int(weights.get("group_size") or 0)
    grouped = weights["strategy"] == "group"
    if not 1 <= bits <= 8 or out < 1 or columns < 1 or (grouped and (size < 1 or columns % size)):
        raise ValueError
    if packed and specs[f"{module}.weight_packed"].shape != (out, -(-columns * bits // 32)):
        raise ValueError
    symmetric = bool(weights.get("symmetric", True))
    meta = {
        "form": IntGrouped.form,
        "bits": bits,
        "group_size": size if grouped else 0,
        "shape": [out, columns],
        "symmetric": symmetric,
    }
    return {**meta, "activation_bits": int(activations["num_bits"])} if activations and rounded(activations) else meta


_READ = "integers of 1 to 8 bits per tensor, channel or group, float8, mxfp4, mxfp6 and nvfp4 are read"


def rounded(activations: Mapping[str, Any]) -> bool:
    """Whether a layer that rounds its inputs so can be stored: as integers, per token, without zero points."""
    return (
        activations.get("dynamic") is True and activations.get("type") == "int" and activations.get("symmetric", True)
    )


def ct_restore(entry: Entry, module: str, read: Callable[[str], Tensor], names: Mapping[str, Any]) -> IntGrouped:
    """Decode one weight from the compressed-tensors layout.

    Raises:
        ValueError: its tensors are not what its config group says.
    """
    from aicompress.weights.coding.packing import unpack_rows

    meta, scale = entry.meta, read(f"{module}.weight_scale")
    out, columns = (int(size) for size in meta["shape"])
    bits, group = int(meta["bits"]), int(meta["group_size"])
    scale = scale.reshape(scale.shape[0] if scale.ndim else 1, -1)
    if f"{module}.weight_packed" not in names:
        zero_name = f"{module}.weight_zero_point"
        zero = read(zero_name).reshape(scale.shape) if zero_name in names else None
        require_groups(scale, zero, out, groups_of(columns, group))
        return IntGrouped(read(f"{module}.weight"), scale, zero, bits, group, meta.get("activation_bits"))
    require_groups(scale, None, out, groups_of(columns, group))
    zero = None
    if not meta["symmetric"]:
        unsigned = unpack_rows(read(f"{module}.weight_zero_point").t().contiguous(), bits, out).t()
        zero = (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8).contiguous()
    return IntGrouped.from_packed(read(f"{module}.weight_packed"), scale, zero, meta)
