"""Run a removal of channels: cut, repair what can be repaired in closed form, write."""

from __future__ import annotations

import copy
from functools import partial

from torch import Tensor, nn

from aicompress.checkpoint.reader import require_finite
from aicompress.model.channels.cut import cut_layer, cut_module
from aicompress.model.channels.repair import Repair, repair
from aicompress.pipeline.calibration.data import record_of_data
from aicompress.pipeline.channels.narrowing import narrowed
from aicompress.pipeline.channels.plan import ChannelPlan
from aicompress.pipeline.step.options import Options, Progress
from aicompress.pipeline.step.report import Results
from aicompress.pipeline.step.run import OpenOutput, run_alone, write_all
from aicompress.report.model import Report
from aicompress.weights import Weight


def run(plan: ChannelPlan, options: Options | None = None) -> Report:
    """Write the output of a plan, its report inside. A stopped run starts anew.

    Under torchrun the first process does it all; the others return its report.

    Raises:
        CheckpointError: a weight holds NaN or infinity; nothing is left behind.
        OutOfSpace: the disk is full; nothing is left behind.
    """
    return run_alone(plan, partial(_write, plan), options or Options())


def _write(plan: ChannelPlan, opened: OpenOutput, progress: Progress) -> Results:
    """Fit what can be fitted to the calibration data, and write every parameter."""
    plan = plan.decided(progress)
    fitted = _fitted(plan, progress)
    seconds = write_all(plan.output, opened.writer, lambda name: [(_value(plan, name, fitted), None)], progress)
    calibration = {} if plan.choice.samples is None else record_of_data([plan.choice.samples.source], 1)
    return Results(plan.rows(seconds), plan.warnings, calibration=calibration)


def _fitted(plan: ChannelPlan, progress: Progress) -> dict[str, Tensor]:
    """New values of the parameters and buffers that are fitted to the calibration data."""
    if plan.choice.samples is None or not plan.kept or not (plan.refits or plan.recalibrates):
        return {}
    small: nn.Module = copy.deepcopy(plan.choice.draft.module)
    cut_module(small, plan.kept)
    coded = {
        plan.choice.draft.names[name] for name, planned in plan.output.parameters.items() if planned.weight is not None
    }
    plain = {path: kept for path, kept in plan.kept.items() if f"{path}.weight" not in coded}
    batches = [inputs for inputs, _ in plan.choice.samples.batches]
    job = Repair(plan.choice.draft.module, small, plain, batches, plan.refits, plan.recalibrates, plan.settings.damping)
    changed = repair(job, lambda done, total: progress(f"layer {done} of {total}", done, total))
    values: dict[str, Tensor] = {}
    for path in changed:
        layer = small.get_submodule(path)
        for leaf, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if tensor.is_floating_point():
                values[f"{path}.{leaf}"] = tensor.detach()
    return values


def _value(plan: ChannelPlan, name: str, fitted: dict[str, Tensor]) -> Tensor | Weight:
    """One parameter of the output: fitted, cut in the form it has, or as it was."""
    checkpoint, planned = plan.checkpoint, plan.output.parameters[name]
    target = plan.choice.draft.names[name]
    path, _, leaf = target.rpartition(".")
    kept = plan.kept.get(path)
    if planned.weight is not None:
        weight = checkpoint.weight(name)
        if kept is None:
            return weight
        small = narrowed(weight, plan.choice.draft.module.get_submodule(path), kept)
        assert small is not None  # the plan made the same cut in its outline
        return small
    if target in fitted:
        tensor = fitted[target].to(planned.dense.dtype)
    elif target in plan.kept:  # a parameter of no layer
        lone = plan.kept[target]
        assert lone.out is not None
        assert lone.axis is not None
        tensor = checkpoint.dense(name).index_select(lone.axis, lone.out)
    else:
        tensor = checkpoint.dense(name)
        if kept is not None:
            tensor = cut_layer(plan.choice.draft.module.get_submodule(path), leaf, tensor, kept)
    require_finite(tensor, name, checkpoint.path)
    return tensor.contiguous()
