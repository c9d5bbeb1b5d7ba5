"""Divergence of a model's outputs from the original's when some of its weights are changed, for many such changes.

The uncompressed model runs once, block by block, and every block's output is kept. A change is then tried on the same
batches: what comes before the first changed block is not run again. Weights of a model that is large are read from the
checkpoint when a block runs and dropped after, so that memory holds one block and the batches' activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from aicompress.errors import CompressError
from aicompress.model.blocks.caches import copied, leave, left_by
from aicompress.model.blocks.find import find_blocks
from aicompress.model.blocks.input_errors import input_errors_refused
from aicompress.model.blocks.walk import Batch
from aicompress.model.loading.definitions.config import configurations
from aicompress.model.loading.partial_model import PartialModel
from aicompress.model.sensitivity.loss import logits_of

BROKEN = 1e6  # the loss of outputs that are no numbers: more than any that are
LOWEST = -1e30  # stands for logits of minus infinity, of tokens that a model never gives
ELEMENTS = 1 << 26  # of all batches' outputs that are kept: 256 MiB of float32; rows beyond are left out evenly


@dataclass(frozen=True)
class _Call:
    """One run of a block in the uncompressed model; `left` is what it shares with later ones beside its output."""

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    left: Sequence[dict[str, Any]] = ()

    def again(self, module: Any) -> Any:
        """What the block gives for the same arguments, to whose caches it has added nothing."""
        return module(*map(copied, self.args), **{name: copied(value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class _Reference:
    """What the uncompressed model gives for a batch.

    Attributes:
        rows: probabilities of logits, or states, (rows, numbers).
        expected: Σ p log p of each row, (rows,); None for states.
        size: what the sum of losses is divided by.
    """

    rows: Tensor
    expected: Tensor | None
    size: float

    @classmethod
    def of(cls, rows: Tensor, logits: bool) -> _Reference:
        if not logits:
            return cls(rows, None, float(rows.square().sum(dtype=torch.float64)))
        likely = rows.softmax(dim=-1)
        return cls(likely, _expected(likely, rows), float(len(rows)))

    def lost(self, rows: Tensor) -> float:
        """Σ p (log p − log q) of logits; Σ ‖y − ŷ‖² of states."""
        if self.expected is None:
            return float((self.rows - rows).square().sum(dtype=torch.float64))
        return float((self.expected - _expected(self.rows, rows)).sum(dtype=torch.float64))


def _expected(likely: Tensor, logits: Tensor) -> Tensor:
    """Σ p log softmax(z) = Σ p z − log Σ exp z of each row, without the softmax of every number, (rows,)."""
    expected: Tensor = torch.linalg.vecdot(likely, logits) - logits.logsumexp(dim=-1)
    return expected


class OutputSensitivity:
    """A model and the batches it is tried on. Use it as a context manager.

    Args:
        model: on the meta device; its layers are the loader's to fill.
        loader: loads parts of the model.
        weights: what gives a parameter as the checkpoint has it, by name; and the module path of one, None where the
            model has none.
        batches: keyword arguments of the model's forward.
        resident: keep all weights in memory.
    """

    def __init__(
        self,
        model: Any,
        loader: PartialModel,
        weights: tuple[Callable[[str], Tensor], Callable[[str], str | None]],
        batches: Sequence[Batch],
        resident: bool,
    ) -> None:
        self._model, self._loader, self._batches, self._resident = model, loader, batches, resident
        self._original, self._place = weights
        self._blocks = find_blocks(model)
        self._calls: list[list[_Call]] = [[] for _ in batches]
        self._running: list[_Call] | None = None  # the batch's calls while they are recorded
        self._at = self._first = self._batch = 0
        self._changes: Mapping[str, Tensor] = {}
        self._reference: list[_Reference] = []
        self._logits = True

    @property
    def divergence(self) -> bool:
        """Whether the model gives logits, whose Kullback-Leibler divergence is measured; else a relative error."""
        return self._logits

    def __enter__(self) -> Self:
        for config in configurations(self._model):
            config.use_cache = False
        self._loader.load(lambda name: self._resident or not any(block.owns(name) for block in self._blocks))
        for index, block in enumerate(self._blocks):
            block.module.forward = self._gated(index, block.module.forward)
        with torch.no_grad():
            for number, batch in enumerate(self._batches):
                self._running, self._batch = self._calls[number], number
                with input_errors_refused():
                    output = self._model(**batch)
                reference, self._logits = output_of(output)
                rows = self._rows(reference, batch)
                if not torch.isfinite(rows).all():
                    hint = "check the calibration inputs, or use a checkpoint in a wider dtype"
                    raise CompressError("the uncompressed model's outputs hold NaN or infinity", hint)
                self._reference.append(_Reference.of(rows, self._logits))
        self._running = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for block in self._blocks:
            block.module.__dict__.pop("forward", None)

    def loss(self, changes: Mapping[str, Tensor]) -> float:
        """What the outputs lose: KL(original ‖ changed) in nats per row, or ‖y − ŷ‖² / ‖y‖² of models without logits.

        Outputs that are no numbers lose BROKEN.

        Args:
            changes: dense parameters by name in the checkpoint.
        """
        lost = size = 0.0
        with self._changed(changes), torch.no_grad():
            for number, batch in enumerate(self._batches):
                self._batch, self._at, self._first = number, 0, self._start(number, changes)
                rows = self._rows(output_of(self._model(**batch))[0], batch)
                lost += self._reference[number].lost(rows)
                size += self._reference[number].size
        if not math.isfinite(lost):
            return BROKEN
        return max(0.0, lost / size) if size else 0.0

    def block_loss(self, changes: Mapping[str, Tensor]) -> float:
        """Σ ‖y − ŷ‖² of the output of the one block that holds all changes, given the original's inputs.

        Raises:
            ValueError: the changes are not in one block.
        """
        blocks = {self.block_of(name) for name in changes}
        if len(blocks) != 1 or None in blocks:
            raise ValueError("changes of one block are compared by its output")
        (index,) = blocks
        lost = 0.0
        with self._changed(changes), torch.no_grad():
            self._first = 0
            for number, batch in enumerate(self._batches):
                self._batch = number
                for call in self._calls[number]:
                    if call.block == index:
                        output = call.again(self._blocks[call.block].module)
                        difference = _leading(output) - _leading(call.output)
                        lost += float(_real(difference, batch).double().square().sum())
        return lost if math.isfinite(lost) else BROKEN

    def holds(self, name: str) -> bool:
        """Whether a parameter of the checkpoint is a layer of the running model."""
        return self._place(name) is not None

    def shares(self, block: int) -> bool:
        """Whether a block leaves keys and values for others, so that its output is not all that depends on it."""
        calls = [call for calls in self._calls for call in calls if call.block == block]
        return any(
            before.get(key) is not value
            for call in calls
            for before, after in zip(left_by((*call.args, *call.kwargs.values())), call.left, strict=True)
            for key, value in after.items()
        )

    def block_of(self, name: str) -> int | None:
        """The block that holds a parameter of the checkpoint; None outside of all."""
        place = self._place(name)
        if place is None:
            return None
        return next((index for index, block in enumerate(self._blocks) if block.owns(place)), None)

    def _start(self, number: int, names: Iterable[str]) -> int:
        """The first call of a batch that may come out otherwise."""
        blocks = {self.block_of(name) for name in names}
        if None in blocks:
            return 0
        calls = self._calls[number]
        return next((at for at, call in enumerate(calls) if call.block in blocks), len(calls))

    def _changed(self, changes: Mapping[str, Tensor]) -> _Changed:
        """Changes in place for the time of a `with`; those of blocks that are not in memory when they are loaded."""
        here = {n: t for n, t in changes.items() if self._resident or self.block_of(n) is None}
        self._changes = {n: t for n, t in changes.items() if n not in here}
        return _Changed(self._loader, self._original, here)

    def _gated(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        block = self._blocks[index]

        def gated(*args: Any, **kwargs: Any) -> Any:
            at, self._at = self._at, self._at + 1
            given = (*args, *kwargs.values())
            if self._running is None and at < self._first:
                leave(given, self._calls[self._batch][at].left)
                return self._calls[self._batch][at].output
            if not self._resident:
                self._loader.load(block.owns)
                for name, tensor in self._changes.items():
                    if self.block_of(name) == index:
                        self._loader.replace(name, tensor)
            call = _Call(index, tuple(map(copied, args)), {key: copied(value) for key, value in kwargs.items()}, None)
            output = forward(*args, **kwargs)
            if not self._resident:
                self._loader.drop(block.owns)
            if self._running is not None:
                self._running.append(replace(call, output=output, left=left_by(given)))
            return output

        return gated

    def _rows(self, output: Tensor, batch: Batch) -> Tensor:
        """(rows, numbers) of real tokens, evenly thinned out to what may be kept."""
        rows = _real(output, batch)
        rows = rows.reshape(-1, rows.shape[-1])
        limit = max(1, ELEMENTS // max(1, len(self._batches) * rows.shape[1]))
        rows = rows[:: -(-len(rows) // limit)].float()
        return rows.clamp_min(LOWEST) if self._logits else rows


@dataclass
class _Changed:
    """Parameters of a loaded model that are others for a while."""

    loader: PartialModel
    original: Callable[[str], Tensor]
    changes: Mapping[str, Tensor]

    def __enter__(self) -> None:
        for name, tensor in self.changes.items():
            self.loader.replace(name, tensor)

    def __exit__(self, *error: object) -> None:
        for name in self.changes:
            self.loader.replace(name, self.original(name))


def output_of(result: Any) -> tuple[Tensor, bool]:
    """What a model gives that losses are about, and whether it is logits.

    Logits where it names them, else its last hidden state; a bare module's one tensor stands for logits.
    """
    logits = logits_of(result)
    if logits is not None:
        return logits, True
    states = getattr(result, "last_hidden_state", None)
    return (states if isinstance(states, Tensor) else _leading(result)), False


def _leading(output: Any) -> Tensor:
    """The first tensor of a module's output."""
    if isinstance(output, Tensor):
        return output
    state: Tensor = next(
        part for part in (output.values() if isinstance(output, Mapping) else output) if part is not None
    )
    return _leading(state)


def _real(output: Tensor, batch: Batch) -> Tensor:
    """Rows of real tokens, where the batch marks padding of what the output is about."""
    mask = batch.get("attention_mask")
    if mask is None or "decoder_input_ids" in batch or output.shape[: mask.ndim] != mask.shape:
        return output
    return output[mask.bool()]
