"""Parameters that a model definition expects and a checkpoint lacks, or holds in another shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aicompress.model import hf
from aicompress.model.loading.fill import computed
from aicompress.model.loading.fitting import fitted


def mismatches(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str] | None:
    """Parameters that transformers would fill with random values or refuse, each with the reason.

    A tied parameter is there when any of those it is tied to is. Parameters that the architecture keeps merged, such as
    experts, are not judged, and one that it computes may be missing.

    Args:
        config: config.json.
        shapes: shapes of the checkpoint's parameters by name.

    Returns:
        None when transformers does not know the architecture.
    """
    fit = fitted(config, shapes)
    if fit is None:
        return None
    model = fit.model
    model.tie_weights()
    targets = hf.parameter_names(model, shapes)
    merged = [pattern for _, merge in targets.values() if merge is not None for pattern in merge[1].target_patterns]
    present = {target: name for name, (target, merge) in targets.items() if merge is None}
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    made = computed(model, [name for name, _ in model.named_parameters()])
    problems: list[str] = []
    for wanted, parameter in model.named_parameters():
        source = next((present[name] for name in tied[id(parameter)] if name in present), None)
        if source is None and wanted not in made and not any(pattern in wanted for pattern in merged):
            problems.append(f"{wanted} is missing")
        elif source is not None and tuple(parameter.shape) != shapes[source]:
            problems.append(f"{source} is {list(shapes[source])}, config.json says {list(parameter.shape)}")
    return problems
