"""Entropy-code what a step has written: how many bytes codes take is known once they are there.

A step writes its output with codes of a fixed width, which is what its plan shows: the most that the output can take.
Then each compressed parameter is read back and coded, and the weight files are written anew with what became smaller.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from aicompress.checkpoint import Checkpoint, CheckpointWriter
from aicompress.checkpoint.files import read_part, read_parts
from aicompress.checkpoint.header import TensorRef
from aicompress.checkpoint.layouts import native_names
from aicompress.checkpoint.manifest import KEY, Manifest, entries_of
from aicompress.checkpoint.naming import layer_name
from aicompress.checkpoint.writer import REPLACED
from aicompress.disk import disk_errors
from aicompress.layer import Kind
from aicompress.pipeline.step.layout import Contents
from aicompress.pipeline.step.output import Output, with_shards
from aicompress.report.model import LayerRow
from aicompress.weights import TensorSpec, Weight, entropy_coded, restore
from aicompress.weights.coding.in_blocks import StreamInFile, write_in_blocks
from aicompress.weights.coding.packing import WORD, unpack_rows, words_per_row
from aicompress.weights.coding.rows import row_slices
from aicompress.weights.coding.writing import write_stream
from aicompress.weights.form import Symbols
from aicompress.weights.stored.entropy import symbols_of, symbols_within
from aicompress.weights.stored.trellis import BLOCK

SPOOL = "entropy-coded.partial"
HELD = 1 << 22  # symbols of a tensor up to which all are held
READ = 1 << 21  # symbols of a larger one that are read at a time


@dataclass
class _Spool:
    """Tensors on their way from one pass to the next, in a file.

    Attributes:
        file: what they are appended to.
        places: by name, where each begins and what it is.
        streams: by name, those whose parts lie in it as they were coded.
    """

    file: BinaryIO
    places: dict[str, tuple[int, TensorSpec]] = field(default_factory=dict)
    streams: dict[str, StreamInFile] = field(default_factory=dict)

    def put(self, name: str, tensor: Tensor) -> None:
        """Append a tensor of bytes."""
        self.places[name] = (self.file.seek(0, os.SEEK_END), TensorSpec.of(tensor))
        self.file.write(tensor.numpy().data)

    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read a tensor back: where each part of it begins, and this."""
        if name in self.streams:
            first = 0
            for piece in filter(None, self.streams[name].pieces()):
                yield first, torch.frombuffer(bytearray(piece), dtype=torch.uint8)
                first += len(piece)
            return
        begin, spec = self.places[name]
        for first in range(0, spec.nbytes, 4 * READ):
            self.file.seek(begin + first)
            part = bytearray(self.file.read(min(4 * READ, spec.nbytes - first)))
            yield first, torch.frombuffer(part, dtype=torch.uint8)


def entropy_coded_output(output: Output, writer: CheckpointWriter) -> Output:
    """Write the weight files of an output anew with its codes entropy-coded.

    Args:
        output: as it was planned and written.
        writer: has written all of it.

    Returns:
        The output as it is now.
    """
    path = writer.work / SPOOL
    with disk_errors(writer.out), path.open("w+b") as file, closing(file):
        spool = _Spool(file)
        fixed = output.so_far(writer.work)
        coded = {name: outline for name in fixed.manifest.entries if (outline := _spooled(fixed, output, name, spool))}
        smaller = _with_weights(output, coded)
        writer.restart(smaller.shards)
        replaced = {ref.file: ref.file.with_name(f"{ref.file.name}{REPLACED}") for ref in fixed.tensors.values()}
        before = {name: replace(ref, file=replaced[ref.file]) for name, ref in fixed.tensors.items()}
        for name in (name for shard in smaller.shards for name in shard.specs):
            own = name in spool.places or name in spool.streams
            for first, part in spool.parts(name) if own else read_parts(before[name], name, 4 * READ):
                writer.put_part(name, part, first)
    for done in (path, *replaced.values()):
        done.unlink()
    return smaller


