"""The tables of a report, built once and rendered as Markdown, HTML and terminal text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aicompress.report import numbers
from aicompress.report.model import BYTE_KINDS, Latency, LayerRow, Report, Side
from aicompress.report.numbers import DASH
from aicompress.report.table import Cell, Table, columns, scalar

FEW_ROUNDS = 20  # below this many, the 95th percentile is the slowest round


def headline(report: Report) -> str:
    """The report in one line."""
    after, before = report.after, report.before
    parts = [numbers.size(after.weight_bytes)]
    if before is not None and report.size_ratio:
        change = f"{numbers.number(1 / report.size_ratio, 3)}× smaller"
        if report.size_ratio >= 1:
            change = "not smaller" if report.size_ratio == 1 else f"{numbers.number(report.size_ratio, 3)}× larger"
        parts = [f"{numbers.size(before.weight_bytes)} → {numbers.size(after.weight_bytes)}, {change}"]
    bits, unit = report.bits_per_original_weight, "original weight"
    if bits is None:  # a report of an earlier version
        bits, unit = after.bits_per_parameter, "parameter"
    if bits is not None:
        parts.append(f"{numbers.number(bits, 3)} bits per {unit}")
    if report.latency is not None and report.latency.ratio is not None:
        parts.append(f"latency {latency_ratio(report.latency)}")
    return "; ".join(parts)


def latency_ratio(latency: Latency) -> str:
    """The ratio of times with its interval, or that nobody can tell."""
    if latency.low is None or latency.high is None:
        return numbers.ratio(latency.ratio)
    spread = f"{numbers.number(latency.low, 3)} to {numbers.number(latency.high, 3)}"
    return f"{numbers.ratio(latency.ratio)} ({spread})" if latency.is_measurable else f"not measurable here ({spread})"


def route(report: Report) -> str:
    """Where the step went: "in → out", for eval what was measured against what."""
    if report.before is None:
        return report.after.path
    return f"{report.before.path} → {report.after.path}"


def summary(report: Report) -> Table:
    """Size, parameters, latency, wall time and memory, before and after."""
    before, after, latency = report.before, report.after, report.latency
    rows = [
        _change("weight bytes", before and before.weight_bytes, after.weight_bytes, numbers.exact_size),
        _change("bytes of all files", before and before.bytes, after.bytes, numbers.exact_size),
        _change("parameters", before and before.parameters, after.parameters, numbers.number),
        _change("bits per parameter", before and before.bits_per_parameter, after.bits_per_parameter, numbers.number),
        *_per_weight(report),
    ]
    if report.untouched is not None:
        left = report.untouched
        rows.append(_change(left.summary, left.bytes, left.bytes, numbers.exact_size))
    rows += _vocabulary(report.vocabulary)
    if latency is None:
        rows.append((Cell("latency, median"), *(Cell(DASH) for _ in range(3))))
    else:
        slowest = f"latency, 95th percentile ({latency.rounds} rounds)"
        if latency.rounds < FEW_ROUNDS:
            slowest = f"latency, slowest of {latency.rounds} rounds"
        *cells, _ = _change(
            f"latency, median ({latency.what})", latency.before_ms, latency.after_ms, numbers.milliseconds
        )
        ratio = latency_ratio(latency) if latency.ratio is not None else DASH
        rows.append((*cells, Cell(ratio, latency.ratio)))
        rows.append(_change(slowest, latency.before_p95_ms, latency.after_p95_ms, numbers.milliseconds))
    rows += _loading(before, after)
    waited = [] if report.waited is None else [("wall time of the command", numbers.duration(report.waited))]
    for name, text in (
        *waited,
        ("of it, the step's work" if waited else "wall time of the step", numbers.duration(report.seconds)),
        ("peak memory of the step (RSS)", numbers.size(report.peak_rss)),
    ):
        rows.append((Cell(name), Cell(DASH), Cell(text), Cell(DASH)))
    return Table("Summary", columns("", "before:", "after:", "after / before:"), tuple(rows))


def _per_weight(report: Report) -> list[tuple[Cell, ...]]:
    """Bits per original weight: both sides over the weights that the input stands for."""
    before, bits = report.before, report.bits_per_original_weight
    if bits is None:
        return []
    dense = 8 * before.weight_bytes / before.weights if before and before.weights else None
    return [_change("bits per original weight", dense, bits, numbers.number)]


def _vocabulary(figures: Mapping[str, Any]) -> list[tuple[Cell, ...]]:
    """How many tokens stay, and of each text the share that needs one that goes."""
    if not figures:
        return []
    rows = [_change("tokens of the vocabulary", figures["of"], figures["tokens"], lambda count: f"{count:,}")]
    for source, told in (("text", "text"), ("held_out", "held-out text")):
        for what in ("samples", "tokens"):
            share = figures.get(source, {}).get(what)
            if share is not None:
                name = f"{what} of the {told} that {'need' if what == 'samples' else 'are'} dropped tokens"
                rows.append((Cell(name), Cell(DASH), Cell(f"{100 * share:.3g} %", share), Cell(DASH)))
    return rows


def _loading(before: Side | None, after: Side) -> list[tuple[Cell, ...]]:
    """Cost of loading either side, where eval measured it."""
    if after.load_seconds is None:
        return []
    return [
        _change("load time, median", before and before.load_seconds, after.load_seconds, numbers.duration),
        _change(
            "load time, files not in memory",
            before and before.cold_load_seconds,
            after.cold_load_seconds,
            numbers.duration,
        ),
        _change("peak memory of load and forward", before and before.load_peak_rss, after.load_peak_rss, numbers.size),
    ]


def baselines(report: Report) -> Table:
    """What eval compared with, beside the input of the first column."""
    rows = []
    for baseline in report.baselines:
        side, latency = baseline.side, baseline.latency
        median, slower = (latency.before_ms, latency.ratio) if latency is not None else (None, None)
        share = numbers.ratio_of(report.after.weight_bytes, side.weight_bytes)
        rows.append(
            (
                Cell(side.path, code=True),
                Cell(numbers.exact_size(side.weight_bytes), side.weight_bytes),
                Cell(numbers.ratio(share), share),
                Cell(numbers.milliseconds(median), median),
                Cell(numbers.ratio(slower), slower),
            )
        )
    headings = columns("baseline", "weight bytes:", "bytes, this / it:", "latency:", "latency, this / it:")
    return Table("Further baselines", headings, tuple(rows))


def kinds(report: Report) -> Table:
    """Bytes of the weight files by kind, before and after."""
    sides = [report.before, report.after]
    present = {name for side in sides if side for name in side.by_kind}
    names = [*(name for name in BYTE_KINDS if name in present), *sorted(present - set(BYTE_KINDS))]
    rows = [_change(name, _kind(report.before, name), _kind(report.after, name), numbers.exact_size) for name in names]
    return Table("Bytes by tensor kind", columns("kind", "before:", "after:", "after / before:"), tuple(rows))


def layers(report: Report) -> Table:
    """One row per layer."""
    headings = columns(
        "layer",
        "kind?",
        "rule?",
        "method",
        "form?",
        "detail",
        "before?:",
        "after:",
        "ratio:",
        "rel. error:",
        "time?:",
        "note?",
    )
    return Table("Layers", headings, tuple(_layer(row) for row in report.layers))


def gates(report: Report) -> Table:
    """Every gate, the value it found and its verdict."""
    rows = []
    for gate in report.gates:
        verdict = Cell("passed", tone="good") if gate.passed else Cell("FAILED", tone="bad")
        value = numbers.exact(gate.value) if gate.value is not None else "not measured"
        rows.append((verdict, Cell(gate.expression, code=True), Cell(value, gate.value)))
    return Table("Gates", columns("verdict", "gate", "found:"), tuple(rows))


def training(report: Report) -> Table:
    """The single figures of a training run; a curve is summed up as its first, last and least value."""
    curves_by_name = curves(report.training)
    drawn = {
        name
        for name in report.training
        if any(curve == name or curve.startswith(f"{name}.") for curve in curves_by_name)
    }
    single = {name: value for name, value in report.training.items() if name not in drawn}
    rows = [(Cell(name), Cell(scalar(value))) for name, value in _leaves(single)]
    for name, points in curves_by_name.items():
        values = [value for _, value in points]
        first, last, least = (numbers.number(v) for v in (values[0], values[-1], min(values)))
        rows.append((Cell(name), Cell(f"{first} → {last}, least {least} ({len(values)} points)")))
    return Table("Training", columns("", "value"), tuple(rows))


def method_of(step: Mapping[str, Any]) -> Any:
    """The method's name of a step of a lineage; None where it says none."""
    recipe = step.get("recipe")
    method = recipe.get("method") if isinstance(recipe, Mapping) else None
    return method.get("name") if isinstance(method, Mapping) else step.get("method")


