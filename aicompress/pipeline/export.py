"""Write a checkpoint in another way: every parameter decoded, codes entropy-coded or not, or with a short header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.reader import require_finite
from aicompress.checkpoint.views.decoded import with_decoded
from aicompress.disk import require_writable
from aicompress.errors import Refused, raise_all
from aicompress.layer import LayerInfo
from aicompress.pipeline.step import blocks
from aicompress.pipeline.step.blocks import Block, copied_in_parts
from aicompress.pipeline.step.checks import left_out, require_loads, require_space
from aicompress.pipeline.step.input import Adapted
from aicompress.pipeline.step.opening import as_stored, opened_input
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.output import Destination, Planned, arrange, lineage_step
from aicompress.pipeline.step.plan import StepPlan
from aicompress.pipeline.step.report import Results
from aicompress.pipeline.step.run import OpenOutput, run_alone, write_all
from aicompress.recipe.made import ExportRecipe
from aicompress.report.model import LayerRow, Report
from aicompress.weights import Dense


@dataclass(frozen=True)
class ExportPlan(StepPlan):
    """An export that can be run, or printed; its layers are whole ones, in the form that they are stored in."""

    recipe: ExportRecipe

    def rows(self, seconds: Mapping[str, float] | None = None) -> tuple[LayerRow, ...]:
        """A row for each layer: decoded, or as it was."""
        return tuple(map(self._row, self.infos))

    def _row(self, info: LayerInfo) -> LayerRow:
        decoded = self.recipe.method.decodes and not self.checkpoint.is_plain(info.tensor)
        done = ("export", self.recipe.method.name) if decoded else ("-", "-")
        form = Dense.form if self.recipe.method.decodes else info.stored
        size = self.output.nbytes(info.tensor, info.part)
        note = "decoded" if decoded else "left as it is"
        return LayerRow(info.name, info.kind, *done, form, {}, info.nbytes, size, 0.0, 0.0, note)

    @property
    def stored(self) -> dict[str, str]:
        """The form of each layer in the input; of another tool's layout its own words."""
        foreign = self.checkpoint.foreign.weights
        return {i.name: foreign[i.tensor].words if i.tensor in foreign else i.stored for i in self.infos}


def make_plan(source: str | Path | Adapted, destination: Destination, recipe: ExportRecipe) -> ExportPlan:
    """Check everything and lay out the output; reads headers only.

    Raises:
        Refused: or Problems, everything that is wrong.
    """
    opened = opened_input(source, destination, recipe.gates)
    checkpoint = opened.checkpoint
    raise_all(opened.problems)
    require_writable(destination.path)
    step = lineage_step("export", recipe, checkpoint.source, checkpoint.foreign.beside)
    if recipe.method.decodes:
        _require_expressible(checkpoint, destination)
        plain = with_decoded(checkpoint, checkpoint.manifest.entries)
        parameters = {name: Planned(spec) for name, spec in plain.parameters().items()}
        output = arrange(plain, destination, parameters, step)
        if opened.kinds is not None:  # an architecture of its own code is read by nothing that could be tried
            require_loads(checkpoint, output.config, plain.parameters(), {})
        layers = tuple(_as_stored(checkpoint, info) for info in plain.layers(opened.kinds))
    else:
        layers = tuple(checkpoint.layers(opened.kinds))
        if recipe.method.shortens:
            _require_bare(checkpoint, destination)
            destination = replace(destination, bundled=True)
        elif not checkpoint.manifest.entries:
            raise Refused(
                f"{checkpoint.path} has no codes that could be stored otherwise", "quantize or prune it first"
            )
        output = arrange(checkpoint, destination, as_stored(checkpoint, layers), step)
    require_space(output)
    return ExportPlan(
        checkpoint,
        recipe,
        output,
        opened.kinds,
        layers,
        (*opened.warnings, *left_out(checkpoint, destination), *output.warnings),
    )


def _as_stored(checkpoint: Checkpoint, info: LayerInfo) -> LayerInfo:
    """A whole layer with the form that the input has it in."""
    entry, outline = checkpoint.manifest.entries.get(info.tensor), checkpoint.outline(info.tensor)
    if entry is None or outline is None:
        return info
    return replace(info, stored=outline.form, outline=outline, transposed=entry.transposed)


def _require_bare(checkpoint: Checkpoint, destination: Destination) -> None:
    """Refuse a short header for what is no single file, or holds weights that only another tool's layout describes.

    Raises:
        Refused: it is.
    """
    if not destination.single or checkpoint.config is not None:
        raise Refused(
            f"{checkpoint.path}: a short header is for one file without a config.json",
            "give IN.safetensors and OUT.safetensors, or take --to dense",
        )
    if checkpoint.foreign.weights:
        raise Refused(f"{checkpoint.path}: its weights are in another tool's layout", "take --to dense")


def _require_expressible(checkpoint: Checkpoint, destination: Destination) -> None:
    """Refuse a plain checkpoint that nothing could load.

    Raises:
        Refused: its layers have widths that config.json cannot say.
    """
    if checkpoint.manifest.widths and checkpoint.config is not None and not destination.single:
        raise Refused(
            f"{checkpoint.path}: its layers have unlike widths, or fewer heads, which config.json cannot say",
            "export to one file, OUT.safetensors, or start from the checkpoint before that step",
        )


def run(plan: ExportPlan, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside.

    Raises:
        CheckpointError: a weight holds NaN or infinity, or cannot be decoded; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    return run_alone(plan, partial(_write, plan), options or Options())


def _write(plan: ExportPlan, opened: OpenOutput, progress: Progress) -> Results:
    """Write one parameter after the other, decoded or as it is stored, a block of rows at a time."""
    decodes, checkpoint = plan.recipe.method.decodes, plan.checkpoint

    def values(name: str) -> Iterator[Block]:
        if not decodes and copied_in_parts(checkpoint, name, plan.output, opened.writer, name):
            return
        for rows in checkpoint.row_blocks(name, blocks.BLOCK):
            if not decodes and name in checkpoint.manifest.entries:
                yield checkpoint.weight(name, rows), rows
                continue
            tensor = checkpoint.dense(name, rows)
            require_finite(tensor, name, checkpoint.path)
            yield tensor, rows

    write_all(plan.output, opened.writer, values, progress, checkpoint.row_axis)
    return Results(plan.rows(), plan.warnings)
