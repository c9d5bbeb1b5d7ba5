"""Gradients of a step's loss in the selected weights: samples in, moments by layer out, on disk until they are read.

A `Joint` brings together those of layers that are one matrix on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import listed
from aicompress.layer import LayerInfo
from aicompress.measure import Counted
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.gradients import Descent, Keep, collect
from aicompress.model.sensitivity.loss import Objective
from aicompress.model.sensitivity.moments import WIDEST, Part, Watched
from aicompress.pipeline.calibration.data import samples
from aicompress.pipeline.calibration.request import Step, module_of
from aicompress.pipeline.step.output import Output
from aicompress.pipeline.step.workers import Processes
from aicompress.statistics import GradientStats

MOMENTS, OUTPUTS = "gradients", "output_gram"  # statistics: of gradients in weights, and in the layers' outputs
GradientReader = Callable[[str], GradientStats | None]  # the moments of a layer's gradients by the layer's name


@dataclass(frozen=True)
class GradientStore:
    """Moments of gradients in a folder, a file per layer."""

    folder: Path

    def add(self, moments: Mapping[str, GradientStats]) -> None:
        for name, stats in moments.items():
            tensors = {"mean": stats.mean, "square": stats.square, OUTPUTS: stats.output_gram}
            there = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
            save_file({**there, "count": torch.tensor(stats.count)}, self._file(name))

    def read(self, name: str) -> GradientStats | None:
        """Moments of a layer; None where there are none of it."""
        if not self._file(name).exists():
            return None
        tensors = load_file(self._file(name))
        return GradientStats(int(tensors["count"]), *(tensors.get(key) for key in ("mean", "square", OUTPUTS)))

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def gradients(
    step: Step,
    output: Output,
    team: Processes,
    say: Callable[[str], None],
    needs: frozenset[str] = frozenset({MOMENTS}),
) -> Iterator[GradientStore]:
    """Moments of the gradients of every selected layer, while the context lasts; the first process keeps them.

    They lie in a folder beside the output: two float32 matrices for every selected weight, or one of its outputs.

    Args:
        step: whose layers they are.
        output: beside which they lie.
        team: processes that share the samples.
        say: told of every step.
        needs: statistics to collect; those that are not of gradients are passed over.

    Raises:
        RecipeError: the calibration data does not fit the model.
    """
    out = output.destination.path.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.gradients.", dir=out.parent) as folder:
        store = GradientStore(Path(folder))
        differentiate(
            step,
            team,
            store.add if team.rank == 0 else lambda moments: None,
            lambda done, total: say(f"gradients, step {done} of {total}"),
            needs,
        )
        yield store


def differentiate(
    plan: Step,
    team: Processes,
    keep: Keep,
    progress: Counted,
    needs: frozenset[str] = frozenset({MOMENTS}),
) -> None:
    """Bring the moments of every selected layer's gradient to `keep`.

    Args:
        plan: the step.
        team: processes that share the samples.
        keep: takes the moments.
        progress: told of every step.
        needs: statistics to collect; those that are not of gradients are passed over.

    Raises:
        RecipeError: the calibration data does not fit the model.
    """
    recipe = plan.recipe
    assert recipe.calibration is not None
    model = module_of(plan)
    loader = PartialModel(plan.checkpoint, model, dtype=torch.float32)
    given = samples(plan.checkpoint, model, recipe.calibration, recipe.seed, team)
    infos = [layer.info for layer in plan.layers if layer.config is not None]
    wanted, joints = watched(plan.checkpoint, loader, infos, needs), joints_of(loader, infos)
    for joint in joints:
        wanted |= joint.watched(needs)
    kind = next(layer.config.gradient_loss for layer in plan.layers if layer.config is not None)  # one for all
    collect(
        Descent(model, loader, given, wanted, Objective(kind, recipe.seed), team),
        partial(_joined, joints, keep),
        progress,
    )


def _joined(joints: Sequence[Joint], keep: Keep, moments: Mapping[str, GradientStats]) -> None:
    """Hand on what came of a block, that of matrices which are divided among layers as one."""
    whole = {joint.name: joint.joined(moments) for joint in joints if joint.parts.keys() <= moments.keys()}
    parts = {name for joint in joints for name in joint.parts}
    keep({**{name: stats for name, stats in moments.items() if name not in parts}, **whole})


def diagonal_only(chosen: Iterable[LayerInfo]) -> list[str]:
    """A warning that names layers of whose outputs no whole Gram matrix is seen, where a method asks for it."""
    names = [x.name for x in chosen if x.kind in ("experts", "embedding") or x.shape[0] > WIDEST]
    if not names:
        return []
    shown = listed(names)
    why = f"(more than {WIDEST:,}, an embedding's, or experts' in one tensor)"
    return [f"layers whose outputs {why} are not weighed against each other, but by their own gradients: {shown}"]


def watched(
    checkpoint: Checkpoint, loader: PartialModel, infos: list[LayerInfo], needs: frozenset[str]
) -> dict[str, Watched]:
    """Where the model has each layer's weight; a layer that it does not have is not in it."""
    places: dict[str, Watched] = {}
    for info in infos:
        held = info.experts
        place = loader.place_of(info.tensor) if held is None else loader.stack_of(info.tensor, held.count)
        if place is not None:
            part = partial(_factor, checkpoint, info) if info.part else None
            outputs = OUTPUTS in needs and not info.part
            places[info.name] = Watched(place, info.tensor_shape, info.transposed, part, outputs, MOMENTS in needs)
    return places


