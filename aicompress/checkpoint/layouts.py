"""Names of a compressed weight's tensors on disk.

`native` keeps the parameter's own name for the primary tensor and adds suffixes. `compressed-tensors` is the layout
that transformers and vLLM read: https://github.com/vllm-project/compressed-tensors, formats pack-quantized and
int-quantized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from aicompress.checkpoint.manifest import Entry
from aicompress.errors import CheckpointError, Refused
from aicompress.layer import LayerInfo
from aicompress.weights import IntGrouped, TensorSpec, Weight

Layout = Literal["plain", "native", "compressed-tensors"]
CT_VERSION = "0.20.0"


def native_names(tensor: str, suffixes: Iterable[str]) -> dict[str, str]:
    """Suffix -> name on disk of a compressed parameter's tensors."""
    return {suffix: f"{tensor}_{suffix}" if suffix else tensor for suffix in suffixes}


def native_tensors(tensor: str, weight: Weight) -> dict[str, Tensor]:
    """Tensors of any form under their names on disk.

    Raises:
        Refused: the primary tensor has the dense shape, so a reader without the form would take it for the weight.
    """
    found = weight.tensors()
    if weight.form != "dense" and tuple(found[""].shape) == weight.shape:
        raise Refused(f"{tensor}: a factor of rank {weight.shape[1]} saves nothing", "give it a smaller rank")
    return {name: found[suffix] for suffix, name in native_names(tensor, found).items()}


def ct_tensors(tensor: str, weight: Weight) -> dict[str, Tensor]:
    """Tensors of an integer weight under the names of compressed-tensors."""
    if not isinstance(weight, IntGrouped):
        raise TypeError(f"compressed-tensors stores integer weights only, not {weight.form}")
    module = tensor.removesuffix(".weight")
    out, columns = weight.shape
    scale = weight.scale.expand(out, -1).contiguous()  # a tensor-wide scale is repeated: readers know rows and groups
    if weight.activation_bits is not None:
        return {f"{module}.weight": weight.codes, f"{module}.weight_scale": scale}
    found = {
        f"{module}.weight_packed": weight.packed(),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor([out, columns], device=weight.codes.device),
    }
    if weight.zero is not None:
        found[f"{module}.weight_zero_point"] = _packed_zeros(weight.zero.expand(out, -1), weight.bits)
    return found


def _packed_zeros(zero: Tensor, bits: int) -> Tensor:
    """Zero points (out, groups), packed along the rows' axis: (words, groups) int32."""
    from aicompress.weights.packing import pack_rows

    unsigned = (zero.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    return pack_rows(unsigned.t().contiguous(), bits).t().contiguous()


def ct_scheme(weight: IntGrouped) -> dict[str, Any]:
    """The `weights` part of a compressed-tensors config group."""
    return {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "group" if weight.group_size else "channel",
        "group_size": weight.group_size or None,
        "dynamic": False,
    }


def ct_config(weights: Mapping[str, IntGrouped], dequantize: bool) -> dict[str, Any]:
    """config.json's quantization_config for integer weights by parameter name.

    Targets are anchored regular expressions of whole module names, so that no other module, such as a new
    classification head, is taken for a packed one. The prefix is optional: heads add it, base models lack it.
    """
    groups: dict[str, tuple[IntGrouped, list[str]]] = {}
    for tensor, weight in weights.items():
        key = repr((ct_scheme(weight), weight.activation_bits))
        groups.setdefault(key, (weight, []))[1].append(tensor.removesuffix(".weight"))
    per_token = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    config_groups = {
        f"group_{number}": {
            "targets": [f"re:(.*\\.)?{re.escape(module)}$" for module in modules],
            "weights": ct_scheme(weight),
            "input_activations": per_token if weight.activation_bits else None,
            "output_activations": None,
            "format": "int-quantized" if weight.activation_bits else "pack-quantized",
        }
        for number, (weight, modules) in enumerate(groups.values())
    }
    formats = {group["format"] for group in config_groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": CT_VERSION,
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [],
        "config_groups": config_groups,
        **({"dequantize": True} if dequantize else {}),
    }


def ct_entries(
    config: dict[str, Any], specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], dtype: torch.dtype
) -> dict[str, Entry]:
    """Entries of a checkpoint in the compressed-tensors layout, ours or another tool's.

    Raises:
        CheckpointError: a scheme this version does not decode.
    """
    entries: dict[str, Entry] = {}
    for name in specs:
        module, found, _ = name.partition(".weight_scale")
        if not found or name != f"{module}.weight_scale":
            continue
        group = _group_of(module, config)
        weights, activations = group["weights"], group.get("input_activations")
        packed = f"{module}.weight_packed" in specs
        if weights.get("type") != "int" or not (packed or specs[f"{module}.weight"].dtype is torch.int8):
            raise CheckpointError(f"{module}: quantized as {config.get('format')!r}, which is not supported", _INTEGERS)
        shape = read(f"{module}.weight_shape").tolist() if packed else specs[f"{module}.weight"].shape
        columns = int(shape[1])
        meta = {
            "form": "int_grouped",
            "bits": int(weights["num_bits"]),
            "group_size": int(weights.get("group_size") or 0) if weights.get("strategy") == "group" else 0,
            "shape": [int(shape[0]), columns],
            "symmetric": bool(weights.get("symmetric", True)),
        }
        if activations:
            meta["activation_bits"] = int(activations["num_bits"])
        entries[f"{module}.weight"] = Entry(TensorSpec(dtype, (int(shape[0]), columns)), False, meta)
    return entries


