"""Measure a checkpoint, alone or against baselines: bytes, load, latency and quality, and judge its gates."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aicompress import __version__
from aicompress import data as sources
from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.reader import digests
from aicompress.errors import OutputExists, RecipeError, raise_all
from aicompress.measure import peak_rss
from aicompress.pipeline.evaluation.load_cost import Footprint, footprint
from aicompress.pipeline.evaluation.quality import measure_quality
from aicompress.pipeline.step import latency as timing
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.environment import environment
from aicompress.pipeline.step.options import Progress
from aicompress.pipeline.step.running_model import Running, Setting, example, resolved_device
from aicompress.pipeline.step.sides import side_of
from aicompress.recipe.evaluation import EvalRecipe
from aicompress.report import gates
from aicompress.report.html import to_html
from aicompress.report.markdown import to_markdown
from aicompress.report.model import Baseline, Gate, Latency, Report, Side

FILES = ("report.json", "report.md", "report.html")
NEGATED = {"<=": ">", ">": "<=", "<": ">=", ">=": "<", "==": "!=", "!=": "=="}


@dataclass(frozen=True)
class Options:
    """How an evaluation runs.

    Attributes:
        out: folder for the report's files, or None.
        fail_if: conditions that must not hold, beside the recipe's gates.
        device: auto, cpu or cuda.
        allow_code: the recipe's factory may run.
        progress: called with (what, done, total).
    """

    out: Path | None = None
    fail_if: tuple[str, ...] = ()
    device: str = "auto"
    allow_code: bool = False
    progress: Progress = lambda what, done, total: None


@dataclass
class _Findings:
    latency: Latency | None = None
    further: tuple[Latency, ...] = ()
    quality: dict[str, Any] = field(default_factory=dict)
    footprints: list[Footprint] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def evaluate(source: str, against: Sequence[str], recipe: EvalRecipe, options: Options | None = None) -> Report:
    """Measure a checkpoint and write its report where `options.out` says.

    The gates are judged, not enforced: `report.gates.require(found.gates)` raises where one does not hold.

    Args:
        source: the checkpoint that is judged.
        against: baselines; the first one is the report's `before`.
        recipe: what to measure.

    Raises:
        Refused: a checkpoint, the recipe or its data; before anything is measured where headers and recipe tell.
    """
    options = options or Options()
    start = time.perf_counter()
    _check(recipe, options, bool(against))
    paths = [source, *against]
    checkpoints = [Checkpoint.open(path) for path in paths]
    found = _Findings()
    sides = [_side(checkpoint, path, found) for checkpoint, path in zip(checkpoints, paths, strict=True)]
    _measure(paths, recipe, options, found)
    sides = [_loaded(side, cost) for side, cost in zip(sides, found.footprints, strict=False)] or sides
    further = [*found.further, *[None] * len(sides)]
    report = Report(
        command="eval",
        tool_version=__version__,
        before=sides[1] if against else None,
        after=sides[0],
        layers=(),
        latency=found.latency,
        quality=found.quality,
        training={},
        warnings=tuple(found.warnings),
        gates=(),
        environment=environment(),
        recipe=recipe.resolved(),
        lineage=checkpoints[0].manifest.lineage,
        seconds=time.perf_counter() - start,
        peak_rss=peak_rss(),
        baselines=tuple(Baseline(side, base) for side, base in zip(sides[2:], further, strict=False)),
    )
    report = dataclasses.replace(report, gates=judged(report, recipe.gates, options.fail_if))
    if options.out is not None:
        write(report, options.out)
    options.progress("done", 100, 100)
    return report


def judged(report: Report, required: Sequence[str], fail_if: Sequence[str]) -> tuple[Gate, ...]:
    """Gates that must hold, then conditions that must not; what was not measured fails either way."""
    plain = json.loads(report.to_json())
    negated = [
        dataclasses.replace(
            condition, expression=f"fail if {condition.expression}", operator=NEGATED[condition.operator]
        )
        for condition in gates.parse_all(fail_if)
    ]
    return tuple(condition.gate(plain) for condition in (*gates.parse_all(required), *negated))


def write(report: Report, folder: Path) -> None:
    """Write the report in its three forms; earlier ones of the same name are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(FILES, (report.to_json(), to_markdown(report), to_html(report)), strict=True):
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def _check(recipe: EvalRecipe, options: Options, compared: bool) -> None:
    """Everything that can be refused before a checkpoint is opened."""
    figures = recipe.figures(compared)
    gates.parse_all((*recipe.gates, *options.fail_if), figures)
    for metric, _ in recipe.quality.asked:
        if metric.needs_baseline and not compared:
            raise RecipeError(
                f"quality.{metric.name} compares {metric.reads.what}, and there is no baseline", "give --against BASE"
            )
    raise_all([problem for _, data in recipe.quality.asked for problem in sources.problems(data)])
    out = options.out
    if out is not None and (out.is_file() or (out / "config.json").exists() or any(out.glob("*.safetensors"))):
        raise OutputExists(f"{out} is a checkpoint or a file", "write the report into a folder of its own")


def _side(checkpoint: Checkpoint, path: str, found: _Findings) -> Side:
    kinds, warnings = known_kinds(checkpoint)
    found.warnings += warnings
    return side_of(checkpoint, kinds, path, digests(checkpoint.source))


def _loaded(side: Side, cost: Footprint) -> Side:
    """A side with what it costs to load it."""
    return dataclasses.replace(
        side,
        load_seconds=cost.warm_seconds,
        cold_load_seconds=cost.cold_seconds if cost.evicted else None,
        load_peak_rss=cost.peak_rss,
    )


def _measure(paths: Sequence[str], recipe: EvalRecipe, options: Options, found: _Findings) -> None:
    """Load cost in fresh processes first, while this one holds no model; then latency, then quality."""
    setting = Setting(recipe.model, options.allow_code, resolved_device(options.device), recipe.kernels)
    if recipe.latency is not None:
        size = (recipe.latency.batch, recipe.latency.length)
        for number, path in enumerate(paths):
            options.progress("loading in a process of its own", 20 * number // len(paths), 100)
            found.footprints.append(
                footprint(path, recipe.model, options.allow_code, size, recipe.quality.arrays, recipe.kernels)
            )
    if recipe.latency is None and not recipe.figures(compared=len(paths) > 1):
        return
    models = [setting.start(path) for path in paths]
    options.progress("latency", 20, 100)
    _time(models, recipe, found)
    found.quality = measure_quality(
        models, recipe, lambda what, done, total: options.progress(what, 30 + 69 * done // total, 100)
    )


def _time(models: Sequence[Running], recipe: EvalRecipe, found: _Findings) -> None:
    if recipe.latency is None:
        found.warnings.append("latency was not measured: the recipe has no latency section")
        return
    asked = recipe.latency
    inputs = example(models[0].module, asked.batch, asked.length, recipe.quality.arrays)
    if inputs is None:
        found.warnings.append("latency was not measured: nothing says what the model takes")
        return
    found.latency, found.further = timing.whole(models, inputs, asked.rounds, asked.warmup)
