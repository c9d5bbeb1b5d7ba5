"""The teacher's outputs, cached or computed batch by batch, and the loss against them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.methods.distill.signals import completed
from aicompress.methods.losses import DistillMethod, LossConfig
from aicompress.methods.outputs import Output, Outputs
from aicompress.model.distillation.outputs import Runner, Task
from aicompress.pipeline.distillation.data.samples import Batch, TrainingSamples

TOKENS: tuple[Task, ...] = ("causal", "masked")  # tasks whose classes are tokens
CACHE_BYTES = 512 << 20  # of teacher outputs that `cache: auto` keeps


@dataclass(frozen=True)
class Loss:
    """The weighted sum of a recipe's losses."""

    terms: tuple[tuple[DistillMethod[Any], LossConfig], ...]

    @property
    def reads(self) -> frozenset[Output]:
        """The outputs that any term needs."""
        return frozenset[Output]().union(*(method.reads for method, _ in self.terms))

    @property
    def leaves_open(self) -> bool:
        """Whether a term has a temperature that is chosen before training."""
        return any(config.leaves_open for _, config in self.terms)

    def at_temperature(self, temperature: float) -> Loss:
        """The same with a temperature where a term leaves it open."""
        return Loss(tuple((method, config.softened(temperature)) for method, config in self.terms))

    def __call__(self, student: Outputs, teacher: Outputs, done: float = 1.0) -> Tensor:
        """The sum when a share of the steps is done."""
        known, logits = teacher.known_classes, student.logits
        as_stored = known is not None and logits is not None and logits.shape[-1] == known.of
        whole = teacher
        if known is not None and logits is not None and not (as_stored and all(m.from_known for m, _ in self.terms)):
            whole = replace(teacher, logits=completed(known, logits), known_classes=None)
        student, whole = _shared_classes(student, whole)
        terms = [
            c.weight_at(done) * method.loss(student, teacher if as_stored and method.from_known else whole, c.at(done))
            for method, c in self.terms
        ]
        return torch.stack(terms).sum()


def _shared_classes(student: Outputs, teacher: Outputs) -> tuple[Outputs, Outputs]:
    """The outputs with logits of the classes that both have: tables of one tokenizer may be padded to other sizes."""
    if student.logits is None or teacher.logits is None or student.logits.shape == teacher.logits.shape:
        return student, teacher
    shared = min(student.logits.shape[-1], teacher.logits.shape[-1])
    one, other = (replace(each, logits=each.logits[..., :shared]) for each in (student, teacher))  # type: ignore[index]
    return one, other


def are_numbers(outputs: Outputs) -> bool:
    """Whether a model gave neither NaN nor infinite numbers."""
    given = (outputs.logits, outputs.embedding, *outputs.hidden, *outputs.attention)
    return all(bool(torch.isfinite(tensor).all()) for tensor in given if tensor is not None)


@dataclass(frozen=True)
class Runnable:
    """A model with what runs it.

    Attributes:
        model: the module.
        run: collects its outputs.
        numbers: (tokens,) its own numbers of the student's tokens, by which it reads texts and gives logits; None where
            they are the student's.
    """

    model: nn.Module
    run: Runner
    numbers: Tensor | None = None

    def __call__(self, batch: Batch, reads: frozenset[Output], precision: str) -> Outputs:
        """The outputs for a batch; bf16 runs matrix products in bfloat16, fp32 everything in float32."""
        device = next(iter(batch.inputs.values())).device.type
        inputs, numbers = batch.inputs, self.numbers
        if numbers is not None:
            numbers = numbers.to(device)
            inputs = {**inputs, "input_ids": numbers[inputs["input_ids"]]}
        with autocast(device, precision):
            given = self.run(self.model, inputs, reads, batch.labels)
        if numbers is None or given.logits is None or self.run.task not in TOKENS:
            return given
        return replace(given, logits=given.logits[..., numbers])


@dataclass(frozen=True)
class Panel:
    """Several teachers that answer as one: their logits and embeddings are averaged.

    A mean of logits is the geometric mean of what they predict, at any temperature (Hinton, Vinyals and Dean,
    "Distilling the Knowledge in a Neural Network", 2015, section 1).
    """

    members: tuple[Runnable, ...]

    def __call__(self, batch: Batch, reads: frozenset[Output], precision: str) -> Outputs:
        """The mean outputs for a batch, of the classes that all have."""
        given = [member(batch, reads, precision) for member in self.members]
        if len(given) == 1:
            return given[0]
        logits = [each.logits.float() for each in given if each.logits is not None]
        embeddings = [each.embedding.float() for each in given if each.embedding is not None]
        classes = min((each.shape[-1] for each in logits), default=0)
        return Outputs(
            torch.stack([each[..., :classes] for each in logits]).mean(dim=0) if logits else None,
            torch.stack(embeddings).mean(dim=0) if embeddings else None,
            mask=given[0].mask,
            labels=given[0].labels,
        )


def autocast(device: str, precision: str) -> AbstractContextManager[object]:
    """The precision context of a forward pass."""
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@dataclass(frozen=True)
class Teacher:
    """The teacher with its cached outputs.

    Attributes:
        side: the teacher's models.
        reads: outputs that the losses need.
        kept: by output, (samples, ...) of cached outputs.
        row: (samples,) where a sample's outputs are in `kept`; -1 where they are not.
    """

    side: Panel
    reads: frozenset[Output]
    kept: dict[str, Tensor]
    row: Tensor

    @torch.no_grad()
    def __call__(self, batch: Batch, precision: str) -> Outputs:
        """The teacher's outputs for a batch."""
        rows = self.row[batch.index]
        if self.kept and bool((rows >= 0).all()):
            device = next(iter(batch.inputs.values())).device
            picked = {name: kept[rows].to(device) for name, kept in self.kept.items()}
            logits = picked.get("logits")
            if logits is not None and logits.ndim == 3:
                picked["logits"] = logits.flatten(0, 1)  # (windows, tokens, classes) -> (positions, classes)
            return Outputs(logits=picked.get("logits"), embedding=picked.get("embedding"))
        return self.side(batch, self.reads, precision)


@torch.no_grad()
def with_cached_outputs(
    teacher: Teacher,
    samples: TrainingSamples,
    order: Iterable[Tensor],
    device: torch.device,
    report: Callable[[int], None],
) -> Teacher:
    """Compute and cache the teacher's outputs for some samples, in float32.

    Args:
        order: indices in batches of like length.
        report: called with the number of samples done.
    """
    parts: dict[str, list[Tensor]] = {}
    indices: list[Tensor] = []
    done = 0
    for index in order:
        given = teacher.side(samples.batch(index).to(device), teacher.reads, "fp32")
        for name in teacher.reads:
            value: Tensor = getattr(given, name)
            rows = value.reshape(len(index), -1, value.shape[-1])  # one row a sample, or one a position of it
            parts.setdefault(name, []).append(rows.squeeze(1).float().cpu())
        indices.append(index)
        done += len(index)
        report(done)
    row = torch.full((len(samples),), -1)
    row[torch.cat(indices)] = torch.arange(done)
    return replace(teacher, kept={name: torch.cat(part) for name, part in parts.items()}, row=row)
