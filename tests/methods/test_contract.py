"""What every layer-wise method owes, found by discovery: a new method file is covered without being named here.

A method is tried with its default parameters where they are valid, with the examples of its config, and with every
choice and both ends of every numeric parameter. What it refuses for a layer is not applied, and it says so in words.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aicompress.errors import Refused
from aicompress.layer import GradientStats, InputStats, Layer, LayerInfo
from aicompress.methods import COMMANDS, MethodConfig, methods
from aicompress.methods.capabilities import Candidate
from aicompress.methods.layerwise import LayerMethod
from aicompress.weights import Dense, IntGrouped, Sparse, SparseCodes, Weight, restore

SHAPES = ((16, 24), (1, 12), (12, 1), (7, 13), (33, 100), (64, 8))
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


CASES = [
    pytest.param(method, fields, id=f"{method.command}-{method.name}-{fields}")
    for method in LAYERWISE
    for fields in variants(method)
]
BRIEF = [pytest.param(method, variants(method)[0], id=f"{method.command}-{method.name}") for method in LAYERWISE]


def statistics(columns: int, generator: torch.Generator) -> InputStats:
    """Statistics of correlated inputs: 3 * columns rows through a random mixing matrix."""
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(3 * columns, columns, generator=generator) @ mixing
    gram = inputs.t() @ inputs / len(inputs)
    norms, size = inputs.square().mean(0), inputs.abs()
    return InputStats(len(inputs), gram, norms, size.mean(0), cross=gram * 1.01, max_abs=size.amax(0))


def gradients(shape: tuple[int, int], generator: torch.Generator) -> GradientStats:
    """Moments of 20 samples' gradients, some of which are larger than others."""
    found = torch.randn(20, *shape, generator=generator) * torch.rand(20, 1, 1, generator=generator)
    return GradientStats(20, found.mean(0), found.square().mean(0))


