"""Kinds of layers, tied parameters and Auto classes of a checkpoint, from its transformers definition."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError
from aicompress.layer import Kind
from aicompress.model import hf
from aicompress.model.kernels.is_linear import is_linear

_EXPERTS = re.compile(r"experts$")
CLASS_PREFIX = "AIC"  # of the classes in modeling_aicompress.py


def layer_kinds(config: dict[str, Any], names: Iterable[str]) -> dict[str, Kind | None] | None:
    """Kinds of a checkpoint's parameters, from its architecture built without memory.

    Args:
        config: config.json.
        names: parameter names in the checkpoint; a base model's prefix may be missing or added.

    Returns:
        Kind by checkpoint name, None for what is no layer; names the architecture lacks are absent. None when
        transformers does not know the architecture: names and shapes must do.
    """
    model = skeleton(config)
    if model is None:
        return None
    known = _parameter_kinds(model)
    known |= _of_experts(config, model, known)
    prefix = f"{model.base_model_prefix}."
    kinds: dict[str, Kind | None] = {}
    others: list[str] = []
    for name in names:
        variant = next((v for v in (name, prefix + name, name.removeprefix(prefix)) if v in known), None)
        if variant is not None:
            kinds[name] = known[variant]
        else:
            others.append(name)
    return kinds | _renamed_kinds(model, known, others)


def _of_experts(config: dict[str, Any], model: Any, known: Mapping[str, Kind | None]) -> dict[str, Kind | None]:
    """Kinds of parameters whose first axis grows with the number of experts in config.json.

    A linear layer with an output for each expert is a router: no layer, for a rounded one chooses other experts. A
    tensor of three axes holds a matrix for each.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim in (2, 3)}
    shapes = {name: shape for name, shape in shapes.items() if len(shape) == 3 or known.get(name) in ("linear", "head")}
    kinds: dict[str, Kind | None] = {}
    for path, count in _expert_counts(model.config.to_dict()):
        candidates = {name for name, shape in shapes.items() if shape[0] == count} - kinds.keys()
        try:
            more = new_skeleton(_with(config, path, 2 * count)) if candidates else None
        except CheckpointError:  # bound to other numbers
            continue
        grown = {} if more is None else {name: tuple(p.shape) for name, p in more.named_parameters()}
        for name in candidates:
            if grown.get(name) == (2 * count, *shapes[name][1:]):
                kinds[name] = "experts" if len(shapes[name]) == 3 else None
    return kinds


