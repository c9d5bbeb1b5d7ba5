"""svd: a hand-computed case, the Eckart-Young property, and the four ways to say its size."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from aicompress.errors import RecipeError
from aicompress.methods.factorize import decomposition
from aicompress.methods.factorize.decomposition import factors, squared_singular_values
from aicompress.methods.factorize.svd import (
    METHOD,
    SvdConfig,
    apply,
    check,
    outline,
    resolve,
)
from aicompress.weights import Dense, IntGrouped, LowRank, outline_nbytes
from tests.methods.layers import candidate_of, layer_of, randn, squared_error


def decaying(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall as 1, 1/2, 1/3, ..."""
    u, _ = torch.linalg.qr(randn(out, min(out, columns), seed=seed))
    v, _ = torch.linalg.qr(randn(columns, min(out, columns), seed=seed + 1))
    return u / torch.arange(1, min(out, columns) + 1) @ v.t()


def test_hand_computed() -> None:
    """diag(3, 2, 1) of rank 1 keeps the 3: factors √3 e₁ and √3 e₁ᵀ, up to a common sign."""
    layer = layer_of(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    weight = apply(layer, SvdConfig(rank=1))
    assert isinstance(weight, LowRank)
    assert torch.allclose(weight.dense(), torch.diag(torch.tensor([3.0, 0.0, 0.0])))
    assert torch.allclose(weight.out.dense().abs(), torch.tensor([[3**0.5], [0], [0]]))
    assert torch.allclose(weight.inner.dense().abs(), torch.tensor([[3**0.5, 0, 0]]))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_squared_error_is_the_sum_of_dropped_squares(shape: tuple[int, int], rank: int) -> None:
    layer = layer_of(randn(*shape))
    sigma = torch.linalg.svdvals(layer.weight.double())
    assert squared_error(layer, apply(layer, SvdConfig(rank=rank))) == pytest.approx(
        float(sigma[rank:].square().sum()), rel=1e-5
    )


def test_no_other_factors_of_the_rank_come_closer() -> None:
    """Eckart-Young: even the best V for a random U stays behind."""
    layer = layer_of(randn(24, 40))
    ours = squared_error(layer, apply(layer, SvdConfig(rank=6)))
    for seed in range(5):
        basis, _ = torch.linalg.qr(randn(24, 6, seed=seed + 1))
        theirs = float((layer.weight - basis @ (basis.t() @ layer.weight)).square().sum())
        assert ours < theirs


def test_factors_share_the_singular_values() -> None:
    out, inner = factors(randn(24, 40), 6)
    sigma = torch.linalg.svdvals(randn(24, 40))[:6]
    assert torch.allclose(out.t() @ out, torch.diag(sigma), atol=1e-4)
    assert torch.allclose(inner @ inner.t(), torch.diag(sigma), atol=1e-4)


def test_rank_deficient_weight_is_exact() -> None:
    layer = layer_of(randn(24, 2) @ randn(2, 40, seed=1))
    weight = apply(layer, SvdConfig(rank=6))
    assert torch.isfinite(weight.dense()).all()
    assert torch.allclose(weight.dense(), layer.weight, atol=1e-4)


@pytest.mark.parametrize(("keep", "rank"), [(0.5, 7), (0.1, 1), (0.99, 14)])
def test_keep_is_a_share_of_the_parameters(keep: float, rank: int) -> None:
    """24 * 40 / (24 + 40) = 15 ranks are the whole matrix."""
    layer = layer_of(randn(24, 40))
    weight = apply(layer, SvdConfig(keep=keep))
    assert isinstance(weight, LowRank)
    assert weight.rank == rank
    assert keep < 0.2 or weight.numbers() <= keep * 24 * 40


@pytest.mark.parametrize("rank", [15, 16, 24, 1000])
def test_a_layer_that_would_grow_stays_dense_and_says_so(rank: int) -> None:
    layer, config = layer_of(randn(24, 40).bfloat16()), SvdConfig(rank=rank)
    weight = apply(layer, config)
    assert isinstance(weight, Dense)
    assert torch.equal(weight.matrix, randn(24, 40).bfloat16())
    assert outline(layer.info, config).form == "dense"
    note = METHOD.describe(config, weight)["note"]
    assert f"rank {rank} would not make it smaller (only ranks up to 14 would)" in note


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_takes_the_smallest_rank_that_holds_it(energy: float) -> None:
    layer = layer_of(decaying(64, 64))
    (config,) = resolve([candidate_of(layer, SvdConfig(energy=energy))], 0)
    share = torch.linalg.svdvals(layer.weight.double()).square().cumsum(0)
    share /= share[-1].clone()
    assert share[config.rank - 1] >= energy
    assert config.rank == 1 or share[config.rank - 2] < energy


def test_multiple_rounds_ranks() -> None:
    layer = layer_of(decaying(64, 64))
    assert apply(layer, SvdConfig(rank=9, multiple=8)).rank == 16  # type: ignore[attr-defined]
    assert apply(layer, SvdConfig(keep=0.9, multiple=8)).rank == 24  # type: ignore[attr-defined]  # 28 rounded down
    (config,) = resolve([candidate_of(layer, SvdConfig(energy=0.99, multiple=8))], 0)
    assert config.rank % 8 == 0


class TestTargetBytes:
    layers = tuple(
        layer_of(factor * decaying(*shape, seed=seed), f"layers.{seed}.fc")
        for seed, (shape, factor) in enumerate([((32, 32), 1.0), ((48, 16), 0.3), ((24, 64), 2.0)])
    )
    dense = sum(layer.info.nbytes for layer in layers)

    def settled(self, budget: int, other: int = 0, **fields: int) -> list[SvdConfig]:
        config = SvdConfig(target_bytes=budget, **fields)
        return resolve([candidate_of(layer, config) for layer in self.layers], other)

    def nbytes(self, configs: list[SvdConfig]) -> int:
        pairs = zip(self.layers, configs, strict=True)
        return sum(outline_nbytes(outline(layer.info, config)) for layer, config in pairs)

    def error(self, configs: list[SvdConfig]) -> float:
        return sum(squared_error(la, apply(la, config)) for la, config in zip(self.layers, configs, strict=True))

    @pytest.mark.parametrize("share", [0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
    @pytest.mark.parametrize("multiple", [1, 4])
    def test_is_never_exceeded_and_nearly_used(self, share: float, multiple: int) -> None:
        least = sum(multiple * sum(layer.info.shape) * 4 for layer in self.layers)
        budget = max(int(share * self.dense), least)
        taken = self.nbytes(self.settled(budget + 1000, 1000, multiple=multiple))
        assert taken <= budget
        largest_step = 4 * 88 * multiple
        assert taken > budget - largest_step or taken == self.dense

    def test_is_close_to_the_best_of_all_choices(self) -> None:
        """Against every triple of ranks; what greedy may leave is the gain of one step, large in layers this small."""
        budget = self.dense // 2
        ours = self.error(self.settled(budget))
        rests = []  # per layer: (bytes, error) of every rank; from the first that would not shrink on, dense
        for layer in self.layers:
            squares = torch.linalg.svdvals(layer.weight.double()).square()
            ranks = range(1, min(layer.info.shape) + 1)
            sizes = [outline_nbytes(outline(layer.info, SvdConfig(rank=rank))) for rank in ranks]
            left = [0.0 if size == layer.info.nbytes else float(squares[r:].sum()) for r, size in enumerate(sizes, 1)]
            rests.append(list(zip(sizes, left, strict=True)))
        choices = ([sum(pair[i] for pair in triple) for i in (0, 1)] for triple in itertools.product(*rests))
        best = min(error for size, error in choices if size <= budget)
        uniform = self.error([SvdConfig(keep=0.5)] * 3)
        assert best <= ours < 1.1 * best
        assert ours < uniform

    def test_everything_fits_then_everything_stays_dense(self) -> None:
        configs = self.settled(self.dense)
        assert self.error(configs) == 0

    def test_too_small_names_the_minimum(self) -> None:
        least = 1000 + sum(4 * sum(layer.info.shape) for layer in self.layers)
        with pytest.raises(RecipeError, match=f"take {least}"):
            self.settled(least - 1, 1000)
        assert self.nbytes(self.settled(least, 1000)) == least - 1000

    def test_two_budgets_are_refused(self) -> None:
        pair = [candidate_of(self.layers[0], SvdConfig(target_bytes=budget)) for budget in (10000, 20000)]
        with pytest.raises(RecipeError, match="several values"):
            resolve(pair, 0)

    def test_other_rules_count_against_the_budget(self) -> None:
        first = candidate_of(self.layers[0], SvdConfig(rank=8))
        rest = [candidate_of(layer, SvdConfig(target_bytes="8KiB")) for layer in self.layers[1:]]
        configs = resolve([first, *rest], 0)
        assert configs[0].rank == 8
        assert self.nbytes(configs) <= 8192


@pytest.mark.parametrize("fields", [{}, {"rank": 3, "keep": 0.5}, {"rank": 0}, {"keep": 0}, {"energy": 1.1}])
def test_refused_parameters(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SvdConfig.model_validate(fields)


def test_a_quantized_layer_must_not_grow() -> None:
    stored = IntGrouped(torch.ones(32, 32, dtype=torch.int8), torch.ones(32, 1), None, 4)
    layer = layer_of(stored)
    refusal = check(layer.info, SvdConfig(keep=0.5))
    assert refusal is not None
    assert "stored as int_grouped in 640 bytes; at rank 8 it would take 2048" in refusal[0]
    assert check(layer.info, SvdConfig(rank=2)) is None
    with pytest.raises(RecipeError, match="int_grouped"):
        resolve([candidate_of(layer_of(IntGrouped(torch.eye(32).to(torch.int8), torch.ones(32, 1), None, 4)),
                             SvdConfig(energy=0.9))], 0)  # fmt: skip


@pytest.mark.parametrize("shape", [(256, 320), (320, 256)], ids=str)
def test_few_directions_of_a_large_matrix_are_nearly_the_best(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """White noise is the hardest: its singular values hardly fall. The same seed gives the same factors."""
    monkeypatch.setattr(decomposition, "LARGE", 256)
    layer, config = layer_of(randn(*shape)), SvdConfig(rank=16)
    squares, weight = squared_singular_values(layer.weight), apply(layer, config)
    assert float(squares[16:].sum()) * 1.0001 < squared_error(layer, weight) < 1.01**2 * float(squares[16:].sum())
    assert torch.equal(apply(layer, config).dense(), weight.dense())
    out, inner = factors(layer.weight, 16)
    assert torch.allclose(out.t() @ out, inner @ inner.t(), atol=1e-2)
    assert not apply(layer_of(torch.zeros(shape)), config).dense().any()
    exact = apply(layer, SvdConfig(rank=17))  # more than a sixteenth of the side
    assert squared_error(layer, exact) == pytest.approx(float(squares[17:].sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [5, 30], ids=["some", "many"])
def test_directions_are_found_in_the_gram_matrix_itself(rank: int) -> None:
    """Its upper triangle is read, and no copy of it is worked on."""
    whole = decomposition.gram(randn(90, 40))
    values, vectors = torch.linalg.eigh(whole)
    upper = torch.where(torch.ones(40, 40).triu() > 0, whole, torch.nan)
    held = upper.clone()
    found, rows = decomposition.leading(upper, rank)
    torch.testing.assert_close(found, values[-rank:])
    torch.testing.assert_close((rows @ vectors[:, -rank:]).abs(), torch.eye(rank, dtype=torch.float64))
    assert not torch.equal(upper.nan_to_num(), held.nan_to_num())
