"""Sparsities that calibration decides, layer by layer: a plan whose allocation is open becomes one of explicit counts.

The original model's statistics are collected first (or read from --stats); the step itself then runs as always, with
the statistics of the compressed prefix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aicompress.checkpoint.statistics import StatisticsFile, merged, merged_gradients
from aicompress.errors import RecipeError
from aicompress.layer import GradientStats, InputStats, Layer
from aicompress.measure import interleaved
from aicompress.methods.budget import least_loss
from aicompress.methods.layerwise import Candidate
from aicompress.methods.prune.masks import allocation
from aicompress.methods.prune.masks.allocation import Share
from aicompress.methods.prune.masks.calibrated import CalibratedConfig, nbytes
from aicompress.methods.prune.masks.candidates import fitting
from aicompress.methods.prune.masks.global_threshold import share_globally
from aicompress.methods.prune.masks.masks import kept_count
from aicompress.methods.prune.masks.search import least, losses, saved_bytes
from aicompress.methods.prune.masks.sparsity import check
from aicompress.model.kernels.select import fast_linear
from aicompress.pipeline.calibration.requirements import input_width
from aicompress.pipeline.calibration.statistics_file import Wanted, collect
from aicompress.pipeline.layerwise.plan import UNDECIDED, Plan, selected
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.workers import Processes
from aicompress.weights import Dense, Weight, outline_nbytes

ROUNDS = 9  # of timing
HEADER = 256  # bytes of a layer's entry that its pattern may add


def allocated(plan: Plan, team: Processes, progress: Progress) -> Plan:
    """The plan with an explicit number of survivors for every layer; itself where nothing is open.

    Every process finds the same.

    Raises:
        RecipeError: a layer would be pruned away.
    """
    layers = [layer for layer in plan.layers if is_open(layer)]
    if not layers:
        return plan
    with _files(plan, team, progress) as files:
        found: list[int] | None = None
        if team.rank == 0:
            found = _decide(plan, layers, files, lambda done: progress("allocation", done, len(layers)))
        found = team.gather(found)[0]
    assert found is not None
    decided = {layer.info.name: _explicit(layer, number) for layer, number in zip(layers, found, strict=True)}
    warnings = tuple(line for line in plan.warnings if line != UNDECIDED)
    return replace(plan.with_configs(decided), warnings=warnings)


def is_open(layer: LayerPlan) -> bool:
    """Whether calibration decides a layer's sparsity."""
    return isinstance(layer.config, CalibratedConfig) and layer.config.open != "uniform"


def _explicit(layer: LayerPlan, count: int) -> CalibratedConfig:
    """A layer's config with its number of survivors, or with the candidate of that number."""
    assert isinstance(layer.config, CalibratedConfig)
    if layer.config.open == "search":
        found: CalibratedConfig = fitting(layer.info, layer.config, check)[count]
        return found
    return layer.config.model_copy(update={"sparsity": None, "kept": count, "allocation": "uniform"})


@contextmanager
def _files(plan: Plan, team: Processes, progress: Progress) -> Iterator[list[StatisticsFile]]:
    """Files of statistics: those of --stats, or one that is gone afterwards. The first process writes it."""
    if team.gather(plan.request.reads_files)[0]:
        yield [StatisticsFile.open(path) for path in plan.request.stats]
        return
    out = plan.output.destination.path.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.statistics.", dir=out.parent) as folder:
        path = plan.request.stats[0] if plan.request.stats else Path(folder) / "statistics.safetensors"
        needs = plan.surveys | (plan.needs if plan.request.stats else frozenset())  # the file is for the step, too
        collect(plan, Wanted(selected(plan), needs), path, team, progress)
        team.wait()
        yield [StatisticsFile.open(path)] if team.rank == 0 else []


