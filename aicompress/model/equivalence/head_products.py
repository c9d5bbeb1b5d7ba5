"""Find the layers of an attention of which only products of heads count, by running blocks on random weights.

An invertible matrix goes into the rows of a value's heads, its inverse into the columns of the output that read them:
where the block's output stays, that is what they are. The same for queries and keys, first with any matrix, then with
one factor for each pair of rows that a rotary embedding may turn. A norm of queries or keys fails both, so that these
are not found. Nothing here knows an architecture: names and places are seen as the block runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.methods.head_products import HeadProduct
from aicompress.model.equivalence.scaling_groups import TOLERANCE, ChannelAxis
from aicompress.model.equivalence.search import each_kind, in_checkpoint, sources_of
from aicompress.model.equivalence.trace import Call, alike, changed, watched
from aicompress.model.loading.partial_model import PartialModel

PARTS = (1, 2, 4)  # a rotary embedding may turn all rows of a head, or the first half or quarter of them


@dataclass(frozen=True)
class HeadCounts:
    """How many heads an attention may have, as config.json counts them.

    Attributes:
        heads: of queries.
        groups: of keys and values.
        width: rows of a head.
    """

    heads: int
    groups: int
    width: int


def find_head_products(
    counts: Sequence[HeadCounts], model: Any, loader: PartialModel, batch: Mapping[str, Tensor]
) -> tuple[HeadProduct, ...]:
    """Products of heads in all blocks of a model, by names in its checkpoint.

    Args:
        counts: what its attentions may be like.
        model: on the meta device.
        loader: fills parts of it with float32 noise.
        batch: a few samples, as keyword arguments of its forward.

    Raises:
        Exception: whatever the model raises for such a batch.
    """
    sources = sources_of(loader)
    products: list[HeadProduct] = []
    for prefix, found in each_kind(model, loader, batch, partial(_of_block, counts)).named():
        for product in found:
            names = [_in_checkpoint(name, prefix, sources, loader) for name in (*product.members, *product.biases)]
            first, second, *biases = names
            if first and second and list(map(bool, biases)) == list(map(bool, product.biases)):
                products.append(replace(product, members=(first, second), biases=(biases[0], biases[1])))
    return tuple(products)


def _in_checkpoint(name: str, prefix: str, sources: Mapping[str, Sequence[str]], loader: PartialModel) -> str:
    """A block's parameter by its name in the checkpoint; empty where it is not one there."""
    named = in_checkpoint([ChannelAxis(name, 0)], prefix, sources, loader) if name else None
    return named[0].parameter if named is not None and len(named) == 1 else ""


def _of_block(counts: Sequence[HeadCounts], block: nn.Module, run: Callable[[], Any]) -> list[HeadProduct]:
    found: list[HeadProduct] = []
    for heads in counts:
        for product in _Trials(block, run, heads).products():
            if not {name for other in found for name in other.members} & set(product.members):
                found.append(product)
    return found


