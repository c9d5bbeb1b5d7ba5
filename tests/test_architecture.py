"""Imports go one way, names say something, and printing and exiting stay in the command line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "aicompress"
# A module imports only from its own cell and from cells before it.
CELLS = (
    ("errors",),
    ("layer", "weights", "selection", "measure"),
    ("methods", "checkpoint", "report"),
    ("recipe", "model", "data", "hf"),
    ("pipeline",),
    ("cli",),
)
RANK = {name: rank for rank, cell in enumerate(CELLS) for name in cell}
MODULES = sorted(PACKAGE.rglob("*.py"))
VAGUE = {"utils", "helpers", "common", "base", "manager", "session", "misc"}


def cell_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_imports(tree: ast.AST) -> list[str]:
    """Modules imported anywhere but under `if TYPE_CHECKING:`."""
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    found: list[str] = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def named_cells(imports: list[str]) -> set[str]:
    parts = [name.split(".") for name in imports]
    return {p[1] for p in parts if p[0] == "aicompress" and len(p) > 1 and p[1] in RANK}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    cell = cell_of(path)
    if cell in ("__init__", "__main__"):
        return
    backward = {
        other for other in named_cells(runtime_imports(ast.parse(path.read_text()))) if RANK[other] > RANK[cell]
    }
    assert not backward, f"{cell} imports from {backward}, which lie to its right"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_model_imports_transformers(path: Path) -> None:
    importers = {name.split(".")[0] for name in runtime_imports(ast.parse(path.read_text()))}
    assert "transformers" not in importers or cell_of(path) in ("model", "hf")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_cli_prints_and_only_boundary_exits(path: Path) -> None:
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    names = {ast.unparse(call) for call in calls}
    assert "print" not in names or cell_of(path) == "cli"
    assert not names & {"sys.exit", "exit", "quit", "os._exit"} or path.name == "boundary.py"


def test_names_say_something() -> None:
    assert not VAGUE & {path.stem for path in MODULES}


def test_every_cell_is_known() -> None:
    found = {cell_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert found <= set(RANK), f"put {found - set(RANK)} into a cell"
