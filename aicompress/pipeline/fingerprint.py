"""What tells a run from another one: only the same one may go on where it was stopped."""

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
    """What stands for the data that a calibrated method, or a search, sees."""
    files = [[str(path.absolute()), path.stat().st_mtime_ns, path.stat().st_size] for path in plan.request.stats]
    reads = plan.search is not None or (bool(plan.needs) and not files)
    return [*files, digest(plan.recipe.calibration)] if reads and plan.recipe.calibration is not None else files
