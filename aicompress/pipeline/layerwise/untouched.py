"""Say what a layer-wise step leaves as it is, and how much of the model that is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from aicompress.checkpoint import Checkpoint
from aicompress.errors import listed
from aicompress.layer import LayerInfo
from aicompress.methods.layerwise import AnyLayerMethod, LayerMethod
from aicompress.methods.method import OF_TRAINING
from aicompress.methods.registry import methods
from aicompress.pipeline.step.layer_plan import LayerPlan
from aicompress.report.model import Untouched
from aicompress.weights import TensorSpec

TOLD = 0.01  # share of the numbers from which on matrices that are no layer are warned of


def untouched(checkpoint: Checkpoint, layers: Sequence[LayerPlan]) -> Untouched:
    """The parameters that no method works on."""
    touched = {layer.info.tensor for layer in layers if layer.config is not None}
    numbers = {name: math.prod(spec.shape) for name, spec in checkpoint.parameters().items()}
    left = {name: count for name, count in numbers.items() if name not in touched}
    return Untouched(
        parameters=len(left),
        numbers=sum(left.values()),
        share=sum(left.values()) / max(1, sum(numbers.values())),
        bytes=sum(checkpoint.nbytes(name) for name in left),
        largest=tuple(sorted(left, key=lambda name: -left[name])[:3]),
    )


def passed_over(checkpoint: Checkpoint, infos: Sequence[LayerInfo]) -> list[str]:
    """A warning that names matrices which are no layer of any kind, where they are more than a trifle."""
    known = {info.tensor for info in infos}
    parameters = checkpoint.parameters()
    matrices = {name: spec for name, spec in parameters.items() if name not in known and _is_matrix(name, spec)}
    told = "are no layer of a kind that is compressed and stay as they are"
    return _shared(checkpoint, matrices, "matrices", told)


def refused_experts(
    checkpoint: Checkpoint,
    method: AnyLayerMethod,
    chosen: Sequence[LayerInfo],
    taken: Sequence[str],
    why: Mapping[str, str],
) -> list[str]:
    """A warning that names experts in one tensor which a method cannot take, says why, and which ones can.

    Args:
        checkpoint: the input.
        method: the step's.
        chosen: the selected layers.
        taken: names of those that are compressed.
        why: why some cannot be divided into their experts, by parameter.
    """
    left = {info.tensor for info in chosen if info.kind == "experts" and info.name not in taken}
    if not left:
        return []
    others = [name for name in _of_experts(method.command) if name != method.name]
    can = f"a step of {', '.join(others[:3])} or others can"
    reason = next((why[name] for name in sorted(left) if name in why), _why_not(method))
    told = f"stay as they are, for {reason}; {can}"
    return _shared(checkpoint, left, "tensors that hold all experts of a block", told, least=0.0)


def _why_not(method: AnyLayerMethod) -> str:
    """Why a method that acts on layers takes no experts in one tensor."""
    if method.couples is not None or method.shares is not None:
        return f"{method.name} compresses several layers together"
    if method.needs & OF_TRAINING:
        return f"{method.name} reads what a training run has recorded, and that is of single matrices"
    return f"{method.name}, as it is set, looks at what single layers do to the outputs"


def _of_experts(verb: str) -> list[str]:
    """Methods that take experts in one tensor, those without statistics first."""
    known = {
        name: each
        for name, each in methods(verb).items()
        if isinstance(each, LayerMethod) and not each.links and each.made_for == "layers"
    }
    return sorted(known, key=lambda name: (bool(known[name].needs), not known[name].stacks, name))


def unsuited(checkpoint: Checkpoint, method: AnyLayerMethod, chosen: Sequence[LayerInfo]) -> list[str]:
    """A warning that names selected layers which the method is not made for."""
    left = {info.tensor for info in chosen if not method.suits(info)}
    told = f"stay as they are, for {method.name} is made for {method.made_for}"
    return _shared(checkpoint, left, "selected layers", told, least=0.0)


def _is_matrix(name: str, spec: TensorSpec) -> bool:
    long = [size for size in spec.shape if size > 1]
    return spec.dtype.is_floating_point and len(long) > 1 and "bias" not in name.rpartition(".")[2]


def _shared(checkpoint: Checkpoint, names: Collection[str], what: str, told: str, least: float = TOLD) -> list[str]:
    """Names with their share of the model's numbers; nothing below a share."""
    numbers = {name: math.prod(spec.shape) for name, spec in checkpoint.parameters().items()}
    share = sum(numbers[name] for name in names) / max(1, sum(numbers.values()))
    if not names or share < least:
        return []
    largest = sorted(names, key=lambda name: -numbers[name])
    return [f"{len(names)} {what} {told} ({share:.1%} of the numbers): {listed(largest)}"]
