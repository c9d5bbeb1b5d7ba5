"""Gradients of a matrix that the model divides among layers, put together from those of the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aicompress.layer import LayerInfo
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.moments import Watched
from aicompress.statistics import GradientStats

MOMENTS, OUTPUTS = "gradients", "output_gram"  # statistics: of gradients in weights, and in the layers' outputs


@dataclass(frozen=True)
class Joint:
    """A matrix, such as fused query, key and value, that lies in several layers of the running model.

    Attributes:
        name: of the checkpoint's layer.
        columns: of the matrix.
        parts: by what a layer's moments are called, the layer's path and the numbers of the rows that it has.
    """

    name: str
    columns: int
    parts: Mapping[str, tuple[str, Tensor]]

    def watched(self, needs: frozenset[str]) -> dict[str, Watched]:
        """What is to be watched of its layers."""
        wanted = OUTPUTS in needs, MOMENTS in needs
        return {
            part: Watched(path, (len(rows), self.columns), outputs=wanted[0], moments=wanted[1])
            for part, (path, rows) in self.parts.items()
        }

    def joined(self, moments: Mapping[str, GradientStats]) -> GradientStats:
        """Moments of the whole matrix; outputs of different layers count as independent of each other."""
        own = [(moments[part], rows) for part, (_, rows) in self.parts.items()]
        total = sum(len(rows) for _, rows in own)
        shape = (total, self.columns)
        mean = _placed(shape, [(stats.mean, rows, slice(None)) for stats, rows in own])
        square = _placed(shape, [(stats.square, rows, slice(None)) for stats, rows in own])
        gram = _placed((total, total), [(stats.output_gram, rows[:, None], rows) for stats, rows in own])
        return GradientStats(own[0][0].count, mean, square, gram)


def _placed(shape: tuple[int, int], parts: Iterable[tuple[Tensor | None, Tensor, Tensor | slice]]) -> Tensor | None:
    """A matrix of these parts at these rows and columns, zero elsewhere; None where a part is lacking."""
    whole = torch.zeros(shape)
    for part, rows, columns in parts:
        if part is None:
            return None
        whole[rows, columns] = part
    return whole


def joints_of(loader: PartialModel, infos: Iterable[LayerInfo]) -> list[Joint]:
    """The layers, none of them a factor, whose matrix the model divides."""
    joints: list[Joint] = []
    for info in infos:
        layers = {} if info.part else loader.rows_of_layers(info.tensor)
        parts = {f"{info.name}, {path}": (path, rows) for path, rows in layers.items()}
        joints += [Joint(info.name, info.tensor_shape[1], parts)] if parts else []
    return joints
