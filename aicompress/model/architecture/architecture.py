"""Locate the stacks of blocks and the feed-forward layers of a checkpoint by editing its config.json.

Nothing here knows an architecture. A number of config.json is changed, the model is built again on the meta device,
and the tensors that came, went or changed shape show what the number governs: `num_hidden_layers` less one takes the
last block of a stack away, `intermediate_size` doubled lengthens exactly the axes along which neurons lie. The tables
below only say which numbers to try.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from aicompress.checkpoint.naming import is_transposed
from aicompress.errors import CheckpointError
from aicompress.model.architecture.config_fields import (
    DEPTH_FIELDS,
    WIDTH_FIELDS,
    Path,
    fields,
    levels,
    value_at,
    with_value,
)
from aicompress.model.architecture.fused_neurons import NARROW, WIDE, lies_in_halves
from aicompress.model.architecture.layer_groups import grouped
from aicompress.model.architecture.shapes import base_prefix, build, defaults, is_taken, shapes_of
from aicompress.weights import TensorSpec

# Lists with a value for each block; other lists may have as many values by chance.
_PER_BLOCK = re.compile(r"layer|block|sliding_window_pattern|activation_sparsity_pattern")
_NEVER_PER_BLOCK = {"architectures", "id2label", "label2id"}
# Lists of block numbers, and counts of leading blocks of one kind.
INDEX_LISTS = {"mlp_only_layers", "cross_attention_layers", "moe_layers", "attn_layer_indices", "hybrid_layer_ids"}
LEADING_COUNTS = {"max_window_layers", "first_k_dense_replace", "num_dense_layers"}


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other.

    Attributes:
        name: how a recipe names it: the prefix of its tensors, e.g. `model.layers`.
        prefixes: all prefixes that are numbered alike; one, but for a few old architectures.
        size: number of blocks.
        field: the number of blocks in config.json.
    """

    name: str
    prefixes: tuple[str, ...]
    size: int
    field: Path

    def block_of(self, tensor: str) -> int | None:
        """The block that a tensor belongs to."""
        return next((int(match[1]) for p in self.prefixes if (match := self._pattern(p).match(tensor))), None)

    def renumbered(self, tensor: str, block: int) -> str:
        """A tensor's name in another block."""
        prefix = next(p for p in self.prefixes if self._pattern(p).match(tensor))
        return self._pattern(prefix).sub(f"{prefix}.{block}.", tensor, count=1)

    @staticmethod
    def _pattern(prefix: str) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(prefix)}\.(\d+)\.")


@dataclass(frozen=True)
class Coupling:
    """One tensor's share in the neurons of a feed-forward layer.

    Attributes:
        tensor: the parameter.
        axis: its axis along which neurons lie.
        parts: how many times the neurons follow one another there: 2 for a fused gate and up projection.
        role: a producer computes the neurons, a consumer reads them.
    """

    tensor: str
    axis: int
    parts: int
    role: Literal["producer", "consumer"]


