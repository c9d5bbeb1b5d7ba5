"""A checkpoint of which some compressed parameters are read as plain ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

from aicompress.checkpoint.foreign.layout import ForeignWeight
from aicompress.checkpoint.reader import Checkpoint


def with_decoded(checkpoint: Checkpoint, parameters: Collection[str]) -> Checkpoint:
    """The view in which these parameters, compressed in whatever form, are decoded as they are read."""
    entries = checkpoint.manifest.entries
    wanted = [*parameters, *checkpoint.manifest.borrowers(parameters)]  # what is decoded lends nothing
    weights = {name: _decoded(checkpoint, name) for name in wanted if name in entries}
    if not weights:
        return checkpoint
    foreign = checkpoint.foreign
    names = {name for weight in weights.values() for name in (*weight.names.values(), *weight.extra.values())}
    refs = {**foreign.refs, **{name: checkpoint.tensors[name] for name in names}}
    foreign = replace(foreign, weights={**foreign.weights, **weights}, refs=refs, path=checkpoint.path)
    left = {name: entry for name, entry in entries.items() if name not in weights}
    manifest = replace(checkpoint.manifest, entries=left)
    return replace(checkpoint, tensors=foreign.shown(checkpoint.tensors), manifest=manifest, foreign=foreign)


def _decoded(checkpoint: Checkpoint, parameter: str) -> ForeignWeight:
    """A parameter without the form that a step would keep it in."""
    if checkpoint.foreign.is_kept(parameter):
        return replace(checkpoint.foreign.weights[parameter], outline=None)
    entry = checkpoint.manifest.entries[parameter]
    names = {name: name for name in checkpoint.own_names(parameter).values()}
    shared = {name: name for name in entry.shared.values()}
    words, decode = str(entry.meta["form"]), partial(checkpoint.restored, parameter, entry)
    return ForeignWeight(entry.dense, names, words, decode, None, entry.transposed, shared)
