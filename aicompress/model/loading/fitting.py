"""Choose the architecture that a checkpoint holds the parameters of: transformers' own, without a head or a pooler.

A config.json may name a head that was never saved, or leave out the pooler that its class has by default. transformers
loads such a checkpoint with random values where it lacks some, which nobody reads.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from aicompress.errors import listed
from aicompress.model import hf
from aicompress.model.loading.definitions.definition import new_skeleton
from aicompress.model.loading.fill import lacking, unused


@dataclass(frozen=True)
class Fit:
    """An architecture on the meta device, and what it and a checkpoint do not share.

    Attributes:
        model: the architecture.
        without: what it has been left without, in words; empty where it is as config.json names it.
        unused: parameters of the checkpoint that it has no place for.
    """

    model: Any
    without: str
    unused: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """What the user should know of it."""
        told = [f"the checkpoint holds nothing of {self.without}: it is run without"] if self.without else []
        if self.unused:
            shown = listed(self.unused)
            told.append(f"{type(self.model).__name__} has no place for {len(self.unused)} parameters: {shown}")
        return told


def fitted(config: dict[str, Any], names: Iterable[str]) -> Fit | None:
    """A new model of the architecture as far as a checkpoint holds it; None where transformers does not know it.

    Args:
        config: config.json.
        names: the checkpoint's parameters.

    Raises:
        CheckpointError: the config is not one that the architecture takes.
    """
    model = new_skeleton(config)
    if model is None:
        return None
    names, without = list(names), []
    missing = _missing(model, names)
    base, prefix = model.base_model, f"{model.base_model_prefix}."
    headless = base is not model and not model.can_generate()  # what generates is nothing without its head
    if missing and headless and not any(name.startswith(prefix) for name in missing):
        held = {target for target, _ in hf.parameter_names(model, names).values()}
        heads = [name for name in model.state_dict() if not name.startswith(prefix)]
        if not held & set(heads):
            without.append(f"the head of {type(model).__name__}")
            model = new_skeleton({**config, "architectures": [type(base).__name__]}) or model
            missing = _missing(model, names)
    if missing and set(missing) == {name for name in model.state_dict() if "pooler" in name.split(".")}:
        parameters = inspect.signature(type(model).__init__).parameters
        if "add_pooling_layer" in parameters:
            without.append("the pooler")
            model = new_skeleton(config | {"architectures": [type(model).__name__]}, add_pooling_layer=False) or model
    return Fit(
        model, " and ".join(without), tuple(unused(model, hf.parameter_names(model, names), set(model.state_dict())))
    )


def misfit_warnings(config: dict[str, Any], names: Iterable[str]) -> list[str]:
    """What the user should know of an architecture and a checkpoint's parameters; a step asks for it several times.

    Raises:
        CheckpointError: the config is not one that the architecture takes.
    """
    return list(_told(json.dumps(config, sort_keys=True), tuple(names)))


@lru_cache(maxsize=16)
def _told(config: str, names: tuple[str, ...]) -> tuple[str, ...]:
    fit = fitted(json.loads(config), names)
    return () if fit is None else tuple(fit.warnings)


def _missing(model: Any, names: list[str]) -> list[str]:
    return lacking(model, hf.parameter_names(model, names), set(model.state_dict()))
