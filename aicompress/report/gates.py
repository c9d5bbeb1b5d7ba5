"""Gates: conditions over a report, such as `size.ratio <= 0.3` or `bytes <= 20MB`.

    gate    = figure operator number
    figure  = a dotted path of the report's JSON form; `bytes` alone is after.weight_bytes
    number  = decimal, for bytes with an optional unit: KB MB GB TB (powers of 1000), KiB MiB GiB TiB (of 1024)

Parsing needs no report, so a recipe with a bad gate is refused before any work. Nothing is evaluated as code.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aicompress.errors import CompressError, GateFailed, RecipeError, raise_all, suggestion
from aicompress.report.model import BYTE_KINDS, Gate, Report
from aicompress.report.numbers import BYTE_UNITS, exact
from aicompress.report.quality import finite

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_OPPOSITES = {"<=": ">", ">": "<=", "<": ">=", ">=": "<", "==": "!=", "!=": "=="}
LOADING = ("load_seconds", "cold_load_seconds", "load_peak_rss")  # what `eval` alone measures of a side
_SIDE_BYTES = ("bytes", "weight_bytes", "load_peak_rss", *(f"by_kind.{kind}" for kind in BYTE_KINDS))
_SIDE_NUMBERS = ("parameters", "bits_per_parameter", "load_seconds", "cold_load_seconds")
_BYTES = frozenset({"bytes", "peak_rss", *(f"{side}.{name}" for side in ("before", "after") for name in _SIDE_BYTES)})
_PLAIN = frozenset(
    {
        "size.ratio",
        "size.bits_per_original_weight",
        "seconds",
        "waited",
        *(f"{side}.{name}" for side in ("before", "after") for name in _SIDE_NUMBERS),
        *(f"latency.{name}" for name in ("ratio", "low", "high", "rounds")),
        *(f"latency.{side}_{name}" for side in ("before", "after") for name in ("ms", "p95_ms")),
    }
)
TOKENS = "vocabulary"  # the section of tokens that go
_OPEN = ("quality", "training", TOKENS)  # sections whose names depend on what is measured
FIGURES = tuple(sorted(_BYTES | _PLAIN))

_FORM = "write FIGURE OPERATOR NUMBER, for example size.ratio <= 0.3"
_GATE = re.compile(r"\s*(?P<figure>[^<>=!]*?)\s*(?P<operator>[<>=!]+)\s*(?P<bound>[^<>=!]*?)\s*", re.ASCII)
_NUMBER = re.compile(r"(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>[A-Za-z%]*)", re.ASCII)
_PATH = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+)*", re.ASCII)


@dataclass(frozen=True)
class Condition:
    """A parsed gate.

    Attributes:
        expression: as the recipe has it.
        figure: the dotted path.
        operator: one of <= < >= > == !=.
        bound: the number on the right, in bytes where the figure is one.
    """

    expression: str
    figure: str
    operator: str
    bound: float

    def gate(self, plain: dict[str, Any]) -> Gate:
        """How this condition comes out on a report's JSON form. A figure that is not there fails, with value None."""
        value = finite(_lookup(plain, "after.weight_bytes" if self.figure == "bytes" else self.figure))
        passed = value is not None and _OPERATORS[self.operator](value, self.bound)
        return Gate(self.expression, value, passed)


def parse(expression: str, quality: Collection[str] | None = None) -> Condition:
    """Read one gate.

    Args:
        expression: for example "bytes <= 20MB".
        quality: the quality figures that will be measured; a gate on another one is then an error.

    Raises:
        RecipeError: not a gate, an unknown figure, or a number or unit that does not fit it.
    """
    match = _GATE.fullmatch(expression)
    if match is None:
        many = len(re.findall(r"[<>=!]+", expression)) > 1
        raise _wrong(expression, "compares more than once" if many else "has no comparison", _FORM)
    figure, sign, bound = match["figure"], match["operator"], match["bound"]
    if sign not in _OPERATORS:
        near = {"=": "==", "=<": "<=", "=>": ">="}.get(sign)
        hint = f"did you mean {near!r}?" if near else f"use one of {' '.join(_OPERATORS)}"
        raise _wrong(expression, f"{sign!r} is not a comparison", hint)
    _check_figure(expression, figure, quality)
    return Condition(expression, figure, sign, _bound(expression, figure, bound))


def parse_all(expressions: Sequence[str], quality: Collection[str] | None = None) -> tuple[Condition, ...]:
    """Read every gate of a recipe.

    Raises:
        RecipeError, Problems: all that is wrong, at once.
    """
    conditions: list[Condition] = []
    problems: list[CompressError] = []
    for expression in expressions:
        try:
            conditions.append(parse(expression, quality))
        except RecipeError as problem:
            problems.append(problem)
    raise_all(problems)
    return tuple(conditions)


def require_measured(expressions: Sequence[str], absent: Mapping[str, str]) -> None:
    """Return when no gate asks for what a command does not measure, so that it is refused before the work.

    Args:
        absent: figures and sections that will not be in the report, each with what to do instead.

    Raises:
        RecipeError, Problems: every gate that cannot hold; see also parse_all.
    """
    problems: list[CompressError] = []
    for condition in parse_all(expressions):
        figure = condition.figure
        hint = next((hint for name, hint in absent.items() if figure == name or figure.startswith(f"{name}.")), None)
        if hint is not None:
            problems.append(RecipeError(f"gate {condition.expression!r}: {figure} will not be measured", hint))
    raise_all(problems)


