"""Recipe files: YAML in which nothing is given twice, edits from the command line, the shipped ones by name."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from aicompress.data.section import FILES, ROWS, SOURCES, kind_of
from aicompress.disk import expanded
from aicompress.errors import RecipeError, nearest, suggestion

SHOWN = 100  # letters of a value in a message
MOST = 100_000  # values of a recipe, those behind aliases counted as often as they are named


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put in what is merged with `<<`, unless aliases of aliases make it grow without end."""
        super().flatten_mapping(node)
        if len(node.value) > MOST:
            raise RecipeError(f"line {node.start_mark.line + 1}: merges {len(node.value):,} keys", _NO_ALIASES)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make a value; one that its tag or its form does not allow is an error of the text, at its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            written = f"{node.value[:60]!r}" if isinstance(node, yaml.ScalarNode) else "a collection"
            problem = f"{written} is no {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Hashable, Any]:
    own = {id(key) for key, _ in node.value}
    loader.flatten_mapping(node)
    mapping: dict[Hashable, Any] = {}
    written: set[Hashable] = set()  # here, and not where something is merged from: these may take its place
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise RecipeError(f"line {key_node.start_mark.line + 1}: a key is a list or a mapping", "quote it")
        if key in written:
            raise RecipeError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice", "keep one of them")
        if id(key_node) in own:
            written.add(key)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


_NO_ALIASES = "write it without aliases"


def _require_bounded(plain: Any, what: str) -> None:
    """Refuse what a few aliases make of a small text.

    Raises:
        RecipeError: it would hold too many values.
    """
    counts: dict[int, int] = {}
    inside: set[int] = set()

    def count(value: Any) -> int:
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if id(value) in inside:
            return MOST + 1  # it holds itself
        if id(value) not in counts or not children:
            inside.add(id(value))
            total = 1 + sum(map(count, children))
            inside.discard(id(value))
            counts[id(value)] = total
            return total
        return counts[id(value)]

    if count(plain) > MOST:
        raise RecipeError(f"{what} holds more than {MOST:,} values", _NO_ALIASES)


