"""A model with only some of its parts in memory: loaded from the checkpoint when needed, dropped after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.model import hf
from aicompress.model.loading.fill import Filling, make_buffers, make_computed
from aicompress.model.loading.places import (
    Divided,
    ExpertStack,
    Slot,
    converted,
    divided,
    rows_of_layers,
    slots,
)
from aicompress.model.loading.resize import owner_of, put, resize

LEAST = 1 << 24  # bytes of a parameter that is worth a second read


@dataclass
class Offload:
    """Parameters that share one tensor and are offloaded together.

    Attributes:
        fetch: puts the tensor into all of them.
        out: it has not been asked for.
    """

    fetch: Callable[[], None]
    out: bool = True

    def end(self) -> None:
        """Bring the parameters back; fetching may itself look them up."""
        if self.out:
            self.out = False
            self.fetch()


class OffloadedParameters(dict[str, nn.Parameter | None]):
    """The parameters of one module, of which some are away until they are read.

    A module looks its parameters up here whoever asks for them, so that none can be read while it is away. Going
    through all of them fetches none.

    Attributes:
        away: what brings back each parameter that is away, by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter | None]) -> None:
        super().__init__(parameters)
        self.away: dict[str, Offload] = {}

    def __getitem__(self, leaf: str) -> nn.Parameter | None:
        offloaded = self.away.pop(leaf, None)
        if offloaded is not None:
            offloaded.end()
        return super().__getitem__(leaf)

    def __setitem__(self, leaf: str, parameter: nn.Parameter | None) -> None:
        self.away.pop(leaf, None)
        super().__setitem__(leaf, parameter)


def offload(module: nn.Module, leaf: str, offloaded: Offload) -> None:
    """Mark a parameter on the meta device as offloaded: it is read again when the model asks for it."""
    if not isinstance(module._parameters, OffloadedParameters):
        module._parameters = OffloadedParameters(module._parameters)
    module._parameters.away[leaf] = offloaded


