"""What every layer-wise method owes, found by discovery: a new method file is covered without being named here.

A method is tried with its default parameters where they are valid, with the examples of its config, and with every
choice and both ends of every numeric parameter: each test applies all of these variants. What a method refuses for a
layer is not applied, and it says so in words (`resolved`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.measure import rel_error
from aicompress.methods.layerwise import LayerMethod
from aicompress.pipeline.verify import verify
from aicompress.statistics import InputStats
from aicompress.weights import Dense, IntGrouped, Sparse, SparseCodes, Weight, restore
from tests.methods.contract import LAYERWISE, Given, layer_of, resolved, variants
from tests.methods.layers import columns_of
from tests.weights.forms import write_form

SHAPES = ((16, 24), (1, 12), (12, 1), (7, 13), (33, 100), (64, 8))
MANY = 100  # rounds of a method: so many are asked for on dense layers alone, as an input in another form needs no more
EACH = [pytest.param(method, id=f"{method.command}-{method.name}") for method in LAYERWISE]
BRIEF = [pytest.param(method, variants(method)[0], id=f"{method.command}-{method.name}") for method in LAYERWISE]


def compressed() -> dict[str, Weight]:
    """Layers of (8, 64) that an earlier step left quantized, sparse or both."""
    generator = torch.Generator().manual_seed(1)
    matrix, mask, codes, scale = (
        torch.randn(8, 64, generator=generator),
        torch.rand(8, 64, generator=generator) < 0.4,
        torch.randint(-8, 8, (8, 64), generator=generator, dtype=torch.int8),
        torch.rand(8, 2, generator=generator).half(),
    )
    ints = IntGrouped(codes, scale, None, 4, 32)
    sparse = Sparse.of(matrix.bfloat16(), mask)
    return {"int_grouped": ints, "sparse": sparse, "sparse_codes": SparseCodes.of(ints, mask)}


DENSE = {str(shape): Given(shape) for shape in SHAPES}
COMPRESSED = {form: Given((8, 64), torch.bfloat16, weight) for form, weight in compressed().items()}
ROWS, STRIDED = Given((48, 128), torch.bfloat16), Given((8, 64))


def brief(method: LayerMethod) -> list[dict[str, Any]]:
    """The variants of a method that take no long time."""
    return [v for v in variants(method) if not any(isinstance(value, int) and value >= MANY for value in v.values())]


def independent_ones(method: LayerMethod) -> list[dict[str, Any]]:
    """The variants of a method that compress each row on its own."""
    apart = method.row_wise
    if apart is None:
        return []
    return [fields for fields in brief(method) if apart.independent(method.config(**{"name": method.name, **fields}))]


def tensors_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    same = one.keys() == other.keys() and all(one[k].dtype == other[k].dtype for k in one)
    return same and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("given", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("method", EACH)
def test_stored_weight(method: LayerMethod, given: Given) -> None:
    layer = layer_of(method, *given)
    for fields in variants(method):
        if (config := resolved(method, layer, fields)) is not None:
            check_stored_weight(method, config, layer)


def check_stored_weight(method: LayerMethod, config: Any, layer: Layer) -> None:
    before = layer.weight.clone()
    weight = method.apply(layer, config)
    assert weight.shape == layer.info.shape
    dense = weight.dense()
    assert dense.shape == layer.info.shape
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

    if layer.info.shape == SHAPES[0]:  # what is drawn does not depend on the shape
        again = method.apply(layer, config)
        assert tensors_equal(again.tensors(), tensors), "the same seed gave other bytes"


@pytest.mark.parametrize(("method", "fields"), BRIEF)
def test_verify_accepts_what_it_writes(method: LayerMethod, fields: dict[str, Any], tmp_path: Path) -> None:
    for number, given in enumerate((ROWS, *COMPRESSED.values())):
        layer = layer_of(method, *given)
        if (config := resolved(method, layer, fields)) is None:
            continue
        weight = method.stored(layer, method.apply(layer, config))
        if not isinstance(weight, Dense):  # a plain tensor needs no description
            write_form(tmp_path / f"{number}.safetensors", weight, weight.tensors())
            assert verify(tmp_path / f"{number}.safetensors").problems == ()


@pytest.mark.parametrize("method", [case for case in EACH if independent_ones(*case.values)])
def test_rows_give_what_they_give_in_the_whole(method: LayerMethod) -> None:
    layer = layer_of(method, *ROWS)
    for fields in independent_ones(method):
        if (config := resolved(method, layer, fields)) is not None:
            check_rows_give_what_they_give_in_the_whole(method, config, layer)


def check_rows_give_what_they_give_in_the_whole(method: LayerMethod, config: Any, layer: Layer) -> None:
    whole = method.apply(layer, config).dense()
    info = dataclasses.replace(layer.info, shape=(16, 128), tensor_shape=(16, *layer.info.tensor_shape[1:]))
    blocks = [Layer(info, rows, Dense(rows), None, seed=layer.seed) for rows in layer.weight.split(16)]
    assert method.row_wise is not None
    divided = method.row_wise.divided if method.row_wise.divides(config) else None
    shares = divided(layer.info, [lambda b=b: b for b in blocks], config) if divided else [config] * len(blocks)
    parts = torch.cat([method.apply(block, share).dense() for block, share in zip(blocks, shares, strict=True)])
    if method.row_wise.exact:
        assert torch.equal(parts, whole)
    else:
        errors = [float((each.float() - layer.weight).norm()) for each in (parts, whole)]
        assert errors[0] == pytest.approx(errors[1], rel=0.1)  # of streams of so few codes the bits are uncertain
        assert float((parts.float() - whole.float()).norm()) <= 1.5 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("method", "fields"), BRIEF)
def test_dtype_of_the_layer(method: LayerMethod, fields: dict[str, Any], dtype: torch.dtype) -> None:
    layer = layer_of(method, (16, 128), dtype)
    config = resolved(method, layer, fields)
    weight = method.apply(layer, config)
    assert weight.specs() == method.outline(layer.info, config).specs()
    assert torch.isfinite(weight.dense()).all()


@pytest.mark.parametrize(("method", "fields"), [case for case in BRIEF if case.values[0].recodes])
def test_small_weights_are_rounded_as_finely_as_others(method: LayerMethod, fields: dict[str, Any]) -> None:
    given = layer_of(method, (16, 128), torch.float32)

    def error(size: float) -> float:
        weight = size * given.weight / given.weight.std()
        layer = dataclasses.replace(given, weight=weight, stored=Dense(weight))
        return rel_error(weight, method.apply(layer, resolved(method, layer, fields)))

    assert max(error(1e-3), error(1e-5)) < 1.35 * error(1.0)


@pytest.mark.parametrize(("method", "fields"), BRIEF)
def test_zero_row_stays_zero(method: LayerMethod, fields: dict[str, Any]) -> None:
    layer = layer_of(method, (16, 128))
    weight = layer.weight.clone()
    weight[3] = 0
    layer = Layer(layer.info, weight, Dense(weight), layer.inputs, layer.seed, layer.gradients, layer.movement)
    config = resolved(method, layer, fields)
    assert method.apply(layer, config).dense()[3].abs().max() < 1e-6


@pytest.mark.parametrize(("method", "fields"), [case for case in BRIEF if case.values[0].needs])
def test_inputs_of_next_to_nothing_tell_nothing(method: LayerMethod, fields: dict[str, Any]) -> None:
    """Squares that float32 holds as subnormal numbers alone: their reciprocals are infinite."""
    layer = layer_of(method, (16, 128))
    config = resolved(method, layer, fields)
    assert layer.inputs is not None
    faint = {name: value * 1e-41 for name, value in vars(layer.inputs).items() if isinstance(value, Tensor)}
    weight = method.apply(dataclasses.replace(layer, inputs=dataclasses.replace(layer.inputs, **faint)), config)
    assert torch.isfinite(weight.dense()).all()


@pytest.mark.parametrize(("method", "fields"), [case for case in BRIEF if "gram" in case.values[0].needs])
def test_fewer_tokens_than_inputs(method: LayerMethod, fields: dict[str, Any]) -> None:
    """A Gram matrix of rank 5: on these tokens the outputs are nearer to the original's than zeros are."""
    layer = layer_of(method, (16, 128))
    rows = torch.randn(5, 128, generator=torch.Generator().manual_seed(5))
    gram = rows.t() @ rows / 5
    inputs = InputStats.of(5, gram, columns_of(rows), gram)
    weight = method.apply(dataclasses.replace(layer, inputs=inputs), resolved(method, layer, fields)).dense()
    assert torch.isfinite(weight).all()
    assert ((layer.weight - weight) @ rows.t()).norm() < (layer.weight @ rows.t()).norm()


