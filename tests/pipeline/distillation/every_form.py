"""A student that has a layer in every stored form, and its teacher: what holds for each mode is tested on these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from aicompress.checkpoint.layouts import native_names
from aicompress.checkpoint.manifest import Entry, Manifest
from aicompress.weights import TensorSpec, Weight
from tests.weights.forms import FORMS, randn

# One row of every form: of those that are not named here the first. What is tied is another layer's, and what has
# nothing left lets nothing through: these have tests of their own.
CONVOLUTION = "two convolutions"
TAKEN = (
    CONVOLUTION, "quantized factors", "sparse", "table and scales", "float8, blocks", "column factors",
    "real zero points",
    "some rows and columns", "corrected, all quantized", "base and difference, quantized", "sparse codes 2 (6, 3) asym",
    "entropy-coded", "trellis", "an integer weight per expert",
)  # fmt: skip
OTHERS = {
    weight.form: name for name, weight in reversed(FORMS.items()) if weight.form not in {FORMS[n].form for n in TAKEN}
}
LAYERS: dict[str, Weight] = {
    name.translate(str.maketrans(" :", "__", "(),")): FORMS[name]
    for name in (*TAKEN, *(name for form, name in sorted(OTHERS.items()) if form not in ("tied", "dense")))
}
FIRST = next(iter(LAYERS))  # a convolution (6, 2, 2, 3); before each of the others a plain layer and a norm, 6 -> 12
SEQUENTIAL = [FIRST, "flatten"]
for layer in (*list(LAYERS)[1:], "last"):
    SEQUENTIAL += [f"{layer}_before", f"{layer}_norm", layer]


def write(folder: Path) -> tuple[Path, Path, Path]:
    """Student, teacher and samples: the teacher has weights a little different from the student's, and other biases."""
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    for number, (name, weight) in enumerate(LAYERS.items()):
        shape = (6, 2, 2, 3) if name == FIRST else (6, 12)
        tensors = weight.tensors()
        entries[f"{name}.weight"] = Entry(TensorSpec(torch.float32, shape), False, weight.meta(), tuple(tensors))
        names = native_names(f"{name}.weight", tensors)
        stored |= {names[suffix]: tensor.contiguous() for suffix, tensor in tensors.items()}
        matrix = weight.dense()
        noise = 0.03 * matrix.square().mean().sqrt() * randn(6, 12, seed=number)
        dense[f"{name}.weight"] = (1.02 * matrix + noise).reshape(shape)
    plain = {"last.weight": randn(6, 12) * (randn(6, 12, seed=5) > 0)}  # zeros of a dense matrix
    for name in (*list(LAYERS)[1:], "last"):
        plain |= {f"{name}_before.weight": randn(12, 6, seed=len(name)), f"{name}_before.bias": torch.zeros(12)}
        plain |= {f"{name}_norm.weight": torch.ones(12), f"{name}_norm.bias": torch.zeros(12)}
    plain |= {f"{name}.bias": torch.zeros(6) for name in (*LAYERS, "last")}
    student, teacher, samples = folder / "student.safetensors", folder / "teacher.safetensors", folder / "samples.npz"
    save_file({**stored, **plain}, student, metadata={"aicompress": Manifest(entries).to_text()})
    biases = {f"{name}.bias": randn(6, seed=number) for number, name in enumerate(LAYERS)}
    save_file({**plain, **dense, **biases, "last.weight": 1.2 * plain["last.weight"]}, teacher)
    np.savez(samples, x=randn(40, 2, 2, 3, seed=7).numpy())
    return student, teacher, samples