class _Trials:
    """Trials on one block.

    Args:
        block: in evaluation mode, with float32 random weights; they are changed on the way and restored.
        run: calls it on fixed inputs.
        heads: how its attention may be laid out.
    """

    def __init__(self, block: nn.Module, run: Callable[[], Any], heads: HeadCounts) -> None:
        self.block, self.run, self.heads = block, run, heads
        self.parameters = dict(block.named_parameters())
        self.generator = torch.Generator().manual_seed(0)
        self.first = watched(block, run)

    def products(self) -> Iterator[HeadProduct]:
        """Value and output of each attention, and the query and key before them."""
        calls = [call for call in self.first.calls if self.parameters[call.parameter].ndim == 2]
        for at, output in enumerate(calls):
            if output.given.shape[-1] != self.heads.heads * self.heads.width:
                continue
            value = next(
                (c for c in reversed(calls[:at]) if self._rows(c, self.heads.groups) and self._mixes(c, output)), None
            )
            if value is None:
                continue
            yield self._product("values", value, output)
            scores = self._scores([call for call in calls[:at] if call is not value])
            if scores is not None:
                yield scores

    def _product(self, kind: Any, first: Call, second: Call, units: tuple[tuple[int, ...], ...] = ()) -> HeadProduct:
        own = self.heads
        members, biases = (first.parameter, second.parameter), (first.bias or "", second.bias or "")
        return HeadProduct(kind, members, biases, own.heads, own.groups, own.width, units)

    def _rows(self, call: Call, heads: int) -> bool:
        """Whether a layer makes so many heads."""
        return self.parameters[call.parameter].shape[1 if call.transposed else 0] == heads * self.heads.width

    def _scores(self, calls: Sequence[Call]) -> HeadProduct | None:
        """The last query and key of these calls, with what has to stay together of a head."""
        queries = [call for call in reversed(calls) if self._rows(call, self.heads.heads)]
        keys = [call for call in reversed(calls) if self._rows(call, self.heads.groups)]
        pairs = [(query, key) for query in queries for key in keys if query is not key]
        for query, key in pairs:
            alone = self.heads.heads == self.heads.groups  # else biases of several heads ask for different bases
            free = alone or query.bias is None
            if free and self._turns(query, key, None) and self._is_key(key):
                return self._product("scores", query, key)
        for query, key in pairs:
            for units in self._layouts():
                if self._turns(query, key, units):
                    return self._product("scores", query, key, units)
        return None

    def _layouts(self) -> Iterator[tuple[tuple[int, ...], ...]]:
        """Rows that a rotary embedding may turn together: the halves of what it turns, or neighbours."""
        width = self.heads.width
        for part in PARTS:
            turned, rest = width // part, tuple((row,) for row in range(width // part, width))
            if turned % 2 == 0:
                yield (*((row, row + turned // 2) for row in range(turned // 2)), *rest)
                yield (*((row, row + 1) for row in range(0, turned, 2)), *rest)

    def _is_key(self, call: Call) -> bool:
        """Whether a constant in its outputs changes nothing, as softmax has it; true where it has no bias."""
        if call.bias is None:
            return True
        bias = self.parameters[call.bias]
        return self._stays({call.bias: bias + torch.randn(bias.shape, generator=self.generator)})

    def _mixes(self, value: Call, output: Call) -> bool:
        """Whether any basis of a value's heads will do."""
        mixing = self._matrices()
        back = torch.linalg.inv(mixing).repeat_interleave(self.heads.heads // self.heads.groups, dim=0)
        matrix = self._matrix(output)
        columns = matrix.view(matrix.shape[0], self.heads.heads, self.heads.width)
        new = torch.einsum("ohd,hde->ohe", columns, back).reshape(matrix.shape)
        mixed = self._mixed(value, mixing)
        return self._stays({**mixed, **self._as_stored(output, new)}) and not self._stays(mixed)

    def _turns(self, query: Call, key: Call, units: tuple[tuple[int, ...], ...] | None) -> bool:
        """Whether any basis of a query's and key's heads will do, or any size of these units."""
        mixing = self._matrices() if units is None else self._factors(units)
        back = torch.linalg.inv(mixing).transpose(1, 2)
        each = self.heads.heads // self.heads.groups
        mixed = self._mixed(query, back.repeat_interleave(each, dim=0))
        return self._stays({**mixed, **self._mixed(key, mixing)}) and not self._stays(mixed)

    def _matrices(self) -> Tensor:
        """(groups, width, width), each a product of a rotation and factors between 1/2 and 2."""
        shape = (self.heads.groups, self.heads.width, self.heads.width)
        rotations: Tensor = torch.linalg.qr(torch.randn(shape, generator=self.generator))[0]
        return rotations * self._steps()[:, None]

    def _steps(self) -> Tensor:
        return torch.exp2(2 * torch.rand(self.heads.groups, self.heads.width, generator=self.generator) - 1)

    def _factors(self, units: tuple[tuple[int, ...], ...]) -> Tensor:
        """(groups, width, width) diagonal, one factor for the rows of a unit."""
        steps = self._steps()
        for unit in units:
            steps[:, list(unit)] = steps[:, unit[0], None].clone()  # of one group it would be read from where it goes
        return torch.diag_embed(steps)

    def _mixed(self, call: Call, mixing: Tensor) -> dict[str, Tensor]:
        """A layer's parameters with the rows of each head mixed."""
        matrix, width = self._matrix(call), self.heads.width
        new = (mixing @ matrix.view(-1, width, matrix.shape[1])).reshape(matrix.shape)
        changed = self._as_stored(call, new)
        if call.bias is not None:
            changed[call.bias] = (mixing @ self.parameters[call.bias].view(-1, width, 1)).flatten()
        return changed

    def _matrix(self, call: Call) -> Tensor:
        """A layer's matrix (out, in)."""
        matrix = self.parameters[call.parameter].detach()
        return matrix.t().contiguous() if call.transposed else matrix

    def _as_stored(self, call: Call, matrix: Tensor) -> dict[str, Tensor]:
        return {call.parameter: matrix.t().contiguous() if call.transposed else matrix}

    def _stays(self, changes: Mapping[str, Tensor]) -> bool:
        """Whether the block's output stays with other parameters."""
        with changed(self.parameters, [(name, partial(_replaced, tensor)) for name, tensor in changes.items()]):
            output = watched(self.block, self.run).output
        return alike(output, self.first.output, TOLERANCE)


def _replaced(by: Tensor, tensor: Tensor) -> Tensor:
    return by
