"""The output of any step: names, layout, files and exact bytes, known before the first byte is written."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from aicompress import __version__
from aicompress.checkpoint import Checkpoint, CheckpointWriter, Entry, Manifest, ShardPlan, plan_shards
from aicompress.checkpoint.header import read_header
from aicompress.checkpoint.layouts import Layout, choose, ct_config, ct_tensors, native_tensors
from aicompress.checkpoint.manifest import KEY
from aicompress.checkpoint.place import require_apart
from aicompress.checkpoint.shards import index_text
from aicompress.checkpoint.source import INDEX, MODELING_FILES, Source
from aicompress.errors import CheckpointError
from aicompress.layer import LayerInfo
from aicompress.model.hf import decoding_aicompress
from aicompress.recipe import Recipe
from aicompress.recipe.distillation import DistillRecipe
from aicompress.recipe.export import ExportRecipe
from aicompress.weights import Dense, IntGrouped, TensorSpec, Weight

DIGEST = "0" * 64  # stands for an input's sha256 until the input has been read


@dataclass(frozen=True)
class Planned:
    """One parameter of the output.

    Attributes:
        dense: the tensor it is, or decodes to.
        weight: outline of its compressed form, or None for a plain tensor.
        info: the layer it is the weight of, or None.
    """

    dense: TensorSpec
    weight: Weight | None = None
    info: LayerInfo | None = None


@dataclass(frozen=True)
class Destination:
    """The place of an output.

    Attributes:
        path: a directory, or one file when it ends in .safetensors.
        max_shard_size: bytes of data in one file of a directory, or None.
        overwrite: replace a checkpoint that is there.
    """

    path: Path
    max_shard_size: int | None = None
    overwrite: bool = False

    @property
    def single(self) -> bool:
        return self.path.suffix == ".safetensors"


@dataclass(frozen=True)
class Output:
    """An output without its data: names, layout, files and exact bytes.

    Attributes:
        destination: where it goes.
        layout: names of compressed parameters.
        parameters: what it holds, in order.
        manifest: its entries and lineage; digests of the inputs are zeros until they are known.
        config: config.json, or None.
        shards: its weight files.
        source: the input's files, for the side files to take along.
        files: side files that are written anew in their place.
    """

    destination: Destination
    layout: Layout
    parameters: dict[str, Planned]
    manifest: Manifest
    config: dict[str, Any] | None
    shards: tuple[ShardPlan, ...]
    source: Source
    files: Mapping[Path, bytes] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Exact bytes of the weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def other_bytes(self) -> int:
        """Exact bytes of all other files but the report."""
        if self.destination.single:
            return 0
        texts = sum(len(text) for text in self._texts().values())
        folder, taken = self.source.folder, [path for path in self.source.side_files if path not in self.files]
        texts += sum(len(content) for content in self.files.values())
        return texts + sum(os.path.getsize(folder / relative) for relative in taken if folder)

    def encode(self, name: str, value: Tensor | Weight) -> dict[str, Tensor]:
        """Tensors on disk of one parameter, or of a block of its rows."""
        if isinstance(value, Tensor):
            return {name: value}
        return on_disk(name, value, self.layout, self.parameters[name].dense.shape[0])

    def so_far(self, folder: Path) -> Checkpoint:
        """Unfinished weight files, to read those parameters back that are written; the others hold zeros."""
        tensors = {n: ref for shard in self.shards for n, ref in read_header(folder / shard.name).tensors.items()}
        return Checkpoint(self.source, tensors, self.manifest, self.layout, {})

    def write_files(self, writer: CheckpointWriter) -> None:
        """Write every file beside weights and report; a single-file output has none."""
        if self.destination.single:
            return
        for relative, content in self._texts().items():
            writer.add(relative, content)
        if self.source.folder is not None:
            for side_file in self.source.side_files:
                writer.add(side_file, self.files.get(side_file, self.source.folder / side_file))

    def _texts(self) -> dict[str, bytes]:
        texts: dict[str, str] = {}
        if self.config is not None:
            texts["config.json"] = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
            lineage = Manifest({}, self.manifest.lineage)
            texts["aicompress.json"] = json.dumps(lineage.to_json(), indent=2, ensure_ascii=False) + "\n"
        if len(self.shards) > 1:
            count = sum(_count(planned.dense) for planned in self.parameters.values())
            texts[INDEX] = index_text(self.shards, count)
        if self.layout == "native" and self.config is not None:
            texts.update(modeling_sources())
        return {name: text.encode(errors="backslashreplace") for name, text in texts.items()}

    def metadata(self) -> dict[str, str]:
        """Strings of the first file's header."""
        return {} if self.config is not None and not self.destination.single else {KEY: self.manifest.to_text()}


def modeling_sources() -> dict[str, str]:
    """The modules that let transformers load the native layout without this package."""
    folder = Path(decoding_aicompress.__file__).parent
    copied = {name: (folder / name).read_text(encoding="utf-8") for name in MODELING_FILES}
    return {**copied, Path(decoding_aicompress.__file__).name: decoding_aicompress.source()}


def on_disk(name: str, weight: Weight, layout: Layout, rows: int | None = None) -> dict[str, Tensor]:
    """The tensors of a compressed parameter, or of a block of its `rows` rows, under the names of a layout."""
    return ct_tensors(name, weight, rows) if layout == "compressed-tensors" else native_tensors(name, weight)


def _count(spec: TensorSpec) -> int:
    return spec.nbytes // spec.dtype.itemsize


