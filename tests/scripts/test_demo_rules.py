"""The demo's rules are complete: every file that a command of the demo reads has a rule and is a prerequisite."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from aicompress.methods.registry import COMMANDS

ROOT = Path(__file__).parents[2]
READY = ".venv/.ready"
STEP = re.compile(r"^\S*/aicompress (?:factorize|quantize|prune|distill|eval) .*$", re.MULTILINE)


def make(folder: Path, *arguments: str) -> str:
    """What make prints, in an environment that is not a make's own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"make {' '.join(arguments)}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the demo's rules read: no build/, and a .venv that stands for one that is set up."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").mkdir()
    (folder / READY).touch()
    return folder


@pytest.fixture(scope="module")
def prerequisites(tree: Path) -> dict[str, set[str]]:
    """Each target's prerequisites, from make's own list of rules after it has matched its patterns."""
    rules: dict[str, set[str]] = {}
    listed = make(tree, "--print-data-base", "--dry-run", "demo")
    for line in listed[listed.index("# Files") :].splitlines():
        target, colon, needed = line.partition(": ")
        if colon and " " not in target and ":=" not in needed and not line.startswith(("#", "\t")):
            rules.setdefault(target, set()).update(needed.replace("|", " ").split())
    return rules


def steps(printed: str) -> list[list[str]]:
    """The compressing and measuring commands among what make would run, in words."""
    return [shlex.split(line) for line in STEP.findall(printed)]


def paths_in(value: Any, folder: Path) -> Iterator[str]:
    """Paths that a recipe names, from the root: strings of it that lead from the recipe's folder into build/."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from paths_in(part, folder)
    elif isinstance(value, str) and "/" in value:
        path = os.path.normpath(folder / value)
        if path.startswith("build/"):
            yield path


def reads(tree: Path, words: list[str]) -> set[str]:
    """Paths that a command reads: its input, its recipe, other models, and the data that the recipe names."""
    recipe = words[words.index("-r") + 1]
    named = {words[2], recipe, *(word for flag, word in pairwise(words) if flag in ("--against", "--teacher"))}
    named |= set(paths_in(yaml.safe_load((tree / recipe).read_text(encoding="utf-8")), Path(recipe).parent))
    return {name.rstrip("/") for name in named}


def written(words: list[str]) -> str:
    """The folder that a command writes."""
    return words[words.index("-o") + 1] if words[1] == "eval" else words[3]


def is_prerequisite(path: str, needed: set[str]) -> bool:
    """Whether a file is among the prerequisites; of a folder, the file that is there when it is complete."""
    return path in needed or any(f"{path}/{complete}" in needed for complete in ("report.json", "model.safetensors"))


def test_both_ways_are_shown(tree: Path) -> None:
    """The direct one, and the chain: distilling for the minute that a demo has does not pay."""
    shown = [(words[1], words[3]) for words in steps(make(tree, "-n", "demo")) if words[1] != "eval"]
    assert {verb for verb, _ in shown} == {*COMMANDS} - {"distill"}
    assert ("quantize", "build/demo/direct") in shown


def test_the_first_step_waits_for_no_text(tree: Path, prerequisites: dict[str, set[str]]) -> None:
    first = written(steps(make(tree, "-n", "demo"))[0])
    assert not any(name.startswith("build/text") for name in prerequisites[f"{first}/report.json"])


def test_every_file_that_a_step_reads_is_a_prerequisite(tree: Path, prerequisites: dict[str, set[str]]) -> None:
    for words in steps(make(tree, "-n", "demo")):
        target = f"{written(words)}/report.json"
        for path in reads(tree, words):
            assert is_prerequisite(path, prerequisites[target]), f"{target} reads {path}, which is no prerequisite"


def test_every_prerequisite_is_there_or_has_a_rule(tree: Path, prerequisites: dict[str, set[str]]) -> None:
    pending, seen = ["demo"], set[str]()
    while pending:
        target = pending.pop()
        if target not in seen:
            seen.add(target)
            assert target in prerequisites or (tree / target).exists(), f"nothing makes {target}"
            pending += prerequisites.get(target, set())
    assert {"build/text/train.txt", "build/text/heldout.txt", "build/minilm/model.safetensors"} <= seen


def test_each_step_can_be_asked_for_alone(tree: Path) -> None:
    for words in steps(make(tree, "-n", "demo")):
        target = f"{written(words)}/report.json"
        printed = make(tree, "-n", target)
        alone = steps(printed)
        made = {written(step) for step in alone}
        assert alone[-1] == words
        for path in set().union(*(reads(tree, step) for step in alone)):
            if path.startswith("build/demo/"):
                assert path in made, f"make {target} does not make {path}"
        assert "scripts/fetch_demo_model.py" in printed


def test_one_run_writes_all_the_texts(tree: Path) -> None:
    """Two jobs do not write the same files at once, and a text that went missing comes back."""
    texts = ("train", "tuning", "heldout")
    assert make(tree, "-n", "-j2", *(f"build/text/{name}.txt" for name in texts)).count("make_demo_text.py") == 1
    for name in texts:
        assert make(tree, "-n", f"build/text/{name}.txt").count("make_demo_text.py") == 1


def test_the_demo_has_gates_at_its_end(tree: Path) -> None:
    (end,) = (words for words in steps(make(tree, "-n", "demo")) if words[1:3] == ["eval", "build/demo/quantized"])
    gates = [word for flag, word in pairwise(end) if flag == "--fail-if"]
    assert gates == ["size.ratio > 0.125", "quality.embedding_agreement < 0.97", "latency.low > 0.5"]
    assert end[end.index("--against") + 1].rstrip("/") == "build/minilm"


def test_recipes_are_not_chosen_on_what_the_figures_are_from(tree: Path) -> None:
    for words in steps(make(tree, "-n", "demo")):
        assert ("build/text/heldout.txt" in reads(tree, words)) == (words[1] == "eval")
