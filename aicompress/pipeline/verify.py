"""Whether a checkpoint is whole: headers, index, manifest, every parameter decoded, every number finite, digests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.header import read_header
from aicompress.checkpoint.reader import digests, require_finite
from aicompress.checkpoint.source import INDEX, Source, locate
from aicompress.errors import CheckpointError, CompressError
from aicompress.model.loading.mismatches import mismatches
from aicompress.report.model import Report
from aicompress.weights import TensorSpec

Progress = Callable[[str, int, int], None]  # what, done, total


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
    """

    path: str
    files: tuple[str, ...]
    parameters: int
    compressed: int
    problems: tuple[str, ...]
    checks: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


@dataclass
class _Findings:
    problems: list[str]
    checks: list[str]
    notes: list[str]


def verify(source: str | Path, progress: Progress = lambda what, done, total: None) -> Verification:
    """Read every byte of a checkpoint, one parameter in memory at a time, and report all that is wrong with it.

    Raises:
        CheckpointError: there is no checkpoint at all.
    """
    located = locate(source)
    findings = _Findings([], [], [])
    names = tuple(file.name for file in located.files)
    findings.problems += list(_header_problems(located))
    if findings.problems:
        return Verification(str(source), names, 0, 0, tuple(findings.problems), (), ())
    findings.checks.append(f"{len(names)} header{'s' if len(names) != 1 else ''}")
    findings.problems += _index_problems(located)
    try:
        checkpoint = Checkpoint.open(source)
    except CheckpointError as error:
        findings.problems.append(error.message)
        return Verification(str(source), names, 0, 0, tuple(findings.problems), tuple(findings.checks), ())
    parameters = checkpoint.parameters()
    for number, (name, spec) in enumerate(parameters.items()):
        findings.problems += _parameter_problems(checkpoint, name, spec)
        progress(name, number + 1, len(parameters))
    compressed = len(checkpoint.manifest.entries)
    findings.checks.append(f"{len(parameters)} parameters finite, {compressed} of them decoded")
    _check_model(checkpoint, parameters, findings)
    _check_digests(checkpoint.source, findings)
    return Verification(
        str(source), names, len(parameters), compressed,
        tuple(findings.problems), tuple(findings.checks), tuple(findings.notes),
    )  # fmt: skip


def report_file(source: Source) -> Path:
    """Where the report of the step that wrote a checkpoint lies: inside a directory, beside a single file."""
    if source.folder is not None:
        return source.folder / "report.json"
    return source.path.with_name(f"{source.path.name.removesuffix('.safetensors')}.report.json")


def _header_problems(source: Source) -> Iterator[str]:
    for file in source.files:
        try:
            read_header(file)
        except CheckpointError as error:
            yield error.message


def _index_problems(source: Source) -> list[str]:
    """Tensors that a loader would never find, because the index does not name them."""
    if not source.weight_map:
        return []
    held = {name for file in source.files for name in read_header(file).tensors}
    stray = sorted(held - set(source.weight_map))
    shown = ", ".join(stray[:5]) + (", ..." if len(stray) > 5 else "")
    return [f"{len(stray)} tensors are not in {INDEX}: {shown}"] if stray else []


def _parameter_problems(checkpoint: Checkpoint, name: str, spec: TensorSpec) -> list[str]:
    """Read, decode, and look for NaN and infinity."""
    try:
        dense = checkpoint.dense(name)
        if TensorSpec.of(dense) != spec:
            return [f"{name}: decodes to {TensorSpec.of(dense)}, the manifest says {spec}"]
        require_finite(dense, name, checkpoint.path)
    except CheckpointError as error:
        return [error.message]
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:  # what decoding damaged tensors raises
        return [f"{name}: cannot be decoded: {str(error).splitlines()[0]}"]
    return []


def _check_model(checkpoint: Checkpoint, parameters: dict[str, TensorSpec], findings: _Findings) -> None:
    """Compare with the architecture that config.json names."""
    if checkpoint.config is None:
        findings.notes.append("a bare file names no architecture: a missing parameter cannot be noticed")
        return
    wrong = mismatches(checkpoint.config, {name: spec.shape for name, spec in parameters.items()})
    if wrong is None:
        findings.notes.append("transformers does not know the architecture: a missing parameter cannot be noticed")
        return
    findings.problems += wrong
    findings.checks.append("parameters and shapes against config.json")


def _check_digests(source: Source, findings: _Findings) -> None:
    """Compare every weight file with the digest that the step which wrote it has noted."""
    path = report_file(source)
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
