"""What a row holds under a name: nested values, nothing at all, plain text, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aicompress.errors import RecipeError, suggestion

ROLES = {"human": "user", "gpt": "assistant"}  # as some data sets of chats call them

Messages = list[dict[str, Any]]


def root(name: str, known: Sequence[str]) -> str:
    """The column that holds a name: itself, or what stands before its first dot.

    Raises:
        KeyError: there is no such column.
    """
    for column in (name, name.partition(".")[0]):
        if column in known:
            return column
    raise KeyError(name)


def value_at(row: Mapping[str, Any], name: str) -> Any:
    """The value of a name, `conversation.text` being the `text` of `conversation`, or of each item of that list.

    Raises:
        KeyError: the row has no such value.
    """
    column = root(name, list(row))
    return _inside(row[column], name.split(".")[1:] if column != name else [], name)


def _inside(value: Any, path: Sequence[str], name: str) -> Any:
    if not path or value is None:
        return value
    if isinstance(value, list) and path[0].isdecimal():
        return _inside(value[int(path[0])], path[1:], name) if int(path[0]) < len(value) else None
    if isinstance(value, list):
        return [_inside(item, path, name) for item in value]
    if isinstance(value, Mapping) and path[0] in value:
        return _inside(value[path[0]], path[1:], name)
    raise KeyError(name)


def no_such(name: str, known: Sequence[str]) -> str:
    """A hint for a name that a row does not have: the nearest one, or the messages of a chat that it has."""
    chats = [column for column in known if column in ("messages", "conversations", "conversation")]
    if name == "text" and chats:
        return (
            f"field: {chats[0]} reads the messages of a chat; from the command line, --set calibration.field={chats[0]}"
        )
    return suggestion(name, known)


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing to read: null, blanks, or a list of such."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list) and all(map(is_empty, value)))


def messages_of(value: Any) -> Messages | None:
    """The messages of a chat with `role` and `content`, also where they are called `from` and `value`; else None."""
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        return None
    messages: Messages = []
    for item in value:
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or ("content" not in item and "value" not in item):
            return None
        messages.append({**item, "role": ROLES.get(role, role), "content": content})
    return messages


def plain_text(value: Any, place: str, name: str | int) -> str:
    """A row's value as text; the texts of a list stand in lines of their own.

    Args:
        value: what the row holds.
        place: where it stands, for messages.
        name: what it is called.

    Raises:
        RecipeError: it is not text.
    """
    if isinstance(value, list) and all(item is None or isinstance(item, str) for item in value):
        value = "\n".join(item for item in value if not is_empty(item))
    if messages_of(value) is not None:
        hint = f"{name}.content reads their texts; a language model's chat template is applied where it reads windows"
        raise RecipeError(f"{place}: {name!r} holds the messages of a chat, not text", hint)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise RecipeError(f"{place}: {name!r} is {kind}, not text", "name the text with `field`, such as `chat.text`")
    if "\0" in value:
        raise RecipeError(f"{place}: {name!r} holds NUL characters, so it is no text", "clean the data")
    return value
