"""Load a checkpoint as a running model: built on the meta device, filled tensor by tensor, nothing left random."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, Refused
from aicompress.model.loading.fill import Filling
from aicompress.model.loading.fitting import fitted
from aicompress.model.loading.mismatches import without_added_biases

Kernels = Literal["fast", "reference"]
# What loading a directory imports, whatever its architecture: seconds, for what comes before the load itself.
IMPORTED = (
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "transformers.tokenization_utils_base",
    "transformers.models.auto.modeling_auto",
)


def load(
    path: str | Path | Checkpoint,
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    kernels: Kernels = "fast",
    trust_remote_code: bool = False,
) -> Any:
    """Load a checkpoint for inference.

    Args:
        path: a Hugging Face directory in any layout, a bare `.safetensors`, an index, or `hf://org/name`; or one that
            has been opened.
        model: for a checkpoint that names no architecture: the module to fill, by parameter names.
        device: where the model runs. The fast kernels are for the CPU; elsewhere compressed layers decode once.
        dtype: of every floating parameter; None keeps what the checkpoint has.
        kernels: "fast" runs compressed layers on the fastest kernel of this machine (`model.aicompress_kernels` says
            which); "reference" decodes them to the dense parameters that other readers see.
        trust_remote_code: build an architecture that transformers does not know from the checkpoint's own code.

    Returns:
        The model in evaluation mode, for inference (see `trainable`); without `model`, the dense tensors by name of a
        bare file, or of a directory whose config.json names no architecture.

    Raises:
        CheckpointError: damaged, or its tensors are not exactly those of the architecture.
    """
    checkpoint = without_added_biases(path if isinstance(path, Checkpoint) else Checkpoint.open(path))
    if model is None and (checkpoint.config is None or _is_nameless(checkpoint.config)):
        return {name: _cast(checkpoint.dense(name), dtype).to(device) for name in checkpoint.parameters()}
    running = model if model is not None else build(checkpoint, trust_remote_code)
    fast = kernels == "fast" and torch.device(device).type == "cpu"
    Filling(checkpoint, torch.device(device), dtype, fast).fill(running)
    _keep_from_saving(running, checkpoint)
    return running.requires_grad_(False).eval()


def trainable(
    source: str | Path | Checkpoint,
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """Load a checkpoint for training, in float32.

    Compressed layers keep their form: factors, scales and surviving values are parameters, codes and masks are fixed.

    Raises:
        CheckpointError: as `load`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    if model is None and checkpoint.config is None:
        raise Refused(f"{checkpoint.path} names no architecture", _SEQUENTIAL)
    running = model if model is not None else build(checkpoint, trust_remote_code)
    Filling(checkpoint, torch.device(device), torch.float32, fast=False).fill(running)
    _keep_from_saving(running, checkpoint)
    return running.train()


def _keep_from_saving(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Let transformers' own saving of a model, or of a model inside it, raise an error.

    It knows nothing of how layers are stored, nor of widths that config.json cannot say.
    """
    manifest = checkpoint.manifest
    if manifest.entries or manifest.widths:
        what = "compressed layers" if manifest.entries else "widths of single layers"
        for module in model.modules():
            if hasattr(module, "save_pretrained"):
                module.save_pretrained = partial(_refuse_to_save, f"{what} of {checkpoint.path}")  # type: ignore[assignment]


def _refuse_to_save(what: str, *args: Any, **options: Any) -> None:
    raise Refused(f"save_pretrained cannot write the {what}", "copy that checkpoint, or run a step on it")


_SEQUENTIAL = "give the recipe `model: {sequential: [fc1, relu, fc2]}`, or a factory"


def build(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The architecture that config.json names, on the meta device.

    Raises:
        CheckpointError: transformers does not know it.
    """
    config = checkpoint.config or {}
    try:
        fit = fitted(config, checkpoint.parameters())
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{checkpoint.path}: config.json is refused by transformers: {error}", "") from error
    model = None if fit is None else fit.model
    if model is None and trust_remote_code and "auto_map" in config:
        model = _remote_skeleton(checkpoint)
    if model is None:
        if _is_nameless(config):
            raise CheckpointError(f"{checkpoint.path}: its config.json names no architecture", "give model=, a module")
        named = (config.get("architectures") or [f"model type {config.get('model_type')!r}"])[0]
        hint = "upgrade transformers" + (", or trust the checkpoint's own code" if "auto_map" in config else "")
        raise CheckpointError(f"{checkpoint.path}: transformers does not know {named}", f"{hint}, or give model=")
    return model


def _is_nameless(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is none of transformers': it names neither a class nor where to find one."""
    return not any(config.get(key) for key in ("architectures", "model_type", "auto_map"))


def _remote_skeleton(checkpoint: Checkpoint) -> Any:
    """The architecture from the checkpoint's own code, which the caller has chosen to trust."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=True, local_files_only=True)
    auto = next((name for name in config.auto_map if name.startswith("AutoModel")), None)
    if auto is None:
        return None
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config, trust_remote_code=True)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
