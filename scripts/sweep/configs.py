"""Small models of any type that transformers knows, from its default configuration made small."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from scripts.sweep.given import GIVEN
from scripts.sweep.shrinking import VOCABULARY, plain_value, shrunk

LARGEST = 6_000_000  # parameters
CLASSES = 3  # of a type that are tried
LACKS = re.compile(r"'(\w+Config)' object has no attribute '(\w+)'")
MOST_ADDED = 6
PLAIN = {
    "hidden": 64, "inner": 96, "expert": 48, "heads": 4, "groups": 2, "head": 16, "rotary": 8, "latent": 16,
    "experts": 4, "state": 16, "chosen": 2, "single": 1, "depth": 2, "vocabulary": VOCABULARY, "positions": 128,
    "image": 32, "patch": 8,
}  # fmt: skip
# All that is large is divided by one number, which leaves what the fields of a type must be to each other.
DIVIDED = {"depth": 2, "vocabulary": VOCABULARY, "experts": 4, "chosen": 2, "single": 1, "positions": 128}
WHOLE: dict[str, int | None] = {"depth": None, "experts": None, "chosen": None}
# What is tried in turn, until transformers takes it; None leaves what the default is. `unset` gives the size of a head
# and the kinds of layers, one of each kind, where the type derives or lists them; `features` keeps which stages of a
# backbone are read.
ATTEMPTS: tuple[dict[str, int | None], ...] = (
    PLAIN,
    {**PLAIN, "groups": 4},
    {**PLAIN, "heads": 8, "groups": 8},  # of a state-space block: twice the hidden width
    {**PLAIN, "depth": 4, "groups": 4},
    {**PLAIN, "unset": 16},
    {**PLAIN, "unset": 16, "groups": 4},
    {**PLAIN, "image": None, "patch": None},
    {**PLAIN, "heads": 2, "groups": 2, "head": 32},
    {"hidden": 128, "inner": 128, "depth": 2, "vocabulary": VOCABULARY, "experts": 4},
    {"depth": 2, "vocabulary": VOCABULARY, "inner": 64, "experts": 4},
    {"depth": 2, "vocabulary": VOCABULARY},
    {},
    *({**DIVIDED, "divisor": divisor, **more} for more in ({}, WHOLE) for divisor in (8, 4, 32)),
    *({**DIVIDED, "divisor": 8, "least": 16, **more} for more in ({}, WHOLE)),
    *({**DIVIDED, **WHOLE, "divisor": divisor, "features": 1} for divisor in (8, 4)),
    {**DIVIDED, "divisor": 2},
    {**PLAIN, "divisor": 2},
    {**PLAIN, "groups": 4, "divisor": 4},
    {**PLAIN, "unset": 16, "divisor": 4},
)
FIRST = (  # which class of a type is taken: the first of these that has one
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CTC",
    "IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION",
)  # fmt: skip


class NotBuilt(Exception):
    """transformers has no model of a type, or none of a small configuration."""


def model_types() -> list[str]:
    """Every model type."""
    return sorted(CONFIG_MAPPING_NAMES)


def small_model(model_type: str) -> Any:
    """A model with random weights and no more than `LARGEST` parameters.

    Raises:
        NotBuilt: there is none.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise NotBuilt("transformers does not know it")
    try:
        kinds, reasons = classes_of(model_type)[:CLASSES], list[str]()
    except ImportError as error:
        raise NotBuilt(f"transformers cannot import it: {error}") from error
    parsed = transformers.CONFIG_MAPPING[model_type]
    given = GIVEN.get(model_type)
    for kind, attempt in product(kinds, ATTEMPTS if given is None else (given,)):
        try:
            config, count = _counted(kind, parsed, attempt) if given is None else _of(kind, parsed(**deepcopy(given)))
            if count > LARGEST:
                reasons.append(f"{count:,} parameters")
                continue
            torch.manual_seed(0)
            return _finite(kind(config).eval())
        except Exception as error:  # whatever a number breaks in the type's own code
            reasons.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:120]}")
    raise NotBuilt(reasons[0])


@torch.no_grad()
def _finite(model: Any) -> Any:
    """The model, with noise in parameters that its class leaves as memory was."""
    for parameter in model.parameters():
        if not parameter.isfinite().all():
            parameter.normal_(std=0.02)
    return model


def _counted(kind: Any, parsed: Any, attempt: Mapping[str, int | None]) -> tuple[Any, int]:
    """A small configuration, and how many parameters its model has.

    Fields that the model's code reads and the configuration lacks are added, one after another.
    """
    lacking: dict[tuple[str, str], Any] = {}
    while True:
        try:
            return _of(kind, parsed(**shrunk(parsed(), attempt, lacking)))
        except AttributeError as error:
            told = LACKS.search(str(error))
            if told is None or (told[1], told[2]) in lacking or len(lacking) == MOST_ADDED:
                raise
            lacking[told[1], told[2]] = plain_value(told[2], attempt)


def _of(kind: Any, config: Any) -> tuple[Any, int]:
    """A configuration, and how many parameters its model has."""
    with torch.device("meta"):
        return config, sum(parameter.numel() for parameter in kind(config).parameters())


def classes_of(model_type: str) -> list[Any]:
    """Classes of a type's models, that which is taken first.

    Raises:
        NotBuilt: transformers lists none.
    """
    classes: list[Any] = []
    for table in [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in FIRST] + ["MODEL_MAPPING_NAMES"]:
        named = getattr(modeling_auto, table).get(model_type)
        kind = getattr(transformers, named if isinstance(named, str) else named[0], None) if named else None
        if inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel) and kind not in classes:
            classes.append(kind)
    alone = None if classes else _in_modules(transformers.CONFIG_MAPPING[model_type])
    if not classes and alone is None:
        raise NotBuilt("a part of another type: transformers has no model of it alone")
    return classes or [alone]


def _in_modules(config: Any) -> Any | None:
    """A class beside a configuration that takes it, where no table lists one: part of a larger model."""
    folder = Path(inspect.getfile(config)).parent
    package = config.__module__.rpartition(".")[0]
    for path in sorted(folder.glob("modeling_*.py")):
        kinds = vars(importlib.import_module(f"{package}.{path.stem}")).values()
        models = [each for each in kinds if inspect.isclass(each) and issubclass(each, transformers.PreTrainedModel)]
        own = [each for each in models if getattr(each, "config_class", None) is config]
        named = [each for each in own if not each.__name__.endswith("PreTrainedModel")]
        exported = [each for each in named if getattr(transformers, each.__name__, None) is each]
        if exported:
            return exported[0]
    return None
