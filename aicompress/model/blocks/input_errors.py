"""Turn exceptions that a model raises on the user's data into one line with a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aicompress.errors import CompressError, Refused, first_line

_OF_DATA = (
    RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError, ArithmeticError,
)  # fmt: skip


@contextmanager
def input_errors_refused(what: str = "calibration inputs") -> Iterator[None]:
    """Around a model's first look at data: what it raises there is about the data.

    Raises:
        Refused: the model does not run on them.
    """
    try:
        yield
    except CompressError:
        raise
    except _OF_DATA as error:
        if "allocate memory" in str(error):
            raise
        reason = first_line(error)
        raise Refused(
            f"the model does not run on the {what}: {reason}",
            "check their shape and values, and that `length` is no longer than the model's positions",
        ) from error
