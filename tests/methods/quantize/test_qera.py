from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from aicompress.methods.curvature import loss, shifted
from aicompress.methods.quantize.qera import QeraConfig, apply, correct
from aicompress.weights import Corrected, outline_nbytes
from tests.methods.quantize.layers import correlated, gaussian, layer_of

RTN = {"name": "rtn", "bits": 2, "group_size": 16}


def test_by_hand() -> None:
    """E = diag(1, 1), H = diag(4, 1): the first direction costs 4, so rank 1 takes it whole and leaves the second."""
    found = correct(torch.eye(2), torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)), 1, torch.float32).dense()
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), atol=1e-6, rtol=0)


def test_error_is_the_tail_of_the_singular_values() -> None:
    """Theorem 1: what is left after rank r is Σ_{i>r} σ_i² of E H^½."""
    inputs = correlated(300, 24).double()
    gram = inputs.t() @ inputs / 300
    error = gaussian(16, 24)
    singular = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(gram))
    for rank in (1, 4, 15):
        left = loss(error - correct(error, gram, rank, torch.float64).dense().double(), gram)
        assert left == pytest.approx(float(singular[rank:].square().sum()), rel=1e-4)


def test_error_falls_with_rank_and_bytes_are_counted() -> None:
    layer = layer_of(gaussian(32, 48), correlated(200, 48))
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    found = [apply(layer, QeraConfig(rank=rank, base=RTN)) for rank in (1, 2, 8, 16)]
    errors = [loss(layer.weight - weight.dense(), layer.inputs.gram.double()) for weight in found]
    assert all(after < before for before, after in itertools.pairwise(errors))
    sizes = [outline_nbytes(weight) for weight in found]
    assert [b - a for a, b in itertools.pairwise(sizes)] == [2 * r * (32 + 48) for r in (1, 6, 8)]


def test_more_rounds_are_never_worse() -> None:
    layer = layer_of(gaussian(32, 48), correlated(200, 48))
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    errors = [
        loss(layer.weight - apply(layer, QeraConfig(rank=4, base=RTN, rounds=n)).dense(), layer.inputs.gram.double())
        for n in (1, 2, 8)
    ]
    assert errors[2] <= errors[1] * 1.001 <= errors[0] * 1.002


def test_the_correction_aims_where_the_base_does() -> None:
    """At full rank nothing is left of the error against W E[x̃ xᵀ] H⁻¹, which the base was to come near."""
    rows = correlated(300, 24)
    layer = layer_of(gaussian(16, 24), rows)
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    cross = (rows + 0.3 * gaussian(300, 24, seed=7)).t() @ rows / 300
    layer = replace(layer, inputs=replace(layer.inputs, cross=cross))
    gram = layer.inputs.gram.double()
    for shift in (0.0, 0.5, 1.0):
        base = {"name": "gptq", "bits": 4, "group_size": 8, "shift": shift}
        config = QeraConfig(rank=16, base=base, damping=1e-6)
        wanted = shifted(layer, shift, lambda x: x.double() @ torch.linalg.inv(gram))
        assert loss(apply(layer, config).dense() - wanted, gram) < 1e-4 * loss(wanted, gram)


def test_any_method_can_be_the_base() -> None:
    layer = layer_of(gaussian(16, 64), correlated(200, 64))
    for name in ("gptq", "hqq", "imatrix", "kmeans", "nf4", "rtn", "sinq", "squeezellm"):
        found = apply(layer, QeraConfig(rank=2, base={"name": name, "group_size": 16}))
        assert isinstance(found, Corrected), name


@pytest.mark.parametrize(
    ("base", "complaint"),
    [
        ({"name": "gptk"}, "did you mean 'gptq'"),
        ({"name": "qera"}, "cannot be corrected"),
        ({"name": "rtn", "bit": 3}, "bit"),
        ({"name": "rtn", "bits": 5}, "bits"),
    ],
)
def test_a_wrong_base_is_refused(base: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        QeraConfig(base=base)


def test_rank_must_fit() -> None:
    from aicompress.methods.quantize.qera import check

    message = check(layer_of(gaussian(8, 48)).info, QeraConfig(rank=9, base=RTN))
    assert message is not None
    assert "rank 9" in message[0]
