"""`aicompress methods`."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from aicompress.cli.render import Entry
    from aicompress.methods.method import Method
    from aicompress.methods.modes import Mode

EXAMPLES = """Examples:

aicompress methods

aicompress methods quantize

aicompress methods quantize gptq"""


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="[COMMAND]", help="factorize, quantize, prune or distill.")
    ] = None,
    method: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="One method of it.")] = None,
) -> None:
    """List the methods of each command and when to take them, or those of one command with their parameters."""
    from aicompress.cli import render
    from aicompress.errors import Refused, suggestion
    from aicompress.methods.modes import modes
    from aicompress.methods.registry import COMMANDS, get, methods

    if name is not None and name not in COMMANDS:
        raise Refused(f"there is no command {name!r}", suggestion(name, COMMANDS))
    if name is None:
        for each in COMMANDS:
            render.definitions(each, [_method(known) for known in methods(each).values()])
        return
    for known in methods(name).values() if method is None else [get(name, method)]:
        render.definitions("", [_method(known)])
        fields = known.config.model_fields.items()
        render.definitions("parameters", [_parameter(field, info) for field, info in fields if is_open(field, info)])
        presets = [(level, (effort.cost,)) for level, effort in known.efforts.items()]
        if presets:
            render.definitions("--effort", presets)
    if name == "distill" and method is None:
        render.definitions("mode: what of the student moves", [_method(mode) for mode in modes().values()])


def _method(method: Method | Mode[Any]) -> Entry:
    return method.name, (method.summary, f"take it for: {method.when}")


def is_open(field: str, info: FieldInfo) -> bool:
    """Whether a parameter can be anything but its default."""
    return field != "name" and info.annotation is not NoneType and len(_choices(info.annotation)) != 1


def _parameter(field: str, info: FieldInfo) -> Entry:
    """What a parameter takes, and what it means."""
    kind = type_in_words(info.annotation) + _bounds(info.metadata)
    if info.is_required():
        return field, (f"{kind}; required", info.description or "")
    default = "" if info.default is None else f"; default {in_yaml(info.default)}"
    return field, (kind + default, info.description or "")


def type_in_words(annotation: Any) -> str:
    """A parameter's type as the author of a recipe would say it; that it may be left out is not said."""
    from pydantic import ByteSize

    words: Mapping[Any, str] = {
        int: "whole number", float: "number", bool: "true or false", str: "text", ByteSize: "size such as 20MB",
    }  # fmt: skip
    origin, inner = get_origin(annotation), [each for each in get_args(annotation) if each is not NoneType]
    if origin is Annotated:
        return type_in_words(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(type_in_words(each) for each in inner)
    if origin is Literal:
        *others, last = (in_yaml(choice) for choice in inner)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (tuple, list):
        kinds = dict.fromkeys(type_in_words(each) for each in inner if each is not Ellipsis)
        return f"list of {' and '.join(kinds)}"
    return "mapping" if origin is dict else words.get(annotation, "mapping")


def in_yaml(value: Any) -> str:
    """A value as a recipe has it."""
    import json

    from aicompress.report.plain import strict

    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {in_yaml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(in_yaml(each) for each in value)}]"
    return json.dumps(strict(value))


def _choices(annotation: Any) -> tuple[Any, ...]:
    """What a parameter of a few values can be; two of them where any value will do."""
    return get_args(annotation) if get_origin(annotation) is Literal else (0, 1)


def _bounds(metadata: list[Any]) -> str:
    """The bounds of a number in words."""
    said = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}
    bounds = [(name, getattr(each, name)) for each in metadata for name in said if hasattr(each, name)]
    return "".join(f" {said[name].format(in_yaml(bound))}" for name, bound in bounds)
