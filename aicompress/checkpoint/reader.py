"""A checkpoint read lazily: headers at once, each tensor's bytes when asked for, nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aicompress.checkpoint.header import DTYPE_NAMES, DTYPES, TensorRef, read_header
from aicompress.checkpoint.layouts import ct_entries, ct_restore, native_names
from aicompress.checkpoint.manifest import KEY, Entry, Manifest
from aicompress.checkpoint.naming import is_transposed, kind_of, layer_name
from aicompress.checkpoint.source import Source, locate
from aicompress.errors import CheckpointError
from aicompress.layer import Kind, Layer, LayerInfo, as_matrix
from aicompress.weights import Dense, LowRank, TensorSpec, Weight, restore

_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        source: its files.
        tensors: every tensor on disk, by name.
        manifest: compressed parameters, and the steps that made this checkpoint.
        layout: how the compressed parameters are named: plain, native or compressed-tensors.
        metadata: strings of the first file's header.
    """

    source: Source
    tensors: dict[str, TensorRef]
    manifest: Manifest
    layout: str
    metadata: dict[str, str]

    @classmethod
    def open(cls, name: str | Path) -> Checkpoint:
        """Open a checkpoint: headers and JSON only.

        Raises:
            CheckpointError: missing, damaged, or in a format this version does not read.
        """
        source = locate(name)
        tensors, metadata = _headers(source)
        manifest = Manifest.from_text(metadata[KEY], str(source.path)) if KEY in metadata else Manifest()
        opened = cls(source, tensors, manifest, "native" if manifest.entries else "plain", metadata)
        opened = opened._with_config() if source.config is not None else opened
        opened._check_entries()
        return opened

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def config(self) -> dict[str, Any] | None:
        return self.source.config

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor on disk."""
        return {name: ref.spec for name, ref in self.tensors.items()}

    def _with_config(self) -> Checkpoint:
        """Entries that config.json's quantization_config describes, and the lineage beside it."""
        from aicompress.checkpoint.source import _json

        beside = self.path / "aicompress.json"
        lineage = Manifest.from_json(_json(beside), str(beside)).lineage if beside.is_file() else self.manifest.lineage
        quantization = (self.config or {}).get("quantization_config")
        if not quantization:
            return Checkpoint(
                self.source, self.tensors, Manifest(self.manifest.entries, lineage), self.layout, self.metadata
            )
        method = quantization.get("quant_method")
        if method == KEY:
            entries, layout = Manifest.from_json(quantization, str(self.path)).entries, "native"
        elif method == "compressed-tensors":
            dtype = _FLOATS.get(
                str((self.config or {}).get("dtype") or (self.config or {}).get("torch_dtype")), torch.float32
            )
            entries, layout = ct_entries(quantization, self.specs, self.read, dtype), "compressed-tensors"
        else:
            raise CheckpointError(
                f"{self.path} is already quantized by {method!r}", "start from the original checkpoint"
            )
        return Checkpoint(self.source, self.tensors, Manifest(entries, lineage), layout, self.metadata)

    def _check_entries(self) -> None:
        for name in self.manifest.entries:
            names = self.stored_names(name)
            if not names or any(disk not in self.tensors for disk in names.values()):
                raise CheckpointError(
                    f"{self.path}: compressed parameter {name!r} lacks tensors", "the file is incomplete"
                )

    def stored_names(self, parameter: str) -> dict[str, str]:
        """Suffix -> name on disk of a parameter's tensors; a dense parameter has one, under ''."""
        if parameter in self.manifest.entries and self.layout == "compressed-tensors":
            module = parameter.removesuffix(".weight")
            suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight")
            return {suffix: f"{module}.{suffix}" for suffix in suffixes if f"{module}.{suffix}" in self.tensors}
        if parameter in self.manifest.entries:
            return native_names(parameter, self.manifest.entries[parameter].suffixes)
        return {"": parameter} if parameter in self.tensors else {}

    def parameters(self) -> dict[str, TensorSpec]:
        """Logical parameters in file order, each as the dense tensor it stands for."""
        owner = {disk: name for name in self.manifest.entries for disk in self.stored_names(name).values()}
        found: dict[str, TensorSpec] = {}
        for disk, ref in self.tensors.items():
            name = owner.get(disk, disk)
            if name not in found:
                found[name] = self.manifest.entries[name].dense if name in self.manifest.entries else ref.spec
        return found

    def nbytes(self, parameter: str) -> int:
        """Bytes of a parameter's tensors on disk."""
        return sum(self.tensors[name].spec.nbytes for name in self.stored_names(parameter).values())

    def layers(self, kinds: Mapping[str, Kind | None] | None = None) -> list[LayerInfo]:
        """Every layer, in file order; a low-rank layer gives its two factors.

        Args:
            kinds: what a model definition says of parameters; names it lacks are judged by name and shape.
        """
        found: list[LayerInfo] = []
        for name, spec in self.parameters().items():
            kind = kinds[name] if kinds is not None and name in kinds else kind_of(name, spec)
            if kind is None or len(spec.shape) < 2:
                continue
            found.extend(self._infos(name, spec, kind))
        return found

    def _infos(self, name: str, spec: TensorSpec, kind: Kind) -> list[LayerInfo]:
        entry = self.manifest.entries.get(name)
        transposed = entry.transposed if entry else kind == "linear" and is_transposed(name, self.config)
        out, columns = spec.shape[0], int(np.prod(spec.shape[1:]))
        shape = (columns, out) if transposed else (out, columns)
        form = entry.meta["form"] if entry else "dense"
        outline = self._stored(name, entry, self._no_data) if entry else None
        whole = LayerInfo(
            layer_name(name),
            name,
            kind,
            shape,
            spec.shape,
            spec.dtype,
            transposed,
            "",
            form,
            self.nbytes(name),
            outline,
        )
        if entry is None or form != "low_rank":
            return [whole]
        names = self.stored_names(name)
        parts = {"out": [s for s in names if not (s == "in" or s.startswith("in_"))]}
        parts["in"] = [s for s in names if s not in parts["out"]]
        rank = int(entry.meta["rank"])
        infos = []
        for part, part_shape in (("out", (shape[0], rank)), ("in", (rank, shape[1]))):
            size = sum(self.tensors[names[suffix]].spec.nbytes for suffix in parts[part])
            factor = (outline.out if part == "out" else outline.inner) if isinstance(outline, LowRank) else None
            infos.append(
                LayerInfo(
                    f"{whole.name}.low_rank.{part}", name, kind, part_shape, spec.shape, spec.dtype, transposed,
                    "out" if part == "out" else "in", entry.meta[part]["form"], size, factor,
                )
            )  # fmt: skip
        return infos

    def read(self, name: str) -> Tensor:
        """Read one tensor from disk into fresh memory.

        Raises:
            CheckpointError: the file shrank since it was opened.
        """
        ref = self.tensors[name]
        buffer = np.empty(ref.spec.nbytes, dtype=np.uint8)
        with ref.file.open("rb", buffering=0) as file:
            file.seek(ref.begin)
            view, done = buffer.data, 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"{ref.file} ended while {name!r} was read", "something is changing the input"
                    )
                done += count
        if not len(buffer):
            return torch.empty(ref.spec.shape, dtype=ref.spec.dtype)
        return torch.from_numpy(buffer).view(ref.spec.dtype).reshape(ref.spec.shape)

    def weight(self, parameter: str) -> Weight:
        """A parameter in the form it is stored in, as a matrix (out, in)."""
        entry = self.manifest.entries.get(parameter)
        if entry is None:
            return Dense(as_matrix(self.read(parameter)))
        return self._stored(parameter, entry, self.read)

    def _no_data(self, name: str) -> Tensor:
        """A tensor of the file as its header shows it."""
        spec = self.tensors[name].spec
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")

    def _stored(self, parameter: str, entry: Entry, read: Callable[[str], Tensor]) -> Weight:
        """A compressed parameter in its form, made of what `read` gives."""
        if self.layout == "compressed-tensors":
            return ct_restore(entry, parameter.removesuffix(".weight"), read, self.tensors)
        names = self.stored_names(parameter)
        try:
            return restore({suffix: read(name) for suffix, name in names.items()}, entry.meta)
        except KeyError as error:
            raise CheckpointError(
                f"{self.path}: {parameter!r} is stored in a form this version does not know ({entry.meta.get('form')})",
                "upgrade aicompress",
            ) from error

    def dense(self, parameter: str) -> Tensor:
        """A parameter as the dense tensor it stands for, in its own dtype and shape."""
        entry = self.manifest.entries.get(parameter)
        return self.read(parameter) if entry is None else entry.decode(self.weight(parameter))

    def layer(self, info: LayerInfo, seed: int = 0) -> Layer:
        """Read a layer for a method: a float32 matrix and its stored form.

        Raises:
            CheckpointError: the weight holds NaN or infinity.
        """
        stored = self.weight(info.tensor)
        if info.part and isinstance(stored, LowRank):
            stored = stored.out if info.part == "out" else stored.inner
        matrix = stored.dense()
        if isinstance(stored, Dense) and info.transposed:
            matrix = matrix.t().contiguous()
            stored = Dense(stored.matrix.t())
        require_finite(matrix, info.name, self.path)
        return Layer(info, matrix, stored, seed=seed)


