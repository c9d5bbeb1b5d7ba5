"""Files of statistics that are given to a step, against the layers that it compresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from aicompress.checkpoint.statistics import StatisticsFile
from aicompress.errors import CompressError, Refused
from aicompress.layer import LayerInfo
from aicompress.methods.method import OF_GRADIENTS, OF_TRAINING
from aicompress.statistics import column_statistics


def lacking(path: Path, chosen: Sequence[LayerInfo], needs: frozenset[str]) -> list[CompressError]:
    """Layers that a file does not know, or knows otherwise.

    Args:
        path: of a file of statistics.
        chosen: layers that are compressed.
        needs: statistics that are read of them.
    """
    try:
        file = StatisticsFile.open(path)
    except CompressError as error:
        return [error]
    if needs & OF_TRAINING:
        return _unmoved(file, chosen)
    by_tensor = _by_tensor(chosen)
    problems: list[CompressError] = []
    absent = [tensor for tensor in by_tensor if tensor not in file.layers]
    if absent:
        shown = f"{absent[0]} and {len(absent) - 1} more" if len(absent) > 1 else absent[0]
        problems.append(Refused(f"{path} holds no statistics of {shown}", "collect them from this checkpoint"))
    for tensor, infos in by_tensor.items():
        problems += _unlike(file, tensor, infos, needs)
    return problems[:5]


def _by_tensor(chosen: Sequence[LayerInfo]) -> dict[str, list[LayerInfo]]:
    """Layers by the name that their statistics have: a parameter's, or that of one of the experts in it."""
    by_tensor: dict[str, list[LayerInfo]] = {}
    for info in chosen:
        if info.experts is None:
            by_tensor.setdefault(info.tensor, []).append(info)
            continue
        experts = [info.of_expert(number) for number in range(info.experts.count)]
        by_tensor |= {f"{info.tensor}.{number}": [own] for number, own in enumerate(experts)}
    return by_tensor


def _unlike(
    file: StatisticsFile, tensor: str, infos: Sequence[LayerInfo], needs: frozenset[str]
) -> list[CompressError]:
    """Statistics of one parameter that are of other shapes than it, or not there."""
    specs = file.specs(tensor) if tensor in file.layers else {}
    problems: list[CompressError] = []
    rows = specs.pop("frequency", None)
    if rows is not None and rows.shape != infos[0].shape[:1]:
        message = f"{file.path}: {tensor} has {infos[0].shape[0]} rows, its statistics have {rows.shape[0]}"
        problems.append(Refused(message, "collect them from this checkpoint"))
    inner = [info for info in infos if info.part != "out"]
    widths = {spec.shape[-1] for spec in specs.values()}
    if inner and widths and widths != {inner[0].shape[1]}:
        message = f"{file.path}: {tensor} has {inner[0].shape[1]} inputs, its statistics have {min(widths)}"
        problems.append(Refused(message, "collect them from this checkpoint"))
    held = (
        [name for name, statistic in column_statistics().items() if statistic.of_gram is not None]
        if "gram" in specs
        else []
    )
    known = {*specs, *held, "frequency"} | OF_GRADIENTS  # of embeddings alone
    absent = needs - known if specs else frozenset()
    if needs & OF_GRADIENTS:
        absent |= _ungraded(file, infos, needs)
    if absent:
        problems.append(Refused(f"{file.path}: no {min(absent)} of {tensor}", "collect the file for this method"))
    return problems


def _unmoved(file: StatisticsFile, infos: Sequence[LayerInfo]) -> list[CompressError]:
    """Layers whose movement a file lacks, or has of another shape."""
    specs = {info.name: file.movement_spec(info.name) for info in infos}
    absent = [info.name for info in infos if (spec := specs[info.name]) is None or spec.shape != info.shape]
    if not absent:
        return []
    shown = f"{absent[0]} and {len(absent) - 1} more" if len(absent) > 1 else absent[0]
    return [Refused(f"{file.path} holds no movement of {shown}", "exclude what was not trained as a plain matrix")]


def _ungraded(file: StatisticsFile, infos: Sequence[LayerInfo], needs: frozenset[str]) -> frozenset[str]:
    """What a file lacks of a layer's gradients, or has of another shape."""
    shapes = [spec.shape for info in infos if (spec := file.gradient_spec(info.name)) is not None]
    if shapes != [info.shape for info in infos]:
        return needs & OF_GRADIENTS
    return (needs & OF_GRADIENTS) - {"gradients"} if not file.has_output_grams else frozenset()


def foreign(files: Sequence[StatisticsFile], inputs: Mapping[str, str]) -> list[str]:
    """A warning for each file of statistics of another checkpoint."""
    mine = set(inputs.values())
    return [
        f"{file.path} was collected from another checkpoint: its statistics fit the layers, maybe not their inputs"
        for file in files
        if set(file.inputs.values()) != mine
    ]
