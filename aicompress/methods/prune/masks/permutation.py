"""N:M groups of inputs that need not be neighbours: an order of the columns in which N of every M keep more.

Pool and Yu 2021, "Channel permutations for N:M sparsity", section 4: columns of two groups are swapped where more score
is kept. Here the first order deals columns out by their total score, so that no group holds many of the best, and a
round of swaps looks at all pairs of a random matching of the groups at once. The weight is stored in its own order;
only its packed mask goes by the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.prune.masks.masks import parse_pattern
from aicompress.methods.prune.masks.sparsity import SparsityConfig, store
from aicompress.statistics import GradientStats
from aicompress.weights import Dense, Sparse, Weight

ROWS = 512  # of a larger matrix every so many-th is looked at
PIECE = 1 << 20  # scores that are regrouped at a time
ROUNDING = 1e-9  # share by which two sums of the same scores may differ

Blocks: TypeAlias = Sequence[Callable[[], Tensor]]

S = TypeVar("S", bound=SparsityConfig)


def kept_scores(scores: Blocks, orders: Sequence[Tensor], kept: int, size: int) -> list[float]:
    """What an N:M mask keeps of scores (rows, columns) in every order of the columns; reads blocks once."""
    total = torch.zeros(len(orders), dtype=torch.float64)
    for read in scores:
        block = read()
        for rows in torch.split(block, max(1, PIECE // block.shape[1])):
            for number, order in enumerate(orders):
                groups = rows[:, order].reshape(-1, size)
                total[number] += groups.topk(kept, dim=1).values.sum(dtype=torch.float64)
    return total.tolist()


def regrouped(scores: Blocks, rows: int, kept: int, size: int, rounds: int, seed: int) -> Tensor:
    """An order of the columns, (columns,) int64, in which an N:M mask keeps at least as much as in their own.

    Args:
        scores: functions that give blocks of rows of the scores (rows, columns), non-negative; each is called twice.
        rows: of all blocks.
        kept, size: N and M.
        rounds: of swaps.
        seed: of the matchings.
    """
    sample = _every(scores, -(-rows // ROWS))
    sample = sample / sample.mean().clamp_min(torch.finfo(torch.float32).tiny)
    draw = torch.Generator().manual_seed(seed)
    own = torch.arange(sample.shape[1])
    dealt = sample.sum(dim=0).argsort(descending=True, stable=True).reshape(size, -1).t().reshape(-1)
    orders = [own]
    for order in (own, dealt):
        groups = order.reshape(-1, size).clone()
        for _ in range(rounds if len(groups) > 1 else 0):
            _swap(groups, sample, kept, torch.randperm(len(groups), generator=draw))
        orders.append(groups.reshape(-1))
    best, *others = zip(kept_scores(scores, orders, kept, size), orders, strict=True)
    for each in others:
        best = each if each[0] > (1 + ROUNDING) * best[0] else best
    return best[1]


def _every(scores: Blocks, step: int) -> Tensor:
    """Every so many-th row, float32."""
    found, skipped = [], 0
    for read in scores:
        block = read()
        found.append(block[skipped::step].to(torch.float32, copy=True))  # a view would hold all of the block
        skipped = (skipped - len(block)) % step
    return torch.cat(found)


def _swap(groups: Tensor, scores: Tensor, kept: int, matching: Tensor) -> None:
    """The best swap of one column for another in every pair of groups, where it gains; in place, (groups, M)."""
    size, half = groups.shape[1], len(groups) // 2
    left, right = groups[matching[:half]], groups[matching[half : 2 * half]]  # (pairs, M)
    gains = torch.full((half, size * size), -torch.inf)
    before = _kept(scores, left, kept) + _kept(scores, right, kept)
    for one in range(size):
        for other in range(size):
            a, b = left.clone(), right.clone()
            a[:, one], b[:, other] = right[:, other], left[:, one]
            gains[:, one * size + other] = _kept(scores, a, kept) + _kept(scores, b, kept) - before
    best = gains.max(dim=1)
    for pair in (best.values > 1e-6 * before).nonzero().flatten().tolist():
        one, other = divmod(int(best.indices[pair]), size)
        a, b = matching[pair], matching[half + pair]
        groups[a, one], groups[b, other] = groups[b, other].clone(), groups[a, one].clone()


def _kept(scores: Tensor, groups: Tensor, kept: int) -> Tensor:
    """(pairs,) what N:M keeps of each group, over all rows."""
    return scores[:, groups].topk(kept, dim=2, sorted=False).values.sum(dim=(0, 2))


def permuting(
    apply: Callable[[Layer, S], Weight], scores: Callable[[Layer, S], Tensor]
) -> Callable[[Layer, S], Weight]:
    """A method that prunes in the best order of a layer's inputs where its config asks for one.

    Args:
        apply: the method in the columns' own order.
        scores: what the mask goes by.
    """

    def permuted(layer: Layer, config: S) -> Weight:
        if config.pattern is None or not config.permutation:
            return apply(layer, config)
        kept, size = parse_pattern(config.pattern)
        found = [lambda: scores(layer, config)]
        order = regrouped(found, layer.info.shape[0], kept, size, config.permutation, layer.seed)
        return pruned_in_order(apply, layer, config, order)

    return permuted


def pruned_in_order(apply: Callable[[Layer, S], Weight], layer: Layer, config: S, order: Tensor) -> Weight:
    """What a method gives for a layer with its columns in another order, stored in their own."""
    plain = config.model_copy(update={"permutation": 0, "store": "sparse"})
    pruned = apply(_in_order(layer, order), plain)
    assert isinstance(pruned, Sparse)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return store(layer, pruned.matrix()[:, back], pruned.mask[:, back], config, order)


def permuting_together(
    permuted: Callable[[Layer, S], Weight], together: Callable[[Sequence[Layer], S], list[Weight]]
) -> Callable[[Sequence[Layer], S], list[Weight]]:
    """A method for layers with the same inputs: each in its own best order where that is searched for, else together.

    Args:
        permuted: prunes one layer in the best order of its inputs.
        together: prunes layers in the columns' own order.
    """

    def batched(layers: Sequence[Layer], config: S) -> list[Weight]:
        return [permuted(layer, config) for layer in layers] if config.permutation else together(layers, config)

    return batched


def _in_order(layer: Layer, order: Tensor) -> Layer:
    """A layer with its inputs in another order."""
    shape = layer.info.shape
    info = replace(layer.info, tensor_shape=shape, transposed=False)
    stored = Dense(layer.stored.matrix[:, order].contiguous()) if isinstance(layer.stored, Dense) else None
    inputs = layer.inputs and layer.inputs.in_order(order)
    moments = layer.gradients and _gradients(layer.gradients, order)
    return replace(
        layer, info=info, weight=layer.weight[:, order].contiguous(), stored=stored, inputs=inputs, gradients=moments
    )


def _gradients(gradients: GradientStats, order: Tensor) -> GradientStats:
    moments = [None if matrix is None else matrix[:, order] for matrix in (gradients.mean, gradients.square)]
    return GradientStats(gradients.count, *moments)
