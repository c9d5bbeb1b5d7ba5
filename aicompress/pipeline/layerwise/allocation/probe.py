"""The running model on which changes of weights are tried, and the part of the calibration data that it runs on."""

from __future__ import annotations

from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.loading.places import Divided, Slot
from aicompress.model.sensitivity.output_divergence import OutputSensitivity
from aicompress.pipeline.calibration.data import Inputs
from aicompress.recipe import Calibration

TOKENS = 1024  # that are measured on, where the recipe gives no number of samples
ARRAYS = 256  # samples of arrays
RESIDENT = 2 << 30  # bytes of parameters that are kept in memory; larger models are read block by block


def probe_of(checkpoint: Checkpoint, model: Any, inputs: Inputs) -> OutputSensitivity:
    """A checkpoint's outputs on these inputs, against which changes are compared.

    Args:
        checkpoint: gives the weights.
        model: on the meta device, and not used elsewhere.
        inputs: what it runs on.
    """
    loader = PartialModel(checkpoint, model)
    weights = (checkpoint.dense, lambda name: _path(loader.reader_of(name)))
    resident = sum(spec.nbytes for spec in checkpoint.parameters().values()) <= RESIDENT
    return OutputSensitivity(model, loader, weights, inputs.batches, resident)


def measured_part(data: Calibration, samples: int | None = None) -> Calibration:
    """The part of the calibration data that is measured on."""
    if data.kind == "arrays" and samples is None and data.samples is None:
        return data
    wanted = samples or (ARRAYS if data.kind == "arrays" else -(-TOKENS // data.length))
    return data.at_most(wanted)


def _path(place: str | Slot | Divided | None) -> str | None:
    return place.module if isinstance(place, Slot | Divided) else place