def _factor(checkpoint: Checkpoint, info: LayerInfo) -> Part:
    """Of W = A P B: dL/dP = Aᵀ dL/dW Bᵀ."""
    weight = checkpoint.weight(info.tensor)
    behind, before = weight.behind(info.part), weight.before(info.part)

    def of_part(gradient: Tensor) -> Tensor:
        gradient = gradient if behind is None else behind.t() @ gradient
        return gradient if before is None else gradient @ before.t()

    return of_part


@dataclass(frozen=True)
class Joint:
    """A matrix, such as fused query, key and value, that lies in several layers of the running model.

    Attributes:
        name: of the checkpoint's layer.
        columns: of the matrix.
        parts: by what a layer's moments are called, the layer's path and the numbers of the rows that it has.
    """

    name: str
    columns: int
    parts: Mapping[str, tuple[str, Tensor]]

    def watched(self, needs: frozenset[str]) -> dict[str, Watched]:
        """What is to be watched of its layers."""
        wanted = OUTPUTS in needs, MOMENTS in needs
        return {
            part: Watched(path, (len(rows), self.columns), outputs=wanted[0], moments=wanted[1])
            for part, (path, rows) in self.parts.items()
        }

    def joined(self, moments: Mapping[str, GradientStats]) -> GradientStats:
        """Moments of the whole matrix; outputs of different layers count as independent of each other."""
        own = [(moments[part], rows) for part, (_, rows) in self.parts.items()]
        total = sum(len(rows) for _, rows in own)
        shape = (total, self.columns)
        mean = _placed(shape, [(stats.mean, rows, slice(None)) for stats, rows in own])
        square = _placed(shape, [(stats.square, rows, slice(None)) for stats, rows in own])
        gram = _placed((total, total), [(stats.output_gram, rows[:, None], rows) for stats, rows in own])
        return GradientStats(own[0][0].count, mean, square, gram)


def _placed(shape: tuple[int, int], parts: Iterable[tuple[Tensor | None, Tensor, Tensor | slice]]) -> Tensor | None:
    """A matrix of these parts at these rows and columns, zero elsewhere; None where a part is lacking."""
    whole = torch.zeros(shape)
    for part, rows, columns in parts:
        if part is None:
            return None
        whole[rows, columns] = part
    return whole


def joints_of(loader: PartialModel, infos: Iterable[LayerInfo]) -> list[Joint]:
    """The layers, none of them a factor, whose matrix the model divides."""
    joints: list[Joint] = []
    for info in infos:
        layers = {} if info.part else loader.rows_of_layers(info.tensor)
        parts = {f"{info.name}, {path}": (path, rows) for path, rows in layers.items()}
        joints += [Joint(info.name, info.tensor_shape[1], parts)] if parts else []
    return joints
