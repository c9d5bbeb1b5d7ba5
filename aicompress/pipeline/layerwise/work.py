"""Write the parameters of a layer-wise step, one at a time, and journal them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from aicompress.checkpoint import CheckpointWriter
from aicompress.checkpoint.files import count_not_finite, may_be_infinite
from aicompress.checkpoint.journal import Journal
from aicompress.checkpoint.reader import require_finite
from aicompress.errors import listed
from aicompress.layer import MergedExperts, from_matrix
from aicompress.measure import relative
from aicompress.pipeline.layerwise.compress import Compression, LayerStatistics, completed
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.layerwise.report_rows import COARSE_NOTE, changed_row, idle_row, is_coarse, noted
from aicompress.pipeline.layerwise.rows import pairs
from aicompress.pipeline.layerwise.rows.writing import row_blocks
from aicompress.pipeline.layerwise.scaling import Rescaling
from aicompress.pipeline.step.options import Progress
from aicompress.report.model import LayerRow
from aicompress.statistics import InputStats
from aicompress.weights import Dense, PerExpert, Weight


@dataclass
class Work:
    """A run on its way.

    Attributes:
        plan: what to do.
        writer: where bytes go.
        journal: what is done.
        progress: told of every parameter.
        warnings: what was noticed on the way.
        done: bytes of parameters that are written.
    """

    plan: Plan
    writer: CheckpointWriter
    journal: Journal
    progress: Progress
    warnings: list[str] = field(default_factory=list)
    infinite: set[str] = field(default_factory=set)  # copied though they are not finite
    done: int = 0
    written_together: set[str] = field(
        default_factory=set
    )  # parameters that were written with the others of their group

    def __post_init__(self) -> None:
        plan = self.plan
        self.total = sum(planned.dense.nbytes for planned in plan.output.parameters.values())
        self.compression = Compression(plan.method, plan.checkpoint, plan.recipe.seed)
        self.rescaling = Rescaling(self.compression, plan.scaling_groups, plan.by_tensor, self.journal)

    def write(self, name: str, known: Mapping[str, LayerStatistics] | None = None, note: str = "") -> Weight | Tensor:
        """Compress or copy one parameter to the output and note it in the journal.

        Args:
            name: the parameter.
            known: statistics by layer name.
            note: put first into the notes of its layers' rows.

        Returns:
            What was written.
        """
        jobs = [layer for layer in self.plan.by_tensor.get(name, []) if layer.config is not None]
        value: Weight | Tensor
        if jobs and jobs[0].members:
            return self._write_together(name, jobs[0].members, known or {}, note)
        if jobs:
            value, rows = self.compression.compress_parameter(name, jobs, known or {}, self._lent(name))
        else:
            value, rows = self._copied(name), []
        return self.put(name, value, rows, note)

    def _write_together(
        self, name: str, members: Sequence[str], known: Mapping[str, LayerStatistics], note: str
    ) -> Weight | Tensor:
        """Compress and write layers that belong together, unless this run has done so; errors and result as of `write`.

        The layers of a group have one input: one without statistics takes those of another. The two layers of a product
        of heads have different inputs: one without statistics takes white noise.
        """
        if name not in self.written_together:
            jobs = [self.plan.by_tensor[member][0] for member in members]
            first = next(iter(known.values()), LayerStatistics())
            others = [
                first if job.product is None else LayerStatistics(completed(InputStats(0), [job.info])) for job in jobs
            ]
            own = [known.get(job.info.name, other) for job, other in zip(jobs, others, strict=True)]
            compressed = self.compression.compress_together(jobs, own)
            for job, its in zip(jobs, compressed, strict=True):
                weight, row = self.compression.finished(job, its)
                self.put(job.info.tensor, weight, [row], note)
                self.written_together.add(job.info.tensor)
        written = self.plan.output.so_far(self.writer.work)
        return written.weight(name) if name in written.manifest.entries else written.read(name)

    def _lent(self, name: str) -> dict[str, Weight]:
        """Factors that another parameter stores for this one, where it is written already."""
        owners = self.plan.checkpoint.manifest.owners(name)
        lent = {part: owner for part, owner in owners.items() if part and owner in self.journal.done}
        written = self.plan.output.so_far(self.writer.work) if lent else None
        return {part: written.weight(owner).parts()[part] for part, owner in lent.items() if written is not None}

    def put(self, name: str, value: Weight | Tensor, rows: Sequence[LayerRow], note: str = "") -> Weight | Tensor:
        """Write what a parameter has become, and note it in the journal.

        Args:
            name: the parameter.
            value: its new weight, or itself.
            rows: of its layers that are compressed.
            note: put first into their notes.

        Returns:
            What was written.
        """
        if isinstance(value, Dense):
            planned = self.plan.output.parameters[name]
            assert planned.info is not None
            value = from_matrix(value.matrix, planned.dense.shape, planned.info.transposed).to(planned.dense.dtype)
        for disk, tensor in self.plan.output.encode(name, value).items():
            self.writer.put(disk, tensor)
        idle = [idle_row(layer) for layer in self.plan.by_tensor.get(name, []) if layer.config is None]
        self.record(name, [*(noted(row, note) for row in rows), *idle])
        return value

    def _copied(self, name: str) -> Weight | Tensor:
        """A parameter as the input has it.

        Raises:
            CheckpointError: it is no layer, and a weight or bias by its name, and holds NaN or infinity.
        """
        checkpoint = self.plan.checkpoint
        value = checkpoint.weight(name) if name in checkpoint.manifest.entries else checkpoint.read(name)
        for tensor in [value] if isinstance(value, Tensor) else value.tensors().values():
            if not self.plan.by_tensor.get(name) and not may_be_infinite(name):
                require_finite(tensor, name, checkpoint.path)
            elif count_not_finite(tensor):
                self.infinite.add(name)
        return value

    def write_all(self, names: Sequence[str]) -> None:
        """Compress or copy parameters without statistics, those that can be in blocks of rows."""
        with row_blocks(self.compression, self.plan.by_tensor, self.plan.output, self.writer) as threads:
            for name, rows in threads.written(names):
                if rows is None and name not in self.written_together:
                    done = self._write_experts(name) or self._write_pair(name)
                    if done is None:
                        self.write(name)
                    else:
                        self.record(name, done)
                elif rows is not None:
                    self.record(name, rows)
            self.infinite |= threads.infinite
        if self.infinite:
            shown = listed(sorted(self.infinite))
            self.warnings.append(
                f"{len(self.infinite)} tensors hold NaN or infinity and are copied as they are: {shown}"
            )

    def _write_pair(self, name: str) -> list[LayerRow] | None:
        """Compress two factors that are rounded together, the outer one in blocks of rows; None of anything else."""
        layers = self.plan.by_tensor.get(name, [])
        return pairs.written(self.compression, name, layers, self.plan.output, self.writer)

    def _write_experts(self, name: str) -> list[LayerRow] | None:
        """Compress the experts in one tensor and write each before the next is read; None of any other parameter."""
        job = next((layer for layer in self.plan.by_tensor.get(name, []) if layer.config is not None), None)
        if job is None or job.info.experts is None or job.info.part or job.outline is None:
            return None
        start, count, is_any_coarse = time.perf_counter(), job.info.experts.count, False
        errors, norms = list[float](), list[float]()
        for number, (weight, *sums) in enumerate(self.compression.experts(job, job.info.experts, LayerStatistics())):
            for disk, tensor in self._encoded_expert(name, weight, job.info.experts).items():
                self.writer.put_part(disk, tensor, number * (self.plan.output.stored[name][disk].shape[0] // count))
            errors, norms = [*errors, sums[0]], [*norms, sums[1]]
            is_any_coarse |= is_coarse(weight)
        error, seconds = relative(sum(errors), sum(norms)), time.perf_counter() - start
        row = changed_row(self.compression.method, job, job.outline, error, seconds)
        return [noted(row, COARSE_NOTE) if is_any_coarse else row]

    def _encoded_expert(self, name: str, weight: Weight, experts: MergedExperts) -> dict[str, Tensor]:
        """What one expert of a parameter is on disk."""
        dense = self.plan.output.parameters[name].dense
        one = PerExpert.joined([weight], experts.transposed)
        if not isinstance(one, Dense):
            return self.plan.output.encode(name, one)
        return {name: one.matrix.reshape(dense.shape[0] // experts.count, *dense.shape[1:]).to(dense.dtype)}

    def record(self, name: str, rows: list[LayerRow]) -> None:
        """Note in the journal that a parameter is written."""
        fresh = name not in self.journal.done  # a block that was stopped half way is done again
        self.journal.record(name, [dataclasses.asdict(row) for row in rows])
        if fresh:
            self.tell(name)

    def tell(self, name: str) -> None:
        """Report progress past a parameter."""
        self.done += self.plan.output.parameters[name].dense.nbytes
        self.say(name)

    def say(self, what: str) -> None:
        """Report what is going on."""
        self.progress(what, self.done, self.total)

    def rows(self) -> tuple[LayerRow, ...]:
        """Rows of all parameters that are done, in the output's order, with the bytes that its layout takes."""
        output, parts = self.plan.output, {layer.info.name: layer.info.part for layer in self.plan.layers}
        return tuple(
            LayerRow(**{**row, "bytes_after": output.nbytes(name, parts[row["name"]])})
            for name in output.parameters
            for row in self.journal.done.get(name, ())
        )
