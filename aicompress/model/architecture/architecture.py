"""Read the architecture of a checkpoint, and locate its stacks of blocks by editing its config.json.

Nothing here knows an architecture. A number of config.json is changed, the model is built again on the meta device,
and the tensors that came, went or changed shape show what the number governs: `num_hidden_layers` less one takes the
last block of a stack away. The tables below only say which numbers to try.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from aicompress.errors import CheckpointError
from aicompress.model.architecture.config_fields import (
    DEPTH_FIELDS,
    WIDTH_FIELDS,
    Path,
    dotted,
    fields,
    levels,
    value_at,
    with_value,
)
from aicompress.model.architecture.shapes import base_prefix, build, changed, defaults, is_taken, shapes_of
from aicompress.weights import TensorSpec

# Lists with a value for each block; other lists may have as many values by chance.
_PER_BLOCK = re.compile(r"layer|block|sliding_window_pattern|activation_sparsity_pattern")
_NEVER_PER_BLOCK = {"architectures", "id2label", "label2id"}
# Lists of block numbers, and counts of leading and of trailing blocks of one kind.
INDEX_LISTS = {"mlp_only_layers", "cross_attention_layers", "moe_layers", "attn_layer_indices", "hybrid_layer_ids"}
LEADING_COUNTS = {"max_window_layers", "first_k_dense_replace", "num_dense_layers"}
TRAILING_COUNTS = {"num_kv_shared_layers"}


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


@dataclass(frozen=True, eq=False)
class Architecture:
    """A checkpoint's configuration and parameters, ready to be asked, and not to be changed.

    Attributes:
        config: config.json, with the counts and per-block lists that transformers derives made explicit.
        specs: the checkpoint's parameters, dense.
    """

    config: dict[str, Any]
    specs: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, specs: Mapping[str, TensorSpec]) -> Architecture:
        """Read the architecture of a checkpoint; a step that asks again gets the same object, and what it knows.

        Raises:
            CheckpointError: it has no config.json, or transformers does not know it.
        """
        if config is None:
            raise CheckpointError(
                "no config.json says how its layers are connected",
                "give a directory with config.json; of a bare network the method `channels` removes neurons",
            )
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        return _read(json.dumps(plain), tuple(specs.items()))

    @cached_property
    def model(self) -> Any:
        return build(self.config)

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

    @cached_property
    def copies(self) -> dict[str, str]:
        """Names on disk of tensors that the checkpoint lacks because they are another one's too, with its name."""
        if self.specs.keys() >= self.names:
            return {}
        tied = getattr(self.model, "all_tied_weights_keys", {})
        named = {self.on_disk(copy): self.on_disk(one) for copy, one in tied.items()}
        return {copy: one for copy, one in named.items() if copy not in self.specs}

    def stacks(self) -> list[Stack]:
        """Every stack of two or more blocks whose number config.json sets."""
        stacks = []
        for field in fields(self.config, DEPTH_FIELDS):
            size = value_at(self.config, field)
            if not isinstance(size, int) or size < 2:
                continue
            fewer = keep_blocks(self.config, field, range(size - 1))
            if not is_taken(fewer):  # one kind of blocks must not be missing, say
                continue
            shapes = shapes_of(fewer)
            gone = [name for name in self.shapes if name not in shapes]
            last = re.compile(rf"(.+?)\.{size - 1}\.")
            prefixes = sorted({match[1] if (match := last.match(name)) else "" for name in gone})
            unchanged = all(self.shapes.get(name) == shape for name, shape in shapes.items())
            if prefixes and "" not in prefixes and unchanged:
                mine = tuple(self.on_disk(f"{prefix}.").removesuffix(".") for prefix in prefixes)
                stacks.append(Stack(mine[0], mine, size, field))
        return stacks

    def bound_to_depth(self) -> str | None:
        """A tensor outside any block whose shape follows their number, such as a table with a part for each block.

        Raises:
            CheckpointError: transformers makes no model with a block less.
        """
        for field in fields(self.config, DEPTH_FIELDS):
            size = value_at(self.config, field)
            if isinstance(size, int) and size > 1:
                fewer = keep_blocks(self.config, field, range(size - 1))
                told = f"transformers makes no model of {size - 1} of the {size} blocks that {dotted(field)} counts"
                changed(fewer, told, "prune feed-forward neurons (width) or heads instead")
                for name, shape in shapes_of(fewer).items():
                    if self.shapes.get(name, shape) != shape:
                        return self.on_disk(name)
        return None

    @cached_property
    def names(self) -> set[str]:
        """Names on disk of every tensor that the architecture expects."""
        return set(self.shapes_on_disk)

    @cached_property
    def shapes_on_disk(self) -> dict[str, tuple[int, ...]]:
        return {self.on_disk(name): shape for name, shape in self.shapes.items()}


@lru_cache(maxsize=16)
def _read(text: str, specs: tuple[tuple[str, TensorSpec], ...]) -> Architecture:
    config = json.loads(text)
    return Architecture(_explicit(config, defaults(config)), dict(specs))


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
        elif key in TRAILING_COUNTS and isinstance(value, int) and value <= size:
            section[key] = sum(block >= size - value for block in kept)
        elif isinstance(value, list) and len(value) == size and is_per_block(key):
            section[key] = [value[block] for block in kept]
        elif isinstance(value, dict) and is_per_block(key) and all(str(block).isdecimal() for block in value):
            section[key] = {str(kept.index(int(block))): value[block] for block in value if int(block) in kept}
    others = [key for key, value in section.items() if isinstance(value, list) and len(value) == size != len(kept)]
    others = [key for key in others if key not in INDEX_LISTS | _NEVER_PER_BLOCK]
    if others and not is_taken(edited) and is_taken(config):  # a list of one value a block whose name does not say so
        section.update({key: [section[key][block] for block in kept] for key in others})
    return edited
