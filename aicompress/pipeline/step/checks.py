"""Checks of a step's input, output and disk space before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.place import require_apart, require_free, working_path
from aicompress.checkpoint.source import Source
from aicompress.errors import CheckpointError, CompressError, OutOfSpace, listed
from aicompress.layer import Kind
from aicompress.measure import directory_nbytes
from aicompress.model.architecture.shapes import misfits
from aicompress.model.loading.definitions.parameter_kinds import layer_kinds
from aicompress.model.loading.fitting import misfit_warnings
from aicompress.pipeline.step.output import Destination, Output
from aicompress.report import gates
from aicompress.weights import TensorSpec

_NO_ARCHITECTURE = "config.json names no architecture"


def known_kinds(checkpoint: Checkpoint) -> tuple[Mapping[str, Kind | None] | None, list[str]]:
    """Kinds of layers from the model definition, and warnings of what it and the checkpoint do not share."""
    if checkpoint.config is None:
        return None, []
    kinds = layer_kinds(checkpoint.config, checkpoint.parameters())
    if kinds is None:
        named = (checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")])[0]
        what = f"transformers does not know the architecture {named!r}" if named else _NO_ARCHITECTURE
        return None, [f"{what}: layers are told by name and shape"]
    names = [name for name in checkpoint.parameters() if name not in checkpoint.foreign.cache_scales]
    return kinds, misfit_warnings(checkpoint.config, names)


def left_out(checkpoint: Checkpoint, destination: Destination | None = None) -> list[str]:
    """Warnings that name what of the input is not taken along: files, and what quantized weights lose.

    Args:
        destination: where the output goes; one file has no room for config.json and what lies beside it.
    """
    if destination is not None and destination.single and checkpoint.config is not None:
        lost = "OUT is one file: config.json and tokenizer are not taken along, and it loads as tensors alone"
        return [lost, *_decoded(checkpoint)]
    kept, told = checkpoint.source.part_weights, files_left_out(checkpoint.source)
    if kept:
        told.append(f"kept as they are, since sentence-transformers reads plain tensors there: {listed(kept, 5)}")
    return told + _decoded(checkpoint)


def files_left_out(source: Source) -> list[str]:
    """Warnings that name files of an input which are not taken along."""
    kinds = {"not taken along": source.left_out, "links out of the folder, left out": source.outside}
    return [f"{why}: {listed(files, 5)}" for why, files in kinds.items() if files]


def _decoded(checkpoint: Checkpoint) -> list[str]:
    """Warnings that name weights of another tool's layout that an output cannot hold as they are, and their riders."""
    foreign = checkpoint.foreign
    by_words: dict[str, list[str]] = {}
    for name in (name for name in foreign.decoded if foreign.weights[name].words):
        by_words.setdefault(foreign.weights[name].words, []).append(name)
    told = [*foreign.told] + [
        f"weights stored as {words} are decoded to {str(foreign.weights[names[0]].dense.dtype).removeprefix('torch.')} "
        f"as they are read: {len(names)}, {names[0]} for one"
        for words, names in by_words.items()
    ]
    if foreign.riders:
        told.append(
            f"scales of rounded inputs and outputs are left out, since no layer of the output rounds by them: "
            f"{len(foreign.riders)}, {foreign.riders[0]} for one"
        )
    if foreign.cache_scales:
        told.append(
            "scales of the key-value cache come along, for readers that round it, which aicompress.load does not: "
            f"{len(foreign.cache_scales)}, {foreign.cache_scales[0]} for one"
        )
    if foreign.rounds_inputs:
        told.append("the input says that layers round their inputs too: only weights are stored rounded")
    return told


def problem_of(check: Callable[[], object]) -> list[CompressError]:
    """The error that a check raises, in a list; an empty one where it raises none."""
    try:
        check()
    except CompressError as error:
        return [error]
    return []


