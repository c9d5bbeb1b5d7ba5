"""Whether a checkpoint is whole: headers, index, manifest, every parameter decoded, every number finite, digests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.files import may_be_infinite
from aicompress.checkpoint.header import read_header
from aicompress.checkpoint.packed.folder import everything
from aicompress.checkpoint.packed.reader import OpenedPackedFile, is_packed
from aicompress.checkpoint.reader import digests, require_finite
from aicompress.checkpoint.source import INDEX, Source, locate
from aicompress.disk import report_path
from aicompress.errors import CheckpointError, CompressError, Unsupported, listed
from aicompress.model.loading.mismatches import misfits_of
from aicompress.pipeline.packing.coding import unpack_file
from aicompress.report.model import Report
from aicompress.weights.coding.rows import row_slices

PIECE = 1 << 22  # elements decoded at a time


@dataclass(frozen=True)
class Verification:
    """What was checked and what is wrong.

    Attributes:
        path: as given.
        files: weight files.
        parameters: parameters that were read and decoded.
        compressed: how many of them are compressed.
        problems: one line each; empty when all is well.
        checks: what was checked, for people: "2 headers", "sha256 of 1 file against report.json".
        notes: what could not be checked, and why.
        unread: why the checkpoint cannot be decoded by this version; empty where it can. It is not judged then.
    """

    path: str
    files: tuple[str, ...]
    parameters: int
    compressed: int
    problems: tuple[str, ...]
    checks: tuple[str, ...]
    notes: tuple[str, ...]
    unread: str = ""

    @property
    def sound(self) -> bool:
        """Everything was decoded, and nothing is wrong."""
        return not self.problems and not self.unread


@dataclass
class _Findings:
    """What has been found so far."""

    path: str
    files: Sequence[Path]
    problems: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def verification(self, parameters: int = 0, compressed: int = 0, unread: str = "") -> Verification:
        """All of it."""
        told = (tuple(self.problems), tuple(self.checks), tuple(self.notes))
        return Verification(self.path, tuple(file.name for file in self.files), parameters, compressed, *told, unread)


def verify(source: str | Path) -> Verification:
    """Read every byte of a checkpoint, one parameter in memory at a time, and report all that is wrong with it.

    Raises:
        CheckpointError: there is no checkpoint at all.
    """
    if packed := packed_files(source):
        return check_packed(str(source), packed)
    located = locate(source)
    findings = _Findings(str(source), located.files)
    unread = _read_headers(located, findings)
    if unread or findings.problems:
        return findings.verification(unread=unread)
    findings.checks.append(f"{len(located.files)} header{'s' if len(located.files) != 1 else ''}")
    findings.problems += _index_problems(located)
    try:
        checkpoint = Checkpoint.open(source)
    except Unsupported as error:
        return findings.verification(unread=error.message)
    except CheckpointError as error:
        findings.problems.append(error.message)
        return findings.verification()
    parameters = checkpoint.parameters()
    for name in parameters:
        wrong = _parameter_problems(checkpoint, name)
        (findings.notes if may_be_infinite(name) and checkpoint.is_plain(name) else findings.problems).extend(wrong)
    compressed = len(checkpoint.manifest.entries)
    findings.checks.append(f"{len(parameters)} parameters finite, {compressed} of them decoded")
    _check_model(checkpoint, findings)
    _check_digests(checkpoint.source, findings)
    return findings.verification(len(parameters), compressed)


def packed_files(source: str | Path) -> tuple[Path, ...]:
    """All weight files of a checkpoint that is packed, or of several in one folder; none of one that is not."""
    with suppress(CheckpointError):  # shards that the index has other names for, or several checkpoints
        if not all(map(_is_packed, locate(source).files)):
            return ()
    with suppress(CheckpointError):
        return tuple(file for file in everything(source).files if _is_packed(file))
    return ()


def _is_packed(file: Path) -> bool:
    try:
        return is_packed(file)
    except CheckpointError:
        return False


def check_packed(path: str, files: Sequence[Path]) -> Verification:
    """Unpack files to nowhere, and compare their digests."""
    findings = _Findings(path, files)
    checked = tensors = 0
    for file in files:
        try:
            packed = OpenedPackedFile.open(file)
            if packed.manifest.base:
                what = f"{file.name} is the difference to a base: it can only be checked by unpacking it"
                findings.notes.append(what)
            else:
                unpack_file(packed, file.name, None, (None, file.name), lambda tensor, size: None)
                checked, tensors = checked + 1, tensors + len(packed.header.extents)
        except CheckpointError as error:
            findings.problems.append(error.message)
    findings.checks += [f"sha256 of {checked} unpacked file{'s' if checked != 1 else ''}"] if checked else []
    return findings.verification(tensors, tensors)


def _read_headers(source: Source, findings: _Findings) -> str:
    """Note what is wrong with headers; why one cannot be read, or nothing."""
    unread = ""
    for file in source.files:
        try:
            read_header(file)
        except Unsupported as error:
            unread = unread or error.message
        except CheckpointError as error:
            findings.problems.append(error.message)
    return unread


def _index_problems(source: Source) -> list[str]:
    """Tensors that a loader would never find, because the index does not name them."""
    if not source.weight_map:
        return []
    held = {name for file in source.files for name in read_header(file).tensors}
    stray = sorted(held - set(source.weight_map))
    shown = listed(stray, 5)
    return [f"{len(stray)} tensors are not in {INDEX}: {shown}"] if stray else []


def _parameter_problems(checkpoint: Checkpoint, name: str) -> list[str]:
    """Read, decode, and look for NaN and infinity."""
    try:
        _decode(checkpoint, name)
    except CheckpointError as error:
        return [error.message]
    return []


def _decode(checkpoint: Checkpoint, parameter: str) -> None:
    """Decode a parameter in blocks of rows, of which one is in memory at a time.

    Raises:
        CheckpointError: it cannot be decoded, or not to finite numbers.
    """
    entry = checkpoint.manifest.entries.get(parameter)
    if entry is None:
        for rows in checkpoint.row_blocks(parameter, PIECE):
            require_finite(checkpoint.dense(parameter, rows), parameter, checkpoint.path)
        return
    for block in checkpoint.row_blocks(parameter, PIECE):
        weight = checkpoint.weight(parameter, block)
        for part in row_slices(*weight.shape, PIECE):
            decoded = weight.rows(part.start, part.stop)
            require_finite(decoded.to(entry.dense.dtype), parameter, checkpoint.path)


def _check_model(checkpoint: Checkpoint, findings: _Findings) -> None:
    """Compare with the architecture that config.json names."""
    if checkpoint.config is None:
        findings.notes.append("a bare file names no architecture: a missing parameter cannot be noticed")
        return
    wrong = misfits_of(checkpoint)
    if wrong is None:
        findings.notes.append("transformers does not know the architecture: a missing parameter cannot be noticed")
        return
    findings.problems += wrong
    findings.checks.append("parameters and shapes against config.json")


def _check_digests(source: Source, findings: _Findings) -> None:
    """Compare every weight file with the digest that the step which wrote it has noted."""
    path = report_path(source.folder or source.path)
    if not path.is_file():
        findings.notes.append(f"no {path.name}: a changed byte can only be noticed where it breaks a number")
        return
    try:
        noted = Report.from_json(path.read_text(encoding="utf-8")).after.sha256
    except (CompressError, OSError, ValueError) as error:
        findings.problems.append(f"{path.name} cannot be read: {error}")
        return
    if not noted:
        findings.notes.append(f"{path.name} notes no digests of the weight files")
        return
    actual = digests(source)
    if len(noted) == len(actual) == 1 and source.folder is None:
        noted = dict.fromkeys(actual, next(iter(noted.values())))  # a single file may have been renamed
    for name in sorted({*noted, *actual}):
        if name not in actual:
            findings.problems.append(f"{path.name} notes {name}, which is not there")
        elif name not in noted:
            findings.problems.append(f"{name} is not the report's: {path.name} does not note it")
        elif noted[name] != actual[name]:
            findings.problems.append(
                f"{name} has changed since it was written: its sha256 is not the one in {path.name}"
            )
    findings.checks.append(f"sha256 of {len(actual)} file{'s' if len(actual) != 1 else ''} against {path.name}")
