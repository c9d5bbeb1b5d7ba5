from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from aicompress.errors import RecipeError
from aicompress.methods.channels import Channels
from aicompress.methods.prune.channels import ChannelsConfig, choose, scores
from aicompress.methods.structural import Part, Structure


def group(values: list[float], cohorts: list[int] | None = None, name: str = "conv") -> Channels:
    """A group whose units have these saliencies and, alone in their rows, these weights."""
    rows = torch.tensor(values)[:, None]
    part = Part(f"{name}.weight", name, "producer", 0, lambda: rows)
    return Channels(Structure(name, len(values), (part,)), tuple(cohorts or [0] * len(values)), torch.tensor(values))


def chosen(groups: list[Channels], **fields: Any) -> list[list[int]]:
    return choose(groups, ChannelsConfig(**{"score": "taylor", **fields}), lambda choice: True)


def test_scores_by_hand() -> None:
    maker, bias, reader = (
        torch.tensor([[3.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[4.0], [0.0]]),
        torch.tensor([[1.0], [3.0]]),
    )
    parts = (
        Part("conv.weight", "conv", "producer", 0, lambda: maker),
        Part("conv.bias", "conv", "producer", 0, lambda: bias),
        Part("next.weight", "next", "consumer", 0, lambda: reader),
    )
    units = Channels(Structure("conv", 2, parts), (0, 0), torch.tensor([2.0, 6.0]))

    def of(score: str) -> Tensor:
        return scores(units, ChannelsConfig(keep=0.5, score=score))

    # Norms 5 and 1 of the maker are 5/3 and 1/3 of their mean, 1 and 3 of the reader 1/2 and 3/2.
    torch.testing.assert_close(of("l2"), torch.tensor([5 / 3 + 1 / 2, 1 / 3 + 3 / 2]).double())
    torch.testing.assert_close(of("l1"), torch.tensor([7 / 4 + 1 / 2, 1 / 4 + 3 / 2]).double())
    torch.testing.assert_close(of("activation"), torch.tensor([1 / 2 * 1 / 2, 3 / 2 * 3 / 2]).double())
    assert of("taylor").tolist() == [2, 6]


def test_the_same_share_of_every_group() -> None:
    kept = chosen([group([5, 1, 4, 2]), group([0.1, 0.3, 0.2])], sparsity=0.5)
    assert kept == [[0, 2], [1, 2]]


def test_the_lowest_of_the_whole_network() -> None:
    groups = [group([5, 1, 4, 2]), group([0.1, 0.3, 0.2, 0.4, 0.5], name="other")]
    assert chosen(groups, sparsity=0.5, scope="global") == [[0, 1, 2, 3], [4]]
    assert [len(k) for k in chosen(groups, sparsity=0.5, scope="global", floor=0.6)] == [3, 3]


def test_every_cohort_keeps_as_many() -> None:
    assert chosen([group([1, 2, 3, 9, 8, 7], [0, 0, 0, 1, 1, 1])], sparsity=0.5) == [[1, 2, 3, 4]]
    assert chosen([group([1, 2, 3, 9], [0, 1, 0, 1])], sparsity=0.5) == [[2, 3]]


def test_the_first_of_equals_stays() -> None:
    assert chosen([group([1, 1, 1, 1])], sparsity=0.5) == [[0, 1]]
    assert chosen([group([1, 1, 1, 1]), group([1, 1], name="b")], sparsity=0.5, scope="global") == [[0], [0, 1]]


@pytest.mark.parametrize(
    ("fields", "size", "expected"),
    [
        ({"sparsity": 0.0}, 7, 7),
        ({"keep": 1.0}, 7, 7),
        ({"sparsity": 0.01}, 8, 8),
        ({"keep": 0.8}, 100, 80),
        ({"sparsity": 0.999}, 8, 1),
        ({"sparsity": 0.5}, 1, 1),
        ({"sparsity": 0.5, "multiple": 4}, 10, 8),
        ({"sparsity": 0.5, "multiple": 64}, 10, 10),
        ({"sparsity": 0.999, "scope": "global", "floor": 0.0}, 8, 1),
        ({"sparsity": 0.999, "scope": "global"}, 30, 3),
    ],
)
def test_how_many_stay(fields: dict[str, Any], size: int, expected: int) -> None:
    assert len(chosen([group([float(i) for i in range(size)])], **fields)[0]) == expected


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(1, 3),
    st.floats(0, 0.999),
    st.sampled_from(["layer", "global"]),
    st.integers(1, 5),
)
def test_no_cohort_is_emptied_and_none_is_favoured(
    sizes: list[int], cohorts: int, sparsity: float, scope: str, multiple: int
) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    groups = [
        group(torch.rand(size * cohorts, generator=generator).tolist(), [i % cohorts for i in range(size * cohorts)])
        for size in sizes
    ]
    kept = chosen(groups, sparsity=sparsity, scope=scope, multiple=multiple)
    for units, whole in zip(kept, groups, strict=True):
        counts = {sum(whole.cohorts[unit] == cohort for unit in units) for cohort in range(cohorts)}
        assert units == sorted(units)
        assert len(counts) == 1
        assert min(counts) >= 1
        assert len(units) % multiple == 0 or len(units) == whole.structure.size


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_target_is_met_by_the_largest_network_that_fits(scope: str) -> None:
    groups = [group([float(i) for i in range(40)]), group([float(i) / 3 for i in range(60)], name="b")]

    def size(choice: list[list[int]]) -> int:
        return len(choice[0]) * len(choice[1])

    config = ChannelsConfig(target_parameters=1000, scope=scope, score="taylor")
    kept = choose(groups, config, lambda choice: size(choice) <= 1000)
    assert 900 < size(kept) <= 1000
    everything = choose(groups, config, lambda choice: size(choice) <= 10_000)
    assert size(everything) == 2400


def test_refuses_a_target_that_cannot_be_met() -> None:
    config = ChannelsConfig(target_bytes=10)
    with pytest.raises(RecipeError, match="one channel left"):
        choose([group([1, 2])], config, lambda choice: False)


@pytest.mark.parametrize(
    "fields", [{}, {"sparsity": 1.0}, {"keep": 0.0}, {"keep": 0.5, "sparsity": 0.5}, {"keep": 0.5, "score": "l3"}]
)
def test_refuses_bad_parameters(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChannelsConfig(**fields)
