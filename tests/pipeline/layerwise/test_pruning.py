"""Pruning as people meet it: zeros are really there, nothing else is touched, and the file shrinks as promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Problems, Refused
from aicompress.methods import methods
from aicompress.methods.layerwise import LayerMethod
from aicompress.model.loading.load import load as load_model
from tests.pipeline.calibration.steps import text
from tests.pipeline.calibration.test_gradients import planned, run

UNSTRUCTURED = sorted(
    name
    for name, method in methods("prune").items()
    if isinstance(method, LayerMethod) and "movement" not in method.needs
)


def recipe_of(folder: Path, **sections: Any) -> Path:
    path = folder / "prune.yaml"
    path.write_text(json.dumps({"version": 1, **sections}))
    return path


@pytest.mark.parametrize("name", UNSTRUCTURED)
def test_every_method_zeroes_what_it_says_and_nothing_else(
    tmp_path: Path, tiny_llama: Path, text_file: Path, name: str
) -> None:
    """No method may do nothing silently, nor reach the embedding through the head that is tied to it."""
    method = methods("prune")[name]
    data = {"calibration": text(text_file, samples=2)} if method.needs else {}
    report = run(tiny_llama, tmp_path / "out", recipe_of(tmp_path, method={"name": name, "sparsity": 0.5}, **data))
    before, after = Checkpoint.open(tiny_llama), Checkpoint.open(tmp_path / "out")
    rows = {f"{row.name}.weight": row for row in report.layers}
    zeros = count = 0
    for tensor in before.parameters():
        if rows.get(tensor) is None or rows[tensor].method == "-":
            assert torch.equal(after.dense(tensor), before.dense(tensor)), tensor
        else:
            found = int((after.dense(tensor) == 0).sum())
            assert rows[tensor].detail["sparsity"] == pytest.approx(found / after.dense(tensor).numel(), abs=1e-6)
            zeros, count = zeros + found, count + after.dense(tensor).numel()
    assert zeros == count // 2
    assert rows["model.embed_tokens.weight"].method == "-"
    model = load_model(tmp_path / "out", kernels="reference")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (model.lm_head.weight != 0).all()


def test_an_exclusion_that_matches_nothing_is_an_error(tmp_path: Path, tiny_llama: Path) -> None:
    """A tied head has no weight of its own: to leave it out is to leave out nothing, and that is said."""
    select = {"kinds": ["linear", "embedding", "head"], "exclude": ["lm_head"]}
    recipe = recipe_of(tmp_path, method={"name": "magnitude", "sparsity": 0.5}, select=select)
    with pytest.raises((Refused, Problems), match="lm_head"):
        planned(tiny_llama, tmp_path / "out", recipe)


def test_a_selected_tied_embedding_is_pruned_once_and_named(tmp_path: Path, tiny_llama: Path) -> None:
    select = {"kinds": ["embedding"]}
    recipe = recipe_of(tmp_path, method={"name": "magnitude", "sparsity": 0.5}, select=select)
    report = run(tiny_llama, tmp_path / "out", recipe)
    (row,) = [row for row in report.layers if row.method != "-"]
    assert row.name == "model.embed_tokens"
    assert row.kind == "embedding"


def test_ninety_percent_in_sparse_storage_is_a_fifth_of_bf16(tmp_path: Path, tiny_llama_bf16: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        method={"name": "magnitude", "sparsity": 0.9, "store": "sparse"},
        select={"kinds": ["linear", "embedding"]},
    )
    report = run(tiny_llama_bf16, tmp_path / "out", recipe)
    chosen = [row for row in report.layers if row.method != "-"]
    assert {row.kind for row in chosen} == {"linear", "embedding"}
    assert sum(row.bytes_after for row in chosen) <= 0.2 * sum(row.bytes_before for row in chosen)
    assert all(row.bytes_after <= 0.17 * row.bytes_before for row in chosen)


def test_two_of_four_loads_back_bit_for_bit(tmp_path: Path, tiny_llama_bf16: Path) -> None:
    fields = {"name": "magnitude", "pattern": "2:4", "permutation": 5}
    run(tiny_llama_bf16, tmp_path / "dense", recipe_of(tmp_path, method=fields))
    report = run(tiny_llama_bf16, tmp_path / "sparse", recipe_of(tmp_path, method={**fields, "store": "sparse"}))
    dense, sparse = Checkpoint.open(tmp_path / "dense"), Checkpoint.open(tmp_path / "sparse")
    for name in dense.parameters():
        assert torch.equal(_bits(sparse.dense(name)), _bits(dense.dense(name))), name
    ids = torch.arange(5, 21)[None]
    with torch.no_grad():
        logits = [load_model(tmp_path / name)(input_ids=ids).logits for name in ("dense", "sparse")]
    assert torch.equal(*logits)
    row = next(row for row in report.layers if row.name == "model.layers.0.mlp.up_proj")
    assert row.bytes_after == 128 * 64 // 2 * 2 + -(-128 * 64 // 12) + 64 * 2  # values, mask, order


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)
