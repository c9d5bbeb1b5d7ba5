"""The output of any step: names, layout, files and exact bytes, known before the first byte is written."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from aicompress import __version__
from aicompress.checkpoint import Checkpoint, CheckpointWriter, Manifest, ShardPlan, plan_shards
from aicompress.checkpoint.header import read_header
from aicompress.checkpoint.layouts import Layout, on_disk
from aicompress.checkpoint.manifest import KEY, entries_of
from aicompress.checkpoint.place import require_apart
from aicompress.checkpoint.shards import index_text
from aicompress.checkpoint.source import MODELING_FILES, Source
from aicompress.errors import CheckpointError
from aicompress.layer import LayerInfo
from aicompress.model.hf import decoding_aicompress
from aicompress.pipeline.step.layout import Contents, cache_scheme, described, stores_entropy
from aicompress.recipe import Recipe
from aicompress.recipe.distillation import DistillRecipe
from aicompress.recipe.made import MadeRecipe
from aicompress.weights import Dense, TensorSpec, Weight

DIGEST = "0" * 64  # stands for an input's sha256 until the input has been read


@dataclass(frozen=True)
class Planned:
    """One parameter of the output.

    Attributes:
        dense: the tensor it is, or decodes to.
        weight: outline of its compressed form, or None for a plain tensor.
        info: the layer it is the weight of, or None.
        owners: parts of its compressed form that other parameters store, each with that one; '' is all of it.
    """

    dense: TensorSpec
    weight: Weight | None = None
    info: LayerInfo | None = None
    owners: Mapping[str, str] = field(default_factory=dict)

    def layer(self, name: str) -> LayerInfo | None:
        """The layer it is the weight of; a compressed vector, which is no layer, is seen as a column."""
        if self.info is not None or self.weight is None:
            return self.info
        return LayerInfo(name, name, "linear", self.weight.shape, self.dense.shape, self.dense.dtype)


@dataclass(frozen=True)
class Destination:
    """The place of an output.

    Attributes:
        path: a directory, or one file when it ends in .safetensors.
        max_shard_size: bytes of data in one file of a directory, or None.
        overwrite: replace a checkpoint that is there.
        bundled: one file in which all tensors lie in one, behind a short description.
    """

    path: Path
    max_shard_size: int | None = None
    overwrite: bool = False
    bundled: bool = False

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
        stored: by parameter, its tensors by their names in the files.
        source: the input's files, for the side files to take along.
        files: side files that are written anew in their place.
        readers: classes of transformers that were tried and load it.
        warnings: what the user should know of the layout.
        own_metadata: strings of the header of the input's first file.
        entropy_coded: codes are entropy-coded once they are written; bytes are the most until then.
    """

    destination: Destination
    layout: Layout
    parameters: dict[str, Planned]
    manifest: Manifest
    config: dict[str, Any] | None
    shards: tuple[ShardPlan, ...]
    stored: Mapping[str, Mapping[str, TensorSpec]]
    source: Source
    files: Mapping[Path, bytes] = field(default_factory=dict)
    readers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    own_metadata: Mapping[str, str] = field(default_factory=dict)
    entropy_coded: bool = False

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

    def nbytes(self, name: str, part: str = "") -> int:
        """Bytes on disk of a parameter, or of one part of it; of a plain tensor all count with the outer one.

        What another parameter stores counts there.
        """
        weight = self.parameters[name].weight
        if part and part in self.parameters[name].owners:
            return 0
        if part and isinstance(weight, Weight):
            return weight.part_nbytes(part)
        return 0 if part not in ("", "out") else sum(spec.nbytes for spec in self.stored[name].values())

    def encode(self, name: str, value: Tensor | Weight) -> dict[str, Tensor]:
        """Tensors on disk that one parameter stores itself, or those of a block of its rows."""
        if isinstance(value, Tensor):
            return {name: value}
        tensors = on_disk(name, value, self.layout, self.parameters[name].dense.shape[0])
        return {disk: tensor for disk, tensor in tensors.items() if disk in self.stored[name]}

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
            count = sum(p.dense.nbytes // p.dense.dtype.itemsize for p in self.parameters.values())
            texts[f"{self.source.base_name}.safetensors.index.json"] = index_text(self.shards, count)
        if self.layout == "native" and self.config is not None:
            texts.update(modeling_sources())
        return {name: text.encode(errors="backslashreplace") for name, text in texts.items()}

    def metadata(self) -> dict[str, str]:
        """Strings of the first file's header: the input's own, and the manifest where no other file can hold it."""
        kept = {key: value for key, value in self.own_metadata.items() if key not in ("format", KEY)}
        described = self.config is not None and not self.destination.single
        manifest = self.manifest.brief() if self.destination.bundled else self.manifest
        return kept if described else {**kept, KEY: manifest.to_text()}


def modeling_sources() -> dict[str, str]:
    """The modules that let transformers load the native layout without this package."""
    folder = Path(decoding_aicompress.__file__).parent
    copied = {name: (folder / name).read_text(encoding="utf-8") for name in MODELING_FILES}
    return {**copied, Path(decoding_aicompress.__file__).name: decoding_aicompress.source()}


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
        Refused: the output would touch the input, two tensors of it would have one name, or a reader would take one
            for another.
    """
    parameters = {name: replace(planned, info=planned.layer(name)) for name, planned in parameters.items()}
    compressed = {
        name: (each.info, each.weight)
        for name, each in parameters.items()
        if each.info is not None and each.weight is not None and not isinstance(each.weight, Dense)
    }
    config = copy.deepcopy(config if config is not None else checkpoint.config)
    narrowed = {**checkpoint.manifest.widths, **{path: dict(fields) for path, fields in (widths or {}).items()}}
    require_apart(checkpoint.source, destination.path)
    dense = {name: planned.dense for name, planned in parameters.items()}
    owners = {name: planned.owners for name, planned in parameters.items() if planned.owners}
    manifest = Manifest(entries_of(dense, compressed, owners), (*checkpoint.manifest.lineage, step), narrowed)
    encoder = "" if destination.single else checkpoint.source.encoder_module
    scheme = cache_scheme(checkpoint)
    coded = bool(compressed) and stores_entropy(step, checkpoint)
    readable = None if destination.single else config
    choice = described(Contents(readable, dense, compressed, manifest, encoder, scheme, coded))
    draft = Output(
        destination,
        choice.layout,
        parameters,
        manifest,
        config if destination.single else choice.config,
        (),
        choice.stored,
        checkpoint.source,
        readers=choice.readers,
        warnings=(*choice.warnings, *checkpoint.manifest.parted(manifest, dense)),
        own_metadata=checkpoint.metadata,
        entropy_coded=coded,
    )
    return with_shards(draft)


def with_shards(output: Output) -> Output:
    """An output with its tensors laid out in weight files.

    Raises:
        CheckpointError: two tensors of it would have one name.
    """
    specs: dict[str, TensorSpec] = {}
    for more in output.stored.values():
        twice = sorted(specs.keys() & more.keys())
        if twice:
            told = f"a compressed tensor would be named {twice[0]!r}, as another one is"
            raise CheckpointError(told, "exclude that layer")
        specs.update(more)
    destination = output.destination
    limit = None if destination.single else destination.max_shard_size
    shards = plan_shards(specs, limit, output.metadata(), output.source.base_name)
    return replace(output, shards=tuple(replace(shard, bundled=destination.bundled) for shard in shards))


def lineage_step(
    command: str,
    recipe: Recipe | DistillRecipe | MadeRecipe,
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
