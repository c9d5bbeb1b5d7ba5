"""The report of one step: a versioned schema. Everything printed, rendered or gated comes from here.

Every number is measured or counted: bytes are bytes on disk, times are wall times of this run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after.

    Attributes:
        name: the layer.
        kind: linear, conv, embedding or head.
        rule: which rule gave it its parameters: "method", "rules[0]: *.down_proj", "levels[1]: 0-1".
        method: the method's name, or "-" where the layer was left alone.
        form: how it is stored now: dense, low_rank, int_grouped, sparse, ...
        detail: bits, group, rank, sparsity: whatever the method chose.
        bytes_before, bytes_after: on disk.
        rel_error: ‖W − Ŵ‖_F / ‖W‖_F, None where the shape changed.
        seconds: time in the method.
        note: why it is as it is, when that is not obvious ("rank 300 would grow it: kept dense").
    """

    name: str
    kind: str
    rule: str
    method: str
    form: str
    detail: dict[str, Any]
    bytes_before: int
    bytes_after: int
    rel_error: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Side:
    """One checkpoint: the input or the output of a step, or what eval measured.

    Attributes:
        path: as given.
        bytes: total of all files.
        weight_bytes: bytes of the safetensors files.
        parameters: numbers the weights stand for; tied ones once.
        by_kind: bytes of tensors by kind: linear, conv, embedding, head, norm and bias ("other").
        sha256: digest of each weight file by name.
    """

    path: str
    bytes: int
    weight_bytes: int
    parameters: int
    by_kind: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.weight_bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Latency:
    """Forward times of input and output, measured in turn in one process.

    Attributes:
        what: what was timed, e.g. "whole model, 8 x 64 tokens" or "sum over 36 matrix layers, 128 rows".
        before_ms, after_ms: medians.
        before_p95_ms, after_p95_ms: 95th percentiles.
        rounds: counted rounds.
    """

    what: str
    before_ms: float
    after_ms: float
    before_p95_ms: float
    after_p95_ms: float
    rounds: int

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms if self.before_ms else 0.0


@dataclass(frozen=True)
class Gate:
    """A condition of the recipe and how it came out."""

    expression: str
    value: float | None
    passed: bool


@dataclass(frozen=True)
class Report:
    """What one step did.

    Attributes:
        command: factorize, quantize, prune, distill or eval.
        before, after: the input and output; eval has its baseline (or nothing) as `before`.
        layers: a row per layer of the input that is a layer of any kind.
        latency: None when switched off, with the reason in `warnings`.
        quality: measured quality by name, each {"value": ..., "low": ..., "high": ..., "n": ...} or a plain number.
        training: loss curve and best step of a distillation; empty otherwise.
        warnings: what the user should know.
        environment: versions, machine, threads.
        recipe: the resolved recipe.
        lineage: every earlier step, oldest first.
        seconds: wall time of the step.
        peak_rss: bytes.
    """

    command: str
    tool_version: str
    before: Side | None
    after: Side
    layers: tuple[LayerRow, ...]
    latency: Latency | None
    quality: dict[str, Any]
    training: dict[str, Any]
    warnings: tuple[str, ...]
    gates: tuple[Gate, ...]
    environment: dict[str, Any]
    recipe: dict[str, Any]
    lineage: tuple[dict[str, Any], ...]
    seconds: float
    peak_rss: int
    schema_version: int = SCHEMA_VERSION

    @property
    def size_ratio(self) -> float:
        """Weight bytes after / before."""
        return self.after.weight_bytes / self.before.weight_bytes if self.before else 1.0

    def to_json(self) -> str:
        """The report as JSON, with the derived figures that readers ask for."""
        plain = dataclasses.asdict(self)
        plain["size"] = {"ratio": self.size_ratio}
        for name, side in (("before", self.before), ("after", self.after)):
            if side is not None:
                plain[name]["bits_per_parameter"] = side.bits_per_parameter
        if self.latency is not None:
            plain["latency"]["ratio"] = self.latency.ratio
        return json.dumps(plain, indent=2, ensure_ascii=False, sort_keys=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            ValueError: not a report, or one of a newer schema.
        """
        plain = json.loads(text)
        if not isinstance(plain, dict) or "schema_version" not in plain:
            raise ValueError("not an aicompress report")
        if plain["schema_version"] > SCHEMA_VERSION:
            raise ValueError(
                f"report schema {plain['schema_version']} is newer than this version reads ({SCHEMA_VERSION})"
            )
        plain.pop("size", None)
        return cls(
            **{
                **plain,
                "before": _build(Side, plain["before"]),
                "after": _build(Side, plain["after"]),
                "latency": _build(Latency, plain["latency"]),
                "layers": tuple(_build(LayerRow, row) for row in plain["layers"]),
                "gates": tuple(_build(Gate, gate) for gate in plain["gates"]),
                "warnings": tuple(plain["warnings"]),
                "lineage": tuple(plain["lineage"]),
            }
        )


def _build(kind: type, fields: dict[str, Any] | None) -> Any:
    """A dataclass from JSON, derived figures dropped."""
    if fields is None:
        return None
    known = {f.name for f in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in fields.items() if key in known})
