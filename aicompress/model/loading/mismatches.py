"""Parameters that a model definition expects and a checkpoint lacks, has in another shape, or adds."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError
from aicompress.model import hf
from aicompress.model.loading.definitions.definition import skeleton
from aicompress.model.loading.fill import computed
from aicompress.model.loading.fitting import fitted


def require_fits(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose parameters are not those of the architecture that its config.json names.

    Raises:
        CheckpointError: one is missing, or of another shape or kind of numbers.
    """
    wrong = misfits_of(checkpoint)
    if wrong:
        more = f", and {len(wrong) - 1} more like it" if wrong[1:] else ""
        hint = "download or write the checkpoint again; `aicompress verify` lists all that is wrong"
        fit = fitted(checkpoint.config or {}, checkpoint.parameters())
        if (
            fit is not None and fit.unused and wrong[0].endswith("is missing")
        ):  # names of another version, or of another architecture
            named = type(fit.model).__name__
            more += f"; {named} has no place for {len(fit.unused)} that it holds, {fit.unused[0]} for one"
            hint = f"transformers, too, loads random numbers there: save it again so that its {named} loads whole"
        raise CheckpointError(f"{checkpoint.path}: {wrong[0]}{more}", hint)


def misfits_of(checkpoint: Checkpoint) -> list[str] | None:
    """What `mismatches` says of a checkpoint's parameters; None where nothing can be said."""
    if checkpoint.config is None:
        return None
    specs = checkpoint.parameters()
    shapes = {name: spec.shape for name, spec in specs.items()}
    whole = [name for name, spec in specs.items() if not spec.dtype.is_floating_point]
    return mismatches(checkpoint.config, shapes, checkpoint.manifest.widths, whole)


def mismatches(
    config: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    widths: Mapping[str, Mapping[str, int]] | None = None,
    integers: Collection[str] = (),
) -> list[str] | None:
    """Parameters that transformers would fill with random values or refuse, each with the reason.

    A tied parameter is there when any of those it is tied to is. Parameters that the architecture keeps merged, such as
    experts, are not judged. One that it computes may be missing, and a pooler, which no hidden state depends on. A step
    asks for the same several times.

    Args:
        config: config.json.
        shapes: shapes of the checkpoint's parameters by name.
        widths: of modules that are narrower than config.json says.
        integers: those of the parameters that hold no real numbers.

    Returns:
        None when transformers does not know the architecture.
    """
    asked = json.dumps(config), tuple(shapes.items()), json.dumps(widths), frozenset(integers)
    problems = _mismatches(*asked)
    return None if problems is None else list(problems)


@lru_cache(maxsize=16)
def _mismatches(
    described: str, parameters: tuple[tuple[str, tuple[int, ...]], ...], narrowed: str, integers: Collection[str]
) -> tuple[str, ...] | None:
    config, shapes, widths = json.loads(described), dict(parameters), json.loads(narrowed)
    fit = fitted(config, shapes)
    if fit is None:
        return None
    model = fit.model
    model.tie_weights()
    if widths:
        hf.fit_shapes(model, widths, shapes)
    targets = hf.parameter_names(model, shapes)
    merged = [pattern for _, merge in targets.values() if merge is not None for pattern in merge[1].target_patterns]
    present = {target: name for name, (target, merge) in targets.items() if merge is None}
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    made = computed(model, [name for name, _ in model.named_parameters()])
    problems: list[str] = []
    for wanted, parameter in model.named_parameters():
        source = next((present[name] for name in tied[id(parameter)] if name in present), None)
        if source is None:
            known = wanted in made or "pooler" in wanted.split(".") or any(pattern in wanted for pattern in merged)
            problems += [] if known else [f"{wanted} is missing"]
        elif tuple(parameter.shape) != shapes[source]:
            problems.append(f"{source} is {list(shapes[source])}, config.json says {list(parameter.shape)}")
        elif source in integers and parameter.is_floating_point():
            problems.append(f"{source} holds integers, the architecture has real numbers there")
    return tuple(problems)


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
