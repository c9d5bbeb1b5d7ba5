"""Hooks that accumulate Gram matrices, norms and means of layers' inputs while a model runs.

Layers that are given the same tensor (q, k and v; gate and up) share one sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from aicompress.model.blocks.expert_inputs import ExpertCalls, Part
from aicompress.model.blocks.input_rows import Convolution, rows_of
from aicompress.model.kernels.bf16_products import bfloat16_products
from aicompress.statistics import InputStats, column_statistics

PANEL = 256  # columns of a Gram matrix that are computed at a time


@dataclass
class InputSums:
    """Running sums over the rows of a layer's inputs, in float32.

    Attributes:
        needs: which to keep: gram, frequency, and statistics of columns by name.
        rounded: inputs of products are rounded to bfloat16.
        count: rows so far.
        weight: of the rows so far, each of which weighs 1 unless said otherwise.
        tensors: what there is so far, by the names of `InputStats`: gram, Σ x xᵀ, of which what lies below the diagonal
            is filled in by `mean`; cross, Σ x x̂ᵀ, and beside it original_mean, Σ x of the original model; of an
            embedding frequency, how often each row was looked up; of statistics of columns the sum, or the largest.
    """

    needs: frozenset[str]
    rounded: bool = False
    count: int = 0
    weight: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add_lookups(self, numbers: Tensor, rows: int, weight: float = 1.0) -> None:
        """Add lookups of an embedding's rows.

        Args:
            numbers: of the rows, (tokens,).
            rows: of the embedding.
            weight: how often each lookup counts.
        """
        self.count += len(numbers)
        self.weight += weight * len(numbers)
        counted = weight * numbers.bincount(minlength=rows).float()
        known = self.tensors.get("frequency")
        self.tensors["frequency"] = counted if known is None else known.add_(counted)

    def add(self, rows: Tensor, original: Tensor | None = None, weight: float = 1.0) -> None:
        """Add rows (tokens, in), and the original model's rows for the same tokens if cross statistics are wanted.

        Args:
            weight: how often each row counts in sums and means.
        """
        if not rows.shape[0]:
            return
        rows = rows.float()
        self.count += rows.shape[0]
        self.weight += weight * rows.shape[0]
        if "gram" in self.needs:
            self.tensors["gram"] = _add_gram(self.tensors.get("gram"), self._factor(rows), self.rounded, weight)
        for name, statistic in column_statistics().items():
            if name in self.needs and not ("gram" in self.needs and statistic.of_gram is not None):
                self.tensors[name] = statistic.added(self.tensors.get(name), rows, weight)
        if original is not None:
            left, right = self._factor(original), self._factor(rows)
            with bfloat16_products(self.rounded):
                cross = _zeros(self.tensors.get("cross"), left, right)
                self.tensors["cross"] = cross.addmm_(left.t(), right, alpha=weight)
            if "mean" in self.needs:
                mean = column_statistics()["mean"].added(self.tensors.get("original_mean"), original.float(), weight)
                self.tensors["original_mean"] = mean

    def _factor(self, rows: Tensor) -> Tensor:
        """Rows as products see them. Rounded here, for oneDNN leaves small products to a library that does not."""
        return rows.bfloat16().float() if self.rounded else rows.float()

    def mean(self) -> InputStats:
        """Means over the rows, in the memory of the sums, which are over; no statistics where no token came."""
        if not self.count:
            return InputStats(0)
        over = {name: tensor if is_largest(name) else tensor.div_(self.weight) for name, tensor in self.tensors.items()}
        apart = {name: over.pop(name, None) for name in ("gram", "cross", "original_mean", "frequency")}
        if apart["gram"] is not None:
            _mirror(apart["gram"])
        return InputStats.of(self.count, apart.pop("gram"), over, apart.pop("cross"), **apart)


def is_largest(name: str) -> bool:
    """Whether one of the tensors of sums holds the largest of what came, and not its sum."""
    return name in column_statistics() and column_statistics()[name].largest


def _zeros(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return torch.zeros(left.shape[1], right.shape[1], device=left.device) if total is None else total


def _add_gram(total: Tensor | None, rows: Tensor, rounded: bool, weight: float) -> Tensor:
    """Add xᵀ x from the diagonal on: panels of columns with all columns to their right."""
    total = _zeros(total, rows, rows)
    with bfloat16_products(rounded):
        for at in range(0, rows.shape[1], PANEL):
            panel = slice(at, at + PANEL)
            total[panel, at:].addmm_(rows[:, panel].t(), rows[:, at:], alpha=weight)
    return total


def _mirror(gram: Tensor) -> None:
    """Copy what lies above the diagonal below it: products are symmetric only up to rounding on some processors."""
    for at in range(0, len(gram), PANEL):
        gram[at + PANEL :, at : at + PANEL] = gram[at : at + PANEL, at + PANEL :].t()
        block = gram[at : at + PANEL, at : at + PANEL]
        block.copy_(block.triu() + block.triu(1).t())


@dataclass
class Recorder:
    """Watches modules and adds up what they are given.

    Attributes:
        modules: watched modules by layer name.
        needs: which statistics to keep.
        parts: experts that are parts of a merged parameter, by layer name.
        experts: parameters that hold several experts, each with the names of those among `parts`.
        rounded: inputs of products are rounded to bfloat16.
        weight: how often each row of the batch that is running counts.
        mask: real tokens of the batch that is running, (batch, tokens) bool; None when all are.
        repeated: what runs was counted already; of lookups, which count alike in both models.
        keep: when set, rows are put here by leader instead of being added up.
        originals: when set, the original model's rows by leader, for cross statistics.
        sums: sums by leader, the first of the layers that share an input.
        leaders: each layer's leader.
    """

    modules: Mapping[str, nn.Module]
    needs: frozenset[str]
    parts: Mapping[str, Part] = field(default_factory=dict)
    experts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rounded: bool = False
    weight: float = 1.0
    mask: Tensor | None = None
    repeated: bool = False
    keep: dict[str, Tensor] | None = None
    originals: dict[str, Tensor] | None = None
    sums: dict[str, InputSums] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    _held: list[tuple[Tensor, Any, str]] = field(default_factory=list)
    _watching: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Recorder:
        for name, module in self.modules.items():
            if isinstance(module, nn.Embedding):
                if "frequency" in self.needs:
                    self._watching.enter_context(lookups(module, partial(self._see_lookups, name, module)))
                continue
            hook = partial(self._see, name)
            self._watching.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        if self.parts:
            self._watching.enter_context(ExpertCalls(self.parts, self._see_expert))
        return self

    def __exit__(self, *error: object) -> None:
        self._watching.close()

    def batch_done(self) -> None:
        """Let go of a batch's inputs."""
        self._held.clear()

    def _see(self, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        leader = self._leader(name, given, _geometry(module))
        if leader != name:
            return
        rows = rows_of(module, given, self.mask)
        if rows is None:
            return
        if self.keep is not None:
            self.keep[leader] = rows
            return
        original = self.originals.get(leader) if self.originals is not None else None
        self.sums.setdefault(leader, InputSums(self.needs, self.rounded)).add(rows, original, self.weight)

    def _see_lookups(self, name: str, module: nn.Embedding, numbers: Tensor) -> None:
        """Rows that an embedding looked up, padding aside."""
        if self.repeated or self.keep is not None:
            return
        masked = self.mask is not None and numbers.shape == self.mask.shape
        numbers = numbers[self.mask] if masked else numbers.reshape(-1)
        self.sums.setdefault(name, InputSums(self.needs)).add_lookups(numbers, module.num_embeddings, self.weight)

    def _see_expert(self, names: Sequence[str], rows: Tensor) -> None:
        """Tokens that one expert is given, (tokens, in); padding goes to experts as other tokens do, and counts.

        The compressed model may send a token to another expert than the original does, so that the inputs of the two
        cannot be compared: each counts as its own original.
        """
        if self.keep is not None:
            return
        self.leaders.update(dict.fromkeys(names, names[0]))
        sums = self.sums.setdefault(names[0], InputSums(self.needs, self.rounded))
        sums.add(rows, rows if self.originals is not None else None, self.weight)

    def _leader(self, name: str, given: Tensor, geometry: Any) -> str:
        """The first layer that made the same rows of this tensor; decided at a layer's first call and kept."""
        if name not in self.leaders:
            shared = (other for tensor, way, other in self._held if tensor is given and way == geometry)
            self.leaders[name] = next(shared, name)
            # Holding the tensor keeps its memory, and so its identity, from being used again in this batch.
            self._held.append((given, geometry, self.leaders[name]))
        return self.leaders[name]

    def stats(self) -> dict[str, InputStats]:
        """Means by layer, at the end: the recorder lets go of its sums. Sharing layers get the same object.

        A layer that no row reached has count 0.
        """
        means = {leader: sums.mean() for leader, sums in self.sums.items()}
        self.sums.clear()
        own = {name: means.get(self.leaders.get(name, name), InputStats(0)) for name in (*self.modules, *self.parts)}
        shared: dict[tuple[str, ...], InputStats] = {}
        for name, parts in self.experts.items():
            leaders = tuple(self.leaders.get(part, part) for part in parts)
            own[name] = shared.setdefault(leaders, InputStats.of_experts([own.pop(part) for part in parts]))
        return own


def _geometry(module: nn.Module) -> Any:
    """How a layer makes rows of its input: layers of one input share its statistics only where this is the same."""
    if not isinstance(module, Convolution):
        return None
    padding = (module.padding, module.padding_mode)
    return module.kernel_size, module.stride, *padding, module.dilation, module.groups


class _Lookups(TorchFunctionMode):
    """Tells of every lookup in a weight: a subclass of Embedding may be given something else than rows' numbers."""

    def __init__(self, weight: Tensor, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._weight, self._see = weight, see

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is functional.embedding and len(args) >= 2 and args[1] is self._weight:
            self._see(args[0])
        return function(*args, **(kwargs or {}))


@contextmanager
def lookups(module: nn.Embedding, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell of every lookup while an embedding runs, in whatever thread that is.

    Args:
        module: the embedding.
        see: called with the numbers of the rows.
    """
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Lookups(module.weight, see):
            return forward(*args, **kwargs)

    module.forward = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
