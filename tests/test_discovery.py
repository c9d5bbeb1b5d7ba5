"""Members of a package are found by name of their object, also in folders that join the package later."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aicompress.discovery import members


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package `fruits` with nothing in it."""
    folder = tmp_path / "fruits"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "fruits"]:
        del sys.modules[name]


def write(folder: Path, module: str, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(f"from types import SimpleNamespace\nFRUIT = SimpleNamespace(name={name!r})\n")


def test_members_stand_in_the_order_of_their_files(package: Path) -> None:
    write(package, "b", "apple")
    write(package, "a", "pear")
    (package / "shared.py").write_text("SEEDS = 5\n")
    assert list(members("fruits", "FRUIT")) == ["pear", "apple"]


def test_a_folder_that_joins_the_package_is_looked_at(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(package, "a", "pear")
    assert list(members("fruits", "FRUIT")) == ["pear"]
    write(tmp_path / "more", "c", "plum")
    monkeypatch.setattr(sys.modules["fruits"], "__path__", [str(package), str(tmp_path / "more")])
    assert list(members("fruits", "FRUIT")) == ["pear", "plum"]


def test_two_members_of_one_name_are_a_mistake(package: Path) -> None:
    write(package, "a", "pear")
    write(package, "b", "pear")
    with pytest.raises(TypeError, match="'pear'"):
        members("fruits", "FRUIT")


def test_a_file_that_does_not_import_is_a_mistake(package: Path) -> None:
    (package / "a.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        members("fruits", "FRUIT")
