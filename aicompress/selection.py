"""Which layers a recipe acts on: names, globs, `re:` patterns, kinds and depth.

A pattern that matches nothing is an error.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from aicompress.errors import CompressError, RecipeError, suggestion
from aicompress.layer import Kind, LayerInfo

_SPAN = re.compile(r"\s*(-?\d+)\s*(?:-\s*(-?\d+)\s*)?")


class Expression:
    """A regular expression that somebody else wrote: all its matches together take a bounded time.

    Args:
        text: in the syntax of Python's re.

    Raises:
        ValueError: it does not compile.
    """

    def __init__(self, text: str) -> None:
        import regex  # like re, with a time limit; a step without expressions does not wait for it

        self.text = text
        self._left = SECONDS
        try:
            self._begins, self._whole = regex.compile(text), regex.compile(f"(?:{text})\\Z")
        except (regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{text[:SHOWN]!r} is not a regular expression: {error}") from error

    def begins(self, name: str) -> bool:
        """Whether the name begins with what the expression matches; ValueError when its time is up."""
        return self._try(self._begins, name)

    def matches(self, name: str) -> bool:
        """Whether the expression matches the whole name; ValueError when its time is up."""
        return self._try(self._whole, name)

    def _try(self, pattern: Any, name: str) -> bool:
        start = time.thread_time()
        try:
            return pattern.match(name, timeout=max(self._left, 0.01)) is not None
        except TimeoutError as error:
            raise ValueError(f"{self.text[:SHOWN]!r} takes more than {SECONDS} seconds to match names") from error
        finally:
            self._left -= time.thread_time() - start


SECONDS = 2.0  # for all matches of an expression; those of 20,000 names take a tenth of one
SHOWN = 100  # letters of an expression in a message


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Callable[[str], object]:
    """What tells whether a pattern matches a whole name."""
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern)).match
    return Expression(pattern[3:]).matches


def matches(pattern: str, layer: LayerInfo) -> bool:
    """Whether a pattern is, or matches, one of a layer's names.

    Args:
        pattern: an exact name, a glob (`*`, `?`, `[...]`; `*` crosses dots), or `re:` and a regular expression.
        layer: the layer.

    Raises:
        RecipeError: the regular expression does not compile, or takes too long.
    """
    try:
        return pattern in layer.names or any(_compiled(pattern)(name) for name in layer.names)
    except ValueError as error:
        raise RecipeError(f"pattern {error}", "write it in Python's re syntax, without nested repetitions") from error


def unmatched(patterns: Iterable[str], layers: Sequence[LayerInfo], where: str) -> list[CompressError]:
    """One error for every pattern that matches no layer."""
    names = [name for layer in layers for name in layer.names]
    return [
        RecipeError(f"{where} pattern {pattern!r} matches no layer", _wider(pattern, names) if names else "")
        for pattern in patterns
        if not any(matches(pattern, layer) for layer in layers)
    ]


def _wider(pattern: str, names: Sequence[str]) -> str:
    """A hint for a pattern that matches nothing: the glob that it is a part of, or the nearest name.

    A module's name stands for what is inside it in other tools, and so does the last word of a name.
    """
    whole = pattern.removesuffix(".weight")
    near = [whole, f"{whole}.*", f"*.{whole}", f"*{whole}", f"*{whole}*"] if not set("*?[:") & set(pattern) else []
    for glob in near:
        found = sum(fnmatch.fnmatchcase(name, glob) for name in names)
        if found:
            return f"did you mean {glob!r}?" + (f" It matches {found}" if found > 1 else "")
    return suggestion(pattern, names)


def unreached(spans: Iterable[str], layers: Sequence[LayerInfo]) -> list[CompressError]:
    """One error for every span of depths that does not parse or holds no layer."""
    problems: list[CompressError] = []
    depths = sorted({layer.index for layer in layers if layer.index is not None})
    hint = f"depths go from {depths[0]} to {depths[-1]}" if depths else "no layer's name has a depth: use rules"
    for span in spans:
        try:
            if not any(in_levels(layer, span) for layer in layers):
                problems.append(RecipeError(f"levels: no layer has a depth in {span!r}", hint))
        except RecipeError as error:
            problems.append(error)
    return problems


def select(
    layers: Sequence[LayerInfo], include: Sequence[str], exclude: Sequence[str], kinds: Sequence[Kind]
) -> tuple[list[LayerInfo], list[CompressError]]:
    """Pick layers: one of `kinds`, matched by some `include` (none given: all), by no `exclude`.

    Returns:
        The picked layers in file order, and every problem found.
    """
    problems = unmatched(include, layers, "include") + unmatched(exclude, layers, "exclude")
    wanted = [layer for layer in layers if not include or any(matches(pattern, layer) for pattern in include)]
    of_kind = [layer for layer in wanted if layer.kind in kinds]
    picked = [layer for layer in of_kind if not any(matches(pattern, layer) for pattern in exclude)]
    if picked or problems:
        return picked, problems
    if wanted and not of_kind:
        selected_kinds = sorted({layer.kind for layer in wanted})
        hint = f"set select.kinds: [{', '.join(selected_kinds)}] to act on them"
        there = " and ".join(selected_kinds)
        message = f"the recipe selects only {there} layers, which it does not act on"
        if not include:  # a head that is tied is the embedding
            message = f"the checkpoint has no {' or '.join(kinds)} layers of its own, only {there}"
        return [], [RecipeError(message, hint)]
    hint = "widen select.include, or check what `aicompress inspect IN` lists"
    return [], [RecipeError("the recipe selects no layer", hint)]


def from_the_start(span: str, layers: Sequence[LayerInfo]) -> str:
    """A span of depths with those counted from the end, such as -1 for the last, counted from the start."""
    depths = [layer.index for layer in layers if layer.index is not None]
    last = max(depths, default=0)

    def counted(match: re.Match[str]) -> str:
        numbers = [int(number) for number in match.groups() if number is not None]
        return "-".join(str(number if number >= 0 else last + 1 + number) for number in numbers)

    return ",".join(_SPAN.sub(counted, piece) if "-" in piece else piece for piece in span.split(","))


def in_levels(layer: LayerInfo, span: str) -> bool:
    """Whether the layer's depth lies in a span such as `0-1`, `5`, `0-1,10-11`; `from_the_start` has counted it.

    Raises:
        RecipeError: the span does not parse.
    """
    depth = -1 if layer.index is None else layer.index
    inside = False
    for piece in span.split(","):
        bounds = _SPAN.fullmatch(piece)
        if bounds is None:
            hint = 'write layers: "0-1", "0-1,10-11", or "-2--1" for the last two'
            raise RecipeError(f"levels: {span!r} is not a list of depths", hint)
        low = int(bounds[1])
        inside |= low <= depth <= int(bounds[2] or low)
    return inside
