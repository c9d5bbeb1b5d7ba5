"""Call the code of transformers' architectures, which may raise anything on a configuration that nobody has tried."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aicompress.errors import CheckpointError, CompressError


@contextmanager
def refusing(told: str, hint: str = "") -> Iterator[None]:
    """Turn whatever an architecture's code raises into a refusal.

    Args:
        told: what it cannot do; the reason is put behind it.
        hint: of the refusal.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        raise CheckpointError(f"{told}: {reason_of(error)}", hint) from error


def reason_of(error: BaseException) -> str:
    """The line of an error that says most: the last, under the error's name where it is a mere key or empty."""
    line = (str(error).strip().splitlines() or [""])[-1].strip()
    return line if " " in line else f"{type(error).__name__} {line}".strip()
