"""Layers with a stored weight.

A compressed layer keeps its class's behaviour: its class becomes a subclass that holds the stored tensors under their
names on disk (`weight`, `weight_scale`, ...) and decodes them where the layer reads `weight`. Of a weight that is a
product, each factor is applied on its own, and of one that is several convolutions each of these.

This file and `decoding_aicompress.py` need torch and transformers only; copies lie in every checkpoint of the native
layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .decoding_aicompress import CONVOLUTIONS, decode, factors, kept, kernels, rounded_input


class Stored(nn.Module):
    """Mixed into a layer's class: the layer's weight is kept in a stored form.

    The stored tensors are named `weight`, `weight_<suffix>`: parameters, but codes and masks are buffers, since readers
    take a model's first parameter for one of real numbers. Once they are loaded, reading `weight` gives the dense
    parameter.
    """

    entry: dict[str, Any]
    ready: bool

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("ready"):
            matrix = self.placed(reduce(torch.matmul, self.matrices()))
            return matrix.t() if self.entry.get("transposed") else matrix.reshape(self.entry["shape"])
        if name == "weight" and ("source" in self.__dict__ or self._is_loaded()):
            # Code that initializes a model takes it for initialized, and for as large as it is when it is decoded.
            shown = torch.empty(self.entry["shape"], device="meta")
            shown._is_hf_initialized = True  # type: ignore[attr-defined]
            return shown
        return super().__getattr__(name)

    def _is_loaded(self) -> bool:
        """Whether transformers has put every stored tensor in its place, and is about to initialize the others."""
        stored = self.stored.values() if "entry" in self.__dict__ else ()
        return bool(stored) and all(hasattr(tensor, "_is_hf_initialized") for tensor in stored)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the class that the layer was of, since its own is made while a program runs."""
        kept = {name: value for name, value in self.__dict__.items() if name != "decoded"}
        return _blank, (type(self).__bases__[1],), kept

    @property
    def stored(self) -> dict[str, Tensor]:
        """Stored tensors by suffix; a tied layer has those of its source, and one that shares some its owner's."""
        holder = self.__dict__.get("source", self)
        held, borrowed = holder._parameters | holder._buffers, holder.__dict__.get("borrowed", {})
        return {
            s: _lent(*borrowed[s]) if s in borrowed else held[f"weight_{s}" if s else "weight"]
            for s in self.entry["tensors"]
        }

    def product(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """The stored weight whose factors are decoded."""
        return self.entry["meta"], self.stored

    def placed(self, matrix: Tensor) -> Tensor:
        """The whole matrix of what these factors give."""
        return matrix

    def matrices(self) -> tuple[Tensor, ...]:
        """The decoded factors, or the matrix alone."""
        return self._kept(_factors)

    def _kept(self, decoded: Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What a function makes of the stored tensors; kept for the next call unless gradients are wanted."""
        meta, tensors = self.product()
        keep = not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors.values())
        if keep:
            key = (
                decoded,
                torch.is_inference_mode_enabled(),
                *((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors.values()),
            )
            known: tuple[Any, tuple[Tensor, ...]] = self.__dict__.get("decoded", (None, ()))
            if known[0] == key:
                return known[1]
        values = decoded(meta, tensors)
        if keep:
            self.__dict__["decoded"] = (key, values)
        return values


def _factors(meta: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(decode(*factor) for factor in factors(meta, tensors))


def _kernels(meta: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(kernels(meta, tensors))


def _lent(owner: nn.Module, name: str) -> Tensor:
    """A tensor that a layer holds for others: a stored one by its suffix, or a parameter by its name."""
    tensor = owner.stored[name] if isinstance(owner, Stored) else owner._parameters[name]
    assert tensor is not None
    return tensor


class StoredLinear(Stored):
    """Linear, and GPT-2's Conv1D: a product for each factor, the right one first; none with zero rows and columns."""

    def product(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """The stored weight without rows and columns of zeros."""
        meta, tensors, _, _ = kept(self.entry["meta"], self.stored)
        return meta, tensors

    def placed(self, matrix: Tensor) -> Tensor:
        """The matrix with its rows and columns of zeros."""
        _, _, rows, columns = kept(self.entry["meta"], self.stored)
        if columns is not None:
            matrix = _spread(matrix, columns, self.entry["meta"]["shape"][1])
        return matrix if rows is None else _spread(matrix.t(), rows, self.entry["meta"]["shape"][0]).t()

    def forward(self, x: Tensor) -> Tensor:
        meta, tensors, rows, columns = kept(self.entry["meta"], self.stored)
        bits = [meta.get("activation_bits") for meta, _ in factors(meta, tensors)]
        left, *right = self.matrices()
        if columns is not None:
            x = x.index_select(-1, columns.long())
        for factor, width in zip(reversed(right), reversed(bits[1:]), strict=True):
            x = F.linear(rounded_input(x, width), factor)
        if rows is None:
            return F.linear(rounded_input(x, bits[0]), left, self.bias)
        y = _spread(F.linear(rounded_input(x, bits[0]), left), rows, self.entry["meta"]["shape"][0])
        return y if self.bias is None else y + self.bias


def _spread(x: Tensor, places: Tensor, size: int) -> Tensor:
    """Values (..., places) among zeros (..., size)."""
    return x.new_zeros(*x.shape[:-1], size).index_copy(-1, places.long(), x)


class StoredEmbedding(Stored):
    """Embedding: rows of the left factor, times the others."""

    def forward(self, ids: Tensor) -> Tensor:
        left, *right = self.matrices()
        if not right or self.max_norm is not None:
            looked_up: Tensor = super().forward(ids)
            return looked_up
        rows = F.embedding(ids, left, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, False)
        return reduce(torch.matmul, right, rows)


class StoredConv(Stored):
    """Convolution: one after the other where it is stored as several, or as two factors.

    Two factors are a k×k convolution to as many channels as the rank, and a 1×1 convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        chain = self.chain() if self.groups == 1 else ()
        if not chain:
            convolved: Tensor = super().forward(x)
            return convolved
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode), (0,) * (chain[0].ndim - 2)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[chain[0].ndim - 3]
        ways = [(self.stride, 1), (padding, 0), (self.dilation, 1)]
        for number, kernel in enumerate(chain):
            own = [number == _going_along(axis, chain) for axis in range(kernel.ndim - 2)]
            here = [[v if mine else no for v, mine in zip(values, own, strict=True)] for values, no in ways]
            x = convolve(x, kernel, self.bias if number == len(chain) - 1 else None, *here)
        return x

    def chain(self) -> tuple[Tensor, ...]:
        """The kernels (out, in, *k), of the first convolution first; none of a weight that is not several."""
        if self.entry["meta"]["form"] in CONVOLUTIONS:
            return self._kept(_kernels)
        left, *others = self.matrices()
        if len(others) != 1:
            return ()
        size = self.entry["shape"][2:]
        return others[0].reshape(len(others[0]), -1, *size), left.reshape(*left.shape, *(1 for _ in size))


def _going_along(axis: int, chain: tuple[Tensor, ...]) -> int:
    """The number of the convolution that goes along an axis of the input: the first one if none is wider than 1."""
    return next((number for number, kernel in enumerate(chain) if kernel.shape[2 + axis] > 1), 0)


_RUNNING: dict[Any, type[Stored]] = {
    nn.Linear.forward: StoredLinear,
    Conv1D.forward: StoredLinear,
    nn.Embedding.forward: StoredEmbedding,
    nn.Conv1d.forward: StoredConv,
    nn.Conv2d.forward: StoredConv,
    nn.Conv3d.forward: StoredConv,
}


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def stored_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer's class with a stored weight; a forward of its own reads the decoded `weight`."""
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Stored{kind.__name__}", (_RUNNING.get(kind.forward, Stored), kind), {})
    return _CLASSES[kind]


def _blank(kind: type[nn.Module]) -> nn.Module:
    """A layer with a stored weight, whose attributes are still to come."""
    made = stored_class(kind)
    return made.__new__(made)


def attach(module: nn.Module, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Turn a layer into one with a stored weight, in place.

    Args:
        module: has a parameter `weight`.
        entry: the parameter's entry in the manifest.
        tensors: stored tensors by suffix, on any device, the meta device too; a parameter is held as it is.
    """
    initialized = _has_no_buffers(module)
    del module._parameters["weight"]
    for suffix, tensor in tensors.items():
        leaf = f"weight_{suffix}" if suffix else "weight"
        if tensor.is_floating_point():
            module._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        else:
            module._buffers[leaf] = tensor
    module.__class__ = stored_class(type(module))
    module.__dict__["entry"] = {**entry, "tensors": list(tensors)}
    module.__dict__["ready"] = False
    module.__dict__["_is_hf_initialized"] = initialized


def borrow(module: Stored, owners: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Let a layer read some of its stored tensors where another layer holds them.

    Args:
        module: has a stored weight.
        owners: by suffix the layer that holds the tensor, and the tensor's suffix there, or its name if it is plain.
    """
    module.__dict__["borrowed"] = dict(owners)
    module.entry["tensors"] += list(owners)


def attach_tied(module: nn.Module, source: nn.Module) -> None:
    """Let a layer decode the stored weight of another, in place."""
    del module._parameters["weight"]
    module.__class__ = stored_class(type(module))
    module.__dict__.update(entry=source.entry, source=source, ready=False)
    module.__dict__["_is_hf_initialized"] = _has_no_buffers(module)


def _has_no_buffers(module: nn.Module) -> bool:
    """Whether transformers may pass over a layer as it initializes a model: the layer computes nothing of its own.

    Code that initializes a layer takes its weight for a matrix; but an embedding's scale is computed nowhere else.
    """
    return all(buffer is None for buffer in module._buffers.values())


def stored_modules(model: nn.Module) -> Iterable[tuple[str, Stored]]:
    """Layers with a stored weight, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Stored))


def mark_ready(model: nn.Module) -> None:
    """Say that the stored tensors are loaded."""
    for _, module in stored_modules(model):
        module.__dict__["ready"] = True


def reshape(layer: Any, leaf: str, shape: tuple[int, ...]) -> None:
    """Give a layer an empty parameter of another shape, and the attributes that follow from it."""
    old = layer._parameters[leaf]
    layer._parameters[leaf] = torch.nn.Parameter(
        torch.empty(shape, dtype=old.dtype, device=old.device), requires_grad=old.requires_grad
    )
    if leaf == "weight" and hasattr(layer, "nf"):  # Conv1D, stored (in, out)
        layer.nx, layer.nf = shape
    elif leaf == "weight":
        layer.out_features, layer.in_features = shape
