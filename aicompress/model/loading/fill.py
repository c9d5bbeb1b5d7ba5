"""Fill a model with a checkpoint's parameters one by one, each checked, compressed ones in their stored form."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, first_line
from aicompress.model import hf
from aicompress.model.kernels.fusion import fuse
from aicompress.model.kernels.select import fast_module, has_room, is_resident, reference_kernel, running_dtype
from aicompress.model.kernels.shared_tensors import SharedTensors
from aicompress.model.loading.places import converted
from aicompress.model.loading.resize import owner_of, put, resize
from aicompress.model.loading.weight_reads import weights_used
from aicompress.weights import Weight

# Buffers that older releases saved and newer ones compute.
_OF_TRAINING = re.compile(r"(^|\.)masked_spec_embed$")  # what replaces masked frames, in training alone
_COMPUTED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


@dataclass
class Filling:
    """One load of a checkpoint into a model.

    Attributes:
        checkpoint: where parameters come from.
        device: where they go.
        dtype: of floating parameters, or None to keep their own.
        fast: compressed layers run on fast kernels instead of decoding.
    """

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype | None
    fast: bool
    placed: dict[str, str] = field(default_factory=dict)  # parameter of the checkpoint -> of the model
    held: set[str] = field(default_factory=set)  # parameters of the model that the checkpoint holds
    used: set[str] = field(default_factory=set)  # layers whose weight the model's own code computes with
    kernels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtype = running_dtype(self.checkpoint, self.dtype)
        self.shared = SharedTensors(self.checkpoint)
        self.memory = (is_resident(self.checkpoint), has_room(self.checkpoint))

    def fill(self, model: Any) -> None:
        """Fill every parameter and buffer of a model, in place.

        Raises:
            CheckpointError: parameters are missing, unexpected, or of another shape.
        """
        hugging = hasattr(model, "all_tied_weights_keys")
        resize(model, self.checkpoint)
        self.used = weights_used(model) if self.fast else set()
        names = list(self.checkpoint.parameters())
        targets = hf.parameter_names(model, names) if hugging else {name: (name, None) for name in names}
        expected = set(model.state_dict())
        self.held = {target for target, _ in targets.values()}
        self.check(model, targets, expected)
        merges: dict[str, list[str]] = {}
        stored = self.checkpoint.manifest.entries
        ties = dict(model.all_tied_weights_keys) if hugging else {}
        for name in sorted(names, key=lambda name: name in stored):  # a fast layer is built with its bias at hand
            target, merge = targets[name]
            while name in stored and ties:  # biases, too, may be another's
                self.tie(model, *ties.popitem())
            if target not in expected:
                continue
            if merge is not None:
                merges.setdefault(target, []).append(name)
            else:
                self._place(model, target, name)
        for target, sources in merges.items():
            self.merge(model, target, {name: targets[name][1] for name in sources})
        if hugging:
            self._finish(model)
        if hugging and self.fast:
            fuse(model)
        hf.mark_ready(model)
        model.aicompress_kernels = self.kernels
        model.aicompress_names = self.placed

    def check(self, model: Any, targets: dict[str, tuple[str, Any]], expected: set[str]) -> None:
        """Nothing may be missing, but for tied parameters and buffers that the architecture computes.

        A module that is no model of transformers takes all that is there; of those, parameters may be left, as
        transformers itself leaves them (see `unused`).
        """
        unexpected = [] if hasattr(model, "all_tied_weights_keys") else unused(model, targets, expected)
        for what, names in (("lacks", lacking(model, targets, expected)), ("has unexpected", unexpected)):
            if names:
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise CheckpointError(
                    f"{self.checkpoint.path} {what} parameters: {shown}", f"{type(model).__name__} was to be filled"
                )

    def _place(self, model: Any, target: str, name: str) -> None:
        """Put one parameter where it belongs."""
        self.placed[name] = target
        module, leaf = owner_of(model, target)
        entry = self.checkpoint.manifest.entries.get(name)
        spec = entry.dense if entry is not None else self.checkpoint.specs[name]
        self.check_shape(module, leaf, name, spec.shape)
        if entry is None or leaf != "weight" or isinstance(module, nn.MultiheadAttention):
            if entry is not None:
                self.kernels[name] = "dense: this layer reads a decoded weight only"
            self.set(module, leaf, self.checkpoint.dense(name))
            if entry is None and leaf in module._parameters:
                self.shared.keep(name, module.get_parameter(leaf))
            return
        weight = self.checkpoint.weight(name)
        if self.fast and target.rpartition(".")[0] not in self.used and self._run_fast(model, target, name, weight):
            return
        hf.attach(module, entry.read_as(weight).to_json(), self.shared.trainable(name, weight, spec.dtype, self._cast))
        self.kernels[name] = reference_kernel(module, weight)

    def check_shape(self, module: nn.Module, leaf: str, name: str, shape: tuple[int, ...]) -> None:
        """A parameter must be of the shape that the model has it in."""
        old = module._parameters.get(leaf, module._buffers.get(leaf))
        if old is not None and tuple(old.shape) != shape:
            raise CheckpointError(
                f"{self.checkpoint.path}: {name} is {list(shape)}, the model has {list(old.shape)}",
                "the weights and the definition of the model disagree",
            )

    def _run_fast(self, model: Any, target: str, name: str, weight: Weight) -> bool:
        """Put inference modules where a compressed parameter and those tied to it belong; False where none fits."""
        ties = getattr(model, "all_tied_weights_keys", {})
        tied = [t for t, source in ties.items() if source == target] + ([ties[target]] if target in ties else [])
        ends = [target, *(end for end in tied if end not in self.held)]
        dtype = self.dtype or self.checkpoint.manifest.entries[name].dense.dtype
        running: dict[str, Any] = {}
        shares, weight = self.shared.has(name), self.shared.weight(name, weight)
        for end in ends:
            module = fast_module(model.get_submodule(end.rpartition(".")[0]), weight, dtype, *self.memory, shares)
            if module is None:
                return False
            self.shared.join(name, module)
            running[end] = module
        for end, module in running.items():
            model.set_submodule(end.rpartition(".")[0], module)
            if ties.pop(end, None):
                hf.forget_tie(model, end)
        self.kernels[name] = ", ".join(module.kernel for module in running.values())
        return True

    def merge(self, model: Any, target: str, sources: Mapping[str, Any]) -> None:
        """Parameters that the architecture keeps merged, such as experts: decoded, then merged by transformers."""
        read = {name: (conversion, self.checkpoint.dense(name)) for name, conversion in sources.items()}
        for full, value in converted(model, target, read).items():
            self.set(*owner_of(model, full), value)
        for name in sources:
            self.placed[name] = target
            if name in self.checkpoint.manifest.entries:
                self.kernels[name] = "dense: this architecture merges it with others"

    def set(self, module: nn.Module, leaf: str, tensor: Tensor) -> None:
        tensor = self._cast(tensor, tensor.dtype)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
            return
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))  # an LSTM wants to know

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self.device, self.dtype or dtype) if tensor.is_floating_point() else tensor.to(self.device)

    def _finish(self, model: Any) -> None:
        """Ties, buffers that the architecture computes, and the generation settings of a transformers model."""
        for parameter in (*model.parameters(), *model.buffers()):
            parameter._is_hf_initialized = parameter.device.type != "meta"
        make_computed(model, self.held, self.device)
        hf.tie(model, self.held)
        for target, source in model.all_tied_weights_keys.items():
            self.tie(model, target, source)
        for module in model.modules():  # code that initializes may ask more of a layer than its running form has
            tensors = (*module.parameters(), *module.buffers())
            module._is_hf_initialized = all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors)
        make_buffers(model, self.device)
        model.initialize_weights()
        left = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
        if left:
            raise CheckpointError(f"{self.checkpoint.path} lacks parameters: {', '.join(left[:3])}", "it is incomplete")
        dtype = self.dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        model.config.dtype = dtype
        if model.can_generate() and (self.checkpoint.path / "generation_config.json").is_file():
            model.generation_config = _generation_config(self.checkpoint.path)

    def tie(self, model: Any, target: str, source: str) -> None:
        """Share one tensor; whichever of the two the checkpoint holds is the source."""
        ends = [owner_of(model, name) for name in (target, source)]
        tensors = [module._parameters.get(leaf) for module, leaf in ends]
        held = [t is not None and t.device.type != "meta" for t in tensors]
        if held == [True, False]:
            ends[1][0]._parameters[ends[1][1]] = tensors[0]
        elif held == [False, True]:
            ends[0][0]._parameters[ends[0][1]] = tensors[1]


def _generation_config(folder: Path) -> Any:
    """The settings of `generate` that lie beside a model.

    Raises:
        CheckpointError: they cannot be read.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a wrong value breaks
        reason = first_line(error)
        message = f"{folder / 'generation_config.json'} cannot be read: {reason}"[:300]
        raise CheckpointError(message, "download it again, or take it away") from error


