"""Shapes that transformers expects of a checkpoint, from a model built on the meta device, without memory.

Names on disk differ from names of modules (renamed attributes, experts stored one by one and fused when loaded), so
both directions go through transformers: its own saving gives the names on disk, its own loading judges a checkpoint.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError
from aicompress.model.architecture.config_fields import Path, value_at, with_value
from aicompress.model.loading.definitions.definition import (
    definition_of,
    new_skeleton,
    reason_of,
    refusing,
    without_initialization,
)
from aicompress.weights import TensorSpec

T = TypeVar("T")
# A block's place, and what its own parameters already tell: not part of how it computes.
_PLACE = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "has_relative_attention_bias"}


def build(config: Mapping[str, Any]) -> Any:
    """The architecture that config.json describes, on the meta device.

    Raises:
        CheckpointError: transformers does not know it, or refuses the configuration.
    """
    with _quiet(), _refusing(config):
        model = new_skeleton(dict(config))
    return _require_known(model, config)


def changed(config: Mapping[str, Any], told: str, hint: str) -> Any:
    """The architecture that a changed config.json describes, on the meta device.

    Args:
        config: config.json of the output.
        told: what it would be, where transformers does not build it.
        hint: of the refusal.

    Raises:
        CheckpointError: transformers does not build it.
    """
    try:
        return build(config)
    except CheckpointError as error:
        raise CheckpointError(f"{told}: {reason_of(root_of(error))}", hint) from error


def root_of(error: BaseException) -> BaseException:
    """What an architecture's code raised, of which a refusal was made."""
    return error if error.__cause__ is None else root_of(error.__cause__)


def base_prefix(config: Mapping[str, Any]) -> str:
    """Name of the base model inside the architecture, such as `model` or `bert`.

    Raises:
        CheckpointError: transformers does not know it, or refuses the configuration.
    """
    return str(_definition(config)[0].base_model_prefix)


def _definition(config: Mapping[str, Any]) -> tuple[Any, Any]:
    with _refusing(config):
        definition = definition_of(dict(config))
    return _require_known(definition, config)


def _named(config: Mapping[str, Any]) -> Any:
    return (config.get("architectures") or [config.get("model_type")])[0]


@contextmanager
def _refusing(config: Mapping[str, Any]) -> Iterator[None]:
    """Say whose configuration is refused: configurations are validated by arbitrary model code."""
    try:
        yield
    except Exception as error:
        reason = reason_of(root_of(error))
        raise CheckpointError(f"transformers refuses the configuration of {_named(config)}: {reason}", "") from error


def _require_known(definition: T | None, config: Mapping[str, Any]) -> T:
    """What transformers has made of a configuration, unless it does not know the architecture."""
    if definition is None:
        raise CheckpointError(
            f"transformers does not know the architecture {_named(config)!r}: its structure cannot be changed safely",
            "structural pruning needs a stock architecture in config.json",
        )
    return definition


def is_taken(config: Mapping[str, Any]) -> bool:
    """Whether transformers builds a model of a configuration."""
    return _is_taken(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=256)
def _is_taken(config: str) -> bool:
    try:
        build(json.loads(config))
    except CheckpointError:
        return False
    return True


def shapes_of(config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of an architecture's tensors as `save_pretrained` stores them; tied ones under every name.

    A step asks for the same several times.

    Raises:
        CheckpointError: transformers does not know it, or refuses the configuration.
    """
    return _shapes_of(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=128)
def _shapes_of(config: str) -> Mapping[str, tuple[int, ...]]:
    model = build(json.loads(config))
    with refusing(f"the tensors of {type(model).__name__} cannot be named as they are stored"):
        stored = stored_tensors(model)
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in stored.items()})


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """A model's tensors as `save_pretrained` stores them."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, model.state_dict()))


def reads_size(config: Mapping[str, Any], path: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the architecture has these shapes with the size of a head that config.json gives, others with another."""
    try:
        return shapes_of(config) == shapes != shapes_of(with_value(config, path, 2 * value_at(config, path)))
    except CheckpointError:  # no field of it
        return False


def misfits(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> set[str]:
    """What goes wrong when transformers loads a checkpoint: missing and unexpected names, shapes that differ.

    Args:
        config: its config.json.
        specs: its parameters, dense.
    """
    architecture, parsed = _definition(config)
    empty = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
    try:
        with _quiet(), without_initialization():
            _, info = _stock_load(architecture)(
                None,
                config=parsed,
                state_dict=empty,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map={"": "meta"},
            )
    except Exception as error:  # experts of different widths cannot be fused; other code of the architecture's own
        return {f"{architecture.__name__} does not load it: {reason_of(error)}"}
    problems = {f"missing {name}" for name in info["missing_keys"]}
    problems |= {f"unexpected {name}" for name in info["unexpected_keys"]}
    return problems | {
        f"{name} has shape {tuple(stored)} where {tuple(expected)} is expected"
        for name, stored, expected in info["mismatched_keys"]
    }


def _stock_load(architecture: Any) -> Callable[..., Any]:
    """transformers' own from_pretrained: that of an architecture may read files of its own, and tell nothing."""
    import transformers

    own: Any = transformers.PreTrainedModel.from_pretrained
    return partial(own.__func__, architecture)


def save(model: Any, folder: str) -> None:
    """Write a small model as a checkpoint, without a word.

    Raises:
        CheckpointError: its code does not.
    """
    with _quiet(), refusing("its smallest model cannot be saved"):
        model.save_pretrained(folder)


def filled(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """A model in memory with these numbers, as transformers loads them; small ones only.

    Args:
        config: its config.json.
        tensors: as they are stored, all of one dtype.

    Raises:
        CheckpointError: it cannot be made of them.
    """
    architecture, parsed = _definition(config)
    parsed._experts_implementation = "eager"  # grouped kernels have no float64
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    try:
        with _quiet(), without_initialization():
            model, info = _stock_load(architecture)(
                None, config=parsed, state_dict=dict(tensors), output_loading_info=True, dtype=dtype
            )
    except Exception as error:  # of the architecture's own code
        raise CheckpointError(f"its tensors cannot be loaded together: {reason_of(error)}", "") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        raise CheckpointError("its tensors do not fill it", "")
    return model.eval().requires_grad_(False)


def defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every field that transformers fills in or derives.

    Raises:
        CheckpointError: transformers does not know the architecture, or refuses the configuration.
    """
    return copy.deepcopy(_defaults(json.dumps(config, sort_keys=True)))


@lru_cache(maxsize=64)
def _defaults(config: str) -> dict[str, Any]:
    return dict(build(json.loads(config)).config.to_dict())


def block_traits(model: Any) -> dict[str, list[dict[str, Any]]]:
    """How the blocks of every module list compute, beside their parameters: plain attributes of all their modules.

    Returns:
        Name of the list -> for each block {attribute path: value}. A block's index is left out.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: [dict(_traits(block)) for block in blocks] for name, blocks in lists.items()}


def _traits(block: nn.Module | None) -> Iterator[tuple[str, Any]]:
    if block is None:  # an empty place in the list, as behind the last block of Informer
        yield ".class", None
        return
    for name, module in block.named_modules():
        yield f"{name}.class", type(module).__name__
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None) and key not in _PLACE and not key.startswith("_"):
                yield f"{name}.{key}", value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' load report and progress bar off the terminal: the caller reads the findings."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
