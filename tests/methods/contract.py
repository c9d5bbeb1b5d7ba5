"""What is tried of every layer-wise method: its parameters, and layers that it is applied to."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args, get_origin

import annotated_types
import torch
from pydantic import ValidationError

from aicompress.errors import Refused
from aicompress.layer import Layer, LayerInfo
from aicompress.methods import COMMANDS, MethodConfig, methods
from aicompress.methods.capabilities import Candidate
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import OF_GRADIENTS
from aicompress.statistics import GradientStats, InputStats
from aicompress.weights import Dense, Weight, restore
from tests.methods.layers import columns_of

LAYERWISE = [m for command in COMMANDS for m in methods(command).values() if isinstance(m, LayerMethod)]


def variants(method: LayerMethod) -> list[dict[str, Any]]:
    """Parameters to try: default, examples, and the first valid one of those with one field moved to each end."""
    examples = list(method.config.model_config.get("json_schema_extra", {}).get("examples", []))  # type: ignore[union-attr]
    start = next((fields for fields in ({}, *examples) if _valid(method.config, fields)), None)
    assert start is not None, f"{method.name}: its defaults are not valid and it gives no examples"
    moved = []
    for field in method.config.model_fields:
        others = {k: v for k, v in start.items() if not {k, field} <= set(method.config.one_of)}
        moved += [{**others, field: value} for value in _ends(method.config, field)]
    found: list[dict[str, Any]] = []
    for fields in (start, *examples, *(fields for fields in moved if _valid(method.config, fields))):
        if fields not in found:
            found.append(fields)
    return found


def _valid(config: type[MethodConfig], fields: dict[str, Any]) -> bool:
    try:
        config(**{"name": _name(config), **fields})
    except ValidationError:
        return False
    return True


def _name(config: type[MethodConfig]) -> str:
    return str(config.model_fields["name"].default)


def _ends(config: type[MethodConfig], field: str) -> list[Any]:
    """Every choice of a Literal or bool, the bounds of a number; an open end is tried with 1e6."""
    info = config.model_fields[field]
    if field in ("name", "preset"):
        return []
    kinds = [kind for kind in (info.annotation, *get_args(info.annotation)) if kind is not None]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices or bool in kinds:
        return choices or [False, True]
    number = next((kind for kind in kinds if kind in (int, float)), None)
    if number is None:
        return []
    low: float = 0
    high: float = 10**6
    for bound in info.metadata:
        low = bound.ge if isinstance(bound, annotated_types.Ge) else low
        low = bound.gt + (1 if number is int else 1e-3) if isinstance(bound, annotated_types.Gt) else low
        high = bound.le if isinstance(bound, annotated_types.Le) else high
        high = bound.lt - (1 if number is int else 1e-3) if isinstance(bound, annotated_types.Lt) else high
    return [number(low), number(high)]


class Given(NamedTuple):
    """A layer that methods are tried on: `stored` is what an earlier step made of it, None where it is dense."""

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    stored: Weight | None = None


def statistics(columns: int, generator: torch.Generator) -> InputStats:
    """Statistics of correlated inputs: 3 * columns rows through a random mixing matrix."""
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(3 * columns, columns, generator=generator) @ mixing
    gram = inputs.t() @ inputs / len(inputs)
    return InputStats.of(len(inputs), gram, columns_of(inputs), gram * 1.01)


def gradients(shape: tuple[int, int], generator: torch.Generator) -> GradientStats:
    """Moments of 20 samples' gradients, some of which are larger than others."""
    found = torch.randn(20, *shape, generator=generator) * torch.rand(20, 1, 1, generator=generator)
    output = found.sum(-1)
    return GradientStats(20, found.mean(0), found.square().mean(0), output.t() @ output / 20)


def info_of(given: Given) -> LayerInfo:
    """What a method knows of a layer before it is read."""
    shape, dtype, stored = given
    form = stored or Dense(torch.empty(shape, dtype=dtype, device="meta"))
    outline = None if stored is None else restore({k: t.to("meta") for k, t in stored.tensors().items()}, stored.meta())
    nbytes = sum(spec.nbytes for spec in form.specs().values())
    return LayerInfo(
        "layers.0.fc", "layers.0.fc.weight", "linear", shape, shape, dtype,
        stored=form.form, nbytes=nbytes, outline=outline,
    )  # fmt: skip


def layer_of(
    method: LayerMethod, shape: tuple[int, int], dtype: torch.dtype = torch.float32, stored: Weight | None = None
) -> Layer:
    """A layer of Gaussian weights; with inputs where the method reads them."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    form = stored or Dense((0.1 * torch.randn(shape, generator=generator)).to(dtype))
    inputs = statistics(shape[1], generator) if method.needs else None
    graded = bool(method.needs & OF_GRADIENTS)
    return Layer(
        info_of(Given(shape, dtype, stored)),
        form.dense(),
        form,
        inputs,
        seed=7,
        gradients=gradients(shape, generator) if graded else None,
        movement=torch.randn(shape, generator=generator) if "movement" in method.needs else None,
    )


def resolved(method: LayerMethod, layer: Layer, fields: dict[str, Any]) -> Any | None:
    """The config for a layer, or None where `check` or an allocation refuses it: with its name, and a hint."""
    config = method.config(**{"name": method.name, **fields})
    refused = method.check(layer.info, config)
    if refused is None and method.allocates is not None:
        try:
            (config,) = method.allocates.resolve([Candidate(layer.info, config, lambda: layer)], 0)
        except Refused as error:
            refused = error.message, error.hint
        else:
            assert method.check(layer.info, config) is None, "a resolved config is refused"
    if refused is None:
        return config
    message, hint = refused
    assert layer.info.name in message
    assert hint
    return None