def lacking(model: Any, targets: Mapping[str, tuple[str, Any]], expected: Collection[str]) -> list[str]:
    """Names that a model expects and a checkpoint does not hold, tied ones and computed ones aside.

    Args:
        model: what is to be filled.
        targets: where transformers puts the checkpoint's parameters, with the conversion that merges them.
        expected: names of everything that the model saves.
    """
    given = {target for target, _ in targets.values()}
    # One conversion may fill several parameters, and many tensors go through one.
    patterns = {pattern for _, merge in targets.values() if merge is not None for pattern in merge[1].target_patterns}
    given |= {name for name in expected if any(pattern in name for pattern in patterns)}
    tied = getattr(model, "all_tied_weights_keys", {})
    groups = [{target, source} for target, source in tied.items()]
    missing = [n for n in set(expected) - given if not any(n in group and group & given for group in groups)]
    return sorted(set(missing) - computed(model, missing))


def unused(model: Any, targets: Mapping[str, tuple[str, Any]], expected: Collection[str]) -> list[str]:
    """Names in a checkpoint that a model has no place for, but for those that it is known to ignore."""
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return sorted(
        name
        for name, (target, _) in targets.items()
        if target not in expected and not _COMPUTED.search(name) and not any(p.search(target) for p in ignored)
    )


