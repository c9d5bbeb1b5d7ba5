"""What transformers makes of a config.json: an architecture's class, and models of it on the meta device."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

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


CLASS_PREFIX = "AIC"  # of the classes in modeling_aicompress.py


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


def parts_are_called(config: Mapping[str, Any]) -> bool:
    """Whether parts of a model are called in transformers before the model itself is.

    `generate` runs an encoder before it calls the model, and models such as CLIP give features of texts or of images
    alone.
    """
    names = config.get("architectures") or []
    if config.get("is_encoder_decoder") or not names:
        return bool(config.get("is_encoder_decoder"))
    import transformers

    return any(hasattr(getattr(transformers, str(name), None), "get_text_features") for name in names)


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
            model = architecture(parsed, **options)
    if not hasattr(model, "all_tied_weights_keys"):  # which `post_init` gives, at the end of a class's constructor
        what = f"transformers cannot load {architecture.__name__}: its constructor ends before loading is prepared"
        raise CheckpointError(what, "another version of transformers may be able to")
    return model


def _parsed(config: dict[str, Any]) -> Any:
    """transformers' own configuration of a config.json: one for every model, which may change it."""
    return copy.deepcopy(_read(json.dumps(config)))


@lru_cache(maxsize=16)
def _read(text: str) -> Any:
    import transformers

    config = json.loads(text)
    plain = {key: _decoded(value) for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    return transformers.CONFIG_MAPPING[str(config.get("model_type"))].from_dict(plain)


def _refusing(architecture: Any) -> AbstractContextManager[None]:
    """Refuse a config.json of which a wrong value breaks the architecture's own code."""
    told = f"config.json does not describe a {architecture.__name__}"
    return refusing(told, "download or copy the checkpoint again")


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
