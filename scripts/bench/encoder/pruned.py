"""A sentence encoder, pruned: its agreement with people's scores, and forward times in turn with the encoder's own."""

from __future__ import annotations

import argparse
from typing import Any

from scripts.bench import running
from scripts.bench.encoder import rows as encoder
from scripts.bench.measuring import Bench
from scripts.bench.rows import Row, Target, ours
from scripts.bench.store import Record
from scripts.bench.tables import section

NAME = "encoder"
GROUP = "Forward pass of 8 × 64 tokens, all in turn"
BASE = "minilm-fp32"
HEADS = "a third of the heads of every attention"


def calibrated(key: str, recipe: str, *overrides: str, **more: Any) -> Row:
    """One of our methods, calibrated on the same text as those of the language model."""
    return ours(f"minilm-{key}", GROUP, recipe, *overrides, calibrated=True, against=(BASE,), seconds=120, **more)


ROWS = (
    Row(BASE, "torch", GROUP, seconds=120),
    ours("minilm-magnitude-50", GROUP, "prune/magnitude-50", against=(BASE,), seconds=120),
    calibrated("sparsegpt-50", "prune/sparsegpt-50"),
    calibrated("alps-50", "prune/alps-50"),
    calibrated("alps-2-4", "prune/alps-2-4"),
    ours("minilm-width-norm-20", GROUP, "prune/width-20", against=(BASE,), seconds=120),
    calibrated("width-obs-20", "prune/width-obs"),
    calibrated("heads-obs", "prune/heads-obs", "method.sparsity=null", "method.heads=8", note=HEADS),
)
TARGETS = (
    Target("minilm-alps-50", "lost", 1.0),  # points of Spearman's correlation
    Target("minilm-width-obs-20", "forward", 1.0),
)


def run(given: argparse.Namespace, bench: Bench, schedule: running.Schedule) -> int:
    """Measure all rows of a round together; returns how many measurements are left."""
    return encoder.run(given, bench, schedule, ROWS)


def tables(records: list[Record]) -> str:
    """The tables of this part."""
    return section("Sentence encoder", ROWS, records, TARGETS, encoder.COLUMNS)