def lineage(report: Report) -> Table:
    """Every step that led here, oldest first."""
    rows = []
    for position, step in enumerate(report.lineage, start=1):
        name = method_of(step)
        rest = {k: v for k, v in step.items() if k not in ("command", "method", "recipe")}
        detail = ", ".join(f"{key} {scalar(value)}" for key, value in _leaves(rest))
        command = Cell(scalar(step.get("command")))
        rows.append((Cell(str(position), position), command, Cell(scalar(name)), Cell(detail or DASH)))
    return Table("Lineage", columns("step:", "command", "method", "details"), tuple(rows))


def environment(report: Report) -> Table:
    """Versions, machine, threads, the data of calibration and metrics, and the digest of each weight file."""
    entries = [*_leaves({**report.environment, "aicompress": report.tool_version})]
    calibration = [("calibration", source) for source in report.calibration.get("data", [])]
    for name, source in [*calibration, *report.data.items()]:
        entries += _leaves(source, f"{name} ")
    rows = [(Cell(name), Cell(scalar(value))) for name, value in entries]
    for side in (report.before, report.after):
        for name, digest in side.sha256.items() if side else ():
            rows.append(
                (Cell(f"sha256 of {'input' if side is report.before else 'output'} {name}"), Cell(digest, code=True))
            )
    return Table("Environment", columns("", "value"), tuple(rows))


