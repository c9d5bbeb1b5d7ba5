"""Write the demo text: the Python language reference inside CPython, as clean sentences, one per line.

Topics are divided between train.txt and heldout.txt by a hash of their name, and a sentence of a training topic is
never kept in heldout.txt, so that held-out sentences are really unseen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pydoc_data.topics import topics

BLOCK = re.compile(r"\n[ \t]*\n")  # blocks are divided by empty lines
ITEM = re.compile(r"^(?:[*-]|\d+\.|\[\d+\])\s+")
CODE = re.compile(
    r">>>|::=|^\s*\.\.\s|[-=*~^+|]{4,}|^\s*(?:def|class|import|from|for|while|if|try|with|print)\b.*[:)]$", re.M
)
MARKUP = re.compile(r"\*\*?([^\s*][^*]*)\*\*?|\"([^\"\s][^\"]*)\"|``([^`]*)``")
BOUNDARY = re.compile(r"(?<=[a-z0-9)\"'][.!?])\s+(?=[A-Z])")
ABBREVIATION = re.compile(r"(?:e\.g|i\.e|etc|cf|vs|Dr|St|No)\.$")


def paragraphs(topic: str) -> Iterator[str]:
    """Running text of a topic on one line each: no headings, tables, grammar, code or signatures."""
    for block in BLOCK.split(topic):
        lines = [line for line in block.splitlines() if line.strip()]
        text = ITEM.sub("", " ".join(line.strip() for line in lines))
        if lines and not CODE.search(block) and text[:1].isupper() and text.endswith((".", ":", "?", "!")):
            yield MARKUP.sub(lambda found: next(part for part in found.groups() if part is not None), text)


def split_sentences(paragraph: str) -> Iterator[str]:
    """Sentences of a paragraph that read as English: 5 to 60 words, mostly letters."""
    start = ""
    for piece in BOUNDARY.split(paragraph):
        start = f"{start} {piece}".strip()
        if ABBREVIATION.search(start):
            continue
        letters = sum(character.isalpha() or character == " " for character in start)
        if 5 <= len(start.split()) <= 60 and letters >= 0.85 * len(start) and start.endswith((".", "?", "!")):
            yield " ".join(start.split())
        start = ""


@cache
def topic_sentences() -> dict[str, tuple[str, ...]]:
    """Sentences by topic, in the order of the topics' names; a sentence that comes again is dropped."""
    seen: set[str] = set()
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(topics):
        fresh = [s for p in paragraphs(topics[name]) for s in split_sentences(p)]
        found[name] = tuple(dict.fromkeys(s for s in fresh if s not in seen))
        seen.update(fresh)
    return found