def computed(model: Any, missing: Collection[str]) -> set[str]:
    """Of the names that a checkpoint lacks, those that the architecture makes itself and never saves.

    Parameters such as Marian's sinusoidal positions, and buffers that may be left out.
    """
    unsaved, optional = (
        [re.compile(pattern) for pattern in getattr(model, field, None) or ()]
        for field in ("_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing")
    )
    buffers = {name for name, _ in model.named_buffers()} if optional else set()
    return {
        name
        for name in missing
        if any(p.search(name) for p in (*unsaved, _OF_TRAINING))
        or (name in buffers and any(p.search(name) for p in optional))
    }


def make_computed(model: Any, held: Collection[str], device: torch.device) -> set[str]:
    """Give the parameters that the architecture computes memory, for it to fill as it initializes weights.

    Returns:
        Their names.
    """
    ties = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    left = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    made = computed(model, [name for name in left if name not in held and name not in ties])
    for name in made:
        put(*owner_of(model, name), torch.empty_like(model.get_parameter(name), device=device))
    return made


def make_buffers(model: nn.Module, device: torch.device) -> None:
    """Give the buffers that are without memory some."""
    for name, buffer in list(model.named_buffers()):
        if buffer.device.type == "meta":
            put(*owner_of(model, name), torch.empty_like(buffer, device=device))