def curves(training: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """The (step, value) curves of a training section: every number beside "step" in its lists of points."""
    points_by_name: dict[str, list[tuple[float, float]]] = {}
    for name, points in training.items():
        if not isinstance(points, list | tuple):
            continue
        for at, point in enumerate(points):
            named = point if isinstance(point, Mapping) else {"": point}
            step = named.get("step", at)
            for key, value in named.items():
                if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                    points_by_name.setdefault(f"{name}.{key}" if key else name, []).append((step, value))
    return points_by_name


def _layer(row: LayerRow) -> tuple[Cell, ...]:
    share = numbers.ratio_of(row.bytes_after, row.bytes_before)
    left_alone = row.method in ("-", "")
    return (
        Cell(row.name, row.name, code=True),
        Cell(row.kind, row.kind),
        Cell(DASH) if row.rule == "-" else Cell(row.rule, row.rule, code=True),
        Cell(DASH if left_alone else row.method, row.method),
        Cell(row.form, row.form),
        Cell(" ".join(f"{key}={scalar(value)}" for key, value in row.detail.items()) or DASH),
        Cell(numbers.size(row.bytes_before), row.bytes_before),
        Cell(numbers.size(row.bytes_after), row.bytes_after),
        Cell(numbers.ratio(share), share, tone="bad" if share is not None and share > 1 else ""),
        Cell(numbers.number(row.rel_error, 3), row.rel_error),
        Cell(DASH if left_alone else numbers.duration(row.seconds), row.seconds),
        Cell(row.note),
    )


def _change(name: str, before: Any, after: Any, write: Any) -> tuple[Cell, ...]:
    """A row: name, before, after, after / before."""
    share = numbers.ratio_of(after, before)
    return (Cell(name, name), Cell(write(before), before), Cell(write(after), after), Cell(numbers.ratio(share), share))


def _kind(side: Side | None, name: str) -> int | None:
    return side.by_kind.get(name, 0) if side is not None else None


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of nested mappings by dotted name."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