def layer_of(
    method: LayerMethod, shape: tuple[int, int], dtype: torch.dtype = torch.float32, stored: Weight | None = None
) -> Layer:
    """A layer of Gaussian weights; with inputs where the method reads them."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    form = stored or Dense((0.1 * torch.randn(shape, generator=generator)).to(dtype))
    outline = None if stored is None else restore({k: t.to("meta") for k, t in stored.tensors().items()}, stored.meta())
    nbytes = sum(spec.nbytes for spec in form.specs().values())
    info = LayerInfo(
        "layers.0.fc", "layers.0.fc.weight", "linear", shape, shape, dtype,
        stored=form.form, nbytes=nbytes, outline=outline,
    )  # fmt: skip
    inputs = statistics(shape[1], generator) if method.needs else None
    graded = "gradients" in method.needs
    return Layer(
        info,
        form.dense(),
        form,
        inputs,
        seed=7,
        gradients=gradients(shape, generator) if graded else None,
        movement=torch.randn(shape, generator=generator) if "movement" in method.needs else None,
    )


def resolved(method: LayerMethod, layer: Layer, fields: dict[str, Any]) -> Any | None:
    """The config for a layer, or None where `check` or an allocation refuses it in words."""
    config = method.config(**{"name": method.name, **fields})
    refusal = method.check(layer.info, config)
    if refusal is None and method.allocates is not None:
        try:
            (config,) = method.allocates.resolve([Candidate(layer.info, config, lambda: layer)], 0)
        except Refused as error:
            refusal = (error.message, error.hint)
        else:
            assert method.check(layer.info, config) is None, "a resolved config is refused"
    if refusal is None:
        return config
    message, hint = refusal
    assert layer.info.name in message
    assert hint
    return None


def tensors_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    same = one.keys() == other.keys() and all(one[k].dtype == other[k].dtype for k in one)
    return same and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "fields"), CASES)
def test_stored_weight(method: LayerMethod, fields: dict[str, Any], shape: tuple[int, int]) -> None:
    layer = layer_of(method, shape)
    before = layer.weight.clone()
    config = resolved(method, layer, fields)
    if config is None:
        return
    weight = method.apply(layer, config)
    assert weight.shape == shape
    dense = weight.dense()
    assert dense.shape == shape
    assert dense.dtype is torch.float32
    assert torch.isfinite(dense).all()
    assert torch.equal(layer.weight, before), "the input was modified"

    tensors, meta = weight.tensors(), weight.meta()
    assert all(tensor.is_contiguous() for tensor in tensors.values()) or weight.form == "dense"
    assert torch.equal(restore(tensors, meta).dense(), dense)
    outline = method.outline(layer.info, config)
    assert outline.specs() == weight.specs()
    assert outline.meta() == meta
    assert method.describe(config, weight) == method.describe(config, outline)

    again = method.apply(layer, config)
    assert tensors_equal(again.tensors(), tensors), "the same seed gave other bytes"


@pytest.mark.parametrize(("method", "fields"), CASES)
def test_a_block_of_rows_gives_what_it_gives_in_the_whole(method: LayerMethod, fields: dict[str, Any]) -> None:
    layer = layer_of(method, (48, 96), torch.bfloat16)
    config = resolved(method, layer, fields)
    if config is None or method.row_wise is None or not method.row_wise.independent(config):
        return
    whole = method.apply(layer, config).dense()
    info = dataclasses.replace(layer.info, shape=(16, 96), tensor_shape=(16, 96))
    for start in (0, 16, 32):
        rows = layer.weight[start : start + 16]
        block = method.apply(Layer(info, rows, Dense(rows), None, seed=start), config)
        assert torch.equal(block.dense(), whole[start : start + 16])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("method", "fields"), BRIEF)
def test_dtype_of_the_layer(method: LayerMethod, fields: dict[str, Any], dtype: torch.dtype) -> None:
    layer = layer_of(method, (16, 128), dtype)
    config = resolved(method, layer, fields)
    assert config is not None
    weight = method.apply(layer, config)
    assert weight.specs() == method.outline(layer.info, config).specs()
    assert torch.isfinite(weight.dense()).all()


@pytest.mark.parametrize(("method", "fields"), BRIEF)
def test_zero_row_stays_zero(method: LayerMethod, fields: dict[str, Any]) -> None:
    layer = layer_of(method, (16, 128))
    weight = layer.weight.clone()
    weight[3] = 0
    layer = Layer(layer.info, weight, Dense(weight), layer.inputs, layer.seed, layer.gradients, layer.movement)
    config = resolved(method, layer, fields)
    assert config is not None
    assert method.apply(layer, config).dense()[3].abs().max() < 1e-6


@pytest.mark.parametrize(("method", "fields"), BRIEF)
def test_all_zero_weight(method: LayerMethod, fields: dict[str, Any]) -> None:
    layer = layer_of(method, (16, 128), stored=Dense(torch.zeros(16, 128)))
    config = resolved(method, layer, fields)
    assert config is not None
    assert torch.equal(method.apply(layer, config).dense(), torch.zeros(16, 128))


@pytest.mark.parametrize(("method", "fields"), CASES)
def test_a_transposed_view_gives_the_same_bytes(method: LayerMethod, fields: dict[str, Any]) -> None:
    layer = layer_of(method, (32, 128))
    config = resolved(method, layer, fields)
    if config is None:
        return
    view = layer.weight.t().contiguous().t()
    assert not view.is_contiguous()
    strided = Layer(layer.info, view, Dense(view), layer.inputs, layer.seed, layer.gradients, layer.movement)
    found, expected = method.apply(strided, config), method.apply(layer, config)
    assert torch.allclose(found.dense(), expected.dense(), atol=1e-5)
    assert found.specs() == expected.specs()


@pytest.mark.parametrize("form", ["int_grouped", "sparse", "sparse_codes"])
@pytest.mark.parametrize(("method", "fields"), CASES)
def test_compressed_input(method: LayerMethod, fields: dict[str, Any], form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(32, 128, generator=generator)
    stored: Weight
    if form == "sparse":
        stored = Sparse.of(matrix.bfloat16(), torch.rand(32, 128, generator=generator) < 0.4)
    else:
        codes = torch.randint(-8, 8, (32, 128), generator=generator, dtype=torch.int8)
        stored = IntGrouped(codes, torch.rand(32, 4, generator=generator).half(), None, 4, 32)
        if form == "sparse_codes":
            stored = SparseCodes.of(stored, torch.rand(32, 128, generator=generator) < 0.4)
    layer = layer_of(method, (32, 128), torch.bfloat16, stored)
    config = resolved(method, layer, fields)
    if config is None:
        return
    weight = method.apply(layer, config)
    assert weight.specs() == method.outline(layer.info, config).specs()
    assert torch.isfinite(weight.dense()).all()
