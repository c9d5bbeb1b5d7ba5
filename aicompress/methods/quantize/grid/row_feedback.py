"""Round a matrix block of rows by block of rows, and move each block's error into the rows that are still to come.

The error of a factor is multiplied by the other one, so that errors E of its rows count together, by tr(P E Eᵀ) with a
matrix P over the rows. Given the error E_B of some rows, that of the others R adds least where they move by
−P_RR⁻¹ P_RB E_B: the feedback between columns of GPTQ (arXiv:2210.17323, equation 3), between rows. Beside a method
that moves errors between columns it makes feedback from both sides (YAQA, Tseng et al. 2025, arXiv:2505.22988).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from aicompress.layer import Layer, LayerInfo
from aicompress.methods.curvature import inverse_factor
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.span_metric import MatrixFeedback, SpanFeedback, SpanMetric
from aicompress.weights import Dense, Weight
from aicompress.weights.form import restore

ROWS = 8  # of a block are a multiple
BLOCKS = 16  # of a matrix, by itself
DAMPING = 1e-4  # added to P, as a part of its mean diagonal


def rounded_by_rows(
    layer: Layer, metric: Tensor | SpanMetric, method: AnyLayerMethod, config: MethodConfig, most: int = BLOCKS
) -> Weight:
    """Compress a layer whose rows' errors count together.

    Args:
        layer: the layer.
        metric: P, (out, out), positive semi-definite, or the span that it leaves out.
        method: compresses it.
        config: the method's parameters.
        most: blocks at most.

    Returns:
        The weight; of a form whose rows have something in common, such as one scale, without feedback.
    """
    known = layer.gradients is not None or layer.movement is not None
    if method.two_sided is not None and not known:
        weight = method.two_sided.compress(layer, metric if isinstance(metric, Tensor) else metric.matrix(), config)
        if weight is not None:
            return weight
    blocks = [slice(0, layer.info.shape[0])] if known else blocks_of(layer.info, method, config, most)
    if len(blocks) == 1:
        return method.apply(layer, config)
    feedback: MatrixFeedback | SpanFeedback
    if isinstance(metric, Tensor):
        feedback = MatrixFeedback(layer.weight.double(), inverse_factor(metric, DAMPING)[0])
    else:
        feedback = SpanFeedback(layer.weight, metric, DAMPING)
    compressed, parts = method.prepared(layer, config), list[Weight]()
    for rows in blocks:
        wanted = feedback.wanted(rows).float()
        part = replace(layer, info=_part(layer.info, rows), weight=wanted, stored=Dense(wanted.to(layer.info.dtype)))
        parts.append(compressed(part))
        feedback.note(rows, parts[-1].dense().double() - wanted)
    tensors = [part.tensors() for part in parts]
    joined = {suffix: torch.cat([each[suffix] for each in tensors]) for suffix in tensors[0]}
    return restore(joined, method.outline(layer.info, config).meta())


def blocks_of(info: LayerInfo, method: AnyLayerMethod, config: MethodConfig, most: int = BLOCKS) -> list[slice]:
    """Blocks of rows that a method's weight can be put together of: zero points of some rows may share a word."""
    count = info.shape[0]
    for least in (ROWS, 4 * ROWS):
        each = -(-count // (most * least)) * least
        blocks = [slice(start, end) for start, end in pairwise([*range(0, count, each), count])]
        if _rows_apart(info, blocks, method, config):
            return blocks
    return [slice(0, count)]


def _part(info: LayerInfo, rows: slice) -> LayerInfo:
    """Some rows of a layer, as those of a layer."""
    shape = (rows.stop - rows.start, info.shape[1])
    return replace(info, shape=shape, tensor_shape=shape)


def _rows_apart(info: LayerInfo, blocks: Sequence[slice], method: AnyLayerMethod, config: MethodConfig) -> bool:
    """Whether the tensors of a layer's weight are those of its blocks of rows, one below the other."""
    whole, total = method.outline(info, config).specs(), info.shape[0]
    for rows in (blocks[0], blocks[-1]):
        part, count = method.outline(_part(info, rows), config).specs(), rows.stop - rows.start
        if part.keys() != whole.keys():
            return False
        for suffix, spec in whole.items():
            own = part[suffix]
            if not spec.shape or own.shape[1:] != spec.shape[1:] or own.shape[0] * total != spec.shape[0] * count:
                return False
    return True
