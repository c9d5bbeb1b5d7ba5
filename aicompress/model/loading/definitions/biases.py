"""Leave out biases of zeros that a quantizing tool has given to layers that have none in their architecture."""

from __future__ import annotations

from dataclasses import replace

from aicompress.checkpoint import Checkpoint
from aicompress.model import hf
from aicompress.model.loading.definitions.definition import skeleton


def without_added_biases(checkpoint: Checkpoint) -> Checkpoint:
    """The view without biases beside another tool's weights that hold zeros, where the architecture has none."""
    weights = checkpoint.foreign.weights
    beside = [f"{name.removesuffix('.weight')}.bias" for name in weights]
    names = [name for name in beside if name in checkpoint.tensors]
    model = skeleton(checkpoint.config) if names and checkpoint.config is not None else None
    if model is None:
        return checkpoint
    known = set(model.state_dict())
    unknown = [name for name, (target, _) in hf.parameter_names(model, names).items() if target not in known]
    added = {name for name in unknown if not bool(checkpoint.read(name).any())}
    if not added:
        return checkpoint
    told = f"biases of zeros that the architecture does not have are left out: {len(added)}, {min(added)} for one"
    foreign = replace(checkpoint.foreign, told=(*checkpoint.foreign.told, told))
    tensors = {name: ref for name, ref in checkpoint.tensors.items() if name not in added}
    return replace(checkpoint, tensors=tensors, foreign=foreign)