FACTORIZING = [case for case in BRIEF if case.values[0].command == "factorize"]


@pytest.mark.parametrize(("method", "fields"), FACTORIZING)
def test_values_at_the_end_of_float16_do_not_overflow_in_factors(method: LayerMethod, fields: dict[str, Any]) -> None:
    layer = layer_of(method, (16, 128), torch.float16)
    large = (6e4 * layer.weight / layer.weight.abs().max()).half()
    config = resolved(method, layer, fields)
    weight = method.apply(dataclasses.replace(layer, weight=large.float(), stored=Dense(large)), config)
    assert all(torch.isfinite(tensor).all() for tensor in weight.tensors().values())
    assert rel_error(large.float(), weight) < 1


@pytest.mark.parametrize(("method", "fields"), FACTORIZING)
def test_a_factor_is_not_factorized_again(method: LayerMethod, fields: dict[str, Any]) -> None:
    factor = dataclasses.replace(layer_of(method, (16, 128)).info, name="layers.0.fc.low_rank.in", part="in")
    config = method.config(name=method.name, **fields)
    refused = method.check(factor, config)
    if refused is None:  # what gives no factors leaves it as it is
        assert isinstance(method.outline(factor, config), Dense)
        return
    assert "layers.0.fc.low_rank.in" in refused[0]
    assert refused[1]