@dataclass(frozen=True)
class FeedForward:
    """The neurons of one feed-forward layer, or of one expert.

    Attributes:
        name: common prefix of its tensors, e.g. `model.layers.0`.
        width: number of neurons.
        field: their number in config.json.
        couplings: every tensor that has an axis of neurons.
    """

    name: str
    width: int
    field: Path
    couplings: tuple[Coupling, ...]


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's configuration and parameters, ready to be asked.

    Attributes:
        config: config.json, with the counts and per-block lists that transformers derives made explicit.
        specs: the checkpoint's parameters, dense.
    """

    config: dict[str, Any]
    specs: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, specs: Mapping[str, TensorSpec]) -> Architecture:
        """Read the architecture of a checkpoint.

        Raises:
            CheckpointError: it has no config.json, or transformers does not know it.
        """
        if config is None:
            raise CheckpointError(
                "a bare .safetensors file does not say how its layers are connected",
                "give a directory with config.json; of a bare network the method `channels` removes neurons",
            )
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        return cls(_explicit(plain, defaults(plain)), specs)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return shapes_of(self.config)

    @cached_property
    def on_disk(self) -> Callable[[str], str]:
        """From transformers' names to the checkpoint's, which may lack or add the base model's prefix."""
        prefix = f"{base_prefix(self.config)}."
        variants: list[Callable[[str], str]] = [
            lambda name: name,
            lambda name: name.removeprefix(prefix),
            lambda name: prefix + name,
        ]
        return max(variants, key=lambda variant: sum(variant(name) in self.specs for name in self.shapes))

    def stacks(self) -> list[Stack]:
        """Every stack of two or more blocks whose number config.json sets."""
        stacks = []
        for field in fields(self.config, DEPTH_FIELDS):
            size = value_at(self.config, field)
            if not isinstance(size, int) or size < 2:
                continue
            shapes = shapes_of(keep_blocks(self.config, field, range(size - 1)))
            gone = [name for name in self.shapes if name not in shapes]
            last = re.compile(rf"(.+?)\.{size - 1}\.")
            prefixes = sorted({match[1] if (match := last.match(name)) else "" for name in gone})
            unchanged = all(self.shapes.get(name) == shape for name, shape in shapes.items())
            if prefixes and "" not in prefixes and unchanged:
                mine = tuple(self.on_disk(f"{prefix}.").removesuffix(".") for prefix in prefixes)
                stacks.append(Stack(mine[0], mine, size, field))
        return stacks

    def feed_forwards(self) -> list[FeedForward]:
        """Every feed-forward layer whose width config.json sets."""
        layers = []
        for field in fields(self.config, WIDTH_FIELDS):
            width = value_at(self.config, field)
            if width is None or (isinstance(width, int) and not isinstance(width, bool) and width > 0):
                layers += self._feed_forwards(field, width)
        return layers

    def _feed_forwards(self, field: Path, width: int | None) -> list[FeedForward]:
        probe = 2 * width if width else 16
        shapes = shapes_of(with_value(self.config, field, probe))
        changed = {name: shape for name, shape in self.shapes.items() if shapes.get(name, shape) != shape}
        couplings = [
            coupling
            for name, shape in changed.items()
            for coupling in self._couplings(name, shape, shapes[name], probe)
        ]
        if set(shapes) != set(self.shapes) or len(couplings) != len(changed):
            return []
        widths = {self._shapes_on_disk[c.tensor][c.axis] // c.parts for c in couplings}
        if len(widths) != 1 or (width is not None and widths != {width}):
            return []
        groups = grouped(couplings)
        if any({coupling.role for coupling in group} != {"producer", "consumer"} for group in groups.values()):
            return []
        fused = any(coupling.parts > 1 for coupling in couplings)
        sizes = (build(with_value(self.config, field, size)) for size in (WIDE, NARROW)) if fused else ()
        if fused and not lies_in_halves(*sizes):
            return []
        return [FeedForward(name, next(iter(widths)), field, tuple(group)) for name, group in groups.items()]

    @cached_property
    def names(self) -> set[str]:
        """Names on disk of every tensor that the architecture expects."""
        return set(self._shapes_on_disk)

    @cached_property
    def _shapes_on_disk(self) -> dict[str, tuple[int, ...]]:
        return {self.on_disk(name): shape for name, shape in self.shapes.items()}

    def _couplings(self, name: str, shape: tuple[int, ...], probed: tuple[int, ...], probe: int) -> Iterable[Coupling]:
        axes = [axis for axis, size in enumerate(shape) if probed[axis] != size]
        disk = self.on_disk(name)
        if len(axes) != 1 or probed[axes[0]] % probe or (len(shape) > 2 and axes[0] != 0):
            return  # experts in one tensor of three dimensions lie in an order that the shape does not tell
        produces = axes[0] == (1 if is_transposed(disk, self.config) and len(shape) == 2 else 0)
        yield Coupling(disk, axes[0], probed[axes[0]] // probe, "producer" if produces else "consumer")


def _explicit(config: dict[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the counts and per-block lists that transformers would derive."""
    explicit = copy.deepcopy(config)
    for level in levels(full):
        section = value_at(full, level)
        counts = {section.get(name) for name in DEPTH_FIELDS if isinstance(section.get(name), int)}
        target = explicit
        for key in level:
            if not isinstance(target.get(key), dict):
                break
            target = target[key]
        else:
            for key, value in section.items():
                per_block = isinstance(value, list) and len(value) in counts and is_per_block(key)
                if target.get(key) is None and (key in DEPTH_FIELDS or key in WIDTH_FIELDS or per_block):
                    target[key] = copy.deepcopy(value)
    return explicit


def is_per_block(key: str) -> bool:
    """Whether a list of as many values as there are blocks is one value for each."""
    return bool(_PER_BLOCK.search(key)) and key not in INDEX_LISTS | _NEVER_PER_BLOCK


def _forget_stages(section: dict[str, Any], size: int) -> None:
    """Names of a backbone's stages, one a block, where they are the default: transformers makes them anew."""
    names = section.get("stage_names")
    default = isinstance(names, list) and len(names) == size + 1 and section.get("out_features") == names[-1:]
    for key in ("stage_names", "out_features", "out_indices") if default else ():
        section.pop(key, None)


def keep_blocks(config: Mapping[str, Any], field: Path, keep: Iterable[int]) -> dict[str, Any]:
    """config.json of a model that keeps the blocks `keep` of the stack counted by `field`."""
    kept, size = list(keep), value_at(config, field)
    edited = with_value(config, field, len(kept))
    section = value_at(edited, field[:-1])
    _forget_stages(section, size)
    for key, value in section.items():
        if key in INDEX_LISTS and isinstance(value, list):
            section[key] = [kept.index(block) for block in value if block in kept]
        elif key in LEADING_COUNTS and isinstance(value, int) and value <= size:
            section[key] = sum(block < value for block in kept)
        elif isinstance(value, list) and len(value) == size and is_per_block(key):
            section[key] = [value[block] for block in kept]
        elif isinstance(value, dict) and is_per_block(key) and all(str(block).isdecimal() for block in value):
            section[key] = {str(kept.index(int(block))): value[block] for block in value if int(block) in kept}
    others = [key for key, value in section.items() if isinstance(value, list) and len(value) == size != len(kept)]
    others = [key for key in others if key not in INDEX_LISTS | _NEVER_PER_BLOCK]
    if others and not is_taken(edited) and is_taken(config):  # a list of one value a block whose name does not say so
        section.update({key: [section[key][block] for block in kept] for key in others})
    return edited
