"""Find the layers that share an input, without reading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError


@dataclass(frozen=True)
class SharedInputs:
    """Layers grouped by their input.

    Attributes:
        checkpoint: the model's.
        tensors: parameters of the layers in question.
    """

    checkpoint: Checkpoint
    tensors: tuple[str, ...]

    @cached_property
    def leaders(self) -> Mapping[str, str]:
        """By parameter the first one of those that share its input; empty where no architecture says how they run."""
        if self.checkpoint.config is None:
            return {}
        from aicompress.model.equivalence.shared_inputs import shared_inputs
        from aicompress.model.loading.load import build
        from aicompress.model.loading.partial_model import PartialModel
        from aicompress.pipeline.step.models.running_model import example

        try:
            model = build(self.checkpoint)
            loader = PartialModel(self.checkpoint, model)
        except CompressError:
            return {}
        inputs = example(model, batch=1, length=8)
        places = {tensor: loader.reader_of(tensor) for tensor in self.tensors}
        if inputs is None or not isinstance(inputs[0], dict):
            return {}
        return shared_inputs(model, {name: place for name, place in places.items() if place is not None}, inputs[0])