def _spooled(fixed: Checkpoint, output: Output, name: str, spool: _Spool) -> Weight:
    """The outline of a parameter as it is stored once it is entropy-coded; what changes of it goes to a file."""
    letter = 0.4 if output.destination.bundled else 1.0 if output.destination.single else 4.0
    outline, streams = fixed.outline(name), dict[str, StreamInFile | Tensor]()
    assert outline is not None
    if math.prod(outline.shape) > HELD:
        streams = _streams(fixed, name, outline, spool.file)
        known = {suffix: _without_data(stream) for suffix, stream in streams.items()}
        weight = entropy_coded(outline, letter, known)
    else:
        weight = entropy_coded(fixed.weight(name), letter)
    tensors, before = weight.tensors(), output.stored[name]
    for suffix, disk in native_names(name, tensors).items():
        if disk in before and before[disk] != TensorSpec.of(tensors[suffix]):
            stream = streams.get(suffix, tensors[suffix])
            if isinstance(stream, StreamInFile):
                spool.streams[disk] = stream
            else:
                spool.put(disk, stream)
    return restore({suffix: tensor.to("meta") for suffix, tensor in tensors.items()}, weight.meta())


def _streams(fixed: Checkpoint, name: str, outline: Weight, file: BinaryIO) -> dict[str, StreamInFile | Tensor]:
    """Streams of all symbols of a parameter by suffix; large tensors are read, and coded to a file, by a few rows."""
    streams: dict[str, StreamInFile | Tensor] = {}
    for suffix, symbols in symbols_within(outline).items():
        disk, stream = fixed.stored_names(name)[suffix], None
        if symbols.kind != "int8" and symbols.rows * symbols.columns > HELD:
            blocks, shape = _blocks(fixed.tensors[disk], disk, symbols)
            stream = write_in_blocks(blocks, shape, symbols.kind, file)
        if stream is not None:
            streams[suffix] = stream
        elif symbols.rows * symbols.columns:
            streams[suffix] = write_stream(symbols_of(fixed.read(disk), symbols), symbols.kind)
    return streams


def _without_data(stream: StreamInFile | Tensor) -> Tensor:
    return torch.empty(stream.nbytes, dtype=torch.uint8, device="meta")


def _blocks(ref: TensorRef, disk: str, symbols: Symbols) -> tuple[list[Callable[[], Tensor]], tuple[int, int]]:
    """Functions that read blocks of rows of symbols, uint8, each of whole blocks of a trellis, and the shape of all.

    Those of a mask are eight each. Symbols in one row are rows of one.
    """
    rows, columns, bits = symbols.rows, symbols.columns, symbols.bits
    if symbols.kind == "mask":
        rows, columns = ref.spec.nbytes, 1
    elif rows == 1:
        rows, columns = columns, 1
    each = bits if symbols.rows == 1 else WORD * words_per_row(columns, bits)  # bits of a row in packed words

    def read(part: slice) -> Tensor:
        if not bits:
            held = read_part(ref, disk, slice(part.start * columns, part.stop * columns)).view(torch.uint8)
            return held.reshape(-1, columns)
        packed = read_part(ref, disk, slice(part.start * each // WORD, -(-part.stop * each // WORD)))
        if symbols.rows == 1:
            return unpack_rows(packed[None], bits, part.stop - part.start).reshape(-1, 1)
        return unpack_rows(packed.reshape(part.stop - part.start, -1), bits, columns)

    return [partial(read, part) for part in row_slices(rows, columns, READ, BLOCK)], (rows, columns)


def _with_weights(output: Output, weights: Mapping[str, Weight]) -> Output:
    """The output with other stored weights of compressed parameters, in the native layout, laid out anew."""
    parameters = {
        name: replace(each, weight=weights.get(name, each.weight)) for name, each in output.parameters.items()
    }
    dense = {name: planned.dense for name, planned in parameters.items()}
    compressed = {n: (p.info, p.weight) for n, p in parameters.items() if n in weights and p.info and p.weight}
    owners = {name: planned.owners for name, planned in parameters.items() if planned.owners}
    manifest = replace(output.manifest, entries=entries_of(dense, compressed, owners))
    stored = Contents(output.config, dense, compressed, manifest).stored("native")
    config = output.config
    if config is not None and not output.destination.single:
        described: dict[str, Any] = Manifest(manifest.entries, (), manifest.widths).to_json()
        config = {**config, "quantization_config": {"quant_method": KEY, **described}}
    return with_shards(replace(output, parameters=parameters, manifest=manifest, stored=stored, config=config))


def sizes(
    rows: Sequence[LayerRow], written: Checkpoint, kinds: Mapping[str, Kind | None] | None
) -> tuple[LayerRow, ...]:
    """The rows of a report with the bytes that their layers take in the finished output."""
    known = {layer_name(name): written.nbytes(name) for name in written.parameters()}
    known |= {info.name: info.nbytes for info in written.layers(kinds) if info.part}
    return tuple(replace(row, bytes_after=known.get(row.name, row.bytes_after)) for row in rows)
