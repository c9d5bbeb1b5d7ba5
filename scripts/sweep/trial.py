"""What the commands make of one small model: each step's output is verified, and loaded by transformers and by us."""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import aicompress.hf  # noqa: F401  transformers' reader of the native layout
from aicompress.errors import CompressError, Problems, RecipeError, Refused
from aicompress.model.architecture.small_models import tiny_model
from aicompress.model.architecture.small_models.tiny_inputs import inputs_of
from aicompress.model.loading.load import load
from aicompress.pipeline import steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import load as load_recipe
from scripts.sweep.configs import NotBuilt, small_model

STEPS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # command, recipe, what beside it
    "quantize": ("quantize", "rtn-w4", ()),
    "magnitude": ("prune", "magnitude-50", ()),
    "svd": ("factorize", "svd-keep", ()),
    "width": ("prune", "width-50", ("method.multiple=1",)),
    "heads": ("prune", "heads-norm", ("method.unit=group",)),
    "depth": ("prune", "depth-half", ("method.keep_layers=1",)),
    "gptq": ("quantize", "gptq-w4", ()),
    "taylor": ("prune", "taylor-50", ()),
}
CALIBRATED = ("gptq", "taylor")  # on the inputs that outputs are compared on
SHAKES = 4  # how often a model is run with noise, where fast kernels give something else
ROUNDING = 2**-8  # relative, of that noise
COPIES = 4  # of these inputs: fewer rows than 16 would leave layers data-free
WORKS, REFUSED, FAULT, ABSENT = "works", "refused", "fault", "not built"


@dataclass(frozen=True)
class Outcome:
    """What came of one step on one model type.

    Attributes:
        model_type, step: of what.
        verdict: works, refused, fault, or not built.
        reason: why it is none of works, in one line.
        seconds: of this processor.
        model: the class of the model.
    """

    model_type: str
    step: str
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    model: str = ""

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


class Wrong(Exception):
    """An output that is not what it should be."""


