"""Merge an adapter into a checkpoint: its weights are decoded, and the adapter's product added, as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from aicompress.checkpoint.adapters.lora import Adapter, LoraFactors
from aicompress.checkpoint.foreign.layout import ForeignWeight, Read
from aicompress.checkpoint.naming import is_transposed
from aicompress.checkpoint.reader import Checkpoint
from aicompress.checkpoint.views.decoded import with_decoded
from aicompress.errors import CheckpointError, suggestion
from aicompress.layer import as_matrix
from aicompress.weights import Dense, TensorSpec, Weight


def with_adapter(
    checkpoint: Checkpoint, adapter: Adapter, tied: Mapping[str, str] = MappingProxyType({})
) -> Checkpoint:
    """The view of a checkpoint with an adapter merged into it.

    Args:
        checkpoint: what it is merged into.
        adapter: the adapter.
        tied: parameters that the checkpoint does not store -> the one that the model takes in their place. Where one
            alone is adapted, the others keep their numbers, and are parameters of their own.

    Raises:
        CheckpointError: the checkpoint lacks a layer of the adapter, or has it in another shape.
    """
    stored = checkpoint.parameters()
    known = {**stored, **{copy: stored[kept] for copy, kept in tied.items()}}
    number = len(checkpoint.foreign.beside) + 1
    targets = {_target(known, adapter, f"{module}.weight"): factors for module, factors in adapter.factors.items()}
    replaced = {_target(known, adapter, own, new=True): name for own, name in adapter.replaced.items()}
    if len(targets) + len(replaced) < len(adapter.factors) + len(adapter.replaced):
        raise CheckpointError(f"{adapter.source.path} adapts one layer under two names", "merge it with PEFT")
    adapted = {*targets, *replaced}
    apart = {
        copy: kept for copy, kept in tied.items() if copy in adapted or (kept in adapted and not adapter.keeps_ties)
    }
    checkpoint = with_decoded(checkpoint, [*adapted, *apart.values()])
    weights = dict(checkpoint.foreign.weights)
    plain = {name: checkpoint.tensors[name] for name in (*adapted, *apart.values()) if name in checkpoint.tensors}
    for copy, kept in apart.items():
        base = weights.get(kept) or _plain(kept, stored[kept], transposed=False)
        weights[copy] = replace(base, names={}, extra={**base.names, **base.extra})
    flipped = adapter.fan_in_fan_out and not any(is_transposed(name, checkpoint.config) for name in known)
    for parameter, name in replaced.items():
        spec, its = known.get(parameter, adapter.tensors[name].spec), adapter.tensors[name].spec
        if its.shape != spec.shape:
            raise _misfit(adapter, parameter, its.shape, spec.shape)
        own = weights[parameter].names if parameter in weights else {"weight": parameter} if parameter in stored else {}
        extra = {"replaced": f"adapter {number}: {name}"}
        flip = parameter in targets and is_transposed(parameter, checkpoint.config)
        along = {"replaced": int(flip)}
        weights[parameter] = ForeignWeight(spec, own, "", partial(_replaced, flip), None, flip, extra, along)
    for parameter, factors in targets.items():
        transposed = is_transposed(parameter, checkpoint.config) or (flipped and not factors.embedding)
        base = weights.get(parameter) or _plain(parameter, known[parameter], transposed)
        _require_fits(adapter, parameter, base, factors)
        weights[parameter] = _merged(base, adapter, factors, number)
    told = f"{adapter.source.path} is merged, weight {adapter.weight:g}: {len(targets)} layers"
    told += f", {len(replaced)} parameters replaced" if replaced else ""
    own_refs = {f"adapter {number}: {name}": ref for name, ref in adapter.tensors.items()}
    foreign = replace(
        checkpoint.foreign,
        weights=weights,
        refs={**plain, **own_refs, **checkpoint.foreign.refs},
        beside={**checkpoint.foreign.beside, f"adapter {number}, weight {adapter.weight:g}": adapter.source},
        merged=(*checkpoint.foreign.merged, told),
        path=checkpoint.path,
    )
    return replace(checkpoint, tensors=foreign.shown(checkpoint.tensors), foreign=foreign)


def _target(known: Mapping[str, TensorSpec], adapter: Adapter, name: str, new: bool = False) -> str:
    """The checkpoint's name of a parameter; a model's prefix may be missing in one of the two, or added.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    if name in known:
        return name
    ends = [own for own in known if own.endswith(f".{name}") or name.endswith(f".{own}")]
    if len(ends) == 1:
        return ends[0]
    if new and not ends:
        return name
    problem = "and the checkpoint has none of that name" if not ends else f"which may be {ends[0]} or {ends[1]}"
    raise CheckpointError(
        f"{adapter.source.path} adapts {name}, {problem}",
        f"is it the adapter's base model? {suggestion(name, list(known))}",
    )


def _plain(parameter: str, spec: TensorSpec, transposed: bool) -> ForeignWeight:
    """A plain parameter as a weight that is decoded."""

    def decode(read: Read) -> Dense:
        return Dense(as_matrix(read("weight"), transposed))

    along = {"weight": 1 if transposed else 0}
    return ForeignWeight(spec, {"weight": parameter}, "", decode, transposed=transposed, along=along)


def _require_fits(adapter: Adapter, parameter: str, base: ForeignWeight, factors: LoraFactors) -> None:
    """Refuse factors of another layer's shape.

    Raises:
        CheckpointError: they are.
    """
    a, b = adapter.tensors[factors.a].spec, adapter.tensors[factors.b].spec
    out, columns = b.shape[0], math.prod(a.shape[1:])
    shape = (columns, out) if factors.embedding else (out, columns)
    whole = base.dense.shape[::-1] if base.transposed else (base.dense.shape[0], math.prod(base.dense.shape[1:]))
    if shape != whole:
        raise _misfit(adapter, parameter, shape, whole)


def _misfit(adapter: Adapter, parameter: str, its: tuple[int, ...], base: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{adapter.source.path}: {parameter} is {list(its)}, and {list(base)} in the checkpoint",
        "give the adapter's own base model as IN, with as many tokens as it was trained with",
    )


def _merged(base: ForeignWeight, adapter: Adapter, factors: LoraFactors, number: int) -> ForeignWeight:
    """A weight with the product of an adapter's factors added."""
    roles = {f"{letter} of {number}": name for letter, name in (("a", factors.a), ("b", factors.b))}
    extra = {**base.extra, **{role: f"adapter {number}: {name}" for role, name in roles.items()}}
    scale = adapter.weight * factors.scale
    decode = partial(_added, base.decode, tuple(roles), scale, factors.embedding)
    factor = {f"a of {number}": 1} if factors.embedding else {f"b of {number}": 0}  # the one that has the rows
    along = None if base.along is None else {**base.along, **factor}
    return replace(base, decode=decode, extra=extra, outline=None, along=along)


def _added(
    decode: Callable[[Read], Weight], roles: tuple[str, ...], scale: float, embedding: bool, read: Read
) -> Dense:
    """W + scale * B A, in float32."""
    a, b = (read(role).float() for role in roles)
    product = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
    return Dense(decode(read).dense().add(product.t() if embedding else product, alpha=scale))


def _replaced(transposed: bool, read: Read) -> Dense:
    tensor = read("replaced")
    return Dense(as_matrix(tensor, transposed) if tensor.ndim else tensor.reshape(1, 1))
