"""Parts of stored weights, such as factors, of which blocks of rows are written as those of whole weights are."""

from __future__ import annotations

from torch import Tensor

from aicompress.checkpoint import Checkpoint, CheckpointWriter
from aicompress.checkpoint.layouts import native_names
from aicompress.pipeline.step.output import Output
from aicompress.weights import Weight
from aicompress.weights.form import nest


def encoded(output: Output, name: str, value: Tensor | Weight, part: str = "") -> dict[str, Tensor]:
    """Tensors on disk of a block of rows, those that the parameter stores itself.

    Args:
        output: what is written.
        name: the parameter.
        value: what its rows are.
        part: of its weight, of which these are rows; '' for all of it.
    """
    if not part or isinstance(value, Tensor):
        return output.encode(name, value)
    tensors = nest(_prefix(part), value.tensors())
    names = native_names(name, tensors)
    return {names[suffix]: tensor for suffix, tensor in tensors.items() if names[suffix] in output.stored[name]}


def copy_what_is_no_part(checkpoint: Checkpoint, name: str, writer: CheckpointWriter) -> None:
    """Copy the tensors of a stored weight that belong to none of its parts: which rows and columns are kept."""
    outline, stored = checkpoint.in_parts(name)
    of_parts = {s for part, weight in outline.parts().items() for s in nest(_prefix(part), weight.specs())}
    for suffix, disk in native_names(name, sorted(stored.keys() - of_parts)).items():
        writer.put(disk, stored[suffix].read(None))


def _prefix(part: str) -> str:
    return "" if part == "out" else part
