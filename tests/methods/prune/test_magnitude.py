"""magnitude: hand-computed masks, exact counts, bit-exact survivors and honest bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from aicompress.errors import RecipeError
from aicompress.methods.prune.magnitude import METHOD, MagnitudeConfig, apply, check, outline, resolve
from aicompress.weights import Dense, IntGrouped, Sparse, SparseCodes, outline_nbytes
from tests.methods.layers import candidate_of, layer_of, randn


def test_hand_computed() -> None:
    layer = layer_of(torch.tensor([[0.1, -3.0, 2.0], [-0.5, 0.2, 4.0]]))
    weight = apply(layer, MagnitudeConfig(sparsity=0.5))
    assert torch.equal(weight.dense(), torch.tensor([[0.0, -3.0, 2.0], [0.0, 0.0, 4.0]]))
    assert not torch.signbit(weight.dense()[weight.dense() == 0]).any()


def test_hand_computed_two_of_four() -> None:
    layer = layer_of(torch.tensor([[1.0, -2.0, 3.0, 0.5, 5.0, 5.0, 5.0, 5.0]]))
    weight = apply(layer, MagnitudeConfig(pattern="2:4"))
    assert torch.equal(weight.dense(), torch.tensor([[0.0, -2.0, 3.0, 0.0, 5.0, 5.0, 0.0, 0.0]]))


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.77, 0.99])
def test_keeps_the_largest_and_exactly_the_count(sparsity: float) -> None:
    layer = layer_of(randn(33, 47))
    weight = apply(layer, MagnitudeConfig(sparsity=sparsity)).dense()
    kept = weight != 0
    assert int((~kept).sum()) == round(sparsity * 33 * 47)
    assert torch.equal(weight[kept], layer.weight[kept])
    if sparsity > 0.001:
        assert layer.weight[kept].abs().min() > layer.weight[~kept].abs().max()


def test_no_mask_of_the_count_is_closer() -> None:
    layer = layer_of(randn(16, 16))
    ours = (apply(layer, MagnitudeConfig(sparsity=0.5)).dense() - layer.weight).norm()
    for seed in range(5):
        random = randn(16, 16, seed=seed + 1)
        mask = random > random.median()
        assert ours < (layer.weight * mask - layer.weight).norm()


def test_scope_row_prunes_each_row_alike() -> None:
    scaled = randn(8, 30) * torch.arange(1, 9)[:, None]
    weight = apply(layer_of(scaled), MagnitudeConfig(sparsity=0.7, scope="row")).dense()
    assert (weight != 0).sum(dim=1).tolist() == [9] * 8


@pytest.mark.parametrize(("pattern", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:3", 1, 3), ("3:3", 3, 3)])
def test_pattern_counts_are_exact_in_every_group(pattern: str, kept: int, group: int) -> None:
    layer = layer_of(randn(7, 48))
    mask = apply(layer, MagnitudeConfig(pattern=pattern)).dense() != 0
    assert (mask.reshape(7, -1, group).sum(dim=-1) == kept).all()


def test_global_is_one_sort_over_all_layers() -> None:
    layers = [layer_of(scale * randn(9, 11, seed=n), f"layers.{n}.fc") for n, scale in enumerate([1.0, 0.3, 3.0])]
    config = MagnitudeConfig(sparsity=0.6, scope="global")
    configs = resolve([candidate_of(layer, config) for layer in layers], 0)
    everything = torch.cat([layer.weight.reshape(-1) for layer in layers])
    order = everything.abs().sort(stable=True, descending=True).indices
    expected = torch.zeros(everything.numel())
    kept = 297 - round(0.6 * 297)
    expected[order[:kept]] = everything[order[:kept]]
    found = [apply(layer, config).dense().reshape(-1) for layer, config in zip(layers, configs, strict=True)]
    assert torch.equal(torch.cat(found), expected)
    assert [c.kept for c in configs] == [int((f != 0).sum()) for f in found]


def test_global_ties_go_to_the_first_layers() -> None:
    layers = [layer_of(torch.ones(4, 4), f"layers.{n}.fc") for n in range(2)]
    config = MagnitudeConfig(sparsity=0.25, scope="global")
    configs = resolve([candidate_of(layer, config) for layer in layers], 0)
    assert [c.kept for c in configs] == [16, 8]
    assert torch.equal(apply(layers[1], configs[1]).dense(), torch.tensor([[1.0] * 4] * 2 + [[0.0] * 4] * 2))


def test_global_refuses_to_prune_a_layer_away() -> None:
    layers = [layer_of(torch.ones(4, 4), "layers.0.fc"), layer_of(0.1 * torch.ones(4, 4), "layers.1.fc")]
    config = MagnitudeConfig(sparsity=0.5, scope="global")
    with pytest.raises(RecipeError, match=r"all of layers\.1\.fc"):
        resolve([candidate_of(layer, config) for layer in layers], 0)


@pytest.mark.parametrize("store", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_survivors_are_bit_exact(dtype: torch.dtype, store: str) -> None:
    matrix = randn(16, 24).to(dtype)
    weight = apply(layer_of(matrix), MagnitudeConfig.model_validate({"sparsity": 0.5, "store": store}))
    kept = weight.dense() != 0
    if isinstance(weight, Sparse):
        assert torch.equal(weight.values.view(torch.uint8), matrix[weight.mask].view(torch.uint8))
    else:
        assert isinstance(weight, Dense)
        assert torch.equal(weight.matrix[kept].view(torch.uint8), matrix[kept].view(torch.uint8))


def test_auto_takes_the_smaller_form() -> None:
    """A bit mask costs 1/32 of a float32: below 3.1 % zeros dense is smaller."""
    layer = layer_of(randn(64, 64))
    for sparsity, form in ((0.02, "dense"), (0.05, "sparse")):
        config = MagnitudeConfig(sparsity=sparsity, store="auto")
        assert apply(layer, config).form == outline(layer.info, config).form == form


def test_zeros_stored_densely_are_no_gain_and_the_note_says_so() -> None:
    layer, config = layer_of(randn(64, 64)), MagnitudeConfig(sparsity=0.9)
    weight = apply(layer, config)
    assert outline_nbytes(weight) == layer.info.nbytes
    sparse = apply(layer, MagnitudeConfig(sparsity=0.9, store="sparse"))
    size = outline_nbytes(sparse)
    assert size == 64 * 64 // 8 + 4 * 410
    assert METHOD.describe(config, weight)["note"].endswith(f"no bytes saved; store: sparse would take {size} bytes")
    assert "note" not in METHOD.describe(config, sparse)


def test_a_sparsity_that_rounds_to_nothing_is_noted() -> None:
    layer, config = layer_of(randn(7, 13)), MagnitudeConfig(sparsity=0.001)
    weight = apply(layer, config)
    assert torch.equal(weight.dense(), layer.weight)
    assert METHOD.describe(config, weight) == {"sparsity": 0.0, "note": "sparsity 0.001 of 91 weights rounds to none"}


@pytest.mark.parametrize(("shape", "sparsity"), [((4, 4), 1.0), ((1, 10), 0.99)])
def test_pruning_everything_is_refused(shape: tuple[int, int], sparsity: float) -> None:
    refusal = check(layer_of(randn(*shape)).info, MagnitudeConfig(sparsity=sparsity))
    assert refusal is not None
    assert "would prune all" in refusal[0]
    assert "at most" in refusal[1]


def test_the_largest_sparsity_of_the_hint_is_accepted() -> None:
    info = layer_of(randn(1, 10)).info
    assert check(info, MagnitudeConfig(sparsity=0.9)) is None


def test_a_pattern_that_does_not_divide_is_refused() -> None:
    refusal = check(layer_of(randn(4, 10)).info, MagnitudeConfig(pattern="2:4"))
    assert refusal is not None
    assert "4 does not divide" in refusal[0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_integer_codes_stay_integer_codes(symmetric: bool) -> None:
    codes = torch.randint(-8, 8, (6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    zero = None if symmetric else torch.full((6, 2), 3, dtype=torch.int8)
    stored = IntGrouped(codes, 0.1 + torch.rand(6, 2), zero, 4, 4)
    layer, config = layer_of(stored), MagnitudeConfig(sparsity=0.5)
    weight = apply(layer, config)
    assert isinstance(weight, IntGrouped)
    assert weight.specs() == outline(layer.info, config).specs()
    kept = weight.dense() != 0
    assert torch.equal(weight.dense()[kept], layer.weight[kept])
    assert int((~kept).sum()) >= 24
    note = METHOD.describe(config, weight)["note"]
    assert note.startswith("zeros are codes like any other: no bytes saved; store: sparse would take ")
    sparse_config = MagnitudeConfig(sparsity=0.5, store="sparse")
    sparse = apply(layer, sparse_config)
    assert isinstance(sparse, SparseCodes)
    assert sparse.specs() == outline(layer.info, sparse_config).specs()
    assert torch.equal(sparse.dense(), weight.dense())
    assert note.endswith(f"{outline_nbytes(sparse)} bytes")


@pytest.mark.parametrize("fields", [{"sparsity": 0.6}, {"sparsity": 0.7, "scope": "row"}, {"pattern": "2:4"}])
def test_zeros_of_a_sparse_layer_count(fields: dict[str, object]) -> None:
    matrix = randn(16, 24).bfloat16()
    stored = Sparse.of(matrix, matrix.abs() > matrix.abs().median())
    layer = layer_of(stored)
    given = MagnitudeConfig.model_validate({**fields, "store": "sparse"})
    (config,) = resolve([candidate_of(layer, given)], 0)
    parts = [layer_of(Sparse.of(matrix[rows], stored.mask[rows])) for rows in (slice(0, 5), slice(5, 16))]
    in_blocks = replace(candidate_of(layer, given), read=None, blocks=[lambda part=part: part for part in parts])
    assert resolve([in_blocks], 0) == [config]  # type: ignore[list-item]
    weight = apply(layer, config)
    assert isinstance(weight, Sparse)
    assert weight.specs() == outline(layer.info, config).specs()
    assert (weight.mask & ~stored.mask).sum() == 0
    if fields == {"sparsity": 0.6}:
        assert weight.values.numel() == 384 - round(0.6 * 384)
        assert torch.equal(weight.dense(), apply(layer_of(matrix.float()), config).dense())


def test_a_sparse_layer_with_enough_zeros_is_left_alone() -> None:
    stored = Sparse.of(randn(16, 24), randn(16, 24, seed=1) > 1)
    weight = apply(layer_of(stored), MagnitudeConfig(sparsity=0.1, store="sparse"))
    assert torch.equal(weight.dense(), stored.dense())


@pytest.mark.parametrize(
    "fields",
    [{}, {"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": 1.5}, {"pattern": "5:4"}, {"pattern": "0:4"},
     {"pattern": "half"}, {"pattern": "2:4", "scope": "global"}],
)  # fmt: skip
def test_refused_parameters(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MagnitudeConfig.model_validate(fields)
