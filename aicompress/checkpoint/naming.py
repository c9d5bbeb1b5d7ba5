"""Tell which parameters are layers, and of what kind, from names and shapes alone.

A model definition knows better; where there is one, `model.load.layer_kinds` corrects this table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from aicompress.layer import Kind
from aicompress.weights import TensorSpec

_WEIGHT = re.compile(r"(?:^|\.)(?:weight|weight_(?:ih|hh)_l\d+(?:_reverse)?|in_proj_weight)$")
_EMBEDDING = re.compile(
    r"(?:^|[._])(?:wte|wpe|emb|embed|embeds|embedding|embeddings|shared|tok_embeddings|embed_tokens|embed_positions"
    r"|embed_in|relative_attention_bias|(?:word|token|position|token_type|segment)_embeddings?)$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection)$")
_EXPERTS = re.compile(r"(?:^|\.)experts\.(?:\w*?(\d+)\.)?")
_ROUTER = re.compile(r"(?:^|\.)(?:gate|router|router\.layer)\.weight$")
# Last parts of names of what is no matrix of weights though it has two axes: norms, biases, tables and statistics.
_NO_MATRIX = re.compile(
    r"bias|norm|gamma|beta|scale|zero|mean|var|mask|pos|token|table|index|codebook|freq|cache|_log$|^(?:cos|sin|b)(?:_|$)",
    re.IGNORECASE,
)
_KERNEL = re.compile(r"(?:^|[._])(?:kernel|weights?|weight_v|w)$", re.IGNORECASE)
_NORM = re.compile(r"norm|(?:^|\.)ln_|layernorm|(?:^|\.)bn\d*$", re.IGNORECASE)
# Conv1D of GPT-2 and its kin stores (in, out).
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
_CONV1D = re.compile(r"(?:^|\.)(?:c_attn|c_proj|c_fc|q_attn)$")


def layer_name(tensor: str) -> str:
    """A parameter's layer: its name without a final `.weight`."""
    return tensor.removesuffix(".weight") if tensor != "weight" else tensor


def kind_of(tensor: str, spec: TensorSpec) -> Kind | None:
    """The kind of layer a parameter is the weight of; None for anything that is not a matrix of weights."""
    if spec.dtype.is_floating_point and len(spec.shape) == 3 and 0 not in spec.shape and _EXPERTS.search(tensor):
        return "experts"
    if not spec.dtype.is_floating_point or len(spec.shape) < 2 or 0 in spec.shape or not _WEIGHT.search(tensor):
        return None
    layer = layer_name(tensor)
    if len(spec.shape) > 2:
        return "conv"
    if _HEAD.search(layer):
        return "head"
    if _EMBEDDING.search(layer):
        return "embedding"
    return None if _NORM.search(layer.rsplit(".", 1)[-1]) else "linear"


def kind_in_bare_file(tensor: str, spec: TensorSpec) -> Kind | None:
    """The kind of layer of a parameter that no model definition speaks of: every matrix counts, whatever its name.

    Such as an LSTM cell's `weight_ih`, a `kernel` and a `W`; not norms, biases and tables.
    """
    kind = kind_of(tensor, spec)
    place, _, leaf = tensor.rpartition(".")
    long = [size for size in spec.shape if size > 1]
    if kind is not None or not spec.dtype.is_floating_point or len(long) < 2 or 0 in spec.shape:
        return kind
    if _WEIGHT.search(tensor) or _NO_MATRIX.search(leaf) or _NORM.search(place.rpartition(".")[2]):
        return None
    if len(spec.shape) > 2:
        return "conv" if _KERNEL.search(leaf) else None
    if _HEAD.search(tensor):
        return "head"
    return "embedding" if _EMBEDDING.search(tensor) or _EMBEDDING.search(place) else "linear"


def kind_among(kinds: Mapping[str, Kind | None] | None, tensor: str, spec: TensorSpec) -> Kind | None:
    """The kind of layer of a parameter: what a model definition says; names that it lacks are judged by themselves.

    Args:
        kinds: by parameter, from a model definition; None where there is none.
        tensor, spec: the parameter.
    """
    if kinds is None:
        return kind_in_bare_file(tensor, spec)
    return kinds[tensor] if tensor in kinds else kind_of(tensor, spec)


def kinds_among(kinds: Mapping[str, Kind | None] | None, specs: Mapping[str, TensorSpec]) -> dict[str, Kind | None]:
    """The kind of layer of every parameter; None for what is no layer: norms, biases, routers; arguments as above."""
    routers = routers_of(specs)
    by_name: dict[str, Kind | None] = {}
    for name, spec in specs.items():
        told = kinds is not None and name in kinds
        no_layer = len(spec.shape) < 2 or 0 in spec.shape or (name in routers and not told)
        by_name[name] = None if no_layer else kind_among(kinds, name, spec)
    return by_name


def routers_of(specs: Mapping[str, TensorSpec]) -> set[str]:
    """Weights that choose among experts: beside `experts`, with an output for each of them or a router's name.

    A rounded one chooses others.
    """
    counts: dict[str, set[int]] = defaultdict(set)  # numbers of experts by what stands before `experts`
    for name, spec in specs.items():
        if match := _EXPERTS.search(name):
            stacked = len(spec.shape) == 3
            counts[name[: match.start()]] |= {int(match[1]) + 1} if match[1] else {spec.shape[0]} if stacked else set()
    return {name for name, spec in specs.items() for place in _beside(name) if _routes(name, spec, place, counts)}


def _beside(name: str) -> list[str]:
    """Prefixes of a weight that lies directly in them, or in a module of theirs."""
    pieces = name.removesuffix(".weight").split(".")
    return [".".join(pieces[:-length]) for length in (1, 2) if len(pieces) > length] or [""]


def _routes(name: str, spec: TensorSpec, place: str, counts: Mapping[str, set[int]]) -> bool:
    """Whether a weight beside the experts of a place chooses among them."""
    if place not in counts or _EXPERTS.search(name):
        return False
    match = _ROUTER.search(name)
    if match is not None and name[: match.start()] == place:
        return True
    outputs = max(counts[place], default=0)
    return len(spec.shape) == 2 and outputs > 1 and spec.shape[0] == outputs and "shared" not in name


def is_embedding(layer: str) -> bool:
    """Whether a layer's name is one that embeddings have."""
    return bool(_EMBEDDING.search(layer))


def is_transposed(tensor: str, config: dict[str, Any] | None) -> bool:
    """Whether a linear layer stores (in, out), as GPT-2's Conv1D does, also where GPT-2 is a part of the model."""
    return bool(_CONV1D.search(layer_name(tensor))) and _has_conv1d(config or {})


def _has_conv1d(config: dict[str, Any]) -> bool:
    parts = (value for value in config.values() if isinstance(value, dict))
    return config.get("model_type") in _CONV1D_MODELS or any(map(_has_conv1d, parts))
