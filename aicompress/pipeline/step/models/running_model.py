"""Load checkpoints as models, and make inputs to run them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aicompress.checkpoint.source import locate
from aicompress.data import Data, Tokenizer, arrays, batches
from aicompress.errors import CheckpointError
from aicompress.model.channels.graph import forward
from aicompress.model.loading.definitions.config import most_positions
from aicompress.model.loading.pooling import Pooling
from aicompress.pipeline.step.input import Adapted
from aicompress.recipe import Model

Inputs = Tensor | dict[str, Tensor]
STORED = "stored numbers"
DECODED = ("reference: ", "dense")  # what `aicompress.load` calls layers that are decoded
ENCODED = 32  # sentences in a batch


@dataclass(frozen=True)
class Running:
    """A loaded checkpoint, ready to run.

    Attributes:
        path: as given, with what is merged into it.
        module: in evaluation mode.
        folder: its directory; None for a bare file.
    """

    path: str
    module: nn.Module
    folder: Path | None = None

    @property
    def kernels(self) -> str:
        """What its compressed layers run on; STORED where all of them compute with the numbers in the files."""
        named: dict[str, str] = getattr(self.module, "aicompress_kernels", {})
        fast = {kernel for kernel in named.values() if not kernel.startswith(DECODED)}
        return "; ".join(sorted(fast)) or STORED

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Read when it is first asked for; None where the checkpoint has none."""
        from aicompress.model.loading.tokenizer import load_tokenizer

        tokenizer: Tokenizer | None = load_tokenizer(self.folder)
        return tokenizer

    @cached_property
    def pooling(self) -> Pooling:
        """How token states become a sentence embedding."""
        from aicompress.model.loading.pooling import pooling

        return pooling(self.folder)


@dataclass(frozen=True)
class Setting:
    """How models are run; the same for all that are compared.

    Attributes:
        model: how to build a bare file's module.
        allow_code: the recipe's factory may run.
        device: cpu or cuda.
        kernels: fast ones where there are any, or the reference that decodes.
    """

    model: Model | None = None
    allow_code: bool = False
    device: str = "cpu"
    kernels: Literal["fast", "reference"] = "fast"

    def start(self, source: str | Adapted) -> Running:
        """Load a checkpoint, with its adapters merged.

        Raises:
            CheckpointError: damaged, or nothing says how to run it.
        """
        from aicompress.model.loading.load import load

        given = source if isinstance(source, Adapted) else Adapted(source)
        path = str(given.path)
        built = None if self.model is None else _built(path, self.model, self.allow_code)
        opened = given.open() if given.adapters else path
        module = load(opened, model=built, device=self.device, kernels=self.kernels)
        if not isinstance(module, nn.Module):
            raise CheckpointError(
                f"{path} names no architecture, so it cannot be run",
                "give the recipe a `model:` section, for example model: {sequential: [flatten, fc1, relu, fc2]}",
            )
        return Running(given.name, module, locate(path).folder)


def _built(path: str, section: Model, allow_code: bool) -> nn.Module:
    from aicompress.model.loading.definitions.chain import module_for

    module: nn.Module = module_for(path, section, allow_code)
    return module


def resolved_device(name: str) -> str:
    """`auto` is the GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def encoder(running: Running, length: int) -> Callable[[Sequence[str]], Tensor]:
    """Sentences -> embeddings (sentences, width) of a sentence encoder, pooled as the checkpoint says."""
    device = next(running.module.parameters()).device
    module: Any = running.module
    length = min(length, most_positions(running.module) or length)
    module = getattr(module, "base_model", module)  # under a head, whose outputs are no states of tokens

    @torch.inference_mode()
    def encode(sentences: Sequence[str]) -> Tensor:
        order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))  # like lengths pad each other least
        rows: list[Tensor] = []
        for batch in batches([sentences[i] for i in order], running.tokenizer, ENCODED, length):
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            states = getattr(module(**moved), "last_hidden_state", None)
            if states is None:
                raise CheckpointError(
                    f"{running.path}: a {type(module).__name__} gives no states of tokens to be pooled",
                    "sentence embeddings are taken from encoders",
                )
            rows.append(running.pooling(states, moved["attention_mask"].bool()).cpu())
        embeddings = torch.empty(len(sentences), rows[0].shape[1])
        embeddings[order] = torch.cat(rows)
        return embeddings

    return encode


def example(module: nn.Module, batch: int, length: int, labelled: Data | None = None) -> tuple[Inputs, str] | None:
    """Inputs to time a model on, and what they are in words; None where nothing says what the model takes.

    Args:
        labelled: the recipe's arrays, for a module without a configuration.
    """
    if labelled is not None and labelled.kind == "arrays":
        few = {"samples": min(batch, labelled.samples or batch), "labels": None}
        samples, _, _ = arrays(labelled.model_copy(update=few))
        first = first_decoder_tokens(module, len(samples))
        inputs = samples if first is None else {str(module.main_input_name): samples, "decoder_input_ids": first}
        return inputs, f"{len(samples)} sample{'s' if len(samples) != 1 else ''}"
    model_config: Any = getattr(module, "config", None)
    taken = getattr(module, "main_input_name", None)
    if model_config is None or taken is None:
        return None
    images = _images(getattr(model_config, "vision_config", model_config), batch)
    if taken == "input_ids":
        tokens = _tokens(module, batch, length)
        words = f"{batch} × {tokens['input_ids'].shape[1]} tokens"
        if hasattr(module, "get_text_features") and hasattr(module, "get_image_features") and images:
            return {**tokens, **images}, f"{words} and {batch} images"  # one that compares texts with images
        return tokens, words
    return (images, f"{batch} images") if taken == "pixel_values" and images else None


def first_decoder_tokens(module: nn.Module, samples: int) -> Tensor | None:
    """What a decoder behind an encoder begins each sample with, (samples, 1) int64; None of another model."""
    described: Any = getattr(module, "config", None)
    if not getattr(described, "is_encoder_decoder", False):
        return None
    start = getattr(described, "decoder_start_token_id", None) or getattr(described, "bos_token_id", None) or 0
    return torch.full((samples, 1), start, dtype=torch.int64)


def _images(model_config: Any, batch: int) -> dict[str, Tensor]:
    """Random images; nothing where the configuration does not say of what size."""
    size = getattr(model_config, "image_size", None)
    if size is None:
        return {}
    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch, getattr(model_config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def _tokens(module: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens without padding; an encoder-decoder reads as many as it writes."""
    model_config: Any = module.config
    shape = (batch, min(length, most_positions(module) or length))
    ids = torch.randint(0, model_config.get_text_config().vocab_size, shape, generator=torch.Generator().manual_seed(0))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**tokens, "decoder_input_ids": ids} if getattr(model_config, "is_encoder_decoder", False) else tokens


def placed(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs on a device."""
    return inputs.to(device) if isinstance(inputs, Tensor) else {name: part.to(device) for name, part in inputs.items()}


def forward_call(module: nn.Module, inputs: Inputs) -> Callable[[], object]:
    """A forward pass on fixed inputs, to be timed."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    moved = placed(inputs, device)

    @torch.inference_mode()
    def run() -> object:
        output = forward(module, moved)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return output

    return run
