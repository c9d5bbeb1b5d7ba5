"""A teacher whose outputs are read from a folder, and the run that stores them there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.methods.distill.signals import outputs_of, stored_logits
from aicompress.methods.outputs import Outputs, wanted
from aicompress.pipeline.distillation.data.samples import Batch, TrainingSamples
from aicompress.pipeline.distillation.signals.folder import SignalFolder, write
from aicompress.pipeline.distillation.signals.outputs import StoredOutputs
from aicompress.pipeline.distillation.teachers.teacher import Panel, are_numbers
from aicompress.pipeline.step.workers import Processes

SHARD_BYTES = 64 << 20
BATCH = 32  # samples that the teacher runs on at a time


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher whose outputs are read."""

    stored: StoredOutputs
    folder: SignalFolder

    def __call__(self, batch: Batch, precision: str) -> Outputs:
        """The teacher's outputs for a batch."""
        device = next(iter(batch.inputs.values())).device
        rows = {name: tensor.to(device) for name, tensor in self.folder.rows(batch.index).items()}
        told, form = self.stored.told, self.stored.form
        known = Outputs() if form is None else outputs_of(form, rows, told["classes"], told["temperature"] or 1.0)
        return replace(known, embedding=rows.get("embedding"))


@torch.no_grad()
def made(
    stored: StoredOutputs, panel: Panel, samples: TrainingSamples, device: torch.device, team: Processes,
    report: Callable[[int], None],
) -> StoredTeacher:  # fmt: skip
    """Run the teacher over all samples, in float32, and store what it gives.

    Args:
        stored: what, and where.
        panel: the teachers.
        samples: all of them, in their order.
        report: called with the number of samples done.

    Raises:
        CompressError: the teacher gives no numbers.
        OutOfSpace: the disk is full.
    """
    run, lengths = panel.members[0].run, samples.lengths
    counts = run.positions(samples.columns)
    size = max(1, SHARD_BYTES * len(samples) // max(1, stored.nbytes))
    ranges = [(first, min(first + size, len(samples))) for first in range(0, len(samples), size)]

    def shard(first: int, end: int) -> dict[str, Tensor]:
        index = torch.arange(first, end)
        order = index if lengths is None else index[lengths[index].argsort(stable=True)]
        draws = torch.Generator().manual_seed(((stored.told["seed"] or 0) << 32) + first)
        rows: dict[str, dict[int, Tensor]] = {}
        for part in torch.split(order, BATCH):
            given = panel(samples.batch(part).to(device), stored.reads, "fp32")
            for name, tensors in _by_sample(stored, given, counts[part].tolist(), draws).items():
                rows.setdefault(name, {}).update(zip(part.tolist(), tensors, strict=True))
            report(len(next(iter(rows.values()))) + first)
        whole = {name: torch.cat([by[sample] for sample in index.tolist()]) for name, by in rows.items()}
        return {**whole, "positions": counts[first:end].int()}

    folder = write(stored.path, stored.told, ranges, shard, team)
    return StoredTeacher(stored, folder)


def _by_sample(
    stored: StoredOutputs, given: Outputs, counts: list[int], draws: torch.Generator
) -> dict[str, list[Tensor]]:
    """A batch's outputs in their stored form, by name, for each sample."""
    if not are_numbers(given):
        raise CompressError("the teacher gives NaN or infinite outputs", "`aicompress verify` checks a checkpoint")
    by_name: dict[str, list[Tensor]] = {}
    told = stored.told
    if stored.form is not None:
        settings = (told["k"] or 0, told["temperature"] or 1.0, draws)
        for name, tensor in stored_logits(stored.form, wanted(given.logits, "logits"), *settings).items():
            by_name[name] = list(torch.split(tensor, counts))
    if "embedding" in stored.reads:
        by_name["embedding"] = list(torch.split(wanted(given.embedding, "embeddings").float().cpu(), 1))
    return by_name
