"""The code that ships inside a checkpoint: decoding, layer and modeling files for transformers.

What this package offers of these files is imported when it is first used, since they import transformers, which takes
seconds: a file of tensors that names no architecture is compressed without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aicompress.model.hf.layers_aicompress import Stored, attach, mark_ready
    from aicompress.model.hf.modeling_aicompress import (
        INSTEAD,
        AicompressConfig,
        arrivals,
        fit_shapes,
        forget_tie,
        parameter_names,
        store,
        tie,
    )

__all__ = [
    "INSTEAD",
    "AicompressConfig",
    "Stored",
    "arrivals",
    "attach",
    "fit_shapes",
    "forget_tie",
    "mark_ready",
    "parameter_names",
    "store",
    "tie",
]


def __getattr__(name: str) -> Any:
    if name in ("Stored", "attach", "mark_ready"):
        from aicompress.model.hf import layers_aicompress

        return getattr(layers_aicompress, name)
    if name in __all__:
        from aicompress.model.hf import modeling_aicompress

        return getattr(modeling_aicompress, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
