"""The report of one step: a versioned schema. Everything printed, rendered or gated comes from here.

Every number is measured or counted: bytes are bytes on disk, times are wall times of this run.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from aicompress.errors import Refused
from aicompress.report.plain import build, strict

SCHEMA_VERSION = 1
BYTE_KINDS = ("linear", "experts", "conv", "embedding", "head", "scale", "other", "header")


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after.

    Attributes:
        name: the layer.
        kind: linear, experts, conv, embedding or head.
        rule: which rule gave it its parameters: "method", "rules[0]: *.down_proj", "levels[1]: 0-1".
        method: the method's name, or "-" where the layer was left alone.
        form: how it is stored now: dense, low_rank, int_grouped, sparse, ...
        detail: bits, group, rank, sparsity: whatever the method chose.
        bytes_before, bytes_after: on disk.
        rel_error: ‖W − Ŵ‖_F / ‖W‖_F, None where the shape changed, or where W is zero and Ŵ is not.
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
        parameters: numbers that are stored: elements of plain tensors, codes, kept values and the numbers of factors,
            without scales, zero points, tables and masks; tied ones once.
        by_kind: bytes of the safetensors files by kind, one of BYTE_KINDS: layers by their kind, scales and zero
            points, what belongs to no layer ("other": norms, biases, routers, copies of tied parameters, riders), file
            headers. They add up to weight_bytes, and so do the layers of a report with "other" and "header".
        sha256: digest of each weight file by name.
        load_seconds: median time to load it, its files in the page cache; None where it was not measured.
        cold_load_seconds: the same with its files dropped from the page cache first, where the system allows that.
        load_peak_rss: highest resident memory of a fresh process that loads it and makes one forward pass, in bytes.
        weights: numbers of the dense tensors that it stands for, zeros included; None in reports of earlier versions.
    """

    path: str
    bytes: int
    weight_bytes: int
    parameters: int
    by_kind: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)
    load_seconds: float | None = None
    cold_load_seconds: float | None = None
    load_peak_rss: int | None = None
    weights: int | None = None

    @property
    def bits_per_parameter(self) -> float | None:
        """Stored bits per stored number; None for a checkpoint without parameters."""
        return 8 * self.weight_bytes / self.parameters if self.parameters else None


UNCERTAIN = 1.5  # greatest part of least in an interval from which on a ratio of times is not stated


@dataclass(frozen=True)
class Latency:
    """Forward times of input and output, measured in turn in one process.

    Attributes:
        what: what was timed, e.g. "whole model, 8 x 64 tokens" or "sum over 36 matrix layers, 128 rows".
        before_ms, after_ms: medians; before is None where there is no baseline.
        before_p95_ms, after_p95_ms: 95th percentiles.
        rounds: counted rounds.
        paired: median over the rounds of after / before in the same round; `low` and `high` are its 95 % interval. None
            without a baseline, and in reports of earlier versions.
    """

    what: str
    before_ms: float | None
    after_ms: float
    before_p95_ms: float | None
    after_p95_ms: float
    rounds: int
    paired: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float | None:
        """Time after / before in the same rounds; None without a baseline."""
        if self.paired is not None:
            return self.paired
        return self.after_ms / self.before_ms if self.before_ms else None

    @property
    def is_measurable(self) -> bool:
        """Whether the interval of the ratio is narrow enough for the ratio to say something."""
        return self.low is None or self.high is None or self.high <= UNCERTAIN * self.low


@dataclass(frozen=True)
class Baseline:
    """A checkpoint beside `before` that eval compared with.

    Attributes:
        side: its bytes and parameters.
        latency: its forward times as "before", the tested checkpoint's as "after".
    """

    side: Side
    latency: Latency | None


@dataclass(frozen=True)
class Gate:
    """A condition of the recipe and how it came out."""

    expression: str
    value: float | None
    passed: bool


@dataclass(frozen=True)
class Untouched:
    """What a step left as it was.

    Attributes:
        parameters: how many tensors.
        numbers: how many numbers are in them.
        share: of the input's numbers.
        bytes: on disk.
        largest: names of the largest of them.
    """

    parameters: int
    numbers: int
    share: float
    bytes: int
    largest: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """In a few words."""
        tensors = f"{self.parameters} tensor{'s' * (self.parameters != 1)}"
        return f"left as it was: {tensors}, {self.share:.1%} of the numbers"


