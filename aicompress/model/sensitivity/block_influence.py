"""Block influence: how much a block changes its input, 1 − E cos(x_in, x_out).

Men et al. 2024 (ShortGPT, arXiv:2403.03853, eq. 1). A block of little influence can be skipped. Blocks that are skipped
hand on what they are given, so that the others are measured as they would be without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aicompress.errors import CompressError
from aicompress.model.blocks.all_reduce import Team
from aicompress.model.blocks.find import Block, find_blocks
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.model.blocks.paused_forward import Arrival, gated
from aicompress.model.blocks.walk import Batch, prepare
from aicompress.model.loading.partial_model import PartialModel

RunBlock = Callable[[Block, Arrival, Batch], Any]


@dataclass(frozen=True)
class BlockRun:
    """What runs through which model.

    Attributes:
        model: on the meta device.
        loader: loads its parts.
        batches: keyword arguments of the model's forward; `attention_mask` marks real tokens.
        team: processes that run together, each with batches of its own.
    """

    model: Any
    loader: PartialModel
    batches: Sequence[Batch]
    team: Team

    def run(self, run_block: RunBlock) -> None:
        """Run all batches through the model, one block in memory at a time.

        Args:
            run_block: gives a block's outputs for one batch.
        """
        blocks = find_blocks(self.model)
        prepare(self.model)
        self.loader.load(lambda name: not any(block.owns(name) for block in blocks))
        with gated(
            [block.module for block in blocks], [partial(self.model, **each) for each in self.batches]
        ) as streams:
            with input_errors_refused():
                for stream in streams:
                    stream.start()
            while (arrival := streams[0].arrival) is not None:
                block = blocks[arrival.block]
                self.loader.load(block.owns)
                for stream, batch in zip(streams, self.batches, strict=True):
                    assert stream.arrival is not None
                    with torch.no_grad():
                        output = run_block(block, stream.arrival, batch)
                    stream.advance(output)
                self.loader.drop(block.owns)

    def influences(self, skipped: AbstractSet[str] = frozenset()) -> dict[str, float]:
        """Influence of every block that runs, by module path; those that are skipped have none.

        Raises:
            CompressError: no block is reached.
        """
        changes: dict[str, Tensor] = {}

        def run_block(block: Block, arrival: Arrival, batch: Batch) -> Any:
            given, output = _hidden_states(arrival), block.module(*arrival.args, **arrival.kwargs)
            if block.name in skipped:
                return given if isinstance(output, Tensor) else (given, *output[1:])
            first = output if isinstance(output, Tensor) else output[0]
            changes[block.name] = changes.get(block.name, 0) + _change(given, first, batch.get("attention_mask"))
            return output

        self.run(run_block)
        if not changes:
            raise CompressError("the model's forward pass never reaches its blocks", "check the calibration inputs")
        sums = {name: self.team.total(total) for name, total in changes.items()}
        return {name: float(total[0] / total[1]) for name, total in sums.items()}


def _hidden_states(arrival: Arrival) -> Tensor:
    """What a block is given to change: its first argument."""
    given = arrival.args[0] if arrival.args else arrival.kwargs.get("hidden_states")
    if not isinstance(given, Tensor):
        raise CompressError("a block is not given hidden states first", "its influence cannot be measured")
    return given


def _change(given: Tensor, output: Tensor, mask: Tensor | None) -> Tensor:
    """Σ 1 − cos over real tokens, and how many there are, (2,)."""
    change = 1 - functional.cosine_similarity(given.float(), output.float(), dim=-1)  # (batch, tokens)
    real = mask.bool() if mask is not None and mask.shape == change.shape else torch.ones_like(change, dtype=torch.bool)
    return torch.stack([change[real].double().sum(), real.sum().double()])
