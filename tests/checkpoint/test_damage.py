"""A stored tensor that is damaged is refused by every reader in one clear error, and `verify` says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aicompress import load
from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError
from aicompress.pipeline.inspect import Analysis, inspect
from aicompress.pipeline.verify import verify
from aicompress.weights import Dense, LowRank, Sparse, SparseCodes, Weight
from tests.weights.forms import FORMS, TWO_OF_FOUR, ints, randn, write_form

DTYPES = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.float32)
GRID = ("int ", "sparse codes ")  # of which a corner will do
COMPRESSED = {name: w for name, w in FORMS.items() if not isinstance(w, Dense)}
SOME = {name: w for name, w in COMPRESSED.items() if not name.startswith(GRID) or "3 (6, 3)" in name}


def damages(tensor: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """A stored tensor in every wrong way, also in some that nothing can tell from a right one."""
    yield "missing", None
    for dtype in DTYPES:
        if dtype is not tensor.dtype:
            yield f"as {dtype}", torch.zeros(tensor.shape, dtype=dtype)
    if not tensor.numel():
        return
    yield "a row less", tensor[:-1].clone()
    yield "another axis", tensor[None].clone()
    raw = tensor.clone().reshape(-1).view(torch.uint8)
    for byte, bit in ((0, 0), (len(raw) // 2, 3), (len(raw) - 1, 7)):
        flipped = raw.clone()
        flipped[byte] ^= 1 << bit
        yield f"bit {bit} of byte {byte}", flipped.view(tensor.dtype).reshape(tensor.shape)
    for value in (float("nan"), float("inf")) if tensor.is_floating_point() else ():
        spoilt = tensor.float().clone()
        spoilt.view(-1)[-1] = value
        if not torch.isfinite(spoilt.to(tensor.dtype).float()).all():  # float8 has no infinity
            yield f"with {value}", spoilt.to(tensor.dtype)


def refused(path: Path) -> dict[str, bool]:
    """Who refuses a file; whatever else than a CheckpointError is raised comes out."""

    def step() -> None:
        checkpoint = Checkpoint.open(path)
        for info in checkpoint.layers():
            checkpoint.layer(info)

    readers = {"load": lambda: load(path), "step": step}
    outcome = {"verify": not verify(path).sound}
    for name, read in readers.items():
        try:
            read()
        except CheckpointError as error:
            outcome[name] = bool(error.hint) and "\n" not in error.message
        else:
            outcome[name] = False
    return outcome


@pytest.mark.parametrize("weight", SOME.values(), ids=SOME)
def test_verify_says_what_any_reader_refuses(weight: Weight, tmp_path: Path) -> None:
    tensors, path = weight.tensors(), tmp_path / "fc.safetensors"
    write_form(path, weight, tensors)
    assert not any(refused(path).values())
    for suffix, tensor in tensors.items():
        for damage, changed in damages(tensor):
            rest = {key: value for key, value in tensors.items() if key != suffix}
            write_form(path, weight, rest if changed is None else {**rest, suffix: changed})
            outcome = refused(path)
            assert len(set(outcome.values())) == 1, (suffix, damage, outcome)
            known = {torch.float32, *({torch.int8} if suffix.endswith("zero") else {})}  # what else is stored there
            real = tensor.is_floating_point() or suffix.endswith("zero")
            undetected = damage.startswith("bit") or (real and damage in {f"as {dtype}" for dtype in known})
            assert outcome["verify"] or undetected, (suffix, damage)


MASK = torch.tensor([[True, False, True], [False, True, True], [True, True, False]])
MASKED: dict[str, Weight] = {
    "values": Sparse.of(randn(3, 3), MASK),
    "codes": SparseCodes.of(ints(4, (3, 1), True, (3, 3)), MASK),
    "values in a factor": LowRank(Sparse.of(randn(3, 3), MASK), Dense(randn(3, 64))),
}


@pytest.mark.parametrize("weight", MASKED.values(), ids=MASKED)
def test_every_bit_of_a_mask_is_looked_at(weight: Weight, tmp_path: Path) -> None:
    """Nine elements in two bytes: a cleared or set one shifts all values after it, and seven bits mean nothing."""
    for bit in range(16):
        mask = weight.tensors()[""].clone()
        mask[bit // 8] ^= 1 << bit % 8
        write_form(tmp_path / "fc.safetensors", weight, {**weight.tensors(), "": mask})
        assert all(refused(tmp_path / "fc.safetensors").values()), bit
    with pytest.raises(CheckpointError, match=r"under a mask that keeps|sets bits beyond"):
        inspect(tmp_path / "fc.safetensors", Analysis())


def test_a_packed_mask_has_bytes_that_mean_something_and_an_order_of_its_columns(tmp_path: Path) -> None:
    weight = FORMS["sparse 2:4 of ordered columns"]
    tensors, path = weight.tensors(), tmp_path / "fc.safetensors"
    assert TWO_OF_FOUR.numel() // 4 % 3 == 0  # three groups in every byte, so that 215 is the largest
    for suffix, value, wrong in (("", 216, True), ("", 215, False), ("order", 12, True), ("order", -1, True)):
        changed = tensors[suffix].clone()
        changed[-1] = value
        write_form(path, weight, {**tensors, suffix: changed})
        assert set(refused(path).values()) == {wrong}
    twice = tensors["order"].clone()
    twice[0] = twice[1]
    write_form(path, weight, {**tensors, "order": twice})
    assert all(refused(path).values())


def test_what_decodes_to_far_more_than_it_is_stored_in_is_refused(tmp_path: Path) -> None:
    bomb = LowRank(Dense(torch.ones(40_000, 1)), Dense(torch.ones(1, 40_000)))
    write_form(tmp_path / "fc.safetensors", bomb, bomb.tensors())
    assert "would decode to 6,400,000,000 bytes" in " ".join(verify(tmp_path / "fc.safetensors").problems)
    for read in (load, inspect, Checkpoint.open):
        with pytest.raises(CheckpointError, match="would decode to"):
            read(tmp_path / "fc.safetensors")