@pytest.mark.parametrize(("method", "fields"), BRIEF)
def test_all_zero_weight(method: LayerMethod, fields: dict[str, Any]) -> None:
    layer = layer_of(method, (16, 128), stored=Dense(torch.zeros(16, 128)))
    config = resolved(method, layer, fields)
    assert torch.equal(method.apply(layer, config).dense(), torch.zeros(16, 128))


@pytest.mark.parametrize("method", EACH)
def test_a_transposed_view_gives_the_same_bytes(method: LayerMethod) -> None:
    layer = layer_of(method, *STRIDED)
    for fields in brief(method):
        if (config := resolved(method, layer, fields)) is not None:
            check_a_transposed_view_gives_the_same_bytes(method, config, layer)


def check_a_transposed_view_gives_the_same_bytes(method: LayerMethod, config: Any, layer: Layer) -> None:
    view = layer.weight.t().contiguous().t()
    assert not view.is_contiguous()
    strided = Layer(layer.info, view, Dense(view), layer.inputs, layer.seed, layer.gradients, layer.movement)
    found, expected = method.apply(strided, config), method.apply(layer, config)
    assert torch.allclose(found.dense(), expected.dense(), atol=1e-5)
    assert found.specs() == expected.specs()


@pytest.mark.parametrize("form", COMPRESSED)
@pytest.mark.parametrize("method", EACH)
def test_compressed_input(method: LayerMethod, form: str) -> None:
    """Every variant that prunes in every form, as masks meet there; of others one form each, and the first in all."""
    layer, (first, *others) = layer_of(method, *COMPRESSED[form]), brief(method)
    if method.command != "prune":
        others = others[list(COMPRESSED).index(form) :: len(COMPRESSED)]
    for fields in (first, *others):
        if (config := resolved(method, layer, fields)) is not None:
            check_compressed_input(method, config, layer)


def check_compressed_input(method: LayerMethod, config: Any, layer: Layer) -> None:
    weight = method.apply(layer, config)
    assert weight.specs() == method.outline(layer.info, config).specs()
    assert torch.isfinite(weight.dense()).all()
