"""How much of each layer stays where a survey decides it, as a rank or a number of survivors.

The original model's statistics are collected first (or read from --stats); the step itself then runs as always, with
the statistics of the compressed prefix. Gradients are the original model's in both: they are taken once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.statistics import StatisticsFile, merged, merged_gradients
from aicompress.layer import Layer
from aicompress.measure import interleaved
from aicompress.methods.capabilities import Candidate
from aicompress.methods.decisions import SurveySetting
from aicompress.methods.method import OF_GRADIENTS, MethodConfig
from aicompress.model.kernels.select import fast_linear
from aicompress.pipeline.calibration.gradients import GradientReader
from aicompress.pipeline.calibration.request import input_width
from aicompress.pipeline.calibration.statistics_file import collect, kept
from aicompress.pipeline.layerwise.allocation.config_trial import ConfigTrial, tried
from aicompress.pipeline.layerwise.plan import UNDECIDED, UNTRIED, Plan
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed, named, sharing_budgets
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes
from aicompress.statistics import GradientStats, InputStats
from aicompress.weights import Dense, Weight

ROUNDS = 9  # of timing
HEADER = 256  # bytes of a layer's entry that its pattern may add


@contextmanager
def allocated(
    plan: Plan, team: Processes, progress: Progress
) -> Iterator[tuple[Plan, GradientReader | None, list[StatisticsFile] | None]]:
    """The plan with an explicit number of survivors, or a rank, for every layer; itself where nothing is open.

    Every process has the same. Beside it what reads the gradients that the survey took, while the context lasts, where
    the step reads no others, and the survey's files where layers are written from them, as they were tried.

    Raises:
        RecipeError: a layer would be pruned away.
    """
    layers = [x for x in plan.layers if x.config is not None and plan.method.undecided(x.config)]
    if not layers:
        yield plan, None, None
        return
    with files_of_original(plan, plan.surveys, team, progress) as files:
        explicit, trial = plan, None
        trying = any(plan.method.tries(layer.config) for layer in layers)
        reader = _Reader(plan.checkpoint, plan.recipe.seed, plan.by_tensor, files)
        for budget, members in sharing_budgets(layers).items():
            configs = None
            if team.rank == 0:
                with named(budget), tried(explicit, members, reader.layer, progress) as trial:
                    configs = _decided(explicit, members, reader, trial, progress)
            configs = team.gather(configs)[0]
            assert configs is not None
            names = [layer.info.name for layer in members]
            explicit = explicit.with_configs(dict(zip(names, configs, strict=True)))
        warnings = tuple(line for line in explicit.warnings if line not in (UNDECIDED, UNTRIED))
        if trial is not None and trial.losses:
            notes = (*plan.notes, trial.note(explicit))
            explicit = replace(explicit, notes=notes, measured_on={**plan.measured_on, **trial.record})
        same = explicit.needs & OF_GRADIENTS <= plan.surveys
        once = trying or (plan.method.shares is not None and plan.method.shares.across)  # of the original model alone
        as_tried = once and not explicit.compares_inputs and explicit.needs <= plan.surveys and plan.recipe.tune is None
        read = partial(merged_gradients, files) if same else None
        yield replace(explicit, warnings=warnings), read, files if as_tried and explicit.needs else None


def _decided(
    plan: Plan, layers: Sequence[LayerPlan], reader: _Reader, trial: ConfigTrial | None, progress: Progress
) -> list[MethodConfig]:
    """Explicit parameters of layers that share a budget: of their own bytes where it is a level's."""
    assert plan.method.surveys is not None
    candidates = [
        Candidate(x.info, x.config, partial(reader.layer, x), partial(str, (x.members or (x.info.tensor,))[0]))
        for x in layers
        if x.config is not None
    ]
    setting = SurveySetting(
        0 if layers[0].budget else _other_bytes(plan, layers),
        saved_milliseconds,
        lambda done: progress("allocation", done, len(layers)),
    )
    if trial is not None:
        setting = replace(setting, divergence=trial.divergence)
    return plan.method.surveys.decide(candidates, setting)


@contextmanager
def files_of_original(
    plan: Plan, needs: frozenset[str], team: Processes, progress: Progress
) -> Iterator[list[StatisticsFile]]:
    """Files of statistics of the original model: those of --stats, or one that is gone afterwards.

    The first process writes it; the others get none.
    """
    if not needs:  # the weights and the running model decide
        yield []
        return
    if team.gather(plan.request.reads_files)[0]:
        yield [StatisticsFile.open(path) for path in plan.request.stats]
        return
    out = plan.output.destination.path.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.statistics.", dir=out.parent) as folder:
        path = plan.request.stats[0] if plan.request.stats else Path(folder) / "statistics.safetensors"
        needs = kept(plan.surveys | plan.needs) if plan.request.stats else needs  # a file is for the step, too
        collect(plan, plan.selected, needs, path, team, progress)
        team.wait()
        yield [StatisticsFile.open(path)] if team.rank == 0 else []


def _other_bytes(plan: Plan, layers: Sequence[LayerPlan]) -> int:
    """Bytes of the output's weight files beside some layers, at most.

    What the manifest says of a pattern may be longer than of the one that was planned.
    """
    planned = sum(plan.output.nbytes(layer.info.tensor, layer.info.part) for layer in layers)  # what is shared once
    return plan.output.weight_bytes - planned + HEADER * len(layers)


@torch.inference_mode()
def saved_milliseconds(layer: Layer, weight: Weight) -> float:
    """What a layer's forward pass takes less on 128 inputs than the dense one, as `load` would run both."""
    dtype = layer.info.dtype if layer.info.dtype.itemsize > 1 else torch.float32
    inputs = torch.randn(128, layer.info.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    dense = fast_linear(Dense(layer.weight), None, dtype, resident=False)
    running = fast_linear(weight, None, dtype, resident=False)
    before, after = interleaved([lambda: dense(inputs), lambda: running(inputs)], ROUNDS)
    # Two dense layers differ by noise alone.
    return 0.0 if running.kernel == dense.kernel else 1e3 * (before.median - after.median)


@dataclass(frozen=True)
class _Reader:
    """Reads layers with what files of statistics hold of them.

    Attributes:
        checkpoint: where the layers are.
        seed: of the step.
        layers: by parameter.
        files: the files.
    """

    checkpoint: Checkpoint
    seed: int
    layers: Mapping[str, Sequence[LayerPlan]]
    files: Sequence[StatisticsFile]

    def layer(self, plan: LayerPlan) -> Layer:
        """A layer with its statistics; where there are none as if it were like any other."""
        info = plan.info
        if not self.files:
            return self.checkpoint.layer(info, layer_seed(self.seed, info.name))
        inputs = merged(self.files, info.tensor)
        if not inputs.count:
            inputs = InputStats.white(input_width([each.info for each in self.layers[info.tensor]]))
        if inputs.frequency is not None:
            inputs = inputs.of_lookups(input_width([each.info for each in self.layers[info.tensor]]))
        inputs = replace(inputs, cross=inputs.gram)
        gradients = merged_gradients(self.files, info.name) or GradientStats.flat(info.shape)
        before = self.checkpoint.weight(info.tensor).before(info.part) if info.part else None
        if before is not None:
            inputs = inputs.through(before)
        layer = self.checkpoint.layer(info, layer_seed(self.seed, info.name))
        return replace(layer, inputs=inputs, gradients=gradients)
