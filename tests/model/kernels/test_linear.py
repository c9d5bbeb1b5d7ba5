"""Fast kernels against the decoded reference, within their documented tolerances."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from aicompress.errors import Refused
from aicompress.model.kernels import int4, linear, select
from aicompress.model.kernels.int4 import KEPT_ROWS
from aicompress.model.kernels.linear import (
    FEW,
    INT8_KEPT_ROWS,
    INT8_ROWS,
    PlainLinear,
    has_exact_int8,
)
from aicompress.model.kernels.select import fast_linear, fast_module
from aicompress.weights import IntGrouped, Weight
from aicompress.weights.decoding import rounded_input
from aicompress.weights.stored.base_delta import BaseDelta
from aicompress.weights.stored.dense import Dense
from aicompress.weights.stored.low_rank import LowRank
from tests.model.compressed import halved, integers, low_rank

OUT, COLUMNS = 48, 64
ROWS = (1, 2, 3, 16, 17, 70)  # both sides of every kernel's crossover


def matrix(out: int = OUT, columns: int = COLUMNS) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(3))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


INT8 = "int8" if has_exact_int8() else "int8, inputs of 7 bits"
# A processor without native bfloat16 products is tried everywhere, one with them only where oneDNN can run them.
NATIVE = [False, True] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [False]
WITHOUT_BFLOAT16 = {"int8 weights": "dense", "bfloat16": "dense"}
CASES: dict[str, tuple[Weight, str]] = {
    "w8a8": (integers(matrix(), 8, activations=8), INT8),
    "w8": (integers(matrix(), 8), "int8 weights"),
    "w8 groups": (integers(matrix(), 8, 32), "bfloat16"),
    "w8 zeros": (integers(matrix(), 8, symmetric=False), "bfloat16"),
    "w4 groups": (integers(matrix(), 4, 32), "int4"),
    "w4 zeros": (integers(matrix(), 4, 32, symmetric=False), "int4"),
    "w4 rows": (integers(matrix(), 4), "int4"),
    "w3": (integers(matrix(), 3, 64), "int4"),
    "w2 zeros": (integers(matrix(), 2, 32, symmetric=False), "int4"),
    "w1": (integers(matrix(), 1, 32, symmetric=False), "int4"),
    "w4 narrow groups": (integers(matrix(), 4, 16), "bfloat16"),
    "w4 narrow last group": (integers(matrix(), 4, 48, symmetric=False), "bfloat16"),
    "w4 group wider than a row": (integers(matrix(), 4, 128), "int4"),
    "w4 odd outputs": (integers(matrix(40), 4, 32), "bfloat16"),
}


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_kernels_agree_with_the_decoded_weight(
    case: str, bias: bool, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: native)
    weight, kernel = CASES[case]
    kernel = kernel if native else WITHOUT_BFLOAT16.get(kernel, kernel)
    offset = torch.randn(weight.shape[0]) if bias else None
    layer = fast_linear(weight, offset, torch.float32, resident=False)
    assert layer.kernel == kernel
    bits = weight.activation_bits if isinstance(weight, IntGrouped) else None
    for rows in ROWS:
        x = torch.randn(rows, COLUMNS)
        expected = nn.functional.linear(rounded_input(x, bits), weight.dense(), offset)
        with torch.no_grad():
            found = layer(x)
        assert found.dtype == torch.float32
        # bfloat16 has 8 bits of mantissa; 8-bit inputs may round to a neighbouring code (scale absmax/127 and /127.5).
        assert relative(found, expected) < (2e-2 if bits else 6e-3), rows


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_copies_of_a_layer_multiply_as_it_does(case: str) -> None:
    weight = CASES[case][0]
    layer = fast_linear(weight, torch.randn(weight.shape[0]), torch.float32, resident=False, keep=True)
    x = torch.randn(70, COLUMNS)
    for made in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for rows in (1, 70):
            assert torch.equal(made(x[:rows]), layer(x[:rows]))


def test_a_processor_whose_int8_product_saturates_is_not_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_exact_int8", lambda: False)
    weight = integers(torch.full((OUT, COLUMNS), 1.0), 8, activations=8)
    layer = fast_linear(weight, None, torch.float32, resident=False)
    x = torch.full((3, COLUMNS), 1.0)
    assert layer.kernel == "int8, inputs of 7 bits"
    torch.testing.assert_close(layer(x), x @ weight.dense().t())


@pytest.mark.parametrize("rows", [1, 16])
def test_the_int8_kernel_that_is_chosen_is_exact_at_the_largest_codes(rows: int) -> None:
    weight = integers(torch.full((OUT, COLUMNS), 1.0), 8, activations=8)
    x = torch.full((rows, COLUMNS), 1.0)
    torch.testing.assert_close(fast_linear(weight, None, torch.float32, resident=False)(x), x @ weight.dense().t())


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoded_matrix_is_held_for_many_rows(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4, "has_fast_bfloat16", lambda: native)
    weight, bias = CASES["w4 zeros"][0], torch.randn(OUT).to(dtype)
    layer = fast_linear(weight, bias, dtype, resident=False, keep=True)
    assert layer.kernel == f"int4, dense above {KEPT_ROWS} rows"
    for rows in (1, KEPT_ROWS, KEPT_ROWS + 1, 70):
        x = torch.randn(rows, COLUMNS).to(dtype)
        product = layer(x)
        assert product.dtype == dtype
        rounds = native or dtype is torch.bfloat16 or rows <= KEPT_ROWS
        expected = nn.functional.linear(x.float(), weight.dense(), bias.float())
        assert relative(product, expected) < (1e-2 if rounds else 1e-6), rows


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_inputs_may_lie_anyhow_in_memory(
    case: str, dtype: torch.dtype, keep: bool, resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler reads the first token of each sequence, whose rows lie apart."""
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    layer = fast_linear(CASES[case][0], None, dtype, resident, keep)
    states = torch.randn(3, 7, COLUMNS).to(dtype)
    turned, thinned = torch.randn(COLUMNS, 5).to(dtype).t(), torch.randn(5, 2 * COLUMNS).to(dtype)[:, ::2]
    with torch.inference_mode():
        for x in (states[:, 0], states[:2, 0], states.transpose(0, 1), turned, thinned, states[:, :0]):
            torch.testing.assert_close(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("columns", [1, 10, 40, 63, 80, 130])
@pytest.mark.parametrize("out", [3, 17, 48])
def test_any_number_of_rows_and_columns(out: int, columns: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that read more columns at once go beyond the end of others' rows, without an error."""
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    weight = integers(matrix(out, columns), bits)
    for dtype, keep in product((torch.float32, torch.bfloat16), (True, False)):
        layer = fast_linear(weight, None, dtype, resident=False, keep=keep)
        for rows in (1, 2, 5, 33):
            x = torch.randn(rows, columns).to(dtype)
            expected = nn.functional.linear(x.float(), weight.dense())
            assert float((layer(x).float() - expected).norm()) <= 2e-2 * float(expected.norm()) + 1e-2, layer.kernel


@pytest.mark.parametrize("case", ["w8", "w8a8"])
def test_weights_of_8_bits_are_held_for_many_rows_too(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    weight, bias = CASES[case][0], torch.randn(OUT).bfloat16()
    layer = fast_linear(weight, bias, torch.bfloat16, resident=False, keep=True)
    most = {"w8": INT8_ROWS, "w8a8": INT8_KEPT_ROWS}[case]
    assert layer.kernel.endswith(f", bfloat16 above {most} rows")
    for rows in (1, most, most + 1, 70):
        x = torch.randn(rows, COLUMNS).bfloat16()
        expected = nn.functional.linear(x.float(), weight.dense(), bias.float())
        assert relative(layer(x), expected) < 2e-2, rows


def test_a_low_rank_weight_holds_its_factors_decoded() -> None:
    weight = low_rank(matrix(64, 128), 32, bits=4)
    kernel = fast_linear(weight, None, torch.float32, resident=False, keep=True).kernel
    assert kernel == "low rank: " + ", ".join([f"int4, dense above {KEPT_ROWS} rows"] * 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_int4_kernel_takes_a_narrow_last_group(symmetric: bool) -> None:
    """Groups of 64 in 96 columns are three of 32, of which two share a scale."""
    weight = integers(matrix(OUT, 96), 4, 64, symmetric)
    layer = fast_linear(weight, None, torch.float32, resident=False)
    assert layer.kernel == "int4"
    for rows in (3, 40):
        x = torch.randn(rows, 96)
        assert relative(layer(x), x @ weight.dense().t()) < 6e-3


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("case", CASES)
def test_weights_that_fit_into_the_cache_run_in_bfloat16_where_it_is_native(
    case: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: native)
    weight, kernel = CASES[case]
    layer = fast_linear(weight, None, torch.float32, resident=True)
    assert layer.kernel.startswith("bfloat16, float32") == native
    x = torch.randn(9, COLUMNS)
    rounding = 2e-2 if kernel == INT8 and not native else 6e-3  # of inputs to 8 bits, or to bfloat16
    with torch.no_grad():
        assert relative(layer(x), x @ weight.dense().t()) < rounding


def test_without_native_bfloat16_nothing_is_decoded_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: False)
    kernels = {
        case: fast_linear(weight, None, torch.float32, resident=True).kernel for case, (weight, _) in CASES.items()
    }
    assert set(kernels.values()) == {INT8, "dense"}
    assert kernels["w8"] == kernels["w8 groups"] == kernels["w4 groups"] == "dense"
    assert fast_linear(CASES["w4 groups"][0], None, torch.float32, resident=False).kernel == "int4"


@pytest.mark.parametrize("case", ["w8a8", "w8", "w4 groups", "w8 groups"])
def test_bfloat16_inputs_and_leading_dimensions(case: str) -> None:
    weight, _ = CASES[case]
    layer = fast_linear(weight, torch.randn(OUT).bfloat16(), torch.bfloat16, resident=False)
    x = torch.randn(2, 5, COLUMNS).bfloat16()
    with torch.no_grad():
        found = layer(x)
    assert found.shape == (2, 5, OUT)
    assert found.dtype == torch.bfloat16
    assert relative(found, nn.functional.linear(x.float(), weight.dense(), layer.bias.float())) < 3e-2


def test_a_row_of_zeros_gives_the_bias() -> None:
    bias = torch.randn(OUT)
    layer = fast_linear(CASES["w8a8"][0], bias, torch.float32, resident=False)
    x = torch.stack([torch.zeros(COLUMNS), torch.ones(COLUMNS)])
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], bias)
    assert layer(torch.empty(0, COLUMNS)).shape == (0, OUT)


def test_low_rank_is_two_products() -> None:
    for weight in (low_rank(matrix(), 16), low_rank(matrix(), 16, bits=8)):
        layer = fast_linear(weight, torch.randn(OUT), torch.float32, resident=False)
        x = torch.randn(7, COLUMNS)
        with torch.no_grad():
            assert relative(layer(x), nn.functional.linear(x, weight.dense(), layer.left.bias)) < 1e-2
    assert fast_linear(low_rank(matrix(), 16), None, torch.float32, resident=True).kernel == "low rank: dense, dense"


def test_sparse_is_decoded_exactly() -> None:
    weight = halved(matrix())
    x = torch.randn(4, COLUMNS)
    torch.testing.assert_close(fast_linear(weight, None, torch.float32, False)(x), x @ weight.dense().t())


@pytest.mark.parametrize(
    "make",
    [
        lambda w: integers(w, 8),
        lambda w: integers(w, 4, 16, symmetric=False),
        lambda w: integers(w, 3),
        lambda w: integers(w, 2, 8),
        lambda w: integers(w, 4, 24, symmetric=False),
    ],
    ids=["8", "4 zeros", "3", "2", "4 narrow last group"],
)
def test_embedding_rows_are_exact(make: Callable[[Tensor], Weight]) -> None:
    weight = make(matrix(50, 32))
    embedding = fast_module(nn.Embedding(50, 32), weight, torch.float32, resident=False)
    ids = torch.tensor([[0, 49, 7], [7, 1, 2]])
    torch.testing.assert_close(embedding(ids), weight.dense()[ids])
    assert embedding.weight.shape == (50, 32)
    held = sum(t.numel() * t.element_size() for t in (embedding.codes, embedding.scale))
    assert held < 50 * 32 * 4 / 2


def test_conv1d_of_gpt2() -> None:
    layer = Conv1D(OUT, COLUMNS)
    nn.init.normal_(layer.bias)
    weight = integers(layer.weight.detach().t().contiguous(), 8)
    running = fast_module(layer, weight, torch.float32, resident=True)
    x = torch.randn(3, COLUMNS)
    with torch.no_grad():
        assert relative(running(x), layer(x)) < 1.5e-2


def test_layers_of_other_classes_are_left_to_the_reference() -> None:
    class Shifted(nn.Embedding):
        pass

    assert fast_module(Shifted(50, 32), integers(matrix(50, 32), 8), torch.float32, resident=True) is None
    assert fast_module(nn.Conv2d(4, 8, 3), integers(matrix(8, 36), 8), torch.float32, resident=True) is None


class Operations(TorchDispatchMode):
    """Notes every operation of PyTorch, and the numbers that the largest writes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and not func.is_view:
            self.written = max(self.written, output.numel())
        return output


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_no_product_of_many_rows_decodes_a_weight_anew(
    case: str, resident: bool, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense layer does not, and this would take as long as its product."""
    for module in (select, linear, int4):
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda: native)
    layer = fast_linear(CASES[case][0], None, dtype, resident, keep=True)
    for rows in (17, 20):  # of fewer numbers than half the weight
        with torch.inference_mode(), Operations() as operations:
            layer(torch.randn(rows, COLUMNS).to(dtype))
        assert operations.written < OUT * COLUMNS // 2, rows


