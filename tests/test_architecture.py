"""Imports go one way and in no circle, rooms stay small, names say something, and only the command line prints."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import get_args

from aicompress import errors
from aicompress.layer import Kind
from aicompress.methods import COMMANDS, methods

PACKAGE = Path(__file__).parent.parent / "aicompress"
UNHINTED = {name for name, kind in vars(errors).items() if getattr(kind, "usual_hint", None) == ""} - {"Problems"}
# Rooms of the package, from the ground up: a module imports only from its own cell and from cells before it.
CELLS = (
    ("errors", "discovery", "disk"),
    ("layer", "statistics", "weights", "selection", "measure", "data", "lossless"),
    ("methods", "metrics", "checkpoint", "report"),
    ("recipe", "model", "hf"),
    ("pipeline",),
    ("cli",),
)
# Rooms inside a folder, in the same way.
FLOORS = {
    "model": (
        ("hf",),
        ("kernels",),
        ("loading",),
        ("vocabulary", "blocks"),
        ("sensitivity", "equivalence", "channels"),
        ("architecture",),
        ("distillation",),
    ),
    "pipeline": (
        ("step",),
        ("calibration", "evaluation"),
        ("layerwise", "structured", "channels", "distillation"),
        ("steps", "analysis", "inspect", "verify", "export", "packing"),
    ),
}
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})
VAGUE = {"utils", "helpers", "common", "base", "manager", "session", "misc"}
MOST_FILES = 20


def name_of(path: Path) -> str:
    """Dotted name of a module of the package."""
    inside = path.relative_to(PACKAGE.parent).with_suffix("")
    return ".".join(inside.parent.parts if inside.name == "__init__" else inside.parts)


NAMES = {name_of(path): path for path in MODULES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """All that a file imports, by dotted name: at the top, inside functions and for type checkers alike."""
    imported: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(imported)


def module_of(imported: str) -> str | None:
    """The module of the package that an imported name leads to."""
    while imported and imported not in NAMES:
        imported = imported.rpartition(".")[0]
    return imported or None


@cache
def graph() -> dict[str, set[str]]:
    """Name of every module -> the modules of the package that it imports."""
    return {
        name: {module for each in imports_of(path) if (module := module_of(each)) is not None and module != name}
        for name, path in NAMES.items()
    }


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A circle of a directed graph as the names along it, or nothing."""
    done: set[str] = set()

    def descend(node: str, above: list[str]) -> list[str]:
        if node in above:
            return [*above[above.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if around := descend(other, [*above, node]):
                return around
        done.add(node)
        return []

    return next((around for node in sorted(graph) if (around := descend(node, []))), [])


def among_children(folder: str) -> dict[str, set[str]]:
    """Imports between the files and folders that lie directly in a folder."""
    depth = folder.count(".") + 2

    def child(name: str) -> str | None:
        return ".".join(name.split(".")[:depth]) if name.startswith(f"{folder}.") else None

    arrows: dict[str, set[str]] = {}
    for name, others in graph().items():
        own = child(name)
        if own is not None:
            arrows.setdefault(own, set()).update({c for other in others if (c := child(other)) not in (None, own)})
    return arrows


def rank(place: str, floors: tuple[tuple[str, ...], ...]) -> int | None:
    """How far right a room stands, None for one that the order does not name."""
    return next((number for number, floor in enumerate(floors) if place in floor), None)


def test_a_circle_is_seen() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_no_circle_among_files() -> None:
    assert circle(graph()) == []


def test_no_circle_among_the_rooms_of_a_folder() -> None:
    names = [name_of(folder / "__init__.py") for folder in FOLDERS]
    assert {name: around for name in names if (around := circle(among_children(name)))} == {}


def breaches(path: Path) -> list[str]:
    """Imports of a file that lead to a room above its own."""
    parts = name_of(path).split(".")[1:]
    others = [module.split(".")[1:] for module in graph()[name_of(path)]]
    upward = []
    for above, floors in (((), CELLS), *(((room,), floors) for room, floors in FLOORS.items())):
        depth = len(above)
        own = rank(parts[depth], floors) if tuple(parts[:depth]) == above and len(parts) > depth else None
        if own is None:
            continue
        for other in others:
            beside = tuple(other[:depth]) == above and len(other) > depth
            theirs = rank(other[depth], floors) if beside else None
            if theirs is not None and theirs > own:
                upward.append(f"{'.'.join(parts)} imports {'.'.join(other)}, which stands above it")
    return upward


def test_imports_go_one_way() -> None:
    inside = [path for path in MODULES if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")]
    assert [breach for path in inside for breach in breaches(path)] == []


def test_a_folder_holds_few_files() -> None:
    """More than a few: put some into a folder that says what they are."""
    files = {folder: [path for path in folder.glob("*.py") if path.name != "__init__.py"] for folder in FOLDERS}
    assert {name_of(folder): len(inside) for folder, inside in files.items() if len(inside) > MOST_FILES} == {}


def test_only_model_imports_transformers() -> None:
    importers = [name for name, path in NAMES.items() if "transformers" in {i.split(".")[0] for i in imports_of(path)}]
    assert {name.split(".")[1] for name in importers} <= {"model", "hf"}


def test_only_cli_prints_and_only_boundary_exits() -> None:
    for path in MODULES:
        names = {ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)}
        assert "print" not in names or path.relative_to(PACKAGE).parts[0] == "cli", path
        assert not names & {"sys.exit", "exit", "quit", "os._exit"} or path.name == "boundary.py", path


def test_names_say_something() -> None:
    assert not VAGUE & {path.stem for path in MODULES}


def test_every_room_has_its_place() -> None:
    placed = {room for cell in CELLS for room in cell}
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__", "__main__"}
    assert rooms <= placed, f"put {rooms - placed} into a cell"
    for folder, floors in FLOORS.items():
        inside = {
            p.relative_to(PACKAGE / folder).parts[0].removesuffix(".py") for p in (PACKAGE / folder).rglob("*.py")
        }
        assert inside - {"__init__"} <= {room for floor in floors for room in floor}


def compared_strings(path: Path) -> set[str]:
    """Strings that a file compares something with, or looks something up by in a match or a dict."""
    strings: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Compare):
            places = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            places = [node.value]
        elif isinstance(node, ast.Dict):
            places = [key for key in node.keys if key is not None]
        else:
            continue
        strings |= {
            leaf.value
            for place in places
            for leaf in ast.walk(place)
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
        }
    return strings


@cache
def registered_names() -> frozenset[str]:
    """Names of methods that say something nowhere else: `embedding` is a loss and a kind of layer."""
    names = {name for command in COMMANDS for name in methods(command)}
    return frozenset(names - set(get_args(Kind.__value__ if hasattr(Kind, "__value__") else Kind)))


def test_the_pipeline_asks_a_method_and_does_not_look_at_its_name() -> None:
    for path in sorted((PACKAGE / "pipeline").rglob("*.py")):
        calls = [ast.unparse(node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
        assert not [call for call in calls if call.startswith("getattr(config")], path
        assert not compared_strings(path) & registered_names(), path


def test_an_error_without_a_usual_hint_brings_one() -> None:
    """Those of recipes and checkpoints have one; a file or folder that is in the way says itself what to do."""
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in UNHINTED:
                given = [*call.args, *(keyword.value for keyword in call.keywords)]
                bare = len(given) < 2 or (isinstance(given[1], ast.Constant) and not given[1].value)
                assert isinstance(given[0], ast.Starred) or not bare, f"{path}:{call.lineno}"


def test_a_package_gives_no_name_that_a_module_of_it_has() -> None:
    """Importing the module would put it in the name's place, from then on; unless it is there already."""
    twice = {
        f"{name}.{alias.asname or alias.name}"
        for name, path in NAMES.items()
        if path.name == "__init__.py"
        for node in tree_of(path).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{name}.{alias.asname or alias.name}" in NAMES
        and node.module not in (name, f"{name}.{alias.asname or alias.name}")
    }
    assert twice == set()


def test_a_class_name_means_one_thing() -> None:
    """Private ones aside, and the parameters of a loss, which its file names."""
    places: dict[str, list[str]] = {}
    for name, path in NAMES.items():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name != "Config":
                places.setdefault(node.name, []).append(name)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
