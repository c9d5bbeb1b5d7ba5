"""A calibrated step as the tests run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.layerwise.plan import Plan
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.report.model import Report

OFF = Options(latency="off")
GPTQ = {"name": "gptq", "bits": 4, "group_size": 16, "refine": 0}


def write_recipe(folder: Path, data: dict[str, Any] | None, **sections: Any) -> Path:
    """A gptq recipe; sections replace its own."""
    path = folder / "recipe.yaml"
    calibration = {} if data is None else {"calibration": data}
    path.write_text(json.dumps({"version": 1, "method": GPTQ, "report": {"html": False}, **calibration, **sections}))
    return path


def text(path: Path, samples: int = 8) -> dict[str, Any]:
    return {"text": str(path), "samples": samples, "length": 32}


def planned(source: Path, out: Path, recipe: Path, request: Request | None = None) -> Plan:
    return planner.make_plan(source, Destination(out), load(str(recipe), "quantize"), "quantize", request)


def run(source: Path, out: Path, recipe: Path, request: Request | None = None, options: Options = OFF) -> Report:
    return layerwise.run(planned(source, out, recipe, request), options)
