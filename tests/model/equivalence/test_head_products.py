"""Layers of which only products of heads count are found by running: with what a rotary embedding holds together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

from aicompress.methods.head_products import HeadProduct
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.attention import head_counts
from aicompress.model.equivalence.head_products import HeadCounts, find_head_products
from aicompress.model.loading.load import build
from aicompress.model.loading.partial_model import PartialModel
from tests.model.equivalence.test_scaling_groups import noise
from tests.pipeline.families import FAMILIES, decoder

HALVES = tuple((row, row + 4) for row in range(4))
# By family each kind of product of a block, with the last words of its members' names, and the number of all products.
PRODUCTS: dict[str, tuple[dict[str, tuple[tuple[str, str], tuple[tuple[int, ...], ...]]], int]] = {
    "llama": ({"values": (("v_proj", "o_proj"), ()), "scores": (("q_proj", "k_proj"), HALVES)}, 8),
    "qwen3": ({"values": (("v_proj", "o_proj"), ())}, 4),  # norms of queries and keys
    "bert": ({"values": (("value", "dense"), ()), "scores": (("query", "key"), ())}, 8),
    "whisper": ({"values": (("v_proj", "out_proj"), ()), "scores": (("q_proj", "k_proj"), ())}, 20),
    "gpt2": ({}, 0),  # one layer makes queries, keys and values
}


def products_in(folder: Path, name: str) -> tuple[HeadProduct, ...]:
    checkpoint = noise(folder)
    model = build(checkpoint)
    architecture = Architecture.of(checkpoint.config, checkpoint.parameters())
    counts = dict.fromkeys(HeadCounts(c.heads, c.groups, c.width) for c in head_counts(architecture.config))
    loader = PartialModel(checkpoint, model, dtype=torch.float32)
    return find_head_products(tuple(counts), model, loader, FAMILIES[name].inputs())


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_heads_are_found(tmp_path: Path, name: str) -> None:
    FAMILIES[name].saved(tmp_path)
    found = products_in(tmp_path, name)
    kinds = {
        product.kind: ((product.members[0].split(".")[-2], product.members[1].split(".")[-2]), product.units)
        for product in found
    }
    assert (kinds, len(found)) == PRODUCTS[name]
    parameters = noise(tmp_path).parameters()
    assert {name for product in found for name in (*product.members, *filter(None, product.biases))} <= set(parameters)
    assert len({name for product in found for name in product.members}) == 2 * len(found)


def test_one_key_for_all_queries(tmp_path: Path) -> None:
    decoder(hf.LlamaForCausalLM, hf.LlamaConfig, num_key_value_heads=1, head_dim=8).saved(tmp_path)
    found = products_in(tmp_path, "llama")
    assert [product.kind for product in found[:2]] == ["values", "scores"]
    assert [product.groups for product in found[:2]] == [1, 1]
