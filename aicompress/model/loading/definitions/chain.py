"""Build modules for checkpoints that name no architecture: a chain of layers, or the user's own factory.

    model: {sequential: [flatten, fc1, relu, fc2, relu, fc3]}

Layers are names of the checkpoint; what they are is read from their tensors. Parameters keep their names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import RecipeError, Refused, suggestion
from aicompress.recipe import Model

_OPERATIONS: dict[str, Callable[..., nn.Module]] = {
    "flatten": nn.Flatten,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softmax": lambda: nn.Softmax(dim=-1),
    "dropout": nn.Identity,
}
_POOLS: dict[str, Callable[[int], nn.Module]] = {"maxpool": nn.MaxPool2d, "avgpool": nn.AvgPool2d}


class Chain(nn.Module):
    """Steps in order. Layers are registered under their checkpoint names, so that parameter names agree."""

    def __init__(self, steps: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.names: list[str] = []
        for number, (name, module) in enumerate(steps):
            self.names.append(name or f"operation_{number}")
            _register(self, self.names[-1], module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.get_submodule(self.names[0]), nn.Conv2d):
            x = _channels_last(x)
        for name in self.names:  # looked up each time: a compressed layer may have taken a module's place
            x = self.get_submodule(name)(x)
        return x


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    """Lay images out with their channels side by side, in which convolutions and pools take two thirds of the time.

    Args:
        images: (samples, channels, height, width), or of one channel without that axis.
    """
    if images.ndim == 3:
        images = images.unsqueeze(1)
    if images.ndim == 4 and images.shape[1] == 1:  # torch takes one channel for either layout: strides say which
        return images.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def _register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted path."""
    *parents, leaf = name.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(leaf, module)


def module_for(path: str | Path, section: Model, allow_code: bool = False) -> nn.Module:
    """The module that a recipe's `model:` section describes, on the meta device where it is a chain.

    Raises:
        RecipeError: a step that is neither a layer of the checkpoint nor an operation.
        Refused: a factory without --allow-code.
    """
    if section.factory is not None:
        return _from_factory(section.factory, allow_code)
    shapes = {name: spec.shape for name, spec in Checkpoint.open(path).parameters().items()}
    return Chain([_step(step, shapes) for step in section.sequential])


def _step(step: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, nn.Module]:
    """One entry of the chain: `fc1`, `conv1:stride=2,padding=1`, `relu`, `maxpool:2`."""
    name, _, options = step.partition(":")
    if f"{name}.weight" in shapes:
        return name, _layer(step, name, options, shapes)
    if name in _POOLS:
        return "", _POOLS[name](_number(step, options or "2"))
    if name not in _OPERATIONS:
        layers = [key.removesuffix(".weight") for key in shapes if key.endswith(".weight")]
        raise RecipeError(
            f"model.sequential: {name!r} is neither a layer of the checkpoint nor an operation",
            suggestion(name, [*layers, *_OPERATIONS, *_POOLS]),
        )
    return "", _OPERATIONS[name]()


def _layer(step: str, name: str, options: str, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """A layer told by the shapes of its tensors."""
    shape, bias = shapes[f"{name}.weight"], f"{name}.bias" in shapes
    with torch.device("meta"):
        if f"{name}.running_mean" in shapes:
            return _BatchNorm(shape[0])
        if len(shape) == 1:
            return nn.LayerNorm(shape[0], bias=bias)
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0], bias=bias)
        if len(shape) == 4:
            given = _options(step, options)
            groups = given.get("groups", 1)
            padding, stride = given.get("padding", 0), given.get("stride", 1)
            kernel = (shape[2], shape[3])
            return nn.Conv2d(shape[1] * groups, shape[0], kernel, stride, padding, groups=groups, bias=bias)
    raise RecipeError(f"model.sequential: {name!r} has a weight of {len(shape)} dimensions", "use model.factory")


class _BatchNorm(nn.BatchNorm2d):
    """Normalises channels of any number of dimensions: the tensors do not say which the layer was made for."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        return


def _options(step: str, options: str) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in ("stride", "padding", "groups"):
            raise RecipeError(f"model.sequential: {step!r} has an unknown option {key!r}", "stride, padding, groups")
        numbers[key] = _number(step, value)
    return numbers


def _number(step: str, text: str) -> int:
    if not text.isdigit():
        raise RecipeError(f"model.sequential: {step!r} takes a whole number", "for example maxpool:2")
    return int(text)


def _from_factory(name: str, allow_code: bool) -> nn.Module:
    """Call pkg.mod:function; it takes no arguments and returns the module."""
    if not allow_code:
        raise Refused(f"the recipe wants to run {name}", "read that code, then give --allow-code")
    module_name, _, function = name.partition(":")
    try:
        built = getattr(importlib.import_module(module_name), function)()
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"model.factory {name!r} cannot be imported: {error}", "write pkg.mod:function") from error
    if not isinstance(built, nn.Module):
        raise RecipeError(f"model.factory {name!r} returned {type(built).__name__}, not a module", "")
    return built