def require_figures(expressions: Sequence[str], section: str, figures: Mapping[str, Any]) -> None:
    """Return when every gate on a section of the report asks for a number that is in it.

    Raises:
        RecipeError, Problems: every gate that cannot hold; see also parse_all.
    """
    problems: list[CompressError] = []
    for condition in parse_all(expressions):
        name = condition.figure.removeprefix(f"{section}.")
        if name != condition.figure and finite(_lookup(dict(figures), name)) is None:
            hint = suggestion(name, sorted(_numbers(figures)))
            problems.append(
                RecipeError(f"gate {condition.expression!r}: {condition.figure} will not be measured", hint)
            )
    raise_all(problems)


def _numbers(figures: Mapping[str, Any]) -> list[str]:
    """The dotted paths of all numbers."""
    paths: list[str] = []
    for name, value in figures.items():
        paths += [f"{name}.{path}" for path in _numbers(value)] if isinstance(value, Mapping) else [name]
    return paths


def evaluate(expressions: Sequence[str], report: Report) -> tuple[Gate, ...]:
    """Every gate with the value it found. A figure that was not measured is a failed gate with value None.

    Raises:
        RecipeError, Problems: see parse_all.
    """
    conditions = parse_all(expressions)
    plain = json.loads(report.to_json()) if conditions else {}
    return tuple(condition.gate(plain) for condition in conditions)


def evaluate_forbidden(expressions: Sequence[str], report: Report) -> tuple[Gate, ...]:
    """Every condition that must not hold, as the gate that must; a figure that was not measured fails as well.

    Raises:
        RecipeError, Problems: see parse_all.
    """
    plain = json.loads(report.to_json()) if expressions else {}
    opposite = [
        replace(each, expression=f"fail if {each.expression}", operator=_OPPOSITES[each.operator])
        for each in parse_all(expressions)
    ]
    return tuple(condition.gate(plain) for condition in opposite)


def require(gates: Sequence[Gate]) -> None:
    """Return when all gates hold.

    Raises:
        GateFailed: names every gate that does not, with the value found.
    """
    failed = [
        f"{gate.expression} (found {exact(gate.value)})"
        if gate.value is not None
        else f"{gate.expression} (not measured)"
        for gate in gates
        if not gate.passed
    ]
    if failed:
        raise GateFailed(
            f"{len(failed)} of {len(gates)} gates failed: {'; '.join(failed)}", "the output and its report are kept"
        )


def _check_figure(expression: str, figure: str, quality: Collection[str] | None) -> None:
    if not figure:
        raise _wrong(expression, "names no figure", _FORM)
    if _NUMBER.fullmatch(figure):
        raise _wrong(expression, "has its number on the left", _FORM)
    section, _, name = figure.partition(".")
    if section in _OPEN and _PATH.fullmatch(figure):
        if not name:
            raise _wrong(expression, f"{section!r} is a section, not a figure", f"name one, for example {section}.loss")
        if section == "quality" and quality is not None and not _measured(name, quality):
            raise _wrong(expression, f"{figure!r} will not be measured", suggestion(name, sorted(quality)))
    elif figure not in _BYTES | _PLAIN:
        raise _wrong(expression, f"unknown figure {figure!r}", _meant(figure, quality or ()))


def _meant(figure: str, quality: Collection[str]) -> str:
    """A hint for a figure that there is none of: those whose last name it is, or the nearest one."""
    known = [*FIGURES, *(f"quality.{name}" for name in quality)]
    ending = [repr(name) for name in known if name.endswith(f".{figure}")]
    return f"did you mean {' or '.join(ending)}?" if ending else suggestion(figure, [*known, "quality.NAME"])


def _measured(name: str, quality: Collection[str]) -> bool:
    """Whether a path under `quality` is one of the figures, or a part of one such as `kl.high`."""
    return any(name == known or name.startswith(f"{known}.") for known in quality)


def _bound(expression: str, figure: str, text: str) -> float:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise _wrong(expression, f"{text!r} is not a number" if text else "has no number on the right", _FORM)
    unit = match["unit"]
    if unit and figure not in _BYTES:
        raise _wrong(
            expression, f"{figure!r} takes no unit", f"write {match['number']} alone, in the figure's own unit"
        )
    if unit and unit not in BYTE_UNITS:
        raise _wrong(expression, f"unknown unit {unit!r}", f"use one of {' '.join(BYTE_UNITS)}")
    bound: float = float(match["number"]) * BYTE_UNITS.get(unit, 1)
    if not math.isfinite(bound):
        raise _wrong(expression, f"{text!r} is too large", "write a number that a float can hold")
    return bound


def _lookup(plain: Any, path: str) -> Any:
    """The entry at a dotted path. A name that holds dots itself is found too; {"value": ...} is its value."""
    if not path:
        return plain.get("value") if isinstance(plain, dict) else plain
    if not isinstance(plain, dict):
        return None
    steps = path.split(".")
    for end in range(len(steps), 0, -1):
        name = ".".join(steps[:end])
        if name in plain:
            return _lookup(plain[name], ".".join(steps[end:]))
    return None


def _wrong(expression: str, what: str, hint: str) -> RecipeError:
    return RecipeError(f"gate {expression!r}: {what}", hint)
