"""aicompress: compress saved neural-network checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from aicompress.model.loading.load import load


def __getattr__(name: str) -> Any:
    # `aicompress --help` imports this package, so torch must stay out until load is asked for.
    if name == "load":
        from aicompress.model.loading.load import load

        return load
    raise AttributeError(f"module 'aicompress' has no attribute {name!r}")
