"""Mixtures of experts: each expert has its own statistics and its own part of the merged tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from aicompress.checkpoint import Checkpoint
from aicompress.model.blocks.expert_inputs import ExpertCalls, product_of
from aicompress.model.loading.load import build, load
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.loading.places import Slot, in_order
from tests.model.blocks.test_walk import run_walk, token_batches

NAMES = {
    "tiny_mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.{}.weight", "w1", "w3", "w2"),
    "tiny_qwen_moe": ("model.layers.{}.mlp.experts.{}.{}.weight", "gate_proj", "up_proj", "down_proj"),
}


def routed(folder: Path, batches: list[dict[str, Any]], block: int, model: Any = None) -> list[Tensor]:
    """Tokens that each expert of a block is given, by the router's choice."""
    model = model or load(folder, kernels="reference")
    experts = model.model.layers[block].mlp.experts
    seen: list[list[Tensor]] = [[] for _ in range(len(experts.gate_up_proj))]

    def look(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, _ = args
        for expert, rows in enumerate(seen):
            rows.append(hidden[(chosen == expert).any(dim=-1)])

    handle = experts.register_forward_pre_hook(look)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return [torch.cat(rows) for rows in seen]


@pytest.mark.parametrize("fixture", NAMES)
def test_each_expert_has_the_gram_of_its_own_tokens(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    pattern, gate, up, down = NAMES[fixture]
    visitor, _ = run_walk(folder, token_batches(32))
    weights = Checkpoint.open(folder)
    for expert, rows in enumerate(routed(folder, token_batches(32), block=0)):
        names = [pattern.format(0, expert, part) for part in (gate, up, down)]
        stats = [visitor.stats[name] for name in names]
        assert [each.count for each in stats] == [len(rows)] * 3
        if not len(rows):
            continue
        assert stats[0] is stats[1]
        hidden = functional.silu(rows @ weights.dense(names[0]).t()) * (rows @ weights.dense(names[1]).t())
        for found, given in ((stats[0], rows), (stats[2], hidden)):
            assert found.gram is not None
            torch.testing.assert_close(found.gram, given.t() @ given / len(given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixture", NAMES)
def test_a_compressed_expert_is_what_the_next_block_sees(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    visitor, wanted = run_walk(folder, token_batches(32), factor=0.5)
    halved = load(folder, kernels="reference")
    for name, place in wanted.items():
        if ".layers.0." in name:
            if isinstance(place, Slot):
                getattr(halved.get_submodule(place.module), place.leaf).data[place.expert] *= 0.5 ** (
                    0.5 if place.leaf == "gate_up_proj" else 1  # met twice, as gate and as up
                )
            else:
                halved.get_submodule(place).weight.data *= 0.5
    pattern, gate, *_ = NAMES[fixture]
    for expert, rows in enumerate(routed(folder, token_batches(32), block=1, model=halved)):
        found = visitor.stats[pattern.format(1, expert, gate)]
        assert found.count == len(rows)
        if len(rows):
            assert found.gram is not None
            torch.testing.assert_close(found.gram, rows.t() @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixture", NAMES)
def test_replacing_every_expert_gives_the_merged_tensor(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    checkpoint = Checkpoint.open(folder)
    model = build(checkpoint)
    loader = PartialModel(checkpoint, model)
    loader.load(lambda name: True)
    experts = model.model.layers[1].mlp.experts
    before = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    for parameter in experts.parameters():
        parameter.data.zero_()
    for name in checkpoint.parameters():
        if ".layers.1." in name and ".experts." in name:
            loader.replace(name, checkpoint.dense(name))
    for name, parameter in experts.named_parameters():
        torch.testing.assert_close(parameter.data, before[name].data, rtol=0, atol=0)


def test_more_than_ten_experts_keep_their_places(tiny_mixtral: Path) -> None:
    ours, theirs = load(tiny_mixtral, kernels="reference"), AutoModelForCausalLM.from_pretrained(tiny_mixtral)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter.data, rtol=0, atol=0)
    assert in_order({"experts.10.w1": 0, "experts.2.w1": 0}) == ["experts.2.w1", "experts.10.w1"]


def test_cross_of_an_expert_is_its_gram(tiny_qwen_moe: Path) -> None:
    visitor, _ = run_walk(tiny_qwen_moe, token_batches(32), factor=0.9, cross=True)
    pattern, gate, *_ = NAMES["tiny_qwen_moe"]
    reached = [visitor.stats[pattern.format(1, expert, gate)] for expert in range(4)]
    for stats in reached:
        if stats.count:
            torch.testing.assert_close(stats.cross, stats.gram)
    assert any(stats.count for stats in reached)


def test_products_with_experts_of_every_layout_are_seen() -> None:
    """One at a time as (out, in) or (in, out), through turned views, and all at once with zeros for other tokens."""
    merged, seen = torch.randn(3, 4, 4), dict[str, Tensor]()
    parts = {str(number): (merged, number) for number in range(3)}
    x = torch.randn(2, 4)
    all_at_once = torch.stack([x, torch.zeros(2, 4), torch.cat([x[:1], torch.zeros(1, 4)])])
    ways: list[tuple[bool, Callable[[], Tensor], dict[str, Tensor]]] = [
        (False, lambda: functional.linear(x, merged[1]), {"1": x}),
        (True, lambda: functional.linear(x, merged[1].t()), {"1": x}),
        (True, lambda: x @ merged[torch.tensor(2)], {"2": x}),
        (False, lambda: x.matmul(merged[2].T), {"2": x}),
        (True, lambda: torch.addmm(x[0], x, merged[0]), {"0": x}),
        (True, lambda: torch.bmm(all_at_once, merged), {"0": x, "2": x[:1]}),
    ]
    for transposed, product, wanted in ways:
        seen.clear()
        with ExpertCalls(parts, lambda names, rows: seen.update(dict.fromkeys(names, rows))), _Orientation() as told:
            product()
        assert seen.keys() == wanted.keys()
        assert all(torch.equal(seen[name], rows) for name, rows in wanted.items())
        assert told.transposed == [transposed]


class _Orientation(TorchFunctionMode):
    """Notes which way round the matrices of products lie."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed: list[bool] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = product_of(function, args)
        self.transposed += [] if product is None else [product[2]]
        return function(*args, **(kwargs or {}))
