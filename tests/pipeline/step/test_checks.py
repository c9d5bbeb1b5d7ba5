"""Checks that a plan makes before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from aicompress.errors import CheckpointError
from aicompress.pipeline.step.checks import require_loads
from tests.pipeline.families import FAMILIES
from tests.pipeline.steps import plan


def test_an_output_that_would_not_load_is_refused(tmp_path: Path) -> None:
    FAMILIES["llama"].saved(tmp_path / "in")
    planned = plan(tmp_path / "in", tmp_path / "out", name="width", sparsity=0.5)
    specs = {name: parameter.dense for name, parameter in planned.output.parameters.items()}
    config = planned.output.config
    require_loads(planned.checkpoint, config, specs, {})
    del specs["model.layers.2.mlp.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"would not load: missing model.layers.2.mlp.down_proj.weight"):
        require_loads(planned.checkpoint, config, specs, {})
