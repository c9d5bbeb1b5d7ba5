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
from aicompress.checkpoint.naming import is_embedding
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


def ct_tensors(tensor: str, weight: Weight, rows: int | None = None) -> dict[str, Tensor]:
    """Tensors of an integer weight under the names of compressed-tensors.

    Args:
        tensor: the parameter.
        weight: all of it, or a block of its rows.
        rows: how many the whole weight has; None where this is the whole.
    """
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
        f"{module}.weight_shape": torch.tensor([rows or out, columns], device=weight.codes.device),
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


def ct_config(weights: Mapping[str, IntGrouped], dequantize: bool, others: Iterable[str] = ()) -> dict[str, Any]:
    """config.json's quantization_config for integer weights by parameter name.

    Args:
        weights: the integer weights.
        dequantize: readers must decode at load.
        others: names of all other parameters, which no target may match.
    """
    groups: dict[str, tuple[IntGrouped, list[str]]] = {}
    for tensor, weight in weights.items():
        key = repr((ct_scheme(weight), weight.activation_bits))
        groups.setdefault(key, (weight, []))[1].append(tensor.removesuffix(".weight"))
    per_token = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    everything = {tensor.removesuffix(".weight") for tensor in (*weights, *others)}
    config_groups = {
        f"group_{number}": {
            "targets": targets(modules, sorted(everything - set(modules))),
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


def targets(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Anchored regular expressions that match these modules and none of the others.

    Modules that differ in one number only share an expression with `\\d+` where that is exact; the rest have their own.
    The prefix is optional: heads add it, base models lack it. No module outside the checkpoint, such as a new
    classification head, is taken for a packed one.
    """
    families: dict[tuple[str, ...], list[str]] = {}
    for module in modules:
        families.setdefault(tuple(_NUMBER.split(module)), []).append(module)
    modules = list(modules)
    strangers = [name.removesuffix(".weight") for name in others]
    found: list[str] = []
    for pieces, members in families.items():
        pattern = "\\d+".join(re.escape(piece) for piece in pieces)
        family = re.compile(f"(.*\\.)?{pattern}$")
        if len(members) > 1 and not any(family.match(name) for name in [*strangers, *(set(modules) - set(members))]):
            found.append(f"re:{family.pattern}")
        else:
            found += [_target(module, strangers) for module in members]
    return found


def _target(module: str, strangers: Iterable[str]) -> str:
    """One module's expression: with an optional prefix, unless another module is named by this one's with a prefix."""
    own = re.escape(module)
    alone = not any(name.endswith(f".{module}") for name in strangers)
    return f"re:(.*\\.)?{own}$" if alone else f"re:{own}$"


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def ct_entries(
    config: dict[str, Any], specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], dtype: torch.dtype
) -> dict[str, Entry]:
    """Entries of a checkpoint in the compressed-tensors layout, ours or another tool's.

    Raises:
        CheckpointError: a scheme this version does not decode.
    """
    _require_known(config, specs)
    entries: dict[str, Entry] = {}
    for name in specs:
        module = name.removesuffix(".weight_scale")
        if module == name:
            continue
        try:
            meta = _ct_meta(module, _group_of(module, config), specs, read)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, re.error) as error:
            raise CheckpointError(
                f"{module} is quantized, but its config group is malformed", "its config.json is inconsistent"
            ) from error
        entries[f"{module}.weight"] = Entry(TensorSpec(dtype, (meta["shape"][0], meta["shape"][1])), False, meta)
    return entries


def _require_known(config: dict[str, Any], specs: Mapping[str, TensorSpec]) -> None:
    """Refuse parts of the format that would be dropped silently."""
    reordered = next((name for name in specs if name.endswith(".weight_g_idx")), None)
    if reordered is not None:
        raise CheckpointError(f"{reordered}: columns in another order are not supported", _INTEGERS)
    if config.get("kv_cache_scheme"):
        raise CheckpointError("a quantized key-value cache is not supported", _INTEGERS)


def _ct_meta(
    module: str, group: dict[str, Any], specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Facts of one integer weight, from its config group and its tensors."""
    weights, activations = group["weights"], group.get("input_activations")
    packed = f"{module}.weight_packed" in specs
    known = weights.get("strategy") in ("tensor", "channel", "group") and weights.get("type") == "int"
    dynamic = not activations or (
        activations.get("dynamic") is True and activations.get("type") == "int" and activations.get("symmetric", True)
    )
    if not known or not dynamic or not (packed or specs[f"{module}.weight"].dtype is torch.int8):
        raise CheckpointError(f"{module} is quantized in a way that is not supported", _INTEGERS)
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
        "form": "int_grouped",
        "bits": bits,
        "group_size": size if grouped else 0,
        "shape": [out, columns],
        "symmetric": symmetric,
    }
    return {**meta, "activation_bits": int(activations["num_bits"])} if activations else meta


_INTEGERS = "integer pack-quantized and int-quantized weights can be read, with dynamic activations or none"


def _group_of(module: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config group whose targets name a module; a class name such as Linear takes what is left."""
    groups: list[dict[str, Any]] = list(config["config_groups"].values())
    for group in groups:
        for target in group["targets"]:
            if target == module or (target.startswith("re:") and re.match(target[3:], module)):
                return group
    # What has no name of an embedding is a linear layer of some class, Linear or a fused one.
    embedding = is_embedding(module)
    by_class = [group for group in groups if any(_is_class(t, embedding) for t in group["targets"])]
    if by_class:
        return by_class[0]
    raise CheckpointError(f"{module} is quantized, but no config group names it", "its config.json is inconsistent")


def _is_class(target: str, embedding: bool) -> bool:
    return target.isidentifier() and ("Embedding" in target) == embedding


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


def choose(
    weights: Mapping[str, tuple[LayerInfo, Weight]], has_config: bool, read: Callable[[list[str]], bool]
) -> tuple[Layout, bool]:
    """The layout that most readers load, and whether compressed-tensors must decode at load time (`dequantize`).

    compressed-tensors holds integer weights of linear layers; with one single scheme also zero points, embeddings and
    weights that the architecture's own code reads, but then only by decoding at load (a second scheme would be decoded
    with the first one's, silently wrong).

    Args:
        weights: by parameter name, its layer and its outline.
        has_config: there will be a config.json.
        read: whether the architecture's own code reads some of these parameters.
    """
    compressed = {name: pair for name, pair in weights.items() if pair[1].form != "dense"}
    if not compressed:
        return "plain", False
    integer = all(
        isinstance(weight, IntGrouped)
        and (weight.zero is None or not weight.zero.is_floating_point())
        and weight.even
        and info.kind != "conv"
        and not info.transposed
        and len(info.tensor.removesuffix(".weight")) in range(1, len(info.tensor))
        for info, weight in compressed.values()
    )
    if not has_config or not integer:
        return "native", False
    ints = [(info, weight) for info, weight in compressed.values() if isinstance(weight, IntGrouped)]
    plain = all(weight.symmetric and info.kind != "embedding" for info, weight in ints)
    if plain and not read(list(compressed)):
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
