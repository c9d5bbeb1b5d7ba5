"""What is measured: a row is one setting of one tool, a target a figure that one row has to reach beside another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "aicompress"


@dataclass(frozen=True)
class Row:
    """One setting of one tool.

    Attributes:
        key: its name: `--only` takes a part of it, and the store keeps it.
        tool: aicompress, cp, or a peer of `scripts.bench.peers`.
        group: rows of a group stand in one table.
        recipe: of aicompress: "quantize/gptq-w4".
        overrides: of aicompress: --set edits. "{bytes:KEY}" stands for the weight bytes that row KEY gave in this run,
            "{parameters:0.8}" for the model's parameters with 0.8 of those in matrices of its blocks. What begins with
            -- is an option of its own.
        before: recipe and overrides of a step that is run first.
        half: the input is the model in bfloat16.
        setting: of a peer.
        calibrated: whether it reads the calibration text.
        against: keys of rows that it is compared with.
        seconds: about how long one measurement takes, to plan a run.
        long: measured in fewer rounds than others.
        forward: its forward pass is timed beside the input's.
        note: what a reader has to know.
    """

    key: str
    tool: str
    group: str
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    half: bool = False
    setting: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    against: tuple[str, ...] = ()
    seconds: float = 30.0
    long: bool = False
    forward: bool = False
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.tool == OURS


@dataclass(frozen=True)
class Target:
    """A figure of a row that has to stay below a limit.

    Attributes:
        row: key of the row.
        figure: seconds, kl, peak_rss, bytes, forward, ...
        limit: of the ratio to the same figure of `peer`; of the figure itself where there is none.
        peer: key of the other row.
    """

    row: str
    figure: str
    limit: float
    peer: str = ""


def ours(key: str, group: str, recipe: str, *overrides: str, **more: Any) -> Row:
    """A row of aicompress."""
    return Row(key, OURS, group, recipe=recipe, overrides=overrides, **more)


def unknown(rows: tuple[Row, ...], targets: tuple[Target, ...] = ()) -> set[str]:
    """Keys that rows and targets name and no row has."""
    keys = {row.key for row in rows}
    named = {peer for row in rows for peer in row.against}
    return (named | {t.row for t in targets} | {t.peer for t in targets if t.peer}) - keys
