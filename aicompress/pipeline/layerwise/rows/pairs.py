"""Two plain factors that are rounded together without data: the outer one in blocks of rows, then the inner one.

The outer factor U (out, rank) is read three times, for R of its QR decomposition, for the Gram matrix of its rows as
they are turned, and to be rounded; what rows tell the others, and the inner factor, are matrices (rank, rank). The
inner factor is held, with copies to work on. The arithmetic is `methods/factors.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from aicompress.checkpoint import CheckpointWriter
from aicompress.layer import Layer
from aicompress.measure import relative
from aicompress.methods.factorize.decomposition import add_gram
from aicompress.methods.factors import KEPT, FactorMoments, like, to_span, triangle, turns
from aicompress.methods.quantize.grid.row_feedback import DAMPING, blocks_of, rounded_by_rows
from aicompress.methods.span_metric import SpanMoves
from aicompress.pipeline.layerwise.compress import INNER, Compressed, Compression
from aicompress.pipeline.layerwise.report_rows import (
    COARSE_NOTE,
    ROTATED_NOTE,
    TURNED_NOTE,
    changed_row,
    is_coarse,
    noted,
)
from aicompress.pipeline.layerwise.rows import reading
from aicompress.pipeline.layerwise.rows.parts import encoded
from aicompress.pipeline.step.layer_plan import LayerPlan, layer_seed
from aicompress.pipeline.step.output import Output
from aicompress.report.model import LayerRow
from aicompress.weights import Dense, Weight


def written(
    compression: Compression, name: str, layers: Sequence[LayerPlan], output: Output, writer: CheckpointWriter
) -> list[LayerRow] | None:
    """Compress and write both factors of a parameter; None of any other parameter.

    Args:
        compression: of the step.
        name: the parameter.
        layers: its layers.
        output, writer: where they go.
    """
    jobs = reading.pair(compression, name, layers)
    if jobs is None:
        return None

    def put(part: str, weight: Weight, start: int, total: int) -> None:
        for disk, tensor in encoded(output, name, weight, part).items():
            writer.put_rows(disk, tensor, start, total)

    outer, inner = jobs
    assert inner.config is not None
    factor, all_of_it = _Outer(compression, outer, put), slice(0, inner.info.shape[0])
    columns = _columns(reading.read(compression, inner, all_of_it).weight)
    out_turn, in_turn = turns(
        factor.triangle(), triangle(piece.t() for piece in columns), layer_seed(compression.seed, name)
    )
    del columns  # it is read again when the outer factor is written
    rounding, row = factor.rounded(out_turn)
    start = time.perf_counter()
    layer = _fitted(reading.read(compression, inner, all_of_it), in_turn, rounding.inner())
    layer = replace(layer, info=inner.info)  # which does not hold what was read
    weight = rounded_by_rows(layer, rounding.after, compression.method, inner.config, INNER)
    weight, own = compression.finished(inner, Compressed(layer, weight, time.perf_counter() - start))
    put("in", weight, 0, inner.info.shape[0])
    return [noted(each, TURNED_NOTE) for each in (own, row)]


def _columns(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """Some columns at a time, that are worked on in float64."""
    return torch.split(weight, max(1, reading.BLOCK // 4 // len(weight)), dim=1)


def _fitted(inner: Layer, turn: torch.Tensor, fit: torch.Tensor) -> Layer:
    """The inner factor, turned, and fitted to what the outer one has become."""
    assert inner.stored is not None
    (stored,) = inner.stored.tensors().values()
    fitted = torch.empty_like(stored)
    for piece, place in zip(_columns(inner.weight), _columns(fitted), strict=True):
        turned = (turn @ piece.double()).to(fitted.dtype)
        place.copy_(fit @ turned.double())
    return replace(inner, weight=fitted.float(), stored=Dense(fitted))


@dataclass(frozen=True)
class _Outer:
    """The outer factor.

    Attributes:
        compression: of the step.
        job: its plan.
        put: (part, some rows of it, the first one, how many it has) -> they are written.
    """

    compression: Compression
    job: LayerPlan
    put: Callable[[str, Weight, int, int], None]

    def pieces(self) -> list[list[slice]]:
        """Rows that are read at a time, of each block of those that are rounded before the others move."""
        method, info, config = self.compression.method, self.job.info, self.job.config
        assert method.row_wise is not None
        assert config is not None
        multiple, most = method.row_wise.multiple(config), reading.BLOCK // 4  # in float64, several times
        return [
            [
                slice(block.start + rows.start, block.start + rows.stop)
                for rows in reading.blocks((block.stop - block.start, info.shape[1]), multiple, most)
            ]
            for block in blocks_of(info, method, config)
        ]

    def triangle(self) -> torch.Tensor:
        """R of its QR decomposition, (rank, rank) float64."""
        return triangle(self._read(rows).weight for rows in chain(*self.pieces()))

    def rounded(self, turn: torch.Tensor) -> tuple[FactorMoments, LayerRow]:
        """Round and write it, turned: what that tells the inner factor, and its row of the report."""
        method, job, (rows_in_all, rank) = self.compression.method, self.job, self.job.info.shape
        gram, coarse, start = torch.zeros_like(turn), False, time.perf_counter()
        for rows in chain(*self.pieces()):
            add_gram(gram, self._turned(rows, turn).weight.double())
        across = to_span(gram)
        feedback = SpanMoves(across.t() @ gram @ across, rows_in_all, rank, 1 - KEPT, DAMPING)
        rounding = FactorMoments(gram, torch.zeros_like(gram), torch.zeros_like(gram))
        for block in self.pieces():
            for rows in block:
                layer = self._turned(rows, turn)
                before = layer.weight.double()
                span = before @ across
                wanted = torch.addmm(before, span, feedback.moves).float()
                moved = replace(layer, weight=wanted, stored=Dense(wanted.to(job.info.dtype)))
                weight = method.stored(layer, method.apply(moved, job.config), job.outline)
                self.put("out", weight, rows.start, rows_in_all)
                after = weight.dense().double()
                feedback.note(span, after - wanted)
                rounding.across.addmm_(before.t(), after)
                add_gram(rounding.after, after)
                coarse |= is_coarse(weight)
            feedback.begin()
        assert job.outline is not None
        seconds = time.perf_counter() - start
        row = changed_row(method, job, job.outline, relative(*rounding.squares()), seconds)
        row = noted(row, ROTATED_NOTE) if method.rotates is not None else row
        return rounding, noted(row, COARSE_NOTE) if coarse else row

    def _read(self, rows: slice) -> Layer:
        return reading.read(self.compression, self.job, rows)

    def _turned(self, rows: slice, turn: torch.Tensor) -> Layer:
        layer = self._read(rows)
        assert layer.stored is not None
        weight = like(layer.weight.double() @ turn, layer.stored)
        return replace(layer, weight=weight.dense(), stored=weight)