_LOADING = dict.fromkeys(
    (f"{side}.{name}" for side in ("before", "after") for name in gates.LOADING),
    "`aicompress eval` measures it",
)
NOT_OF_CUTTING_TOKENS = {
    "quality": "`aicompress eval OUT --against IN` measures it, with gates of its own",
    "training": "only `aicompress distill` trains",
    **_LOADING,
}
NOT_OF_A_STEP = {**NOT_OF_CUTTING_TOKENS, gates.TOKENS: "only `aicompress prune` by `vocabulary` counts tokens"}
NOT_OF_TRAINING = {name: hint for name, hint in NOT_OF_A_STEP.items() if name != "training"}


def place_problems(
    inputs: Sequence[Checkpoint],
    destination: Destination,
    conditions: Sequence[str],
    absent: Mapping[str, str] = NOT_OF_A_STEP,
) -> list[CompressError]:
    """Errors in the place of the output and in its gates: `absent` is what they cannot ask for."""
    problems = taken([checkpoint.source for checkpoint in inputs], destination)
    return problems + problem_of(lambda: gates.require_measured(conditions, absent))


def taken(inputs: Sequence[Source], destination: Destination) -> list[CompressError]:
    """Errors in the place of the output: it lies in an input, or something is there."""
    problems = [
        problem for source in inputs for problem in problem_of(partial(require_apart, source, destination.path))
    ]
    # The input itself is nothing to overwrite: no more is said of it.
    return problems or problem_of(lambda: require_free(destination.path, destination.overwrite))


def decoding(names: Sequence[str]) -> list[str]:
    """A warning when compressed parameters of the input become plain tensors of the output."""
    if not names:
        return []
    return [
        f"{len(names)} compressed parameters cannot be cut in the form they have and are decoded, "
        f"{names[0]} for one: prune first, then quantize or sparsify"
    ]


def require_loads(
    checkpoint: Checkpoint,
    config: Mapping[str, Any] | None,
    specs: Mapping[str, TensorSpec],
    widths: Mapping[str, object],
) -> None:
    """Let transformers load the planned output without data: no parameter is missing or of another shape.

    Args:
        checkpoint: the input; what does not fit there is not held against the output.
        config: the output's config.json; nothing is checked without one.
        specs: the output's parameters, dense.
        widths: modules whose shapes config.json does not give.

    Raises:
        CheckpointError: a parameter does not fit.
    """
    if config is None or checkpoint.config is None:
        return
    known = tuple(f"{path}.{leaf} has shape" for path in widths for leaf in ("weight", "bias"))
    new = sorted(misfit for misfit in misfits(config, specs) if not misfit.startswith(known))
    if new:  # the input is asked only then: it costs as much again
        old = misfits(checkpoint.config, checkpoint.parameters())
        new = [misfit for misfit in new if misfit not in old]
    if new:
        raise CheckpointError(
            f"the pruned checkpoint would not load: {new[0]}"
            + (f", and {len(new) - 1} more like it" if new[1:] else ""),
            "this architecture cannot be pruned this way, or not as far: prune less of it, or something else",
        )


def require_space(output: Output) -> None:
    """Refuse an output that does not fit the disk."""
    require_room(output.destination.path, output.weight_bytes + output.other_bytes)


def require_room(path: Path, nbytes: int) -> None:
    """Refuse an output that does not fit the disk, with a little to spare for the report.

    Raises:
        OutOfSpace: it does not.
    """
    needed, (folder, free) = nbytes + 1_000_000, room_for(path)
    if needed > free:
        raise OutOfSpace(
            f"the output takes {needed:,} bytes and {folder} has {free:,} free", "free space, or write elsewhere"
        )


def room_for(path: Path) -> tuple[Path, int]:
    """The folder that is there already, and bytes that are free in it, with those that a stopped run holds."""
    work = working_path(path)
    folder = next(parent for parent in work.parents if parent.exists())
    return folder, shutil.disk_usage(folder).free + (directory_nbytes(work) if work.exists() else 0)
