"""Names of a compressed weight's tensors on disk.

`native` keeps the parameter's own name for the primary tensor and adds suffixes. `compressed-tensors` is the layout
that transformers and vLLM read: https://github.com/vllm-project/compressed-tensors, formats pack-quantized and
int-quantized.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from aicompress.errors import Refused
from aicompress.layer import LayerInfo
from aicompress.weights import Dense, IntGrouped, Weight

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
    tensors = weight.tensors()
    if not isinstance(weight, Dense) and tuple(tensors[""].shape) == weight.shape:
        raise Refused(f"{tensor}: a factor of rank {weight.shape[1]} saves nothing", "give it a smaller rank")
    return {name: tensors[suffix] for suffix, name in native_names(tensor, tensors).items()}


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
    if _is_int8(weight):
        return {f"{module}.weight": weight.codes, f"{module}.weight_scale": scale}
    tensors = {
        f"{module}.weight_packed": weight.packed(),
        f"{module}.weight_scale": scale,
        f"{module}.weight_shape": torch.tensor([rows or out, columns], device=weight.codes.device),
    }
    if weight.zero is not None:
        tensors[f"{module}.weight_zero_point"] = _packed_zeros(weight.zero.expand(out, -1), weight.bits)
    return tensors


def on_disk(tensor: str, weight: Weight, layout: Layout, rows: int | None = None) -> dict[str, Tensor]:
    """The tensors of a compressed parameter, or of a block of its `rows` rows, under the names of a layout."""
    return ct_tensors(tensor, weight, rows) if layout == "compressed-tensors" else native_tensors(tensor, weight)


def _packed_zeros(zero: Tensor, bits: int) -> Tensor:
    """Zero points (out, groups), packed along the rows' axis: (words, groups) int32."""
    from aicompress.weights.coding.packing import pack_rows

    unsigned = (zero.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    return pack_rows(unsigned.t().contiguous(), bits).t().contiguous()


def _is_int8(weight: IntGrouped) -> bool:
    """Whether codes are stored as they are, as readers with integer products of 8 bits take them."""
    return weight.activation_bits is not None and weight.bits == 8


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


@dataclass(frozen=True)
class Names:
    """Names that a reader has for the modules of a model.

    Attributes:
        of: module by parameter of the checkpoint, where it has one of its own.
        layers: all modules that the reader could take for quantized ones.
    """

    of: Mapping[str, str]
    layers: Collection[str]


def ct_config(
    weights: Mapping[str, IntGrouped],
    dequantize: bool,
    others: Iterable[str] = (),
    readers: Sequence[Names] = (),
    kv_cache_scheme: Any = None,
) -> dict[str, Any] | None:
    """config.json's quantization_config for integer weights by parameter name.

    None where no target can tell them: a name that one reader has for one of them is another module's to the next.

    Args:
        weights: the integer weights.
        dequantize: readers must decode at load.
        others: names of all other parameters, which no target may match.
        readers: that know modules by other names than those in the checkpoint.
        kv_cache_scheme: how keys and values are rounded in the cache, as the input says.
    """
    groups: dict[str, tuple[IntGrouped, list[str]]] = {}
    for tensor, weight in weights.items():
        key = repr((ct_scheme(weight), weight.activation_bits))
        groups.setdefault(key, (weight, []))[1].append(tensor)
    per_token = {"type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    everything = [*weights, *others]
    in_file = Names({name: name.removesuffix(".weight") for name in everything}, ())
    apart = [_apart(tensors, (in_file, *readers)) for _, tensors in groups.values()]
    if any(not set(wanted).isdisjoint(unwanted) for wanted, unwanted in apart):
        return None
    config_groups = {
        f"group_{number}": {
            "targets": targets(*apart[number]),
            "weights": ct_scheme(weight),
            "input_activations": {"num_bits": bits, **per_token} if (bits := weight.activation_bits) else None,
            "output_activations": None,
            "format": "int-quantized" if _is_int8(weight) else "pack-quantized",
        }
        for number, (weight, _) in enumerate(groups.values())
    }
    formats = {group["format"] for group in config_groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": CT_VERSION,
        "global_compression_ratio": None,
        "kv_cache_scheme": kv_cache_scheme,
        "ignore": [],
        "config_groups": config_groups,
        **({"dequantize": True} if dequantize else {}),
    }


def _apart(tensors: Iterable[str], readers: Iterable[Names]) -> tuple[list[str], list[str]]:
    """Names of the modules of these parameters, and of all other modules, in all ways that readers have them."""
    wanted: list[str] = []
    others: set[str] = set()
    for reader in readers:
        own = [reader.of[tensor] for tensor in tensors if tensor in reader.of]
        wanted += own
        others |= {*reader.layers, *reader.of.values()} - set(own)
    return wanted, sorted(others)


def targets(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Anchored regular expressions that match these modules and none of the others.

    Modules that differ in one number only share an expression with `\\d+` where that is exact; the rest have their own.
    A prefix is optional: heads add it, base models lack it. So a name that is another one with a prefix needs none of
    its own. No module outside the checkpoint, such as a new classification head, is taken for a packed one.

    Args:
        modules: names to match, in every way that readers have them.
        others: the same of all others.
    """
    wanted = list(dict.fromkeys(modules))
    strangers = [name.removesuffix(".weight") for name in others]
    shortest = _without_prefixed(wanted)
    families: dict[tuple[str, ...], list[str]] = {}
    for module in shortest:
        families.setdefault(tuple(_NUMBER.split(module)), []).append(module)
    endings = {name[dot + 1 :] for name in strangers for dot, letter in enumerate(name) if letter == "."}
    targets: list[str] = []
    for pieces, members in families.items():
        pattern = "\\d+".join(re.escape(piece) for piece in pieces)
        family = re.compile(f"(.*\\.)?{pattern}$")
        if len(members) > 1 and not any(family.match(name) for name in [*strangers, *(set(shortest) - set(members))]):
            targets.append(f"re:{family.pattern}")
        else:
            targets += [_target(module, endings) for module in members]
    if len(shortest) == len(wanted):
        return targets
    known = re.compile("|".join(target.removeprefix("re:") for target in targets))
    return targets + [_target(module, endings) for module in wanted if not known.match(module)]


def _without_prefixed(names: list[str]) -> list[str]:
    """The names that are no other one of them with a prefix."""
    known = set(names)

    def is_prefixed(name: str) -> bool:
        pieces = name.split(".")
        return any(".".join(pieces[first:]) in known for first in range(1, len(pieces)))

    return [name for name in names if not is_prefixed(name)]


def _target(module: str, endings: Collection[str]) -> str:
    """One module's expression: with an optional prefix, unless another module's name ends in this one's."""
    own = re.escape(module)
    return f"re:{own}$" if module in endings else f"re:(.*\\.)?{own}$"


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def candidates(
    weights: Mapping[str, tuple[LayerInfo, Weight]], has_config: bool, dense_forward: bool = False
) -> list[tuple[Layout, bool]]:
    """Layouts that can hold an output, the one that most readers load first, and whether they must decode it at load.

    compressed-tensors holds integer weights of linear layers; with one single scheme also zero points, embeddings and
    weights that the architecture's own code reads, but then only by decoding at load, `dequantize` (a second scheme
    would be decoded with the first one's, silently wrong). The native layout holds everything.

    Args:
        weights: by parameter name, its layer and its outline.
        has_config: there will be a config.json.
        dense_forward: a reader calls parts of the model, or its forward, past what decodes compressed-tensors at the
            first call of the model: they have to be decoded at load, so that inputs are not rounded.
    """
    compressed = {name: pair for name, pair in weights.items() if not isinstance(pair[1], Dense)}
    if not compressed:
        return [("plain", False)]
    integer = all(
        isinstance(weight, IntGrouped)
        and (weight.zero is None or not weight.zero.is_floating_point())
        and weight.even
        and info.kind not in ("conv", "experts")
        and not info.transposed
        and len(info.tensor.removesuffix(".weight")) in range(1, len(info.tensor))
        for info, weight in compressed.values()
    )
    if not has_config or not integer:
        return [("native", False)]
    ints = [(info, weight) for info, weight in compressed.values() if isinstance(weight, IntGrouped)]
    layouts: list[tuple[Layout, bool]] = []
    if not dense_forward and all(weight.symmetric and info.kind != "embedding" for info, weight in ints):
        layouts.append(("compressed-tensors", False))
    schemes = {repr((ct_scheme(weight), weight.activation_bits)) for _, weight in ints}
    if len(schemes) == 1 and (dense_forward or all(weight.activation_bits is None for _, weight in ints)):
        layouts.append(("compressed-tensors", True))
    return [*layouts, ("native", False)]
