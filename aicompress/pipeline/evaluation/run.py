"""Measure a checkpoint, alone or against baselines: bytes, load, latency and quality, and evaluate its gates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from aicompress import data as sources
from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.reader import digests, require_finite
from aicompress.checkpoint.source import REPORTS, is_adapter, local_folder
from aicompress.checkpoint.written import require_own_reports
from aicompress.disk import require_file, write_whole
from aicompress.errors import CheckpointError, OutputExists, RecipeError, raise_all
from aicompress.pipeline.evaluation.load_cost import footprint, prepare
from aicompress.pipeline.evaluation.quality import Asked, asked_quality, measure_quality, shortened
from aicompress.pipeline.evaluation.samples import outlined
from aicompress.pipeline.step.checks import known_kinds
from aicompress.pipeline.step.input import Adapted, open_input
from aicompress.pipeline.step.models.running_model import Running, Setting, example, resolved_device
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.report import Results, build_report, rendered
from aicompress.pipeline.step.sides import side_of
from aicompress.pipeline.step.timing import latency as timing
from aicompress.recipe.evaluation import EvalRecipe
from aicompress.report import gates
from aicompress.report.model import Baseline, Latency, Report, Side


@dataclass(frozen=True)
class EvalOptions:
    """Options of an evaluation alone.

    Attributes:
        out: folder for the report's files, or None.
        fail_if: conditions that must not hold, beside the recipe's gates.
        allow_code: the recipe's factory may run.
    """

    out: Path | None = None
    fail_if: tuple[str, ...] = ()
    allow_code: bool = False


def evaluate(
    source: str | Adapted,
    against: Sequence[str | Adapted],
    recipe: EvalRecipe,
    judging: EvalOptions = EvalOptions(),
    options: Options = Options(),
) -> Report:
    """Measure a checkpoint and write its report where `judging.out` says.

    The gates are evaluated, not enforced: `gates.require(report.gates)` raises where one does not hold.

    Args:
        source: the checkpoint that is judged, with adapters to merge into it.
        against: baselines; the first one is the report's `before`.
        recipe: what to measure.
        judging: further conditions, and where the report goes.
        options: the device, and whom to tell of progress.

    Raises:
        Refused: a checkpoint, the recipe or its data; before anything is measured where headers and recipe tell.
    """
    start = time.perf_counter()
    _check(recipe, judging, bool(against))
    sources = [each if isinstance(each, Adapted) else Adapted(each) for each in (source, *against)]
    if recipe.latency is not None:
        prepare(str(sources[0].path))
    _require_no_adapter(sources[1:])
    inputs = [open_input(each) for each in sources]
    sides, warnings = _sides([checkpoint for checkpoint, _ in inputs], [each.name for each in sources])
    if not _runs(recipe, bool(against)):  # no model is loaded, which would tell
        for checkpoint, _ in inputs:
            _require_finite(checkpoint)
    bare = (recipe.model, judging.allow_code)
    outlines = [outlined(opened, each.name, *bare) for (opened, _), each in zip(inputs, sources, strict=True)]
    asked = asked_quality(recipe, outlines)
    if recipe.latency is not None:
        sides = _with_load_cost(sides, sources, recipe, judging.allow_code, options.progress)
    setting = Setting(recipe.model, judging.allow_code, resolved_device(options.device), recipe.kernels)
    results, latencies = _measured(sources, setting, recipe, asked, options.progress)
    further = [*latencies, *[None] * len(sides)]
    results = replace(
        results,
        warnings=(
            *(told for opened, tied in inputs for told in (*opened.foreign.told, *tied)),
            *warnings,
            *results.warnings,
        ),
        notes=tuple(merged for opened, _ in inputs for merged in opened.foreign.merged),
        baselines=tuple(Baseline(side, latency) for side, latency in zip(sides[2:], further, strict=False)),
    )
    pair = (sides[1] if against else None, sides[0])
    lineage = inputs[0][0].manifest.lineage
    results = replace(results, waited=options.waited())
    report = build_report("eval", recipe, pair, lineage, results, time.perf_counter() - start)
    report = replace(report, gates=(*report.gates, *gates.evaluate_forbidden(judging.fail_if, report)))
    if judging.out is not None:
        write(report, judging.out, recipe.report.html)
    options.progress("done", 100, 100)
    return report


def write(report: Report, folder: Path, html: bool = True) -> None:
    """Write the report's files; earlier ones are replaced, and a page that is not written anew goes.

    Raises:
        OutputExists: files of these names are there that this tool did not write.
    """
    require_own_reports(folder)
    write_whole({folder / name: text for name, text in rendered(report, html).items()})
    if not html:
        (folder / "report.html").unlink(missing_ok=True)


def _check(recipe: EvalRecipe, judging: EvalOptions, compared: bool) -> None:
    """Refuse everything that can be refused before a checkpoint is opened."""
    figures = recipe.figures(compared)
    conditions = (*recipe.gates, *judging.fail_if)
    gates.parse_all(conditions, figures)
    gates.require_measured(conditions, _absent(recipe, compared))
    for metric, _ in recipe.quality.asked:
        if metric.needs_baseline and not compared:
            raise RecipeError(
                f"quality.{metric.name} compares {metric.reads.what}, and there is no baseline", "give --against BASE"
            )
    raise_all([problem for _, data in recipe.quality.asked for problem in sources.problems(data)])
    out = judging.out
    if out is not None and (out.is_file() or (out / "config.json").exists() or any(out.glob("*.safetensors"))):
        raise OutputExists(f"{out} is a checkpoint or a file", "write the report into a folder of its own")
    if out is not None:
        require_own_reports(out)
        for name in REPORTS:
            require_file(out / name)


def _require_no_adapter(baselines: Sequence[Adapted]) -> None:
    """Refuse a folder that holds an adapter alone as a baseline.

    Raises:
        CheckpointError: it does.
    """
    for baseline in baselines:
        if is_adapter(local_folder(baseline.path)):
            raise CheckpointError(
                f"{baseline.path} is an adapter, no checkpoint",
                f"give its base model with --against, and --against-adapter {baseline.path}",
            )


def _absent(recipe: EvalRecipe, compared: bool) -> dict[str, str]:
    """What the report will not hold, with what to do about it."""
    absent = {"training": "only `aicompress distill` trains"}
    if not compared:
        paired = (f"latency.{name}" for name in ("ratio", "low", "high", "before_ms", "before_p95_ms"))
        changes = (f"quality.{name}.{part}" for name in recipe.figures(False) for part in ("change", "baseline"))
        absent |= dict.fromkeys(("before", "size.ratio", *paired, *changes), "give --against BASE")
    if recipe.latency is None:
        loading = (f"{side}.{name}" for side in ("before", "after") for name in gates.LOADING)
        absent |= dict.fromkeys(("latency", *loading), "the recipe has no `latency` section")
    return absent


def _sides(checkpoints: Sequence[Checkpoint], paths: Sequence[str]) -> tuple[list[Side], list[str]]:
    """Bytes and parameters of every checkpoint, and warnings."""
    sides: list[Side] = []
    warnings: list[str] = []
    for checkpoint, path in zip(checkpoints, paths, strict=True):
        kinds, unknown = known_kinds(checkpoint)
        warnings += unknown
        sides.append(side_of(checkpoint, kinds, path, digests(checkpoint.source)))
    return sides, warnings


def _runs(recipe: EvalRecipe, compared: bool) -> bool:
    """Whether models are run, or sizes alone are read."""
    return recipe.latency is not None or bool(recipe.figures(compared))


def _require_finite(checkpoint: Checkpoint) -> None:
    """Refuse scales, factors and values of compressed parameters that are NaN or infinite, without decoding any.

    Raises:
        CheckpointError: naming the tensor.
    """
    for name in checkpoint.manifest.entries:
        for disk, spec in checkpoint.stored_specs(name).items():
            if spec.dtype.is_floating_point:
                require_finite(checkpoint.read(disk), disk, checkpoint.path)


def _with_load_cost(
    sides: Sequence[Side], sources: Sequence[Adapted], recipe: EvalRecipe, allow_code: bool, progress: Progress
) -> list[Side]:
    """The sides with what it costs to load them, each in a process of its own, while this one holds no model."""
    assert recipe.latency is not None
    size = (recipe.latency.batch, recipe.latency.length)
    loaded: list[Side] = []
    for number, (side, source) in enumerate(zip(sides, sources, strict=True)):
        progress("loading in a process of its own", 20 * number // len(sides), 100)
        setting = Setting(recipe.model, allow_code, kernels=recipe.kernels)
        cost = footprint(source, setting, size, recipe.quality.arrays)
        cold = cost.cold_seconds if cost.evicted else None
        loaded.append(
            replace(side, load_seconds=cost.warm_seconds, cold_load_seconds=cold, load_peak_rss=cost.peak_rss)
        )
    return loaded


def _measured(
    sources: Sequence[Adapted], setting: Setting, recipe: EvalRecipe, asked: Asked, progress: Progress
) -> tuple[Results, tuple[Latency, ...]]:
    """Latency and quality of the first checkpoint, and its latency against each baseline but the first."""
    if not _runs(recipe, len(sources) > 1):
        return Results(), ()
    models = [setting.start(source) for source in sources]
    latency, further, warnings = _timed(models, recipe, progress)
    data = {metric.name: asdict(samples.source) for metric, _, samples in asked}
    quality = measure_quality(
        models, asked, recipe.seed, lambda what, done, total: progress(what, 30 + 69 * done // total, 100)
    )
    warnings = (*warnings, *shortened(recipe, asked))
    return Results(latency=latency, quality=quality, warnings=warnings, data=data), further


def _timed(
    models: Sequence[Running], recipe: EvalRecipe, progress: Progress
) -> tuple[Latency | None, tuple[Latency, ...], tuple[str, ...]]:
    """Latency of the first model, the same against each baseline but the first, and why there is none."""
    if recipe.latency is None:
        return None, (), ()
    asked = recipe.latency
    progress("latency", 20, 100)
    inputs = example(models[0].module, asked.batch, asked.length, recipe.quality.arrays)
    if inputs is None:
        return None, (), ("latency was not measured: nothing says what the model takes",)
    return *timing.whole(models, inputs, asked.rounds, asked.warmup), ()
