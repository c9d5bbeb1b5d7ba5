"""Widths found from the values of a layer, and the knobs that go with a search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aicompress.errors import Refused
from aicompress.layer import Layer, LayerInfo
from aicompress.methods import methods
from aicompress.methods.capabilities import Candidate
from aicompress.methods.decisions import Width
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.quantize.gptq import GptqConfig
from aicompress.methods.quantize.grid.widths import (
    CodeWidthConfig,
    group_sizes,
    open_bits,
    open_widths,
    proposed,
    resolve,
    rounding_errors,
    unfit,
    with_bits,
    with_width,
)
from aicompress.methods.quantize.qera import QeraConfig
from aicompress.methods.quantize.rtn import RtnConfig
from aicompress.recipe.step import Level, Recipe, Rule


def candidate(weight: Tensor, unit: str = "", name: str = "fc", **config: Any) -> Candidate:
    shape = (weight.shape[0], weight.shape[1])
    info = LayerInfo(name, f"{name}.weight", "linear", shape, shape, torch.float32)
    fields = {"name": "rtn", "bits": "range", "granularity": "channel", **config}
    return Candidate(info, RtnConfig(**fields), lambda: Layer(info, weight), (lambda: unit) if unit else None)


def widths(*candidates: Candidate) -> list[int]:
    return [config.bits for config in resolve(candidates, 0)]


def test_hand_computed_error() -> None:
    """Two bits are codes -2 to 1 with scale max / 1.5: 3 -> 1 (2), 1 -> 1 (rounded from 0.5 up to 0), 0 -> 0."""
    config = RtnConfig(name="rtn", bits=2, granularity="channel")
    weight = torch.tensor([[3.0, -3.0, 0.0, 1.2]])
    # scale 2: 3 / 2 = 1.5 -> 1 (clamped) -> 2; -1.5 -> -2 -> -4; 0; 0.6 -> 1 -> 2: errors 1, 1, 0, 0.8.
    assert rounding_errors([lambda: weight], config, (2,)) == {2: pytest.approx((2.64 / 19.44) ** 0.5)}
    assert rounding_errors([lambda: torch.zeros(2, 3)], config, (2,)) == {2: 0}


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_is_that_of_rtn(granularity: str, symmetric: bool) -> None:
    weight = torch.randn(300, 1024, generator=torch.Generator().manual_seed(0))  # more than one piece of rows
    fields: dict[str, Any] = {"granularity": granularity, "symmetric": symmetric, "scale_dtype": "float32"}
    config = RtnConfig(name="rtn", bits=3, **fields)
    info = LayerInfo("fc", "fc.weight", "linear", (300, 1024), (300, 1024), torch.float32)
    rounded = methods("quantize")["rtn"].apply(Layer(info, weight), config).dense()  # type: ignore[attr-defined]
    expected = float((rounded - weight).norm() / weight.norm())
    for blocks in ([weight], weight.split(64)):
        found = rounding_errors([lambda block=block: block for block in blocks], config, (3,))
        assert found == {3: pytest.approx(expected, rel=1e-4)}


def test_the_least_width_within_the_bound() -> None:
    assert proposed({2: 0.5, 3: 0.2, 4: 0.1, 8: 0.01}, 0.1) == 4
    assert proposed({2: 0.5, 3: 0.2}, 0.1) is None
    assert proposed({2: 0.0, 4: 0.0}, 0.1) == 2


def test_range_reads_the_values() -> None:
    """Values on three levels need 2 bits, evenly spread ones 4 at a tenth, outliers in a row 8."""
    ternary = torch.tensor([[-1.0, 0.5, 0.0, -1.0]]).repeat(4, 8)  # -2, 1 and 0 times the scale of 2 bits
    even = torch.linspace(-1, 1, 128).reshape(4, 32)
    outliers = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    outliers[:, 0] = 60
    found = [candidate(weight, name=name, max_error=0.1) for name, weight in (("a", even), ("b", outliers))]
    errors = rounding_errors([lambda: ternary], with_bits(found[0].config, 2), (2, 3, 4, 8))
    assert errors[2] < errors[4] + 0.3
    assert widths(*found) == [4, 8]
    assert widths(candidate(torch.zeros(4, 32))) == [2]


def test_layers_that_share_an_input_get_the_widest_of_theirs() -> None:
    even = torch.linspace(-1, 1, 128).reshape(4, 32)
    zeros = torch.zeros(4, 32)
    together = [candidate(even, "qkv", "q"), candidate(zeros, "qkv", "k"), candidate(zeros, "o", "o")]
    assert widths(*together) == [3, 3, 2]
    assert widths(candidate(even, name="q"), candidate(zeros, name="k")) == [3, 2]  # alone without a unit


def test_range_keeps_what_is_explicit_and_what_is_searched() -> None:
    zeros = torch.zeros(4, 32)
    pinned, searched = candidate(zeros, bits=8), candidate(zeros, bits="auto", max_kl=0.1)
    assert resolve([pinned, searched], 0) == [pinned.config, searched.config]


def test_an_error_that_no_width_keeps_is_refused_with_the_figure() -> None:
    even = torch.linspace(-1, 1, 128).reshape(4, 32)
    with pytest.raises(Refused, match=r"fc: its error at 4 bits is 0\.0\d+, above max_error 0\.01") as error:
        resolve([candidate(even, max_error=0.01, choices=(4, 2))], 0)
    assert "max_error" in error.value.hint


def test_a_settled_config_is_as_if_given() -> None:
    given = RtnConfig(name="rtn", bits="range", max_error=0.2, choices=(3, 4), group_size=64)  # type: ignore[arg-type]
    assert with_bits(given, 3) == RtnConfig(name="rtn", bits=3, group_size=64)
    assert open_bits(given) == "range"
    assert open_bits(with_bits(given, 3)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": "auto"}, "exactly one of target_bytes, target_bpw, max_kl"),
        ({"bits": "auto", "target_bpw": 3, "max_kl": 0.1}, "exactly one of"),
        ({"bits": "auto", "target_bpw": 3, "max_error": 0.1}, "max_error has no meaning beside bits: auto"),
        ({"bits": 4, "target_bytes": "1MB"}, "target_bytes has no meaning beside bits: 4"),
        ({"bits": "range", "max_kl": 0.1}, "max_kl has no meaning"),
        ({"bits": "range", "choices": []}, "at least one width"),
        ({"bits": "range", "choices": [5]}, "2, 3, 4 or 8"),
        ({"bits": 5}, "2, 3, 4, 8"),
        ({"bits": 4, "group_sizes": [32]}, "group_sizes has no meaning beside bits: 4"),
        ({"bits": "range", "group_sizes": [32]}, "group_sizes has no meaning beside bits: range"),
        ({"bits": "auto", "target_bpw": 3, "group_sizes": []}, "at least one size"),
        ({"bits": "auto", "target_bpw": 3, "group_sizes": [0]}, "at least one column"),
        (
            {"bits": "auto", "target_bpw": 3, "group_sizes": [32], "granularity": "channel"},
            "group_sizes has no meaning beside granularity: channel",
        ),
    ],
)
def test_knobs_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GptqConfig(name="gptq", **fields)


def test_a_target_may_have_a_unit_and_choices_are_sorted() -> None:
    config = GptqConfig(name="gptq", bits="auto", target_bytes="20MB", choices=(8, 3, 3))  # type: ignore[arg-type]
    assert config.target_bytes == 20_000_000
    assert config.widths == (3, 8)


def auto(**fields: Any) -> GptqConfig:
    return GptqConfig(name="gptq", bits="auto", target_bpw=3, **fields)  # type: ignore[arg-type]


def test_groups_to_choose_among() -> None:
    assert group_sizes(auto(group_size=64), 1024) == (32, 64, 128)
    assert group_sizes(auto(group_size=16), 1024) == (16, 32, 64, 128)
    assert group_sizes(auto(group_size=64), 704) == (32, 64)  # 128 does not divide it
    assert group_sizes(auto(group_size=1), 3) == (1,)
    assert group_sizes(auto(group_sizes=[128, 32, 32]), 704) == (32,)
    assert group_sizes(auto(granularity="channel"), 704) == (None,)
    assert group_sizes(auto(group_size=64, pad=True), 100) == (64,)
    assert group_sizes(auto(group_sizes=[32, 64], pad=True), 100) == (32, 64)
    assert open_widths(auto(choices=[2, 4], group_sizes=[32]), 64) == (Width(2, 32), Width(4, 32))
    assert unfit(auto(group_size=64), 100) == "group_size 64 does not divide"
    assert unfit(auto(group_size=48, group_sizes=[20]), 100) is None
    assert unfit(auto(group_sizes=[64, 128]), 100) == "none of group_sizes 64, 128 divides"


def test_what_a_search_chose_is_as_if_given() -> None:
    chosen = GptqConfig(name="gptq", bits=2, group_size=128, refine=4)
    assert with_width(auto(group_sizes=[64, 128], refine=4), Width(2, 128)) == chosen
    assert with_width(auto(granularity="channel"), Width(2)) == GptqConfig(name="gptq", bits=2, granularity="channel")


def test_rules_pin_layers_and_levels_narrow_their_choices() -> None:
    info = LayerInfo("layers.0.fc", "layers.0.fc.weight", "linear", (4, 4), (4, 4), torch.float32)
    config = GptqConfig(name="gptq", bits="auto", target_bpw=3.5, samples=4, order="natural")  # type: ignore[arg-type]
    pinned = Recipe(version=1, method=config, rules=(Rule(match="*.fc", bits=8),))  # type: ignore[call-arg]
    assert pinned.config_for(info)[0] == GptqConfig(name="gptq", bits=8, order="natural")
    narrowed = Recipe(version=1, method=config, levels=(Level(layers="0", choices=[4, 8]),))  # type: ignore[call-arg]
    found, _ = narrowed.config_for(info)
    assert isinstance(found, CodeWidthConfig)
    assert (open_bits(found), found.widths, found.target_bpw) == ("auto", (4, 8), 3.5)


def test_every_method_with_such_a_width_settles_ranges() -> None:
    found = [
        m for m in methods("quantize").values() if isinstance(m, LayerMethod) and issubclass(m.config, CodeWidthConfig)
    ]
    assert {"rtn", "gptq", "imatrix", "hqq", "sinq"} <= {method.name for method in found}
    assert all(method.allocates is not None and method.widths is not None for method in found)


def test_a_corrected_base_has_explicit_bits() -> None:
    with pytest.raises(ValidationError, match="base needs explicit bits"):
        QeraConfig(name="qera", base={"name": "rtn", "bits": "range"})
