"""wanda, sparsegpt and alps: what each is there for, exact counts, and inputs in every stored form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from aicompress.errors import CompressError
from aicompress.layer import Layer
from aicompress.methods import get
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.prune import alps
from aicompress.methods.prune.masks.masks import pattern_mask
from aicompress.methods.zeros import zeroed
from aicompress.statistics import InputStats
from aicompress.weights import IntGrouped, Sparse, Weight
from tests.methods.layers import candidate_of, layer_of, randn
from tests.methods.prune.gram import calibrated, loss

CALIBRATED = ("wanda", "sparsegpt", "alps")


def pruned(name: str, layer: Layer, **fields: Any) -> Weight:
    method = get("prune", name)
    assert isinstance(method, LayerMethod)
    config = method.config.model_validate({"name": name, **fields})
    assert method.check(layer.info, config) is None
    if method.allocates is not None:
        (config,) = method.allocates.resolve([candidate_of(layer, config)], 0)
    weight = method.apply(layer, config)
    assert weight.specs() == method.outline(layer.info, config).specs()
    return weight


@pytest.mark.parametrize("fields", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}], ids=str)
def test_each_method_is_better_than_the_one_before(fields: dict[str, Any]) -> None:
    layer = calibrated()
    plain = [loss(layer, pruned(name, layer, **fields, **more)) for name, more in (
        ("magnitude", {}),
        ("wanda", {"refit": False}),
        ("sparsegpt", {"refit": False}),
        ("sparsegpt", {}),
        ("alps", {}),
    )]  # fmt: skip
    assert plain == sorted(plain, reverse=True)


@pytest.mark.parametrize("name", CALIBRATED)
def test_refit_lowers_the_loss_on_the_same_mask(name: str) -> None:
    layer = calibrated()
    with_refit, without = (pruned(name, layer, sparsity=0.6, damping=1e-6, refit=refit) for refit in (True, False))
    assert torch.equal(with_refit.dense() != 0, without.dense() != 0)
    assert loss(layer, with_refit) < loss(layer, without)


def test_wanda_hand_computed() -> None:
    """Rows compete apart: |w| √E[x²] is [3, 4, 2] and [6, 0.5, 2] for norms² [9, 4, 1]."""
    gram = torch.diag(torch.tensor([9.0, 4.0, 1.0]))
    inputs = InputStats.of(10, gram, {})
    layer = layer_of(torch.tensor([[1.0, 2.0, -2.0], [2.0, 0.25, 2.0]]), inputs=inputs)
    weight = pruned("wanda", layer, sparsity=1 / 3, refit=False)
    assert torch.equal(weight.dense(), torch.tensor([[1.0, 2.0, 0.0], [2.0, 0.0, 2.0]]))


def test_sparsegpt_hand_computed() -> None:
    """Optimal brain surgeon on 2x3 weights, one of each row's first two columns to go.

    H = [[2, 1, 0], [1, 2, 0], [0, 0, 1]] has H⁻¹ = 1/3 [[2, -1, 0], [-1, 2, 0], [0, 0, 3]], C = chol(H⁻¹) upper with
    C₀₀² = 2/3, C₁₁² = 1/2, C₂₂² = 1 and C₀₁ / C₀₀ = -1/2. Losses w² / C² of [[1, 2, 9], [4, 1, 9]]: [1.5, 8] and
    [24, 2]. Row 0 drops column 0, its error 1 reaches column 1 as +1/2; row 1 drops column 1, and no column comes after
    that is tied to it.
    """
    gram = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    layer = layer_of(torch.tensor([[1.0, 2.0, 9.0], [4.0, 1.0, 9.0]]), inputs=InputStats.of(10, gram, {}))
    weight = pruned("sparsegpt", layer, sparsity=1 / 3, refit=False, damping=1e-9)
    expected = torch.tensor([[0.0, 2.5, 9.0], [4.0, 0.0, 9.0]])
    torch.testing.assert_close(weight.dense(), expected, rtol=1e-5, atol=1e-5)
    refitted = pruned("sparsegpt", layer, sparsity=1 / 3, damping=1e-9)
    torch.testing.assert_close(refitted.dense()[1], torch.tensor([4.5, 0.0, 9.0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize(
    ("shape", "fields", "zeros"),
    [
        ((7, 13), {"sparsity": 0.0}, 0),
        ((7, 13), {"sparsity": 0.001}, 0),
        ((10, 300), {"sparsity": 0.9}, 2700),
        ((10, 300), {"sparsity": 0.99}, 2970),
        ((10, 300), {"sparsity": 0.3, "scope": "row"}, 900),
        ((10, 300), {"sparsity": 0.3, "scope": "layer"}, 900),
        ((8, 300), {"sparsity": 0.5, "scope": "layer", "block": "4x1"}, 1200),
        ((8, 300), {"sparsity": 0.5, "scope": "layer", "block": "1x4"}, 1200),
        ((8, 300), {"sparsity": 0.5, "scope": "row", "block": "2x3"}, 1200),
        ((16, 40), {"sparsity": 0.5, "scope": "layer", "block": "16x1"}, 320),
        ((8, 48), {"pattern": "4:8"}, 192),
        ((8, 60), {"pattern": "7:20"}, 312),
        ((8, 48), {"pattern": "3:3"}, 0),
        ((8, 48), {"kept": 10}, 374),
    ],
    ids=str,
)  # fmt: skip
def test_counts_are_exact(name: str, shape: tuple[int, int], fields: dict[str, Any], zeros: int) -> None:
    if name == "wanda" and "kept" in fields:
        fields = {**fields, "kept": 10, "scope": "layer"} if "sparsity" in fields else {"kept": 16}
        zeros = shape[0] * shape[1] - 16
    layer = calibrated(*shape)
    weight = pruned(name, layer, **fields)
    gone = weight.dense() == 0
    assert int(gone.sum()) == zeros
    if zeros == 0:
        torch.testing.assert_close(weight.dense(), layer.weight)
    if fields.get("scope") == "row":
        assert gone.sum(dim=1).unique().numel() == 1
    if "pattern" in fields:
        kept, group = map(int, fields["pattern"].split(":"))
        assert ((~gone).reshape(shape[0], -1, group).sum(-1) == kept).all()
    if "block" in fields:
        high, wide = map(int, fields["block"].split("x"))
        tiles = gone.reshape(shape[0] // high, high, shape[1] // wide, wide).float().mean(dim=(1, 3))
        assert set(tiles.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_equal_scores_keep_the_first(name: str) -> None:
    gram = torch.eye(8)
    layer = layer_of(torch.ones(4, 8), inputs=InputStats.of(10, gram, {}))
    weight = pruned(name, layer, sparsity=0.5, scope="row").dense()
    assert torch.equal(weight != 0, torch.arange(8).lt(4).expand(4, 8))


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("store", ["dense", "sparse"])
def test_zeros_of_an_earlier_step_stay(name: str, store: str) -> None:
    matrix = randn(24, 64, seed=5) * (randn(24, 64, seed=6) > -0.5)
    for stored in (matrix, Sparse.of(matrix, matrix != 0)):
        weight = pruned(name, calibrated(stored=stored), sparsity=0.5, store=store).dense()
        assert not (weight[matrix == 0] != 0).any()
        assert int((weight != 0).sum()) == 768


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("fields", [{"sparsity": 0.2}, {"sparsity": 0.5, "scope": "row"}, {"pattern": "2:4"}], ids=str)
def test_an_already_sparse_layer_never_grows(name: str, fields: dict[str, Any]) -> None:
    matrix = randn(24, 64, seed=5)
    stored = Sparse.of(matrix, randn(24, 64, seed=6) > 0.5)
    weight = pruned(name, calibrated(stored=stored), store="sparse", **fields)
    assert isinstance(weight, Sparse)
    assert not (weight.mask & ~stored.mask).any()


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_codes_stay_on_their_grid(name: str, symmetric: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = (2.5 * torch.randn(24, 64, generator=draw)).round().clamp(-8, 7).to(torch.int8)
    zero = None if symmetric else torch.randint(-2, 3, (24, 4), generator=draw, dtype=torch.int8)
    stored = IntGrouped(codes, (torch.rand(24, 4, generator=draw) + 0.5).half(), zero, 4, 16)
    layer = calibrated(stored=stored)
    weight = pruned(name, layer, sparsity=0.5)
    assert isinstance(weight, IntGrouped)
    assert torch.equal(weight.scale, stored.scale)
    assert float((weight.dense() == 0).float().mean()) >= 0.5
    masked = zeroed(stored, weight.dense() != 0)
    assert loss(layer, weight) < loss(layer, masked)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_layer_that_no_token_reached_is_an_error(name: str) -> None:
    with pytest.raises(CompressError, match="no calibration token"):
        pruned(name, layer_of(randn(4, 8), inputs=InputStats(0)), sparsity=0.5)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_dead_input_is_pruned_first(name: str) -> None:
    layer = calibrated()
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    gram = layer.inputs.gram.clone()
    gram[5], gram[:, 5] = 0, 0
    layer = layer_of(layer.weight, inputs=InputStats.of(10, gram, {}))
    weight = pruned(name, layer, sparsity=0.3)
    assert torch.isfinite(weight.dense()).all()
    if name == "wanda":
        assert torch.equal(weight.dense()[:, 5], torch.zeros(24))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pattern": "3:7"}, "7 does not divide"),
        ({"sparsity": 0.5, "block": "5x1"}, "do not divide"),
        ({"sparsity": 0.9999}, "would prune all"),
        ({"sparsity": 0.99, "scope": "layer", "block": "24x16"}, "would prune all"),
    ],
)
@pytest.mark.parametrize("name", CALIBRATED)
def test_what_does_not_fit_is_refused(name: str, fields: dict[str, Any], said: str) -> None:
    method = get("prune", name)
    assert isinstance(method, LayerMethod)
    refusal = method.check(calibrated().info, method.config.model_validate({"name": name, **fields}))
    assert refusal is not None
    assert said in refusal[0]
    assert refusal[1]


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
@pytest.mark.parametrize(
    "fields",
    [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "block": "4x1"}, {"pattern": "2:4", "permutation": 2}],
    ids=str,
)
def test_layers_with_the_same_inputs_give_the_same_jointly(name: str, fields: dict[str, Any]) -> None:
    """The second one lacks weights; sums may differ in their last bit, which moves no mask here."""
    first = calibrated()
    rows, columns = first.info.shape
    weight = randn(rows // 2, columns, seed=5)
    weight[:, 3] = 0
    layers = [first, layer_of(weight, inputs=first.inputs)]
    method = get("prune", name)
    assert isinstance(method, LayerMethod)
    assert method.batched is not None
    config = method.config.model_validate({"name": name, **fields})
    for layer, found in zip(layers, method.batched.compress(layers, config), strict=True):
        torch.testing.assert_close(found.dense(), method.apply(layer, config).dense(), rtol=1e-3, atol=1e-4)


def test_fast_alps_is_between_sparsegpt_and_alps() -> None:
    layer = calibrated()
    fast = alps.EFFORTS["fast"].fields({})
    losses = [loss(layer, pruned(*of, sparsity=0.6)) for of in (("alps", layer), ("sparsegpt", layer))]
    assert losses[0] <= loss(layer, pruned("alps", layer, sparsity=0.6, **fast)) < losses[1]


def test_the_two_largest_of_four() -> None:
    scores = randn(8, 24).square()
    assert torch.equal(alps.two_of_four(scores), pattern_mask(scores, 2, 4))


@pytest.mark.parametrize("penalty", [1e-9, 1e-3, 0.02, 1.0])
def test_the_pull_of_a_penalty_keeps_two_digits(penalty: float) -> None:
    """Inputs that are all but equal: a penalty of 1e-9 leaves a float32 factorization nothing to divide by."""
    rows = (randn(64, 1, seed=1) + 1e-3 * randn(64, 48, seed=2)).double()
    gram = rows.t() @ rows
    deviation = gram.diagonal().sqrt()
    hessian = gram / deviation / deviation[:, None]
    expected = penalty * torch.linalg.inv(hessian + penalty * torch.eye(48, dtype=torch.float64))
    assert (alps.pull(hessian, penalty) - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("name", [*CALIBRATED, "taylor"])
@pytest.mark.parametrize(("field", "value"), [("outlier", 3.0), ("spread", 0.2)])
def test_what_only_outliers_use_is_refused_without_them(name: str, field: str, value: float) -> None:
    config = get("prune", name).config
    for allocation in ("uniform", "global", "auto"):
        with pytest.raises(ValidationError, match=f"{field}: {value:g} needs allocation: owl"):
            config.model_validate({"name": name, "sparsity": 0.5, "allocation": allocation, field: value})
    config.model_validate({"name": name, "sparsity": 0.5, "allocation": "owl", field: value})
    plain = config.model_validate({"name": name, "sparsity": 0.5})
    assert config.model_validate(plain.model_dump()) == plain  # as a report holds it, with every default