class PartialModel:
    """Loads parts of a checkpoint, decoded, into a model on the meta device.

    Args:
        checkpoint: where parameters come from.
        model: on the meta device; a transformers model, or a module whose parameter names are the checkpoint's.
        device: where loaded parts go.
        dtype: of floating parameters; None keeps the checkpoint's.

    Raises:
        CheckpointError: the checkpoint's parameters are not exactly the model's.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Any, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        resize(model, checkpoint)
        self.model = model
        self.hugging = hasattr(model, "all_tied_weights_keys")
        self._filling = Filling(checkpoint, torch.device(device), dtype, fast=False)
        names = list(checkpoint.parameters())
        self.targets = hf.parameter_names(model, names) if self.hugging else {name: (name, None) for name in names}
        self._filling.held = {target for target, _ in self.targets.values()}
        known = set(model.state_dict())
        self._filling.check(model, self.targets, known)
        for name, spec in checkpoint.parameters().items():
            target, merge = self.targets[name]
            if merge is None and target in known:
                self._filling.check_shape(*owner_of(model, target), name, spec.shape)
        self._started = False
        self._computed: set[str] = set()  # parameters that the architecture makes itself

    def place_of(self, name: str) -> str | Slot | None:
        """The module that a weight of the checkpoint belongs to, or its part of a merged tensor; None if neither."""
        target, merge = self.targets[name]
        if merge is not None:
            return self._slots.get(name)
        return target.removesuffix(".weight") if target in self._known and target.endswith(".weight") else None

    def stack_of(self, name: str, count: int) -> ExpertStack | None:
        """Where the model has a parameter that holds so many experts; None where it has no such parameter."""
        target, merge = self.targets[name]
        if merge is not None or target not in self._known:
            return None
        module, _, leaf = target.rpartition(".")
        return ExpertStack(module, leaf, count)

    @property
    def paths(self) -> dict[str, str]:
        """Where the model has each parameter that is one by itself there, too; by its name in the checkpoint."""
        return {
            name: target for name, (target, merge) in self.targets.items() if merge is None and target in self._known
        }

    def reader_of(self, name: str) -> str | Slot | Divided | None:
        """What reads the inputs of a weight: its place, or the layers that it is divided among."""
        return self.place_of(name) or self._divided.get(name)

    def rows_of_layers(self, name: str) -> dict[str, Tensor]:
        """Rows of a divided matrix by path of the layer that has them; empty where the matrix is not divided."""
        if name not in self._divided:
            return {}
        target, conversion = self.targets[name]
        shape = self._filling.checkpoint.parameters()[name].shape
        return rows_of_layers(self.model, name, target, conversion, shape)

    @cached_property
    def _divided(self) -> dict[str, Divided]:
        """Layers that have a matrix of the checkpoint between them, by its name there."""
        merges = {name: (target, merge) for name, (target, merge) in self.targets.items() if merge is not None}
        single = {target for target, count in Counter(target for target, _ in merges.values()).items() if count == 1}
        shapes = self._filling.checkpoint.parameters()
        parts = {
            name: divided(self.model, name, target, merge, shapes[name].shape)
            for name, (target, merge) in merges.items()
            if target in single & self._known and len(shapes[name].shape) == 2
        }
        return {name: part for name, part in parts.items() if part is not None}

    @cached_property
    def _known(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    @cached_property
    def _slots(self) -> dict[str, Slot]:
        """Parts of merged tensors, by name in the checkpoint."""
        merges: dict[str, dict[str, tuple[Any, tuple[int, ...]]]] = {}
        shapes = self._filling.checkpoint.parameters()
        for name, (target, merge) in self.targets.items():
            if merge is not None and target in self._known:
                merges.setdefault(target, {})[name] = merge, shapes[name].shape
        return {n: slot for target, sources in merges.items() for n, slot in slots(self.model, target, sources).items()}

    def load(self, owns: Callable[[str], bool]) -> None:
        """Load parameters whose name in the model satisfies `owns`; the first call also makes the computed buffers."""
        known = set(self.model.state_dict())
        merges: dict[str, list[str]] = {}
        for name, (target, merge) in self.targets.items():
            if target not in known or not owns(target):
                continue
            if merge is not None:
                merges.setdefault(target, []).append(name)
            else:
                self._put(target, self._filling.checkpoint.dense(name))
        for target, sources in merges.items():
            self._filling.merge(self.model, target, {name: self.targets[name][1] for name in sources})
        if not self._started:
            self._start()
        elif self.hugging:
            self._tie()

    def _tie(self) -> None:
        """Give a parameter that is not there the tensor that it shares."""
        for target, source in self.model.all_tied_weights_keys.items():
            self._filling.tie(self.model, target, source)

    def _start(self) -> None:
        """Make the buffers that the architecture computes, and ties; parameters still to come stay on meta."""
        self._started = True
        self.model.eval()
        loaded = {
            id(buffer) for buffer in self.model.buffers() if buffer.device.type != "meta"
        }  # such as of batch norms
        make_buffers(self.model, self._filling.device)
        if not self.hugging:
            return
        self._computed = make_computed(self.model, self._filling.held, self._filling.device)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor._is_hf_initialized = isinstance(tensor, nn.Parameter) or id(tensor) in loaded
        for name in self._computed:
            self.model.get_parameter(name)._is_hf_initialized = False
        self._tie()
        self.model.initialize_weights()

    def replace(self, name: str, dense: Tensor) -> None:
        """Put a dense tensor in the place of a loaded parameter."""
        place = self.reader_of(name)
        if isinstance(place, Slot):
            merged = self.model.get_submodule(place.module)._parameters[place.leaf]
            place.write(merged.data, dense)
        elif isinstance(place, Divided):
            target, conversion = self.targets[name]
            for full, part in converted(self.model, target, {name: (conversion, dense)}).items():
                self._put(full, part)
        else:
            for target in self._tied_with(self.targets[name][0]):
                self._put(target, dense)

    def _tied_with(self, target: str) -> list[str]:
        """A parameter of the model and those tied to it that the checkpoint does not hold."""
        ties = self.model.all_tied_weights_keys if self.hugging else {}
        ends = [end for end, source in ties.items() if source == target]
        ends += [ties[target]] if target in ties else []
        return [target, *(end for end in ends if end not in self._filling.held)]

    def drop(self, owns: Callable[[str], bool]) -> None:
        """Send parameters back to the meta device; computed buffers stay."""
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if owns(name) and name not in self._computed:
                put(*owner_of(self.model, name), torch.empty_like(parameter, device="meta"))

    def offload(self, owns: Callable[[str], bool]) -> None:
        """Send large parameters back to the meta device; each is loaded again when the model next reads it."""
        named = self.model.named_parameters(remove_duplicate=False)
        large = {name for name, parameter in named if owns(name) and parameter.nbytes >= LEAST}
        for shared in {self._sharing(name) for name in large}:
            if shared.isdisjoint(self._filling.held):
                continue  # the architecture made it
            self.drop(shared.__contains__)
            offloaded = Offload(partial(self.load, shared.__contains__))
            for name in shared:
                offload(*owner_of(self.model, name), offloaded)

    def _sharing(self, target: str) -> frozenset[str]:
        """A parameter of the model and those that share its tensor."""
        ties = self.model.all_tied_weights_keys if self.hugging else {}
        source = ties.get(target, target)
        return frozenset({source, *(end for end, other in ties.items() if other == source)})

    def _put(self, target: str, dense: Tensor) -> None:
        self._filling.set(*owner_of(self.model, target), dense)
