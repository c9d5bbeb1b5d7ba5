"""Corrections of a compressed model's norms and biases in closed form, one layer after another.

A layer's bias takes up the mean of what its output has lost: b += E[W x] - E[W' x'], with the compressed model's own
inputs x' behind layers that are corrected (Nagel et al. 2019, arXiv:1906.04721, section 4.2, with measured means). Gain
and shift of a norm give every channel the spread and the mean that the original's has; a gain of least squared distance
would shrink what is noisy, which makes the outputs of the whole worse. The statistics of a batch norm are those of what
it is given now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.model.blocks.paused_forward import Arrivals, Runs, run_side_by_side

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Pair:
    """A layer that is corrected, and the original's of the same name.

    Attributes:
        student, teacher: the two.
        moves: the student's own norms, biases and statistics, by their names in the layer.
        channels: the axis of channels in what it gives.
    """

    student: nn.Module
    teacher: nn.Module
    moves: Mapping[str, Tensor]
    channels: int


def pairs(student: nn.Module, teacher: nn.Module, moved: Mapping[str, Tensor]) -> list[Pair]:
    """The layers that have one of the given parameters or buffers, in the student's order.

    Args:
        student, teacher: of one architecture.
        moved: norms, biases and statistics, by their names in the student.
    """
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in moved.items():
        layer, _, leaf = name.rpartition(".")
        by_layer.setdefault(layer, {})[leaf] = tensor
    modules = {name: (student.get_submodule(name), teacher.get_submodule(name)) for name in by_layer}
    return [Pair(own, its, by_layer[name], _axis(own)) for name, (own, its) in modules.items()]


def _axis(module: nn.Module) -> int:
    """Channels are the last axis of what linear layers and norms give, and the second of images."""
    of_images = isinstance(module, (*BATCH_NORMS, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm))
    return 1 if of_images else -1


@torch.no_grad()
def correct(layers: Sequence[Pair], runs: Sequence[Runs], masks: Sequence[Tensor | None]) -> None:
    """Run student and teacher over all batches, and correct every layer of the student when all have come to it.

    Args:
        layers: in the order of the modules of `runs`.
        runs: of the student and of the teacher.
        masks: real tokens of every batch, (batch, tokens); None where all are.
    """
    corrected: set[int] = set()

    def visit(place: int, arrived: list[Arrivals]) -> list[dict[int, Any]]:
        pair, (own, original) = layers[place], arrived
        wanted = {number: _given(pair.teacher, arrival) for number, arrival in original.items()}
        if place not in corrected and own.keys() == original.keys():  # one that runs again is corrected once
            _correct(pair, own, wanted, masks)
            corrected.add(place)
        return [{number: _given(pair.student, arrival) for number, arrival in own.items()}, wanted]

    run_side_by_side(runs, visit)


def _given(module: nn.Module, arrival: Any) -> Tensor:
    output: Tensor = module(*arrival.args, **arrival.kwargs)
    return output


def _correct(pair: Pair, own: Arrivals, wanted: Mapping[int, Tensor], masks: Sequence[Tensor | None]) -> None:
    """Correct one layer by all batches."""
    if isinstance(pair.student, BATCH_NORMS):
        _estimate(pair, [arrival.args[0] for arrival in own.values()])
        return
    if not all(isinstance(output, Tensor) for output in wanted.values()):
        return  # a router gives its choice beside the weights of it, and has no mean to be kept
    weight, bias = pair.moves.get("weight"), pair.moves.get("bias")
    targets = [_rows(output, pair.channels, masks[number]) for number, output in wanted.items()]
    if weight is None and bias is not None:
        given = [_rows(_given(pair.student, own[number]), pair.channels, masks[number]) for number in wanted]
        bias.add_((_sum(targets) - _sum(given)).to(bias.dtype) / sum(map(len, targets)))
    elif weight is not None and targets[0].shape[1] == len(weight):
        _fit(
            weight,
            bias,
            [(_Response.of(pair, own[n], masks[n]), t) for n, t in zip(wanted, targets, strict=True)],
        )


@dataclass(frozen=True)
class _Response:
    """What a norm gives without gain and shift, and what a gain of 1 adds to it; (rows, channels) each."""

    still: Tensor
    slope: Tensor

    @classmethod
    def of(cls, pair: Pair, arrival: Any, mask: Tensor | None) -> _Response:
        """Run the norm with gains of 0 and 1: some multiply by 1 + gain."""
        saved = {name: tensor.clone() for name, tensor in pair.moves.items()}
        outputs = []
        for gain in (0.0, 1.0):
            for name, tensor in pair.moves.items():
                if name in ("weight", "bias"):
                    tensor.fill_(gain if name == "weight" else 0.0)
            outputs.append(_rows(_given(pair.student, arrival), pair.channels, mask))
        for name, tensor in pair.moves.items():
            tensor.copy_(saved[name])
        return cls(outputs[0], outputs[1] - outputs[0])


def _fit(weight: Tensor, bias: Tensor | None, given: Sequence[tuple[_Response, Tensor]]) -> None:
    """Gain and shift that give every channel the original's spread and mean; without a shift, its mean square."""
    count = sum(len(target) for _, target in given)
    lost = [target - response.still for response, target in given]
    slopes = [response.slope for response, _ in given]
    mean, offset = (_sum(each) / count if bias is not None else torch.zeros(()) for each in (slopes, lost))
    own, original = (
        _sum([(each - middle).square() for each in parts]) for parts, middle in ((slopes, mean), (lost, offset))
    )
    known = own > 1e-12 * count  # a channel that never changes keeps its gain
    spread = torch.where(known, (original / own.clamp(min=1e-30)).sqrt() * weight.sign(), weight.double())
    weight.copy_(spread)
    if bias is not None:
        bias.copy_(offset - spread * mean)


def _estimate(pair: Pair, inputs: Sequence[Tensor]) -> None:
    """Mean and unbiased variance of what a batch norm is given."""
    rows = [_rows(each, 1, None) for each in inputs]
    count = sum(map(len, rows))
    mean = _sum(rows) / count
    pair.moves["running_mean"].copy_(mean)
    pair.moves["running_var"].copy_(_sum([(each - mean).square() for each in rows]) / max(1, count - 1))


def _rows(values: Tensor, channels: int, mask: Tensor | None) -> Tensor:
    """Values (rows, channels) in float64, without those of padding."""
    if mask is not None and values.shape[: mask.ndim] == mask.shape:
        values = values[mask]
    return values.movedim(channels, -1).flatten(0, -2).double()


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """(channels,) sum of the rows of all parts."""
    return torch.stack([part.sum(dim=0) for part in parts]).sum(dim=0)
