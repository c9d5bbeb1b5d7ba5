"""What compressed-tensors has decompressed and saved: plain numbers, beside the scales that they were codes of.

transformers decompresses at the first call of a model, and `save_pretrained` then writes `weight` as it is in memory;
`quantization_status: decompressed` of quantization_config says so. A weight of real numbers under another status is not
rounded yet, and not read.
"""

from __future__ import annotations

from aicompress.checkpoint.foreign.layout import (
    ForeignLayout,
    ForeignTensors,
    ForeignWeight,
    Read,
    modules_with,
    weight_of,
)
from aicompress.checkpoint.naming import is_transposed
from aicompress.layer import as_matrix
from aicompress.weights import Dense

ROLES = {"weight": "weight", "scale": "weight_scale", "zero": "weight_zero_point", "shape": "weight_shape"}
ROLES |= {"global": "weight_global_scale", "order": "weight_g_idx"}
DECOMPRESSED = "decompressed"
WORDS = "decompressed by another tool, its scales left beside it"


def weights(stored: ForeignTensors) -> dict[str, ForeignWeight]:
    """Matrices of real numbers with scales beside them, where all of the checkpoint is decompressed."""
    if stored.settings.get("quantization_status") != DECOMPRESSED:
        return {}
    recognized: dict[str, ForeignWeight] = {}
    for module in modules_with(stored.specs, "weight_scale"):
        names = stored.names(module, ROLES)
        spec = stored.specs.get(names.get("weight", ""))
        if spec is None or not spec.dtype.is_floating_point or spec.dtype.itemsize < 2 or len(spec.shape) != 2:
            continue
        transposed = is_transposed(weight_of(module), stored.config)

        def plain(read: Read, transposed: bool = transposed) -> Dense:
            return Dense(as_matrix(read("weight"), transposed))

        along = {"weight": int(transposed)}
        recognized[weight_of(module)] = ForeignWeight(spec, names, WORDS, plain, None, transposed, along=along)
    return recognized


LAYOUT = ForeignLayout("decompressed", ("compressed-tensors",), weights)
