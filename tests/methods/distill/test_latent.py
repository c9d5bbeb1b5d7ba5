"""Latent numbers of codes: they start at the codes, are read as what will be written, and gradients reach them."""

from __future__ import annotations

import pytest
import torch

from aicompress.methods.distill.latent import latent_suffixes, nearest, relaxed, settled
from aicompress.weights import Codebook, IntGrouped, Weight
from aicompress.weights.decoding import decode
from tests.weights.forms import FORMS, randn

CODED = {name: weight for name, weight in FORMS.items() if latent_suffixes(weight) and "nothing left" not in name}


def as_trained(weight: Weight) -> dict[str, torch.Tensor]:
    return {s: t.float() if t.is_floating_point() else t for s, t in weight.tensors().items()}


@pytest.mark.parametrize("name", CODED)
def test_what_is_read_in_training_is_what_is_written(name: str) -> None:
    weight, latent = CODED[name], relaxed(CODED[name])
    torch.testing.assert_close(decode(latent.meta(), as_trained(latent)), weight.dense(), rtol=1e-5, atol=1e-5)
    assert torch.equal(settled(latent, {}).dense(), weight.dense())
    moved = {
        suffix: (tensor + 0.8 * tensor.std(correction=0) * randn(*tensor.shape, seed=3)).requires_grad_()
        for suffix, tensor in latent.tensors().items()
        if suffix in latent_suffixes(weight)
    }
    read = decode(latent.meta(), {**as_trained(latent), **moved})
    written = settled(latent, {suffix: tensor.detach() for suffix, tensor in moved.items()})
    assert written.meta() == weight.meta()
    assert written.specs() == weight.specs()
    assert not torch.equal(written.dense(), weight.dense())
    torch.testing.assert_close(read.detach(), written.dense(), rtol=1e-5, atol=1e-5)
    read.sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in moved.values())


def test_a_number_beyond_the_grid_is_pushed_no_further() -> None:
    weight = IntGrouped(torch.zeros(1, 3, dtype=torch.int8), torch.ones(1, 1), None, 2)
    latent = torch.tensor([[1.4, -2.3, 0.2]], requires_grad=True)
    meta = relaxed(weight).meta()
    for sign, grown in ((1.0, [0.0, 1.0, 1.0]), (-1.0, [-1.0, 0.0, -1.0])):
        latent.grad = None
        (-sign * decode(meta, {"": latent, "scale": weight.scale})).sum().backward()  # a step raises what sign says
        assert latent.grad is not None
        assert (-latent.grad).tolist() == [grown]


def test_a_code_of_a_table_is_its_nearest_centroid() -> None:
    tables = torch.tensor([[3.0, -1.0, 0.5, 0.0]])
    assert nearest(torch.tensor([[-9.0, 0.2, 0.3, 1.7, 1.8]]), tables).tolist() == [[1, 3, 2, 2, 0]]
    weight = Codebook(torch.tensor([[1, 3]], dtype=torch.uint8), tables, None, 2)
    after = settled(relaxed(weight), {"": torch.tensor([[0.1, 2.0]]), "tables": tables - 1})
    assert isinstance(after, Codebook)
    assert after.codes.tolist() == [[3 - 1, 0]]  # of the centroids as they are now: 2, -2, -0.5 and -1
    assert after.dense().tolist() == [[-0.5, 2.0]]