def _decide(
    plan: Plan, layers: Sequence[LayerPlan], files: Sequence[StatisticsFile], tell: Callable[[int], None]
) -> list[int]:
    """Survivors of every layer, or the number of its candidate. Layers of one recipe share one way to decide.

    Raises:
        RecipeError: they do not.
    """
    ways = {(c.open, c.sparsity) for layer in layers if isinstance(c := layer.config, CalibratedConfig)}
    if len(ways) > 1:
        shown = ", ".join(f"{way} {sparsity or ''}".strip() for way, sparsity in sorted(ways, key=str))
        raise RecipeError(f"layers share a sparsity in several ways: {shown}", "give one for all of them")
    if ways == {("search", None)}:
        return _searched(plan, layers, files, tell)
    shares = [_share(layer) for layer in layers]
    config = layers[0].config
    assert isinstance(config, CalibratedConfig)
    assert config.sparsity is not None
    kept = kept_count(sum(share.size for share in shares), config.sparsity)
    read = [partial(_read, plan, layer, files) for layer in layers]
    if config.allocation == "owl":
        found = []
        for number, give in enumerate(read):
            found.append(allocation.outliers(give(), config.outlier))
            tell(number + 1)
        return allocation.by_outliers(shares, found, kept, config.spread)
    if config.allocation == "global":
        assert plan.method.scores is not None
        candidates = [Candidate(layer.info, layer.config, give) for layer, give in zip(layers, read, strict=True)]
        configs = [layer.config.model_copy(update={"scope": "global"}) for layer in layers if layer.config]
        return [each.kept for each in share_globally(candidates, configs, plan.method.scores)]
    average = kept / sum(share.size for share in shares)
    counts = [allocation.options(share, average) for share in shares]
    losses = []
    for number, (layer, options) in enumerate(zip(layers, counts, strict=True)):
        given = read[number]()
        losses.append(allocation.measured(given, options, partial(_pruned, plan, layer, given)))
        tell(number + 1)
    return allocation.by_losses(shares, counts, losses, kept)


def _searched(
    plan: Plan, layers: Sequence[LayerPlan], files: Sequence[StatisticsFile], tell: Callable[[int], None]
) -> list[int]:
    config = layers[0].config
    assert isinstance(config, CalibratedConfig)
    if config.target_bytes is not None:
        return _within_bytes(plan, layers, files, tell)
    found = []
    for number, layer in enumerate(layers):
        assert isinstance(layer.config, CalibratedConfig)
        options = fitting(layer.info, layer.config, check)
        saved = saved_bytes if layer.config.per == "bytes" else saved_milliseconds
        found.append(least(_read(plan, layer, files), options, plan.method.apply, saved))
        tell(number + 1)
    return found


def _within_bytes(
    plan: Plan, layers: Sequence[LayerPlan], files: Sequence[StatisticsFile], tell: Callable[[int], None]
) -> list[int]:
    """Candidates of least total loss within `target_bytes`, everything else in the output included."""
    costs, found, planned = [], [], 0
    for number, layer in enumerate(layers):
        config = layer.config
        assert isinstance(config, CalibratedConfig)
        assert config.target_bytes is not None
        assert layer.outline is not None
        budget, options = config.target_bytes, fitting(layer.info, config, check)
        planned += outline_nbytes(layer.outline)
        costs.append([float(each) for each in nbytes(layer.info, config)])
        found.append(losses(_read(plan, layer, files), options, plan.method.apply))
        tell(number + 1)
    # What the manifest says of a pattern may be longer than of the one that was planned.
    others = plan.output.weight_bytes - planned + HEADER * len(layers)
    return list(least_loss(costs, found, float(budget - others)).picks)


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


def _share(layer: LayerPlan) -> Share:
    config = layer.config
    assert isinstance(config, CalibratedConfig)
    (out, columns), (high, wide) = layer.info.shape, config.tile
    unit = high * wide * (out // high if config.scope == "row" else 1)
    return Share(out * columns, unit, layer.info.index)


def _pruned(plan: Plan, layer: LayerPlan, given: Layer, count: int) -> Any:
    return plan.method.apply(given, _explicit(layer, count)).dense()


def _read(plan: Plan, layer: LayerPlan, files: Sequence[StatisticsFile]) -> Layer:
    """A layer with its statistics; where there are none as if it were like any other."""
    info = layer.info
    inputs = merged(files, info.tensor)
    if not inputs.count:
        inputs = InputStats.white(input_width([each.info for each in plan.by_tensor[info.tensor]]))
    inputs = replace(inputs, cross=inputs.gram)
    moments = merged_gradients(files, info.name) or GradientStats.flat(info.shape)
    if info.part == "out":
        inputs = inputs.through(_inner(plan, info.tensor))
    return replace(
        plan.checkpoint.layer(info, layer_seed(plan.recipe.seed, info.name)), inputs=inputs, gradients=moments
    )


def _inner(plan: Plan, tensor: str) -> Any:
    weight: Any = plan.checkpoint.weight(tensor)
    return weight.inner.dense()