@dataclass(frozen=True)
class Report:
    """What one step did.

    Attributes:
        command: factorize, quantize, prune, distill or eval.
        before, after: the input and output; eval has its baseline (or nothing) as `before`.
        layers: a row per layer of the input that is a layer of any kind.
        latency: None when switched off, or where it cannot be measured, with the reason in `warnings`.
        quality: measured quality by name, each a plain number or {"value": ...} with any of "low", "high" (interval),
            "n" (samples), "baseline" (the same figure of `before`), "better" ("lower" or "higher"), "change" (how it
            differs from the baseline's on the same samples, with an interval of its own), "kernels" (what the
            model's compressed layers ran on) and "baseline_kernels" (the same of `before`).
        training: loss curve and best step of a distillation; empty otherwise. A list of {"step": ..., ...} is a curve.
        warnings: what the user should know.
        notes: what the user asked for, and the step has settled.
        environment: versions, machine, threads.
        recipe: the resolved recipe.
        lineage: every step, this one included, oldest first.
        seconds: wall time of the step's work.
        waited: wall time of the command until its report: imports, plan, work and timing; None outside of the command
            line.
        peak_rss: bytes.
        calibration: of a calibrated step: `data`, where the samples came from, with sha256, number and seed;
            `statistics`, files that were read; `processes` that ran them. Empty otherwise.
        data: of eval: where the samples of each metric came from, as in `calibration`.
        bits: of a step that searched for widths: `target` and `value`, what was measured on how many `samples`, the
            losses of the choice, and `units`: layers that got one width, with bytes and loss of each they could have;
            `levels`: the target and the losses of each level with a budget of its own.
        vocabulary: of a step that drops tokens: `tokens` that stay, `of` how many, and by source (`text`, `held_out`)
            which shares of its `samples` and `tokens` need one that goes. Empty otherwise.
        untouched: what a layer-wise step left as it was; None for others.
        baselines: further checkpoints that eval compared with; their figures are under quality.against by path.
        files: what a step wrote into its output's directory; nothing else in it is ever replaced.
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
    calibration: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    bits: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    untouched: Untouched | None = None
    baselines: tuple[Baseline, ...] = ()
    files: tuple[str, ...] = ()
    waited: float | None = None
    notes: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @property
    def size_ratio(self) -> float | None:
        """Weight bytes after / before; None without a `before`."""
        return self.after.weight_bytes / self.before.weight_bytes if self.before and self.before.weight_bytes else None

    @property
    def bits_per_original_weight(self) -> float | None:
        """Bits of the output for every weight that the input stands for: what is comparable between methods."""
        weights = (self.before or self.after).weights
        return 8 * self.after.weight_bytes / weights if weights else None

    def to_json(self) -> str:
        """The report as strict JSON, with the derived figures that readers ask for. What is not finite becomes null."""
        plain = dataclasses.asdict(self)
        plain["size"] = {"ratio": self.size_ratio, "bits_per_original_weight": self.bits_per_original_weight}
        for name, side in (("before", self.before), ("after", self.after)):
            if side is not None:
                plain[name]["bits_per_parameter"] = side.bits_per_parameter
        if self.latency is not None:
            plain["latency"]["ratio"] = self.latency.ratio
        return json.dumps(strict(plain), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            Refused: not a report, a damaged one, or one of a newer schema.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Refused("not an aicompress report: not JSON", "give the report.json that a step wrote") from error
        version = plain.get("schema_version") if isinstance(plain, dict) else None
        if not isinstance(version, int):
            raise Refused("not an aicompress report: no schema_version", "give the report.json that a step wrote")
        if version > SCHEMA_VERSION:
            raise Refused(
                f"report schema {version} is newer than this version reads ({SCHEMA_VERSION})", "update aicompress"
            )
        try:
            report: Report = build(cls, plain)
        except TypeError as error:
            raise Refused(f"damaged report: {error}", "run the step again, or take the report from a backup") from error
        return report
