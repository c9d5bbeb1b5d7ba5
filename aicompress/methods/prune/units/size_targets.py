"""Sizes by their effect: as many units stay as a number of parameters, bytes or milliseconds allows."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ByteSize, Field

from aicompress.methods.structural import StructuralConfig

Target = Literal["target_parameters", "target_bytes", "target_latency"]
TARGETS: tuple[Target, ...] = ("target_parameters", "target_bytes", "target_latency")


def multiples(size: int, of: int) -> list[int]:
    """`size`, and the multiples of a number below it, in descending order.

    >>> multiples(20, 8)
    [20, 16, 8]
    """
    return [size, *range((size - 1) // of * of, 0, -of)]


class TargetedConfig(StructuralConfig):
    """Parameters of methods whose size can follow from a target; the driver finds it."""

    target_parameters: int | None = Field(None, ge=1, description="parameters of the whole model afterwards, at most")
    target_bytes: ByteSize | None = Field(
        None, description="bytes of the weight files afterwards, at most, such as 20MB"
    )
    target_latency: float | None = Field(
        None,
        gt=0,
        le=1,
        description="forward time of the matrix layers afterwards, at most, as a part of the input's; measured here",
    )

    @property
    def target(self) -> Target | None:
        """The target that is given."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    def whole(self) -> Self:
        """The same where nothing goes."""
        return self.model_copy(update={**dict.fromkeys(TARGETS), "keep": 1.0})

    def sized(self, units: int, of: int) -> Self:
        """The same with so many units of so many in place of the target."""
        return self.model_copy(update={**dict.fromkeys(TARGETS), "keep": units / of})

    def probing(self) -> Self:
        """The same without scores that take time, for sizes that are only tried."""
        return self

    def candidates(self, size: int) -> list[int]:
        """Numbers of units that can stay, from all of them down."""
        return list(range(size, 0, -1))
