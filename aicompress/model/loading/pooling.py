"""Pool token states into sentence embeddings, as a sentence-transformers checkpoint describes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from aicompress.checkpoint.encoder_modules import MODULES, encoder_folder, encoder_modules
from aicompress.checkpoint.json_text import read_json
from aicompress.errors import CheckpointError

MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (nn.Tanh, nn.Identity, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU)
}


@dataclass(frozen=True)
class Pooling:
    """How token states become one embedding.

    Attributes:
        mode: cls, mean, max or last.
        normalize: scale embeddings to length 1.
        layers: what embeddings go through after they are pooled, before they are scaled.
    """

    mode: str = "mean"
    normalize: bool = False
    layers: tuple[nn.Module, ...] = ()

    @property
    def width(self) -> int | None:
        """How wide the layers make the embeddings; None where they stay as wide as the states."""
        linears = [part for layer in self.layers for part in layer.modules() if isinstance(part, nn.Linear)]
        return linears[-1].out_features if linears else None

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, width) and (batch, tokens) bool -> (batch, width) float32."""
        pooled = _POOLED[self.mode](states.float(), mask)
        for layer in self.layers:
            pooled = layer.to(pooled.device)(pooled)
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weight = mask[..., None].to(states.dtype)
    return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return _row(states, mask.int().argmax(dim=1))  # the first real token, wherever the padding is


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return _row(states, mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1))


def _row(states: Tensor, position: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), position]


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(~mask[..., None], float("-inf")).amax(dim=1)


_POOLED = {"mean": _mean, "cls": _first, "last": _last, "max": _max}


def pooling(folder: Path | None) -> Pooling:
    """What the checkpoint's modules.json and pooling config say; the mean of the tokens where it says nothing.

    Raises:
        CheckpointError: a pooling that this version does not compute.
    """
    folder = encoder_folder(folder) if folder is not None else None
    if folder is None:
        return Pooling()
    steps = encoder_modules(folder)
    kinds = dict(steps)
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Dense", "Normalize"})
    if unknown:
        hint = "sentence embeddings are made of Transformer, Pooling, Dense and Normalize here"
        raise CheckpointError(f"{folder}: sentence embeddings go through {unknown[0]}", hint)
    if "Pooling" not in kinds:
        raise CheckpointError(f"{folder / MODULES} names no pooling", "download or copy the checkpoint again")
    plain = read_json(folder / kinds["Pooling"] / "config.json")
    layers = tuple(_dense(folder / path) for kind, path in steps if kind == "Dense")
    return Pooling(_mode(plain, folder), "Normalize" in kinds, layers)


def _dense(folder: Path) -> nn.Module:
    """A Dense module: a linear layer and an activation, tanh where its config names none.

    Raises:
        CheckpointError: it cannot be read, or has another activation.
    """
    plain = read_json(folder / "config.json")
    named = str(plain.get("activation_function", "Tanh")).rpartition(".")[2]
    if named not in _ACTIVATIONS:
        raise CheckpointError(f"{folder}: activation {named} is not known", f"one of {', '.join(_ACTIVATIONS)}")
    try:
        tensors = load_file(folder / "model.safetensors")
        linear = nn.Linear(plain["in_features"], plain["out_features"], bias=plain.get("bias", True))
        linear.load_state_dict({name.removeprefix("linear."): tensor.float() for name, tensor in tensors.items()})
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: it cannot be read: {reason}", "it has to hold model.safetensors") from error
    return nn.Sequential(linear, _ACTIVATIONS[named]()).requires_grad_(False).eval()


def _mode(plain: dict[str, Any], folder: Path) -> str:
    modes = [str(plain["pooling_mode"])] if "pooling_mode" in plain else []
    modes += [mode for key, mode in MODES.items() if plain.get(key)]
    other = [key for key, value in plain.items() if key.startswith("pooling_mode_") and value and key not in MODES]
    if len(modes) != 1 or modes[0] not in _POOLED or other:
        named = ", ".join(modes + other) or "none"
        raise CheckpointError(f"{folder}: pooling by {named} is not supported", f"one of {', '.join(_POOLED)}")
    return modes[0]