def trials(model_type: str, wanted: tuple[str, ...], folder: Path) -> Iterator[Outcome]:
    """Build a model and try steps on it, one outcome after the other."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.process_time()
    try:
        model = small_model(model_type)
    except NotBuilt as error:
        yield Outcome(model_type, "build", ABSENT, str(error), _since(start))
        return
    name = type(model).__name__
    try:
        model.save_pretrained(folder / "in")
    except Exception as error:  # a type's own code
        yield Outcome(model_type, "build", ABSENT, f"does not save itself: {_line(error)}", _since(start), name)
        return
    yield Outcome(model_type, "build", WORKS, "", _since(start), name)
    for step in wanted:
        start = time.process_time()
        verdict, reason = _tried(lambda step=step: _step(step, folder, type(model)))  # type: ignore[misc]
        yield Outcome(model_type, step, verdict, reason, _since(start), name)


def _since(start: float) -> float:
    return round(time.process_time() - start, 2)


def _tried(work: Callable[[], None]) -> tuple[str, str]:
    """The verdict over what is done, and its reason."""
    try:
        work()
    except Problems as error:
        return (REFUSED if isinstance(error, Refused) else FAULT), _line(error.problems[0])
    except Refused as error:
        return REFUSED, _line(error)
    except Wrong as error:
        return FAULT, str(error)
    except CompressError as error:
        return FAULT, f"ends with code {error.exit_code}: {_line(error)}"
    except Exception as error:  # what the user would be told to be a defect
        return FAULT, f"{type(error).__name__}: {_line(error)}"
    return WORKS, ""


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _step(step: str, folder: Path, kind: Any) -> None:
    """Run a step and look at what it has written.

    Raises:
        Refused: it was not done.
        Wrong: it was, but not well.
    """
    command, recipe, more = STEPS[step]
    out = folder / step
    more = (*more, _calibration(folder)) if step in CALIBRATED else more
    read = load_recipe(f"{command}/{recipe}", command, ["report.html=false", *more])
    try:
        plan = steps.make_plan(folder / "in", Destination(out), read, command)
    except RecipeError as error:
        stack = re.search(r"the model has \d+ stacks of blocks: ([^, ]+)", error.message)
        if stack is None:
            raise
        read = load_recipe(f"{command}/{recipe}", command, ["report.html=false", *more, f"method.stack={stack[1]}"])
        plan = steps.make_plan(folder / "in", Destination(out), read, command)
    steps.run(plan, Options(latency="off"))
    problems = verify(out).problems
    if problems:
        raise Wrong(f"verify: {problems[0]}")
    reference = load(out, kernels="reference")
    wanted, compressed = _outputs(reference), bool(plan.output.manifest.entries)
    if compressed and not _same(fast := _outputs(load(out)), wanted):  # dense layers have no other kernel
        shaken = [_outputs(reference, seed) for seed in range(SHAKES)]
        if all(_same(one, wanted) for one in shaken):  # one that picks the largest of something may pick another one
            _require_same(fast, wanted, "the fast kernels")
    if plan.output.manifest.widths or (compressed and kind.__name__ not in plan.output.readers):
        return  # the plan says that it is read with aicompress alone
    loading: Any = transformers.PreTrainedModel.from_pretrained  # a type's own gives no loading info
    stock, info = loading.__func__(kind, out, output_loading_info=True)
    if info["missing_keys"]:
        raise Wrong(f"transformers misses {sorted(info['missing_keys'])[0]}")
    if hasattr(getattr(stock, "hf_quantizer", None), "compressor"):
        stock.hf_quantizer.compressor.decompress_model(stock)
    ours = dict(_dense(reference))
    for name, value in _dense(stock):
        if name in ours and not torch.allclose(value.float(), ours[name].float(), rtol=1e-3, atol=1e-3):
            raise Wrong(f"transformers loads other numbers for {name}")
    _require_same(_outputs(stock.eval()), wanted, "transformers")


def _calibration(folder: Path) -> str:
    """The edit of a recipe that makes a model's own inputs its calibration data.

    Raises:
        Refused: what the model takes is not known here, or it gives no finite numbers.
    """
    model = load(folder / "in", kernels="reference")
    try:
        inputs = inputs_of(model)
    except CompressError as error:
        raise Refused("what it takes is not known to the sweep") from error
    real = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    if not _gives_finite(model, real):
        raise Refused("with random weights it gives no finite numbers")
    arrays = {name: torch.cat([value] * COPIES) for name, value in real.items()}
    save_file(arrays, folder / "inputs.safetensors")
    return "calibration=" + json.dumps({"arrays": str(folder / "inputs.safetensors"), "inputs": list(arrays)})


def _gives_finite(model: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether no output holds NaN or infinity; of a model that does not run on the inputs, the step says so."""
    try:
        with torch.no_grad():
            outputs = dict(model(**inputs)).values()
    except Exception:  # whatever else a type's own code asks for
        return True
    return all(bool(value.isfinite().all()) for value in outputs if isinstance(value, Tensor))


def _dense(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, as dense as the model computes with it."""
    for path, module in model.named_modules():
        for leaf in {*module._parameters, "weight"}:
            value = None if leaf.startswith("weight_") else getattr(module, leaf, None)
            if isinstance(value, Tensor):
                yield (f"{path}.{leaf}" if path else leaf), value


def _outputs(model: Any, noise: int | None = None) -> list[Tensor]:
    """What the model gives for a few tokens or an image; nothing where it takes neither.

    Args:
        model: runs.
        noise: seed of noise as large as the rounding of bfloat16, in the outputs of all layers; None for no noise.
    """
    hooks = [] if noise is None else [each.register_forward_hook(_shake) for each in model.modules() if _is_leaf(each)]
    try:
        return _run(model, noise or 0)
    finally:
        for hook in hooks:
            hook.remove()


def _is_leaf(module: nn.Module) -> bool:
    return not list(module.children()) and bool(module._parameters or module._buffers)


def _shake(module: nn.Module, given: Any, output: Any) -> Any:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    return output * (1 + ROUNDING * (2 * torch.rand_like(output) - 1))


def _run(model: Any, seed: int) -> list[Tensor]:
    try:
        inputs = inputs_of(model)
        torch.manual_seed(seed)  # some draw what they mask
        inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
        return tiny_model.outputs_of(model, inputs)
    except Exception:  # whatever else a type's own code asks for
        return []


def _require_same(given: list[Tensor], wanted: list[Tensor], who: str) -> None:
    if not _same(given, wanted):
        raise Wrong(f"{who}: the outputs are not those of the decoded weights")


def _same(given: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(_close(one.float(), other.float()) for one, other in zip(given, wanted, strict=False))


def _close(one: Tensor, other: Tensor) -> bool:
    scale = float(other.nan_to_num().abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.05, atol=0.05 * scale, equal_nan=True)
