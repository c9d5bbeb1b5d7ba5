"""A step of the project in a benchmark, as its command runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def step(
    command: str, source: Path, sections: Mapping[str, Any], out: Path, data: Mapping[str, Any] | None = None
) -> None:
    """Run a command with a recipe's sections, on calibration data where its method reads any."""
    from aicompress import recipe as recipes
    from aicompress.methods import get
    from aicompress.pipeline import steps
    from aicompress.pipeline.step.options import Options
    from aicompress.pipeline.step.output import Destination

    made = {"version": 1, **sections, "report": {"html": False}}
    if data and get(command, sections["method"]["name"]).needs:
        made["calibration"] = data
    file = out.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made), encoding="utf-8")  # JSON is YAML
    steps.run(
        steps.make_plan(source, Destination(out), recipes.load(str(file), command), command), Options(latency="off")
    )