def require_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Refuse NaN and infinity: every method would spread them.

    Raises:
        CheckpointError: naming the tensor and how many elements are bad.
    """
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        bad = int((~torch.isfinite(values)).sum())
        raise CheckpointError(
            f"{path}: {name!r} holds {bad} NaN or infinite values", "repair or re-export the checkpoint"
        )


def _headers(source: Source) -> tuple[dict[str, TensorRef], dict[str, str]]:
    tensors: dict[str, TensorRef] = {}
    metadata: dict[str, str] = {}
    for number, file in enumerate(source.files):
        header = read_header(file)
        twice = next((name for name in header.tensors if name in tensors), None)
        if twice is not None:
            raise CheckpointError(
                f"tensor {twice!r} is in {tensors[twice].file.name} and in {file.name}", "keep one copy"
            )
        tensors.update(header.tensors)
        metadata = header.metadata if number == 0 else metadata
    for name, file_name in source.weight_map.items():
        if name not in tensors or tensors[name].file.name != Path(file_name).name:
            raise CheckpointError(
                f"the index says {name!r} is in {file_name}, and it is not", "download the checkpoint again"
            )
    return tensors, metadata


def digests(source: Source) -> dict[str, str]:
    """sha256 of each weight file by name; reads every byte once."""
    import hashlib

    found: dict[str, str] = {}
    for file in source.files:
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


__all__ = ["DTYPES", "DTYPE_NAMES", "Checkpoint", "digests", "require_finite"]
