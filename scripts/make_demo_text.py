"""Write the demo text: the English that ships inside CPython, as clean sentences, one per line.

It is the language reference (`pydoc_data.topics`) and the documentation strings of the standard library, without
tables, code, grammar and markup. Topics and modules are divided by a hash of their names: recipes are trained on
train.txt and chosen by what they do on tuning.txt, and heldout.txt is for the final figures alone. A sentence is kept
only where it comes first, so that the sentences of one part are unseen in the others.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics

BLOCK = re.compile(r"\n[ \t]*\n")  # blocks are divided by empty lines
ITEM = re.compile(r"^(?:[*-]|\d+\.|\[\d+\])\s+")
STATEMENT = r"^\s*(?:def|class|import|from|for|while|if|try|with|print)\b.*[:)]$"
CODE = re.compile(rf">>>|::|^\s*\.\.\s|[-=*~^+|]{{4,}}|https?:|@|{STATEMENT}", re.MULTILINE)
MARKUP = re.compile(r"\*\*?([^\s*][^*]*)\*\*?|\"([^\"\s][^\"]*)\"|`{1,2}([^`]*)`{1,2}|:[a-z]+:`([^`]*)`")
BOUNDARY = re.compile(r"(?<=[a-z0-9)\"'][.!?])\s+(?=[A-Z])")
ABBREVIATION = re.compile(r"(?:e\.g|i\.e|etc|cf|vs|Dr|St|No)\.$")
BODIES = (ast.stmt, ast.excepthandler, ast.match_case)
NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}


def paragraphs(text: str) -> Iterator[str]:
    """Running text on one line each: no headings, tables, grammar, code or signatures."""
    for block in BLOCK.split(text):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        joined = re.sub(r"(?<=\w-) (?=[a-z])", "", ITEM.sub("", " ".join(lines)))
        if not CODE.search(block) and joined[:1].isupper() and joined.endswith((".", ":", "?", "!")):
            yield MARKUP.sub(lambda found: next(part for part in found.groups() if part is not None), joined)


def split_sentences(paragraph: str) -> Iterator[str]:
    """Sentences of a paragraph that read as English: 5 to 60 words, mostly letters."""
    start = ""
    for piece in BOUNDARY.split(paragraph):
        start = f"{start} {piece}".strip()
        if ABBREVIATION.search(start):
            continue
        letters = sum(map(str.isalpha, start)) + start.count(" ")
        if 5 <= len(start.split()) <= 60 and letters >= 0.85 * len(start) and start.endswith((".", "?", "!")):
            yield " ".join(start.split())
        start = ""


def sentences(texts: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Sentences by topic, in the order of the topics' names; a sentence that comes again is dropped."""
    seen: set[str] = set()
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(texts):
        fresh = [s for paragraph in paragraphs(texts[name]) for s in split_sentences(paragraph)]
        found[name] = tuple(dict.fromkeys(s for s in fresh if s not in seen))
        seen.update(fresh)
    return found


def reference() -> dict[str, str]:
    """The language reference by topic."""
    return dict(topics)


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """A module and its statements, level by level: as `ast.walk` has them, without a walk through every expression."""
    level: list[ast.AST] = [tree]
    while level:
        yield from level
        inside = (getattr(node, field) for node in level for field in node._fields)
        lists = (value for value in inside if isinstance(value, list))
        level = [node for value in lists for node in value if isinstance(node, BODIES)]


def library() -> dict[str, str]:
    """Documentation strings of the standard library by module file, read from the source, nothing imported."""
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    for file in sorted(modules(root)):
        tree = ast.parse(file.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in statements(tree) if isinstance(node, kinds)]
        texts[file.relative_to(root).as_posix()] = "\n\n".join(string for string in strings if string)
    return texts


def modules(root: Path) -> Iterator[Path]:
    """The library's source files; what is installed beside it, often far more, is not looked through."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        yield from (Path(folder, name) for name in names if name.endswith(".py") and name not in NOT_LIBRARY)


def part_of(topic: str, held_out: float, tuning: float) -> str:
    """The part that a topic falls into: by its name alone, so it never moves."""
    place = int.from_bytes(hashlib.sha256(topic.encode()).digest()[:4]) / 2**32
    if place < held_out:
        return "heldout"
    return "tuning" if place < held_out + tuning else "train"


def write(path: Path, lines: list[str]) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(part, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/text"), help="folder of the three files")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the topics in heldout.txt")
    parser.add_argument("--tuning", type=float, default=0.05, help="share of the topics in tuning.txt")
    given = parser.parse_args(arguments)
    parts: dict[str, list[str]] = {"train": [], "tuning": [], "heldout": []}
    for topic, lines in sentences({**reference(), **library()}).items():
        parts[part_of(topic, given.held_out, given.tuning)] += lines
    given.out.mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        path = given.out / f"{name}.txt"
        write(path, lines)
        print(f"{path}: {len(lines)} sentences")


if __name__ == "__main__":
    main()
