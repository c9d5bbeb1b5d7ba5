"""The student's parameters in their stored forms: trained, fixed, and written back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.layouts import native_names
from aicompress.layer import LayerInfo
from aicompress.measure import rel_error
from aicompress.methods.distill.latent import gaps, settled
from aicompress.model import hf
from aicompress.model.loading.resize import owner_of
from aicompress.pipeline.distillation.trained.optimizer import TrainedParameters
from aicompress.pipeline.distillation.trained.student_mode import StudentMode
from aicompress.report.model import LayerRow
from aicompress.weights import Weight, restore

CANNOT_TRAIN = "fixed: its stored form cannot be trained"


@dataclass(frozen=True)
class Student:
    """A student in training.

    Attributes:
        checkpoint: where it came from.
        student_mode: what of it the recipe's mode moves.
        stored: trained parameters by checkpoint parameter and suffix of the stored form; '' for a plain tensor.
        places: names in the model by those in the checkpoint.
    """

    checkpoint: Checkpoint
    student_mode: StudentMode
    stored: dict[str, dict[str, Tensor]]
    places: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, checkpoint: Checkpoint, student_mode: StudentMode) -> Student:
        """Find the tensors that move in a model that was loaded for training; everything else is frozen."""
        targets: Mapping[str, str] = model.aicompress_names  # type: ignore[assignment]
        merged = Counter(targets.values())
        stored: dict[str, dict[str, Tensor]] = {}
        for name, target in targets.items():
            _relax(model, target, name, checkpoint, student_mode)
            compressed, corrected = name in checkpoint.manifest.entries, student_mode.config.layer_by_layer
            parameters = _parameters(model, target, compressed, corrected)
            parameters = {s: tensor for s, tensor in parameters.items() if s in student_mode.suffixes[name]}
            if parameters and merged[target] == 1:  # parameters that the architecture merges cannot be told apart
                stored[name] = parameters
        trained = {id(parameter) for parameters in stored.values() for parameter in parameters.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return cls(checkpoint, student_mode, stored, targets)

    def trained(self, keep_zeros: bool) -> TrainedParameters:
        """The trained parameters by their names in the native layout, with dtypes, zeros, scales and latent numbers."""
        parameters: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        zeros: dict[str, Tensor] = {}
        scales: dict[str, float] = {}
        latent: dict[str, float] = {}
        for name, tensors in self.stored.items():
            entry = self.checkpoint.manifest.entries.get(name)
            shared = {} if entry is None else entry.shared  # a tensor of several parameters is trained once
            disk = {**native_names(name, tensors), **{s: shared[s] for s in tensors if s in shared}}
            start = self._start(name) if name in self.checkpoint.manifest.entries else None
            kept, steps = (None, {}) if start is None else (start.tensors(), gaps(start))
            relative = self.student_mode.relative(name)
            for suffix, parameter in tensors.items():
                full = disk[suffix]
                parameters[full] = parameter
                dtypes[full] = kept[suffix].dtype if kept is not None else self.checkpoint.specs[name].dtype
                if suffix in steps:
                    latent[full] = steps[suffix]
                elif suffix in relative:
                    scales[full] = float(parameter.detach().square().mean().sqrt())
                elif keep_zeros and parameter.ndim >= 2:
                    zero = parameter.detach() == 0
                    zeros |= {full: zero} if bool(zero.any()) else {}
        return TrainedParameters(parameters, dtypes, zeros, scales, latent, self.student_mode.code_rate)

    def value(self, name: str) -> Tensor | Weight:
        """The trained value of a parameter: a plain tensor in its own dtype, or its stored form."""
        tensors = self.stored.get(name, {})
        if name not in self.checkpoint.manifest.entries:
            if not tensors:
                return self.checkpoint.read(name)
            return tensors[""].detach().cpu().to(self.checkpoint.specs[name].dtype)
        old = self._start(name)
        now = {s: tensors[s].detach().cpu().to(t.dtype) if s in tensors else t for s, t in old.tensors().items()}
        return restore(now, old.meta()) if self.student_mode.mode.relax is None else settled(old, now)

    def _start(self, name: str) -> Weight:
        """A stored weight of the checkpoint, with latent numbers in the place of codes that move."""
        return self.student_mode.relaxed(self.checkpoint.weight(name))

    def original(self, name: str) -> Tensor | Weight:
        """The value of a parameter in the checkpoint."""
        return self.checkpoint.weight(name) if name in self.checkpoint.manifest.entries else self.checkpoint.read(name)

    def row(self, info: LayerInfo, value: Tensor | Weight, loss: str, size: int) -> LayerRow:
        """The report's row of a layer, or of a part of a low-rank one: how far it has moved, and its bytes now."""
        before = self.checkpoint.layer(info).weight
        now = value.parts()[info.part] if info.part and not isinstance(value, Tensor) else value
        after = info.matrix(now).float() if isinstance(now, Tensor) else now.dense()
        moved = rel_error(before, after)
        fixed = (
            f"mode {self.student_mode.mode.name} leaves it" if self.student_mode.stays(info.tensor) else CANNOT_TRAIN
        )
        note = "" if info.tensor in self.stored else fixed
        method = loss if info.tensor in self.stored else "-"
        form = info.stored if info.part or isinstance(value, Tensor) else value.form
        return LayerRow(
            info.name, info.kind, "method" if method != "-" else "-", method, form, {}, info.nbytes, size,
            moved, 0.0, note,
        )  # fmt: skip


def _relax(model: nn.Module, target: str, name: str, checkpoint: Checkpoint, student_mode: StudentMode) -> None:
    """Put latent numbers in the place of the codes of a layer, where codes move."""
    module, leaf = owner_of(model, target)
    if student_mode.mode.relax is None or not isinstance(module, hf.Stored) or leaf != "weight":
        return
    weight = student_mode.relaxed(checkpoint.weight(name))
    module.entry["meta"] = weight.meta()  # in place: a tied layer has the same entry
    for suffix, tensor in weight.tensors().items():
        held = f"weight_{suffix}" if suffix else "weight"
        codes = module._buffers.get(held)  # none where another layer has them
        if codes is not None and tensor.is_floating_point():
            del module._buffers[held]
            module._parameters[held] = nn.Parameter(tensor.to(codes.device))


def _parameters(model: nn.Module, target: str, compressed: bool, buffers: bool) -> dict[str, Tensor]:
    """The floating-point tensors of a stored parameter in the model, by suffix; of a buffer where buffers move."""
    module, leaf = owner_of(model, target)
    if isinstance(module, hf.Stored) and leaf == "weight":
        tensors = module.stored
        return {s: t for s, t in tensors.items() if isinstance(t, nn.Parameter) and t.is_floating_point()}
    parameter = module._parameters.get(leaf, module._buffers.get(leaf) if buffers else None)
    if parameter is None or compressed or not parameter.is_floating_point():
        return {}  # codes, and compressed weights that this layer needs decoded
    return {"": parameter}
