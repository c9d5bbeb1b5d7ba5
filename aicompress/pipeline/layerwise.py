"""Run a layer-wise plan: one layer in memory at a time, bytes streamed to the output, everything measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from aicompress import __version__
from aicompress.checkpoint import CheckpointWriter
from aicompress.checkpoint.journal import Journal
from aicompress.checkpoint.reader import digests, require_finite
from aicompress.layer import from_matrix
from aicompress.measure import rel_error
from aicompress.pipeline.finish import Facts, finish
from aicompress.pipeline.output import with_digests
from aicompress.pipeline.plan import LayerPlan, Plan, layer_seed
from aicompress.report.model import LayerRow, Report
from aicompress.weights import Dense, LowRank, Weight, outline_nbytes

Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Options:
    """How a step runs; nothing here changes the numbers.

    Attributes:
        resume: go on where a stopped run of the same step was.
        latency: "auto" times the forward passes of input and output, "off" does not.
        progress: called with (what, done bytes, total bytes).
    """

    resume: bool = False
    latency: str = "auto"
    progress: Progress = lambda what, done, total: None


def run(plan: Plan, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside.

    Raises:
        CheckpointError: a weight holds NaN or infinity; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    options = options or Options()
    start = time.perf_counter()
    output = plan.output
    rows: dict[str, list[LayerRow]] = {}
    with (
        CheckpointWriter(output.destination.path, output.shards, options.resume) as writer,
        ThreadPoolExecutor(1) as pool,
    ):
        journal = (Journal.resume if options.resume else Journal.start)(writer.work, fingerprint(plan))
        inputs = pool.submit(digests, plan.checkpoint.source)  # hashing releases the GIL: it overlaps with the work
        total, done = sum(p.dense.nbytes for p in output.parameters.values()), 0
        for name, planned in output.parameters.items():
            if name not in journal.done:
                rows[name] = _write_one(plan, name, writer)
                journal.record(name, [dataclasses.asdict(row) for row in rows[name]])
            else:
                rows[name] = [LayerRow(**row) for row in journal.done[name]]
            done += planned.dense.nbytes
            options.progress(name, done, total)
        final = with_digests(output, inputs.result())
        layers = tuple(row for name in output.parameters for row in rows[name])
        facts = Facts(plan.recipe, plan.checkpoint, plan.kinds, layers, plan.warnings, start)
        return finish(facts, final, writer, options.latency)


def fingerprint(plan: Plan) -> str:
    """Digest of everything that decides the output's bytes: input headers, recipe, version, file layout."""
    inputs = {
        name: [str(ref.file), ref.begin, str(ref.spec), ref.file.stat().st_mtime_ns, ref.file.stat().st_size]
        for name, ref in plan.checkpoint.tensors.items()
    }
    shards = [[shard.name, shard.nbytes, list(shard.specs)] for shard in plan.output.shards]
    whole = [__version__, plan.method.name, plan.recipe.sha256(), inputs, shards]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _write_one(plan: Plan, name: str, writer: CheckpointWriter) -> list[LayerRow]:
    """Compress or copy one parameter; a row for each of its layers."""
    checkpoint, planned = plan.checkpoint, plan.output.parameters[name]
    layers = plan.by_tensor.get(name, [])
    jobs = [layer for layer in layers if layer.config is not None]
    value: Weight | Tensor
    if jobs:
        value, rows = _compress(plan, name, jobs)
    else:
        rows = []
        value = checkpoint.weight(name) if name in checkpoint.manifest.entries else checkpoint.read(name)
        if isinstance(value, Tensor):
            require_finite(value, name, checkpoint.path)
    if isinstance(value, Dense):
        assert planned.info is not None
        value = from_matrix(value.matrix, planned.dense.shape, planned.info.transposed).to(planned.dense.dtype)
    for disk, tensor in plan.output.encode(name, value).items():
        writer.put(disk, tensor)
    return rows + [_idle_row(layer) for layer in layers if layer.config is None]


def _compress(plan: Plan, name: str, jobs: list[LayerPlan]) -> tuple[Weight, list[LayerRow]]:
    """Apply the method to a parameter, or to the parts of a low-rank one."""
    done = {job.info.part: _apply(plan, job) for job in jobs}
    rows = [row for _, row in done.values()]
    if "" in done:
        return done[""][0], rows
    old = plan.checkpoint.weight(name)
    assert isinstance(old, LowRank)
    out = done["out"][0] if "out" in done else old.out
    inner = done["in"][0] if "in" in done else old.inner
    return LowRank(out, inner), rows


def _apply(plan: Plan, job: LayerPlan) -> tuple[Weight, LayerRow]:
    info = job.info
    layer = plan.checkpoint.layer(info, layer_seed(plan.recipe.seed, info.name))
    start = time.perf_counter()
    weight = plan.method.apply(layer, job.config)
    seconds = time.perf_counter() - start
    detail = plan.method.describe(job.config, weight)
    note = str(detail.pop("note", ""))
    error = rel_error(layer.weight, weight.dense())
    size = outline_nbytes(weight)
    name, form = plan.method.name, weight.form
    row = LayerRow(info.name, info.kind, job.rule, name, form, detail, info.nbytes, size, error, seconds, note)
    return weight, row


def _idle_row(layer: LayerPlan) -> LayerRow:
    info = layer.info
    return LayerRow(
        info.name, info.kind, "-", "-", info.stored, {}, info.nbytes, info.nbytes, 0.0, 0.0, "left as it is"
    )