def read(name: str, command: str, overrides: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """The fields of a recipe of a command with their edits, and its file.

    Raises:
        RecipeError: there is none, it cannot be read, or an edit does not apply.
    """
    path = find(name, command)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read as text", "give a YAML file") from error
    return with_overrides(read_yaml(text, path.name), overrides), path


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse a recipe's text.

    Raises:
        RecipeError: not YAML, not a mapping, or a key given twice.
    """
    try:
        plain = yaml.load(text, Loader=_UniqueKeys)
        _require_bounded(plain, name)
    except RecursionError as error:
        raise RecipeError(f"{name} is nested too deeply", "start from a recipe in configs/") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        hint = (
            "write another value" if isinstance(error, yaml.constructor.ConstructorError) else "check the indentation"
        )
        raise RecipeError(f"{name} is not YAML{where}: {getattr(error, 'problem', error)}", hint) from error
    if not isinstance(plain, dict):
        raise RecipeError(
            f"{name} is not a recipe: it must be a mapping with `version: 1`", "start from one in configs/"
        )
    return plain


def with_overrides(plain: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `--set method.bits=3` edits before validation; values are YAML, list items go by number.

    A path of data is relative to the current folder, and takes the place of the source that the recipe has there.
    `text=FILE` stands for every section that reads such a file, `drawn=N` for a calibration on drawn tokens instead.

    Raises:
        RecipeError: not KEY=VALUE, or a path through something that is not a mapping.
    """
    edited: set[tuple[int, str]] = set()  # sources that edits give: of two of these none is the one that is meant
    for override in overrides:
        path, equals, value = (part.strip() for part in override.partition("="))
        if not equals or not path:
            raise RecipeError(f"--set {override[:SHOWN]!r} is not KEY=VALUE", "for example --set method.bits=3")
        if path == "text":
            _set_text(plain, value)
            continue
        if path == "drawn":
            _set_drawn(plain, value)
            continue
        *parents, last = path.split(".")
        target: Any = plain
        for parent in parents:
            target = target[_item(target, parent, path)] if isinstance(target, list) else target.setdefault(parent, {})
            if not isinstance(target, dict | list):
                raise RecipeError(f"--set {path}: {parent!r} holds a value, not a section", "")
        try:
            parsed = yaml.load(value, Loader=_UniqueKeys)
            _require_bounded(parsed, f"--set {path}")
        except RecursionError as error:
            raise RecipeError(f"--set {path}: its value is nested too deeply", "start from a recipe") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {path}: {value[:SHOWN]!r} is not YAML", "quote it") from error
        parsed = _from_here(parsed, path.split("."))
        if isinstance(target, dict) and last in SOURCES and parsed is not None:
            for other in target.keys() & set(SOURCES) - {last}:
                if (id(target), other) not in edited:
                    del target[other]
            edited.add((id(target), last))
        target[_item(target, last, path) if isinstance(target, list) else last] = parsed
    made = plain.get("calibration")  # by an edit, after the text was given to the sections that were there
    if isinstance(made, dict) and not made.keys() & {*SOURCES, "drawn"}:
        plain["calibration"] = {**with_text({}, overrides).get("calibration", {}), **made}
    return plain


def _from_here(value: Any, path: Sequence[str]) -> Any:
    """A value with its paths of files made absolute: a recipe's start at its folder, those of the command line here."""
    if isinstance(value, dict):
        return {key: _from_here(item, [*path, str(key)]) for key, item in value.items()}
    is_path = path[-1] in FILES or list(path) == ["student", "config"]
    return str(expanded(value).absolute()) if is_path and isinstance(value, str) else value


def _set_text(plain: dict[str, Any], file: str) -> None:
    """Let calibration, training data and every figure read one file; a step that reads no data needs none.

    A file that holds rows by its suffix is read as rows: the braces of JSON are no text to calibrate on.

    Raises:
        RecipeError: the recipe reads something else than what the file holds.
    """
    figures = plain.get("quality")
    named = {"calibration": plain.get("calibration"), "data": plain.get("data")}
    named |= {f"quality.{name}": figure for name, figure in figures.items()} if isinstance(figures, dict) else {}
    sections = {name: section for name, section in named.items() if isinstance(section, dict)}
    kind = kind_of(file)
    of_rows = {"text", *ROWS.values(), *(("pairs",) if kind == "csv" else ())}
    replaced = {"text": {"text"}, "arrays": {"arrays"}}.get(kind, of_rows)
    readers = [section for section in sections.values() if section.keys() & set(SOURCES) <= replaced]
    if not readers and (sections or "method" not in plain):
        which = " and ".join(sections) or "the recipe"
        another = "take a recipe that does, such as `-r eval/language-model`"
        hint = "give a file of what it reads, or take another recipe" if sections else another
        raise RecipeError(f"--text: {which} reads no {kind}", hint)
    for section in readers:
        own = "pairs" if "pairs" in section else kind
        for name in replaced:
            section.pop(name, None)
        section[own] = str(expanded(file).absolute())


def with_text(plain: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Let a recipe without calibration calibrate on the file of `text=FILE`, where that is among its edits."""
    files = [edit.partition("=")[2] for edit in overrides if edit.startswith("text=")]
    return {**plain, "calibration": {kind_of(files[-1]): str(expanded(files[-1]).absolute())}} if files else plain


def _set_drawn(plain: dict[str, Any], number: str) -> None:
    """Let calibration draw tokens in the place of what it reads; a step that calibrates nothing needs none.

    Raises:
        RecipeError: no number, or calibration reads arrays.
    """
    if not number.isdecimal() or int(number) < 1:
        raise RecipeError(f"--drawn: {number[:SHOWN]!r} is no number of samples", "for example --drawn 128")
    section = plain.get("calibration")
    if not isinstance(section, dict):
        return
    if "arrays" in section:
        raise RecipeError("--drawn: calibration reads arrays, and no tokens", "give arrays with --set")
    for name in (*SOURCES, "samples"):
        section.pop(name, None)
    section["drawn"] = int(number)


def _item(items: list[Any], number: str, path: str) -> int:
    """A list item's number, counted from 0."""
    if not number.isdecimal() or int(number) >= len(items):
        raise RecipeError(f"--set {path}: {number!r} is not one of its {len(items)} items", "items count from 0")
    return int(number)


def shipped() -> Path:
    """Folder of the shipped recipes: inside an installed package, or configs/ of a source tree."""
    here = Path(__file__).resolve().parent.parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


@functools.cache
def _recipes(folder: Path) -> dict[str, Path]:
    """The recipe files of a folder by their names in it."""
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def folder_of(recipe: Path) -> Path:
    """Where the paths of a recipe start: its folder, or the current one where it comes through a pipe."""
    return Path() if recipe.is_fifo() or recipe.parent == Path("/dev") else recipe.parent


def find(name: str, command: str | None = None) -> Path:
    """A recipe file by path, `-` for standard input, or a shipped one by name such as `quantize/rtn-w4`.

    Args:
        command: what the recipe is for, of which one is suggested.

    Raises:
        RecipeError: neither exists.
    """
    path = Path("/dev/stdin" if name == "-" else name)
    if path.is_file() or path.is_fifo():  # such as a shell gives for <(command)
        return path
    known = _recipes(shipped())
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    fitting = [recipe for recipe in known if command is None or recipe.startswith(f"{command}/")]
    by_last = {recipe.rpartition("/")[2]: recipe for recipe in reversed(fitting)}
    near = nearest(name, fitting) or by_last.get(nearest(name, list(by_last)) or "")
    hint = suggestion(name, fitting) if near is None else f"did you mean {near!r}?"
    raise RecipeError(f"recipe {name!r} is neither a file nor a shipped recipe", hint)
