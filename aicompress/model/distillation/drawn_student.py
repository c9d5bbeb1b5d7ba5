"""A new model of a configuration, with the weights that transformers draws for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aicompress.errors import CheckpointError
from aicompress.model.loading.definitions.definition import definition_of, refusing


def drawn_model(config: dict[str, Any], seed: int) -> Any:
    """A model of transformers with random weights, in the dtype that the configuration names, else in float32.

    Args:
        config: config.json.
        seed: of the weights; the state of torch's generator stays as it is.

    Raises:
        CheckpointError: transformers does not know the architecture, or does not take its configuration.
    """
    defined = definition_of(config)
    if defined is None:
        named = (config.get("architectures") or [config.get("model_type")])[0]
        raise CheckpointError(f"transformers does not know the architecture {named!r}", "check the config of `student`")
    architecture, parsed = defined
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with refusing(f"it does not describe a {architecture.__name__}", "check its sizes against each other"):
            model = architecture(parsed)
    return model.to(parsed.dtype or torch.float32)


def save(model: Any, folder: Path) -> None:
    """Save a model as transformers does, without the bar that it would draw."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
