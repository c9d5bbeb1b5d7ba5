"""Write the parameters of a layer-wise step, one at a time, and journal them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from aicompress.checkpoint import CheckpointWriter
from aicompress.checkpoint.journal import Journal
from aicompress.checkpoint.reader import require_finite
from aicompress.layer import from_matrix
from aicompress.pipeline.layerwise.compress import Known, compress_parameter
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.layerwise.report_rows import idle_row, noted
from aicompress.pipeline.layerwise.row_blocks import row_blocks
from aicompress.pipeline.layerwise.scaling import Rescaling
from aicompress.pipeline.step.options import Progress
from aicompress.report.model import LayerRow
from aicompress.weights import Dense, Weight


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
    done: int = 0

    def __post_init__(self) -> None:
        self.rescaling = Rescaling(self.plan, self.journal)

    def write(self, name: str, known: Mapping[str, Known] | None = None, note: str = "") -> Weight | Tensor:
        """Compress or copy one parameter to the output and note it in the journal.

        Args:
            name: the parameter.
            known: statistics by layer name.
            note: put first into the notes of its layers' rows.

        Returns:
            What was written.
        """
        value, rows = _produce(self.plan, name, known or {})
        for disk, tensor in self.plan.output.encode(name, value).items():
            self.writer.put(disk, tensor)
        self.record(name, [noted(row, note) for row in rows])
        return value

    def write_all(self, names: Sequence[str]) -> None:
        """Compress or copy parameters without statistics, those that can be in blocks of rows."""
        with row_blocks(self.plan, self.writer) as threads:
            for name, rows in threads.written(names):
                if rows is None:
                    self.write(name)
                else:
                    self.record(name, rows)

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
        total = sum(planned.dense.nbytes for planned in self.plan.output.parameters.values())
        self.progress(what, self.done, total)

    def rows(self) -> tuple[LayerRow, ...]:
        """Rows of all parameters that are done, in the output's order."""
        return tuple(LayerRow(**row) for name in self.plan.output.parameters for row in self.journal.done.get(name, ()))


def _produce(plan: Plan, name: str, known: Mapping[str, Known]) -> tuple[Weight | Tensor, list[LayerRow]]:
    """One parameter of the output, and a row for each of its layers."""
    checkpoint, planned = plan.checkpoint, plan.output.parameters[name]
    layers = plan.by_tensor.get(name, [])
    jobs = [layer for layer in layers if layer.config is not None]
    value: Weight | Tensor
    if jobs:
        value, rows = compress_parameter(plan, name, jobs, known)
    else:
        rows = []
        value = checkpoint.weight(name) if name in checkpoint.manifest.entries else checkpoint.read(name)
        for tensor in [value] if isinstance(value, Tensor) else value.tensors().values():
            require_finite(tensor, name, checkpoint.path)
    if isinstance(value, Dense):
        assert planned.info is not None
        value = from_matrix(value.matrix, planned.dense.shape, planned.info.transposed).to(planned.dense.dtype)
    return value, rows + [idle_row(layer) for layer in layers if layer.config is None]