_INTEGERS = "integer pack-quantized and int-quantized checkpoints can be read"


def _group_of(module: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config group whose targets name a module; a class name such as Linear takes what is left."""
    groups: list[dict[str, Any]] = list(config.get("config_groups", {}).values())
    for group in groups:
        for target in group["targets"]:
            if target.startswith("re:") and re.match(target[3:], module):
                return group
            if target == module:
                return group
    by_class = [group for group in groups if any(t in ("Linear", "Embedding") for t in group["targets"])]
    if by_class:
        return by_class[0]
    raise CheckpointError(f"{module} is quantized, but no config group names it", "its config.json is inconsistent")


def ct_restore(entry: Entry, module: str, read: Callable[[str], Tensor], names: Mapping[str, Any]) -> IntGrouped:
    """Decode one weight from the compressed-tensors layout."""
    from aicompress.weights.packing import unpack_rows

    meta, scale = entry.meta, read(f"{module}.weight_scale")
    out = int(meta["shape"][0])
    scale = scale.reshape(scale.shape[0] if scale.ndim else 1, -1)
    if f"{module}.weight_packed" not in names:
        zero_name = f"{module}.weight_zero_point"
        zero = read(zero_name) if zero_name in names else None
        bits, group = int(meta["bits"]), int(meta["group_size"])
        return IntGrouped(read(f"{module}.weight"), scale, zero, bits, group, meta.get("activation_bits"))
    zero = None
    if not meta["symmetric"]:
        bits = int(meta["bits"])
        unsigned = unpack_rows(read(f"{module}.weight_zero_point").t().contiguous(), bits, out).t()
        zero = (unsigned.to(torch.int16) - (1 << (bits - 1))).to(torch.int8).contiguous()
    return IntGrouped.from_packed(read(f"{module}.weight_packed"), scale, zero, meta)


def choose(weights: Mapping[str, tuple[LayerInfo, Weight]], has_config: bool) -> tuple[Layout, bool]:
    """The layout that most readers load, and whether compressed-tensors must decode at load time (`dequantize`).

    compressed-tensors holds integer weights of linear layers; with one single scheme also zero points and embeddings,
    but then only by decoding at load (a second scheme would be decoded with the first one's, silently wrong).
    """
    compressed = {name: pair for name, pair in weights.items() if pair[1].form != "dense"}
    if not compressed:
        return "plain", False
    integer = all(
        isinstance(weight, IntGrouped)
        and info.kind != "conv"
        and not info.transposed
        and info.tensor.endswith(".weight")
        for info, weight in compressed.values()
    )
    if not has_config or not integer:
        return "native", False
    ints = [(info, weight) for info, weight in compressed.values() if isinstance(weight, IntGrouped)]
    if all(weight.symmetric and info.kind != "embedding" for info, weight in ints):
        return "compressed-tensors", False
    schemes = {repr(ct_scheme(weight)) for _, weight in ints}
    plain_activations = all(weight.activation_bits is None for _, weight in ints)
    return ("compressed-tensors", True) if len(schemes) == 1 and plain_activations else ("native", False)


def ct_outline(entry: Entry, empty: Mapping[str, Tensor]) -> IntGrouped:
    """Outline of a stored weight from its tensors on the meta device."""
    meta, scale = entry.meta, empty["weight_scale"]
    out, columns = (int(size) for size in meta["shape"])
    groups = columns // int(meta["group_size"]) if meta["group_size"] else 1
    bits, activation = int(meta["bits"]), meta.get("activation_bits")
    return IntGrouped.outline(
        (out, columns), (scale.dtype, (out, groups)), bool(meta["symmetric"]), bits, int(meta["group_size"]), activation
    )
