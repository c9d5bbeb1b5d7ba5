"""The files of an output, laid out to the byte before any data is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from aicompress.checkpoint.header import build_bundle, build_header
from aicompress.weights import TensorSpec


@dataclass(frozen=True)
class ShardPlan:
    """One output file.

    Attributes:
        name: file name.
        specs: its tensors.
        metadata: strings of its header.
        bundled: all tensors lie in one, behind a short description.
    """

    name: str
    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
    bundled: bool = False

    @cached_property
    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes, and where each tensor begins."""
        return build_bundle(self.specs, self.metadata) if self.bundled else build_header(self.specs, self.metadata)

    def stamped(self, metadata: Mapping[str, str]) -> bytes:
        """The file's first bytes with other metadata, as long as they are.

        Raises:
            ValueError: that does not fit.
        """
        length = len(self.layout[0])
        if not self.bundled:
            return build_header(self.specs, metadata, length=length - 8)[0]
        first, _ = build_bundle(self.specs, metadata)
        if len(first) != length:
            raise ValueError(f"the description needs {len(first)} bytes, {length} are reserved")
        return first

    @property
    def nbytes(self) -> int:
        """Exact size of the file."""
        return len(self.layout[0]) + sum(spec.nbytes for spec in self.specs.values())


def plan_shards(
    specs: Mapping[str, TensorSpec], limit: int | None, metadata: Mapping[str, str], base: str = "model"
) -> tuple[ShardPlan, ...]:
    """Split tensors into files of at most `limit` bytes of data; a module, with all its tensors, is never split.

    Args:
        specs: tensors in the order they should lie.
        limit: bytes, or None for one file.
        metadata: strings for the header of the first file.
        base: what the files are called.
    """
    modules: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = spec
    shards: list[dict[str, TensorSpec]] = [{}]
    used = 0
    for tensors in modules.values():
        size = sum(spec.nbytes for spec in tensors.values())
        if limit is not None and used and used + size > limit:
            shards.append({})
            used = 0
        shards[-1].update(tensors)
        used += size
    count = len(shards)
    names = (
        [f"{base}.safetensors"]
        if count == 1
        else [f"{base}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    return tuple(
        ShardPlan(n, s, dict(metadata) if i == 0 else {}) for i, (n, s) in enumerate(zip(names, shards, strict=True))
    )


def index_text(shards: tuple[ShardPlan, ...], parameters: int) -> str:
    """The index of a sharded checkpoint; total_size is in bytes."""
    total = sum(spec.nbytes for shard in shards for spec in shard.specs.values())
    weight_map = {name: shard.name for shard in shards for name in shard.specs}
    return json.dumps(
        {
            "metadata": {"total_size": total, "total_parameters": parameters},
            "weight_map": dict(sorted(weight_map.items())),
        },
        indent=2,
    )
