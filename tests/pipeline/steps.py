"""A structural step as the tests run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aicompress.errors import Refused
from aicompress.methods import get
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.structured import planner as structure_planner
from aicompress.pipeline.structured import run as structure
from aicompress.pipeline.structured.plan import StructurePlan
from aicompress.pipeline.verify import verify
from aicompress.recipe import Recipe
from aicompress.recipe.section import ReportFiles
from aicompress.report.model import Report

OFF = Options(latency="off")


def plan(source: Path, out: Path, **method: Any) -> StructurePlan:
    config = get("prune", method["name"]).config(**method)
    recipe = Recipe(version=1, method=config, report=ReportFiles(html=False))
    return structure_planner.make_plan(source, Destination(out), recipe, "prune")


def prune(source: Path, out: Path, **method: Any) -> Report:
    """Prune; the plan's bytes must be those of the run, and what is written must be sound."""
    planned = plan(source, out, **method)
    report = structure.run(planned, OFF)
    assert verify(out).problems == ()
    assert planned.output.weight_bytes == report.after.weight_bytes
    kinds = report.after.by_kind
    layers = sum(row.bytes_after for row in report.layers)
    assert layers + kinds.get("other", 0) + kinds["header"] == report.after.weight_bytes
    assert planned.output.weight_bytes == sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert planned.output.other_bytes == sum(
        f.stat().st_size for f in out.rglob("*") if f.is_file() and f.suffix != ".safetensors" and f.stem != "report"
    )
    return report


def loaded(model: Any, out: Path) -> Any:
    """Plain transformers, and nothing missing."""
    found, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return found.eval()


def refused(source: Path, out: Path, **method: Any) -> str:
    with pytest.raises(Refused) as found:
        plan(source, out, **method)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return f"{found.value.message} | {found.value.hint}"
