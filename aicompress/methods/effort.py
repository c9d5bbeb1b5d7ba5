"""Presets of a calibrated method: how much time it may take, as fields of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class Effort:
    """One preset.

    Attributes:
        cost: what it takes, in words, for `methods` and --help.
        fields: (fields that the recipe gives) -> fields of the method that it leaves open.
        tune: fields of the recipe's `tune` section; None for no block tuning.
        calibration: (fields that the recipe gives) -> fields of its `calibration` section.
    """

    cost: str
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    tune: Mapping[str, Any] | None = field(default=None)
    calibration: Callable[[Mapping[str, Any]], dict[str, Any]] = field(default=lambda given: {})


def one_pass(given: Mapping[str, Any]) -> dict[str, Any]:
    """Calibration that runs the original model once, where no shifted target compares it with the compressed one."""
    return {} if given.get("shift") else {"activations": "original"}
