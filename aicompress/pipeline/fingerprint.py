"""What tells one run of a step from another, so that a stopped one is never continued as something else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from aicompress import __version__
from aicompress.data import digest
from aicompress.pipeline.plan import Plan


def fingerprint(plan: Plan) -> str:
    """Digest of all that decides the output's bytes: input headers, recipe, version, file layout, calibration data."""
    inputs = {
        name: [str(ref.file.absolute()), ref.begin, str(ref.spec), ref.file.stat().st_mtime_ns, ref.file.stat().st_size]
        for name, ref in plan.checkpoint.tensors.items()
    }
    shards = [[shard.name, shard.nbytes, list(shard.specs)] for shard in plan.output.shards]
    whole = [__version__, plan.method.name, plan.recipe.sha256(), inputs, shards, _evidence(plan)]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _evidence(plan: Plan) -> list[Any]:
    """What stands for the data that a calibrated method sees."""
    if plan.request.stats:
        return [[str(path.absolute()), path.stat().st_mtime_ns, path.stat().st_size] for path in plan.request.stats]
    return [digest(plan.recipe.calibration)] if plan.needs and plan.recipe.calibration is not None else []