@pytest.mark.parametrize("rows", [1, FEW // (OUT * COLUMNS)])
def test_a_small_layer_multiplies_few_rows_as_a_dense_one_does(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "has_fast_bfloat16", lambda: True)
    layer = fast_linear(CASES["w8"][0], None, torch.float32, resident=True)
    dense, x = nn.Linear(COLUMNS, OUT, bias=False), torch.randn(1, rows, COLUMNS)
    dense.weight = nn.Parameter(CASES["w8"][0].dense(), requires_grad=False)
    with torch.inference_mode(), Operations() as mine:
        y = layer(x)
    with torch.inference_mode(), Operations() as others:
        expected = dense(x)
    assert torch.equal(y, expected)
    assert mine.names == others.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_decoded_layer_does_what_a_dense_one_does(dtype: torch.dtype, bias: bool) -> None:
    """At one token every operation more would show."""
    dense = nn.Linear(COLUMNS, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    decoded = PlainLinear(dense.weight, dense.bias)
    x = torch.randn(1, 1, COLUMNS, dtype=dtype)
    done = []
    for layer in (dense, decoded):
        with torch.inference_mode(), Operations() as operations:
            y = layer(x)
        done.append((operations.names, y))
    assert done[0][0] == done[1][0]
    assert torch.equal(done[0][1], done[1][1])


@pytest.mark.parametrize("case", ["w8", "w4 narrow groups"])
def test_gradients_through_a_kernel_are_refused(case: str) -> None:
    layer = fast_linear(CASES[case][0], None, torch.float32, resident=False)
    with pytest.raises(Refused, match="inference"):
        layer(torch.randn(2, COLUMNS, requires_grad=True))


def test_reading_the_values_of_a_packed_weight_fails_loudly() -> None:
    layer = fast_linear(CASES["w8"][0], None, torch.float32, resident=False)
    assert layer.weight.shape == (OUT, COLUMNS)
    assert layer.weight.dtype == torch.float32
    with pytest.raises(TypeError):
        nn.functional.linear(torch.randn(2, COLUMNS), layer.weight)


@pytest.mark.parametrize(
    "weight",
    [
        LowRank(Dense(matrix(OUT, 8)), Dense(matrix(8))),
        BaseDelta(Dense(matrix(OUT, 8)), Dense(matrix(8)), Dense(matrix())),
        integers(matrix(), 8),
    ],
    ids=lambda weight: weight.form,
)
def test_a_layer_shows_its_bias(weight: Weight) -> None:
    """Once: what initializes a layer from above writes to it, and whoever saves the layer finds one."""
    layer = fast_linear(weight, torch.ones(OUT), torch.float32, True)
    assert torch.equal(layer.bias, torch.ones(OUT))
    assert len([name for name, _ in layer.named_parameters(remove_duplicate=False) if name.endswith("bias")]) == 1
