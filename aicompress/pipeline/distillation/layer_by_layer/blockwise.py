"""Tune a student block by block towards its teacher, behind blocks that are tuned, one block of each in memory.

The forward passes of both models go on together: training samples and held-out ones through the student as it becomes,
held-out ones through the student as it came, and all of them through the teacher. So the held-out loss before and after
is known when the last block is tuned.

Several processes tune each block as one: every one has some rows of each batch, and its share of the held-out batches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from aicompress.errors import CompressError, Refused
from aicompress.layer import LayerInfo, as_matrix
from aicompress.methods.modes import BlockTuning
from aicompress.methods.outputs import Outputs
from aicompress.model.blocks.bf16_interior import given, interior
from aicompress.model.blocks.find import Block, find_blocks
from aicompress.model.blocks.moving_weights import TunableLayer, TuningSchedule
from aicompress.model.blocks.paused_forward import Arrivals, Runs, run_side_by_side
from aicompress.model.blocks.reconstruction import Stage, hidden, tune
from aicompress.model.blocks.walk import prepare as prepare_blocks
from aicompress.model.distillation.outputs import prepare
from aicompress.model.loading.load import build
from aicompress.model.loading.partial_model import PartialModel
from aicompress.pipeline.distillation.data.samples import Batch
from aicompress.pipeline.distillation.layer_by_layer.block_files import BlockFiles
from aicompress.pipeline.distillation.loop.state import Point, TrainingHistory
from aicompress.pipeline.distillation.plan import DistillPlan
from aicompress.pipeline.distillation.teachers.teacher import Loss, Runnable
from aicompress.pipeline.step.layer_plan import layer_seed
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes
from aicompress.weights import Dense, Weight


@dataclass(frozen=True)
class _Side:
    """A model whose blocks are loaded one at a time, with its checkpoint."""

    loader: PartialModel
    model: Any
    blocks: list[Block]

    def outputs(self, block: Block, arrived: Arrivals, rounded: bool) -> dict[int, Any]:
        """What a block that is loaded gives for each batch."""
        with interior(block.module, rounded), torch.no_grad():
            return {n: given(block.module, rounded, each.args, each.kwargs) for n, each in arrived.items()}


@dataclass
class BlockwiseTuning:
    """One run of block tuning.

    Attributes:
        plan: what to do.
        device: where blocks run.
        team: the processes that tune together.
        files: keep every tuned block until all are written.
        progress: told of every block.
        kept: blocks that a stopped run has tuned.
        history: the held-out loss before and after.
    """

    plan: DistillPlan
    device: torch.device
    team: Processes
    files: BlockFiles
    progress: Progress
    kept: frozenset[int] = frozenset()
    history: TrainingHistory = field(default_factory=TrainingHistory)

    @property
    def config(self) -> BlockTuning:
        """The mode's parameters."""
        config = self.plan.student_mode.config
        assert isinstance(config, BlockTuning)
        return config

    @cached_property
    def infos(self) -> dict[str, LayerInfo]:
        """A layer of every parameter that has one."""
        return {info.tensor: info for info in self.plan.layers}

    @property
    def rounded(self) -> bool:
        """Whether products round their inputs to bfloat16."""
        return self.plan.training.precision == "bf16" and self.device.type == "cpu"

    def heal(self) -> None:
        """Tune all blocks.

        Raises:
            CompressError: the two models do not run alike, the held-out loss is not a number, or not every process sees
                the same tuned blocks.
        """
        start = time.perf_counter()
        self.kept = self.files.seen_by(self.team)
        student, teacher = (self._side(each) for each in (self.plan.checkpoint, self.plan.teachers[0]))
        if [block.name for block in student.blocks] != [block.name for block in teacher.blocks]:
            counts = f"{len(student.blocks)} blocks, and the teacher {len(teacher.blocks)}"
            raise Refused(f"the student has {counts}: they cannot be compared", "take mode: full")
        train, held = self._batches()
        masks = [mask if mask is None else mask.bool() for mask in (b.inputs.get("attention_mask") for b in train)]
        came = len(train) + len(held)  # the number of the first batch through the student as it came
        visit = partial(self._visit, student, teacher, masks, came)
        runs = [
            Runs([block.module for block in student.blocks], self._calls(student, [*train, *held, *held], 0)),
            Runs([block.module for block in teacher.blocks], self._calls(teacher, [*train, *held], 1)),
        ]
        own, original = run_side_by_side(runs, visit)
        sizes = [len(batch) for batch in held]
        losses = [self._loss(own[first:][: len(held)], original[len(train) :], sizes) for first in (came, len(train))]
        self.history.curve = [Point(0, None, losses[0]), Point(self.plan.training.steps, None, losses[1])]
        self.history.step = self.plan.training.steps
        self.history.best_step = self.history.step if losses[1] < losses[0] else 0
        self.history.samples = self.config.steps * self.plan.training.batch
        self.history.seconds = time.perf_counter() - start

    def _side(self, checkpoint: Any) -> _Side:
        model = self.plan.module_of(checkpoint)
        model = build(checkpoint) if model is None else model
        prepare(model, Loss(self.plan.losses).reads)
        prepare_blocks(model)
        loader, blocks = PartialModel(checkpoint, model, self.device, torch.float32), find_blocks(model)
        loader.load(lambda name: not any(block.owns(name) for block in blocks))
        return _Side(loader, model.eval(), blocks)

    def _batches(self) -> tuple[list[Batch], list[Batch]]:
        """Training samples, and held-out ones."""
        split, samples = self.plan.split, self.plan.samples
        rank, size = self.team.rank, self.team.size
        tuned, judged = (
            [samples.batch(part).to(self.device) for part in split.in_order(index, split.batch)]
            for index in (split.first(self.config.samples), split.held_out)
        )
        return [batch.rows(rank, size) for batch in tuned], judged[rank::size]

    def _calls(self, side: _Side, batches: list[Batch], which: int) -> list[Any]:
        run = (self.plan.runner, *self.plan.teacher_runners)[which]
        model = Runnable(side.model, run, (None, *self.plan.numbers)[which])
        reads = Loss(self.plan.losses).reads
        return [partial(model, batch, reads, "fp32") for batch in batches]

    def _visit(
        self, student: _Side, teacher: _Side, masks: list[Tensor | None], came: int, place: int, arrived: list[Arrivals]
    ) -> list[dict[int, Any]]:
        """Tune a block, and run it for all batches; one that the model runs again is as it was tuned."""
        own, original = arrived
        block, its = student.blocks[place], teacher.blocks[place]
        teacher.loader.load(its.owns)
        wanted = teacher.outputs(its, original, self.rounded)
        originals = {name: tensor.detach() for name, tensor in its.module.named_parameters()}
        student.loader.load(block.owns)
        untouched = student.outputs(block, {n: each for n, each in own.items() if n >= came}, self.rounded)
        if place in self.kept:
            tuned = self.files.read(place)
        else:
            targets = [target for n in range(len(masks)) if (target := hidden(wanted.get(n))) is not None]
            inputs = [(own[n].args, own[n].kwargs) for n in range(len(targets)) if n in own]
            if len(inputs) < len(masks):
                raise CompressError(f"{block.name} gives no states to be compared", "take mode: full")
            stage = Stage(block.name, block.module, inputs, targets, masks, self.rounded, self.team)
            tuned = self._tuned(stage, student, originals)
            self.kept |= {place}
            if self.team.rank == 0:
                self.files.write(place, tuned)
            self.team.wait()
        for name, value in tuned.items():
            student.loader.replace(name, self._parameter(name, value))
        given_now = student.outputs(block, {n: each for n, each in own.items() if n < came}, self.rounded)
        student.loader.drop(block.owns)
        teacher.loader.drop(its.owns)
        self.progress("block", place + 1, len(student.blocks))
        return [{**given_now, **untouched}, wanted]

    def _tuned(self, stage: Stage, student: _Side, originals: Mapping[str, Tensor]) -> dict[str, Weight | Tensor]:
        """What becomes of the parameters of a block that move, by their names in the checkpoint."""
        layers: dict[str, TunableLayer] = {}
        own = dict(stage.module.named_parameters())
        for name, path in student.loader.paths.items():
            inside = path.removeprefix(f"{stage.name}.") if path.startswith(f"{stage.name}.") or not stage.name else ""
            if inside in own and not self.plan.student_mode.stays(name):
                layers[name] = self._layer(name, inside, originals.get(inside))
        config = self.config
        pace = TuningSchedule(config.steps, config.code_rate, config.scale_rate, config.factor_rate)
        weights = tune(stage, list(layers.values()), pace, layer_seed(self.plan.recipe.seed, stage.name))
        return {name: self._stored(name, weight) for name, weight in zip(layers, weights, strict=True)}

    def _layer(self, name: str, inside: str, original: Tensor | None) -> TunableLayer:
        """A parameter as it is tuned: a layer, or a vector as a matrix of one row."""
        checkpoint, info = self.plan.checkpoint, self.infos.get(name)
        spec = checkpoint.parameters()[name]
        transposed = info is not None and info.transposed
        matrix = (
            checkpoint.dense(name).float() if original is None or original.shape != spec.shape else original.float()
        )
        wanted = _matrix(matrix, transposed)
        weight = checkpoint.weight(name) if name in checkpoint.manifest.entries else None
        keeps = self.plan.keep_zeros and len(spec.shape) > 1
        start = Dense(_matrix(checkpoint.read(name), transposed)) if weight is None else weight
        return TunableLayer(inside, start, wanted, spec.shape, transposed, keeps)

    def _stored(self, name: str, weight: Weight) -> Weight | Tensor:
        """A tuned weight as it is written."""
        if name in self.plan.checkpoint.manifest.entries:
            return weight
        return self._parameter(name, weight).to(self.plan.checkpoint.specs[name].dtype)

    def _parameter(self, name: str, value: Weight | Tensor) -> Tensor:
        """A tuned weight as the model has it."""
        if isinstance(value, Tensor):
            return value.float()
        info, shape = self.infos.get(name), self.plan.checkpoint.parameters()[name].shape
        matrix = value.dense()
        return (matrix.t() if info is not None and info.transposed else matrix).reshape(shape)

    def _loss(self, own: list[Outputs], original: list[Outputs], sizes: list[int]) -> float:
        """Mean loss of the held-out samples."""
        loss = Loss(self.plan.losses)
        loss = loss.at_temperature(1.0) if loss.leaves_open else loss
        with torch.no_grad():
            parts = [float(loss(a, b)) * size for a, b, size in zip(own, original, sizes, strict=True)]
        total = self.team.total(torch.tensor([sum(parts), sum(sizes)], dtype=torch.float64))
        mean = float(total[0] / total[1])
        if not mean < float("inf"):
            raise CompressError(f"the held-out loss is {mean}", "check teacher and data")
        return mean


def _matrix(tensor: Tensor, transposed: bool) -> Tensor:
    """A parameter as a matrix (out, in), or of one row."""
    return tensor[None] if tensor.ndim < 2 else as_matrix(tensor, transposed)
