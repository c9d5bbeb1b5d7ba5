"""Losses on softened logits: cases by hand, what each is for, and a temperature that changes over the steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from aicompress.methods.distill import dkd, jsd, kl, reverse_kl
from aicompress.methods.distill.dkd import decoupled
from aicompress.methods.distill.jsd import softened_jsd
from aicompress.methods.distill.kl import softened_kl
from aicompress.methods.outputs import Outputs, OutputShapes

LN3 = math.log(3.0)
QUARTERS, HALVES = torch.tensor([[LN3, 0.0]]), torch.tensor([[0.0, 0.0]])  # 3/4 and 1/4; 1/2 and 1/2


def value(module: Any, student: Tensor, teacher: Tensor, **fields: Any) -> float:
    labels = torch.zeros(len(student), dtype=torch.int64)
    return float(module.loss(Outputs(student, labels=labels), Outputs(teacher), module.Config(**fields)))


def test_reverse_kl_by_hand() -> None:
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # of the student, 3/4 and 1/4
    assert value(reverse_kl, QUARTERS, HALVES, temperature=1) == pytest.approx(expected)
    assert value(kl, HALVES, QUARTERS, temperature=1) == pytest.approx(expected)


def test_reverse_kl_settles_on_one_of_two_peaks_where_kl_spreads_over_both() -> None:
    teacher = torch.tensor([[4.0, -4.0, 4.0]])
    one, spread = torch.tensor([[4.0, -4.0, -4.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert value(reverse_kl, one, teacher, temperature=1) < value(reverse_kl, spread, teacher, temperature=1)
    assert value(kl, one, teacher, temperature=1) > value(kl, spread, teacher, temperature=1)


def test_jsd_by_hand() -> None:
    p, q = (0.75, 0.25), (0.5, 0.5)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    expected = sum((a * math.log(a / c) + b * math.log(b / c)) / 2 for a, b, c in zip(p, q, m, strict=True))
    assert value(jsd, HALVES, QUARTERS, temperature=1) == pytest.approx(expected)
    assert value(jsd, QUARTERS, HALVES, temperature=1) == pytest.approx(expected)


def test_jsd_stays_below_ln_2_and_turns_into_both_divergences() -> None:
    far = torch.tensor([[60.0, -60.0]])
    assert value(jsd, far, -far, temperature=1) == pytest.approx(math.log(2))
    assert value(kl, far, -far, temperature=1) > 100
    ours, theirs = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    near = float(softened_jsd(ours, theirs, 1.0, 1e-4)) / 1e-4
    assert near == pytest.approx(float(softened_kl(ours, theirs, 1.0)), rel=1e-2)
    other = float(softened_jsd(ours, theirs, 1.0, 1 - 1e-4)) / 1e-4
    assert other == pytest.approx(float(softened_kl(theirs, ours, 1.0)), rel=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_two_parts_of_dkd_make_up_kl(temperature: float) -> None:
    ours, theirs = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(1))
    target, others = decoupled(ours, theirs, torch.tensor([2]), temperature)
    sure = float((theirs / temperature).softmax(-1)[0, 2])
    assert float(target + (1 - sure) * others) == pytest.approx(float(softened_kl(ours, theirs, temperature)), rel=1e-5)


def test_dkd_hears_a_teacher_that_is_sure_and_kl_does_not() -> None:
    teacher = torch.tensor([[20.0, 2.0, 0.0]])
    gradients = {}
    for module in (kl, dkd):
        student = torch.tensor([[20.0, 0.0, 2.0]], requires_grad=True)
        labels = torch.tensor([0])
        given = (Outputs(student, labels=labels), Outputs(teacher), module.Config(temperature=1.0))
        module.loss(*given).backward()  # type: ignore[attr-defined]
        assert student.grad is not None
        gradients[module.__name__] = float(student.grad[0, 1:].abs().max())
    assert gradients[dkd.__name__] > 1e6 * gradients[kl.__name__]


def test_dkd_takes_the_teachers_class_where_none_is_known() -> None:
    ours, theirs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    classes = theirs.argmax(dim=-1), torch.full((3,), -1), None
    known, unknown, without = (dkd.loss(Outputs(ours, labels=c), Outputs(theirs), dkd.Config()) for c in classes)
    assert known.equal(unknown)
    assert known.equal(without)
    assert dkd.check(OutputShapes(classes=1), OutputShapes(classes=1), dkd.Config()) is not None


@pytest.mark.parametrize("module", [kl, reverse_kl, jsd, dkd])
def test_the_factor_of_the_temperature_keeps_the_gradient_alike(module: Any) -> None:
    teacher, sizes = torch.randn(8, 5, generator=torch.Generator().manual_seed(3)), []
    for temperature in (20.0, 40.0):
        student = torch.zeros(8, 5, requires_grad=True)
        config = module.Config(temperature=temperature)
        module.loss(Outputs(student, labels=torch.arange(8) % 5), Outputs(teacher), config).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_a_temperature_goes_from_one_number_to_another() -> None:
    config = kl.Config(temperature=(4.0, 1.0))
    assert [config.at(done).softness for done in (0.0, 0.5, 1.0)] == [4.0, 2.5, 1.0]
    assert config.softness == 1.0
    assert kl.Config(temperature=3).at(0.5).softness == 3
    for wrong in (0, -1.0, "hot", (4.0, 0.0), (1.0, 2.0, 3.0), True):
        with pytest.raises(ValidationError, match="give a number above 0, or two of them"):
            kl.Config(temperature=wrong)