def arrange(
    checkpoint: Checkpoint,
    destination: Destination,
    parameters: dict[str, Planned],
    step: dict[str, Any],
    config: dict[str, Any] | None = None,
    widths: Mapping[str, Mapping[str, int]] | None = None,
) -> Output:
    """Choose the layout and lay out the files.

    Args:
        checkpoint: the input.
        destination: where the output goes.
        parameters: what it will hold, in order.
        step: this step for the lineage, from `lineage_step`.
        config: an edited config.json; None takes the input's.
        widths: of the layers of a plain module that this step narrows.

    Raises:
        Refused: the output would touch the input, or two tensors of it would have one name.
    """
    compressed = {
        name: (planned.info, planned.weight)
        for name, planned in parameters.items()
        if planned.weight is not None and not isinstance(planned.weight, Dense) and planned.info is not None
    }
    config = copy.deepcopy(config if config is not None else checkpoint.config)
    layout, dequantize = choose(compressed, config is not None and not destination.single, partial(_read, config))
    narrowed = {**checkpoint.manifest.widths, **{path: dict(fields) for path, fields in (widths or {}).items()}}
    if narrowed and config is not None and not destination.single:
        layout, dequantize = "native", False  # what config.json says of the widths is not enough
    require_apart(checkpoint.source, destination.path)
    entries: dict[str, Entry] = {}
    specs: dict[str, TensorSpec] = {}
    for name, planned in parameters.items():
        if name not in compressed:
            _add(specs, {name: planned.dense})
            continue
        info, weight = compressed[name]
        tensors = on_disk(name, weight, layout)
        _add(specs, {disk: TensorSpec.of(tensor) for disk, tensor in tensors.items()})
        entries[name] = Entry(planned.dense, info.transposed, weight.meta(), tuple(weight.tensors()))
    manifest = Manifest(entries, (*checkpoint.manifest.lineage, step), narrowed)
    if config is not None:
        config = _with_quantization(config, (layout, dequantize), manifest, parameters)
    limit = None if destination.single else destination.max_shard_size
    draft = Output(destination, layout, parameters, manifest, config, (), checkpoint.source)
    shards = plan_shards(specs, limit, draft.metadata())
    return replace(draft, shards=shards)


def _read(config: Mapping[str, Any] | None, tensors: list[str]) -> bool:
    """Whether the code of the architecture reads these weights itself; an unknown one is taken for a usual one."""
    from aicompress.model.loading.definition import skeleton
    from aicompress.model.loading.weight_reads import reads_weights

    model = skeleton(dict(config or {}))
    return model is not None and reads_weights(model, tensors)


def _add(specs: dict[str, TensorSpec], more: dict[str, TensorSpec]) -> None:
    twice = sorted(specs.keys() & more.keys())
    if twice:
        raise CheckpointError(
            f"a compressed tensor would be named {twice[0]!r}, as another one is", "exclude that layer"
        )
    specs.update(more)


def _with_quantization(
    config: dict[str, Any], layout: tuple[Layout, bool], manifest: Manifest, parameters: Mapping[str, Planned]
) -> dict[str, Any]:
    """config.json with the quantization_config that the layout's readers need."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if layout[0] == "compressed-tensors":
        ints = {name: p.weight for name, p in parameters.items() if isinstance(p.weight, IntGrouped)}
        others = [name for name in parameters if name not in ints]
        return {**plain, "quantization_config": ct_config(ints, layout[1], others)}
    auto_map = {
        key: value for key, value in plain.pop("auto_map", {}).items() if "modeling_aicompress" not in str(value)
    }
    if layout[0] == "native":
        entries = Manifest(manifest.entries, (), manifest.widths).to_json()
        plain["quantization_config"] = {"quant_method": KEY, **entries}
        auto_map.update(auto_classes(config))
    return {**plain, "auto_map": auto_map} if auto_map else plain


def auto_classes(config: dict[str, Any]) -> dict[str, str]:
    """auto_map lines that lead transformers' Auto classes to modeling_aicompress.py."""
    from aicompress.model.loading.definition import auto_class_names

    return {auto: f"modeling_aicompress.{name}" for auto, name in auto_class_names(config).items()}


def lineage_step(
    command: str,
    recipe: Recipe | DistillRecipe | ExportRecipe,
    source: Source,
    further: Mapping[str, Source] | None = None,
) -> dict[str, Any]:
    """This step as the lineage records it; no time stamp, so that equal runs give equal bytes.

    Args:
        command: factorize, quantize, prune or distill.
        recipe: what was asked for.
        source: the input.
        further: inputs beside the first, by name.
    """
    return {
        "command": command,
        "tool": f"aicompress {__version__}",
        "recipe": recipe.resolved(),
        "recipe_sha256": recipe.sha256(),
        "seed": recipe.seed,
        "inputs": _undigested(source),
        **{name: {"inputs": _undigested(each)} for name, each in (further or {}).items()},
    }


def _undigested(source: Source) -> dict[str, str]:
    return {source.name_of(file): DIGEST for file in source.files}


def with_digests(output: Output, inputs: Mapping[str, str], further: Mapping[str, Mapping[str, str]]) -> Output:
    """The output with the inputs' real digests in its lineage; no length changes.

    Args:
        output: as planned.
        inputs: sha256 of the input's files by name.
        further: the same of inputs beside the first.
    """
    *earlier, step = output.manifest.lineage
    beside = {name: {"inputs": dict(files)} for name, files in further.items()}
    lineage = (*earlier, {**step, "inputs": dict(inputs), **beside})
    return replace(output, manifest=replace(output.manifest, lineage=lineage))
