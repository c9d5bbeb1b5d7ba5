"""Importance of experts from their routing: frequency of use, and router-weighted output norm.

REAP (Lasby et al. 2025, arXiv:2510.13999, eq. 8): the mean over the tokens routed to an expert of g ‖f(x)‖, the gate
value g of the chosen experts made to sum to one. Experts are modules that are called with hidden states, the chosen
experts and their weights; one is run alone by choosing it for all tokens, whatever it computes inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.errors import CompressError
from aicompress.model.blocks.find import Block
from aicompress.model.blocks.paused_forward import Arrival
from aicompress.model.blocks.walk import Batch
from aicompress.model.sensitivity.block_influence import Passage


@dataclass
class Routing:
    """Watches experts and adds up what goes through them.

    Attributes:
        sizes: number of experts by module path.
        totals: by module path, (experts, 2): tokens, and Σ g ‖f(x)‖ over them.
        mask: real tokens of the batch that is running, flat; None when all are.
    """

    sizes: Mapping[str, int]
    totals: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    _inside: bool = False

    def measure(self, passage: Passage) -> dict[str, Tensor]:
        """Totals over all processes, by module path.

        Raises:
            CompressError: experts are not called as experts are.
        """
        self.totals = {path: torch.zeros(size, 2, dtype=torch.float64) for path, size in self.sizes.items()}
        with ExitStack() as watching:
            for path in self.sizes:
                module = passage.model.get_submodule(path)
                watching.enter_context(module.register_forward_pre_hook(partial(self._see, path), with_kwargs=True))
            passage.run(self._run_block)
        return {path: passage.team.total(total) for path, total in self.totals.items()}

    def _run_block(self, block: Block, arrival: Arrival, batch: Batch) -> Any:
        mask = batch.get("attention_mask")
        self.mask = None if mask is None or bool(mask.all()) else mask.bool().reshape(-1)
        return block.module(*arrival.args, **arrival.kwargs)

    def _see(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._inside:
            return
        given = [*args, *kwargs.values()]
        hidden, chosen, weights = self._call(path, given)
        if weights.shape != chosen.shape:  # a weight for every expert
            weights = weights.gather(1, chosen.clamp_max(weights.shape[1] - 1))
        gates = weights.double() / weights.double().sum(dim=1, keepdim=True).clamp_min(1e-12)  # (tokens, chosen)
        real = self.mask if self.mask is not None and len(self.mask) == len(hidden) else None
        self._inside = True
        try:
            for expert in range(self.sizes[path]):
                tokens, place = (chosen == expert).nonzero(as_tuple=True)
                if real is not None:
                    tokens, place = tokens[real[tokens]], place[real[tokens]]
                if len(tokens):
                    alone = torch.full((len(tokens), 1), expert, dtype=chosen.dtype)
                    answer = module(hidden[tokens], alone, torch.ones(len(tokens), 1, dtype=weights.dtype))
                    size = answer.double().norm(dim=-1)
                    self.totals[path][expert, 0] += len(tokens)
                    self.totals[path][expert, 1] += (gates[tokens, place] * size).sum()
        finally:
            self._inside = False

    def _call(self, path: str, given: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (tokens, width), chosen experts (tokens, chosen), and their weights."""
        fits = len(given) >= 3 and all(isinstance(each, Tensor) for each in given[:3])
        if not fits or given[1].is_floating_point() or given[0].ndim != 2 or given[1].ndim != 2:
            raise CompressError(
                f"{path} is not called with hidden states, chosen experts and their weights",
                "choose its experts by weight norm: score: norm",
            )
        return given[0], given[1], given[2]
