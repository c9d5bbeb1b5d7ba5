"""What every loss of distillation owes, for any loss: shipped ones and those that a test adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aicompress.methods.losses import DistillMethod, LossConfig
from aicompress.methods.outputs import Outputs, OutputShapes

SAMPLES, TOKENS, WIDTH, CLASSES, DEPTH, HEADS = 4, 6, 8, 5, 3, 2
ANATOMY = OutputShapes(CLASSES, WIDTH, DEPTH, labels=True, embedding=WIDTH, heads=HEADS)


def configs(method: DistillMethod[Any]) -> list[LossConfig]:
    """Its defaults, and the examples that its config gives."""
    extra = method.config.model_config.get("json_schema_extra")
    examples = extra.get("examples", []) if isinstance(extra, dict) else []
    assert isinstance(examples, list)
    return [method.config(name=method.name), *(method.config.model_validate(fields) for fields in examples)]


def outputs(method: DistillMethod[Any], seed: int) -> Outputs:
    """Random outputs of a model, those that the loss reads and no others; the last token of the last sample is padding.

    They are leaves that gradients flow to.
    """
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    def maps() -> Tensor:
        return tensor(SAMPLES, HEADS, TOKENS, TOKENS).softmax(dim=-1).detach().requires_grad_()

    mask = torch.ones(SAMPLES, TOKENS, dtype=torch.bool)
    mask[-1, -1] = False
    return Outputs(
        logits=tensor(SAMPLES, CLASSES) if "logits" in method.reads else None,
        embedding=tensor(SAMPLES, WIDTH) if "embedding" in method.reads else None,
        hidden=tuple(tensor(SAMPLES, TOKENS, WIDTH) for _ in range(DEPTH + 1)) if "hidden" in method.reads else (),
        mask=mask if method.reads & {"hidden", "attention"} else None,
        labels=torch.arange(SAMPLES) % CLASSES,
        attention=tuple(maps() for _ in range(DEPTH)) if "attention" in method.reads else (),
    )


def leaves(given: Outputs) -> list[Tensor]:
    """Tensors that a loss may depend on."""
    return [tensor for tensor in (given.logits, given.embedding, *given.hidden, *given.attention) if tensor is not None]


def require_differentiable(method: DistillMethod[Any], config: LossConfig) -> None:
    """A finite scalar whose gradient reaches the student's outputs, twice the same, and no input is modified."""
    student, teacher = outputs(method, 0), outputs(method, 1)
    before = [tensor.detach().clone() for tensor in (*leaves(student), *leaves(teacher))]
    value = method.loss(student, teacher, config)
    assert value.shape == ()
    assert torch.isfinite(value)
    assert torch.equal(method.loss(student, teacher, config), value)
    value.backward()  # type: ignore[no-untyped-call]
    gradients = [tensor.grad for tensor in leaves(student) if tensor.grad is not None]
    assert gradients, "nothing of the student is trained"
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves(student), *leaves(teacher)), strict=True))


def require_least_at_the_teacher(method: DistillMethod[Any], config: LossConfig) -> None:
    """A student that answers as its teacher has the least loss."""
    teacher = outputs(method, 1)
    least = method.loss(teacher, teacher, config)
    assert all(method.loss(outputs(method, seed), teacher, config) > least for seed in range(2, 6))


def require_checked(method: DistillMethod[Any], config: LossConfig) -> None:
    """Models of the same output shapes are accepted; a model without outputs is refused in words."""
    assert method.check(ANATOMY, ANATOMY, config) is None
    for student, teacher in ((OutputShapes(), ANATOMY), (ANATOMY, OutputShapes()), (OutputShapes(), OutputShapes())):
        problem = method.check(student, teacher, config)
        assert problem is not None
        assert all(problem), "a message and a hint"


def require_contract(method: DistillMethod[Any]) -> None:
    """All of it, with every config."""
    assert method.command == "distill"
    assert method.summary
    assert method.reads
    for config in configs(method):
        assert config.name == method.name
        require_differentiable(method, config)
        require_least_at_the_teacher(method, config)
        require_checked(method, config)