def _expert_counts(section: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Fields of a configuration that can be a number of experts, with their values."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _expert_counts(value, (*path, key))
        elif _EXPERTS.search(str(key)) and type(value) is int and value > 1:
            yield (*path, key), value


def _with(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """config.json with one field changed; sections that it lacks are added."""
    key, *inner = path
    section = config.get(key)
    return {**config, key: _with(section if isinstance(section, dict) else {}, tuple(inner), value) if inner else value}


def _renamed_kinds(model: Any, known: Mapping[str, Kind | None], names: list[str]) -> dict[str, Kind | None]:
    """Kinds of parameters that transformers renames as it loads them, such as a Mixtral's routers."""
    placed = hf.parameter_names(model, names) if names else {}
    return {name: known[target] for name, (target, merge) in placed.items() if merge is None and target in known}


def tied_parameters(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Copy -> original of the checkpoint's parameters that the architecture ties; both must be there.

    Args:
        config: config.json.
        names: parameter names in the checkpoint; a base model's prefix may be missing or added.
    """
    model = skeleton(config)
    if model is None:
        return {}
    prefix = f"{model.base_model_prefix}."
    known = list(names)
    present = {variant: name for name in known for variant in (name.removeprefix(prefix), prefix + name, name)}
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        members = groups.setdefault(source, [present[source]] if source in present else [])
        if target in present and present[target] not in members:
            members.append(present[target])
    return {copy: original for original, *copies in filter(None, groups.values()) for copy in copies}


def skeleton(config: dict[str, Any]) -> Any | None:
    """The architecture on the meta device, to be looked at and not changed: a step asks for one several times.

    Raises:
        CheckpointError: the config is not one that the architecture takes.
    """
    return _shared_skeleton(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _shared_skeleton(config: str) -> Any | None:
    return new_skeleton(json.loads(config))


def new_skeleton(config: dict[str, Any], **options: Any) -> Any | None:
    """A new model of the architecture, on the meta device; None when transformers does not know it.

    Args:
        config: config.json.
        options: of the architecture's class, beside its configuration.

    Raises:
        CheckpointError: the config is not one that the architecture takes.
    """
    architecture = _class_of(config)
    return None if architecture is None else _built(config, architecture, **options)


def definition_of(config: dict[str, Any]) -> tuple[Any, Any] | None:
    """The architecture's class and its configuration, read; None when transformers does not know it.

    Raises:
        CheckpointError: the config is not one that the architecture takes.
    """
    architecture = _class_of(config)
    if architecture is None:
        return None
    with _refusing(architecture):
        return architecture, _parsed(config)


def _class_of(config: dict[str, Any]) -> Any | None:
    """transformers' class of the architecture; None when it does not know it."""
    import transformers

    known = str(config.get("model_type")) in transformers.CONFIG_MAPPING
    return getattr(transformers, _architecture(config), None) if known else None


def stock_models(config: dict[str, Any]) -> list[Any]:
    """New models that people load a checkpoint as in transformers, on the meta device; none where it is unknown there.

    They are what config.json names, and what `AutoModel` makes of it.

    Raises:
        CheckpointError: the config is not one that the architecture takes.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    model = new_skeleton(config)
    if model is None:
        return []
    kind = MODEL_MAPPING_NAMES.get(str(config.get("model_type")), ())
    names = [*(config.get("architectures") or [])[1:], *((kind,) if isinstance(kind, str) else kind[:1])]
    classes = dict.fromkeys(getattr(transformers, str(name), None) for name in names)
    others = [_alternative(config, each) for each in classes if each not in (None, type(model))]
    return [model, *(other for other in others if other is not None)]


def _alternative(config: dict[str, Any], architecture: Any) -> Any | None:
    """What else a checkpoint is loaded as; None where the class does not take its config, and says so when it loads."""
    try:
        return _built(config, architecture)
    except CheckpointError:
        return None


def _built(config: dict[str, Any], architecture: Any, **options: Any) -> Any:
    with _refusing(architecture), without_initialization():
        parsed = _parsed(config)
        with torch.device("meta"):
            return architecture(parsed, **options)


def _parsed(config: dict[str, Any]) -> Any:
    """transformers' own configuration of a config.json."""
    import transformers

    plain = {key: _decoded(value) for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    return transformers.CONFIG_MAPPING[str(config.get("model_type"))].from_dict(plain)


@contextmanager
def _refusing(architecture: Any) -> Iterator[None]:
    """Turn whatever a wrong value of config.json breaks in the architecture's own code into a refusal."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise CheckpointError(
            f"config.json does not describe a {architecture.__name__}: {reason}",
            "download or copy the checkpoint again",
        ) from error


def _decoded(value: Any) -> Any:
    """A field of config.json with the numbers that JSON cannot hold, as transformers writes them."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(inner) for key, inner in value.items()}
    return [_decoded(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def without_initialization() -> Iterator[None]:
    """Let torch initialize no tensor on the meta device: it has no values, and drawing them takes half of the time."""
    functions = {
        name: function for name, function in vars(nn.init).items() if name.endswith("_") and callable(function)
    }

    def unless_meta(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda tensor, *given, **named: tensor if tensor.is_meta else function(tensor, *given, **named)

    try:
        for name, function in functions.items():
            setattr(nn.init, name, unless_meta(function))
        yield
    finally:
        for name, function in functions.items():
            setattr(nn.init, name, function)


def _architecture(config: dict[str, Any]) -> str:
    """The architecture that config.json names, or the base class of its model type, as AutoModel takes it.

    Saving a model loaded through the checkpoint's own code prefixes the name.
    """
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0]).removeprefix(CLASS_PREFIX)
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    base = MODEL_MAPPING_NAMES.get(str(config.get("model_type")))
    return str(base[0] if isinstance(base, list | tuple) else base)


def has_generate(config: dict[str, Any]) -> bool:
    """Whether the architecture that config.json names generates tokens."""
    import transformers

    return hasattr(getattr(transformers, _architecture(config), None), "generate")


def auto_class_names(config: dict[str, Any]) -> dict[str, str]:
    """Classes of modeling_aicompress.py by Auto class, for every Auto class that knows the model type.

    Args:
        config: config.json.

    Returns:
        E.g. {"AutoModel": "AICLlamaModel", "AutoModelForCausalLM": "AICLlamaForCausalLM"}; the architecture that the
        config names is taken for its Auto class.
    """
    from transformers.models.auto import modeling_auto

    classes: dict[str, str] = {}
    for auto, kind in vars(modeling_auto).items():
        mapping = getattr(kind, "_model_mapping", None)
        if not auto.startswith("AutoModel") or mapping is None:
            continue
        known = mapping._model_mapping.get(config.get("model_type"))
        names = known if isinstance(known, list | tuple) else [known] if known else []
        if names:
            named = _architecture(config)
            classes[auto] = CLASS_PREFIX + (named if named in names else names[0])
    return classes


def _parameter_kinds(model: Any) -> dict[str, Kind | None]:
    """Kind of every parameter of two or more dimensions; others are left to be copied."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = set(model.base_model.modules())
    kinds: dict[str, Kind | None] = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            kinds[full] = _module_kind(module, module is head or module not in backbone) if name == "weight" else None
    return kinds


def _module_kind(module: nn.Module, is_head: bool) -> Kind | None:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if is_linear(module):
        return "head" if is_head else "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    return None
