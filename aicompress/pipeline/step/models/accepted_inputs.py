"""Whether the forward of a model takes the samples of a data section: asked of its architecture, without weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.data import Data
from aicompress.errors import CompressError, RecipeError, first_line
from aicompress.model.loading.definitions.config import batched_experts, most_positions
from aicompress.model.loading.definitions.definition import without_initialization
from aicompress.pipeline.step.models.running_model import Inputs, example

TOKENS, IMAGES = "input_ids", "pixel_values"
NAMES = {TOKENS: "token ids", IMAGES: "images"}
HINTS = {
    TOKENS: "give text, or arrays of whole numbers, (samples, tokens)",
    IMAGES: "give arrays of real numbers of that shape; `scale: 255` makes them of bytes",
}
BESIDE = ("_mask", "_type_ids")  # ends of the names of inputs that come with others


def input_problems(
    module: nn.Module, inputs: Mapping[str, Tensor], data: Data, who: str = "the model"
) -> list[CompressError]:
    """Errors that say what a model takes and what the data holds, where these are not the same.

    Args:
        module: on the meta device; one with weights is not run.
        inputs: (samples, ...) by the model's arguments; one that takes one unnamed tensor has it under "".
        data: the section that they were read from.
        who: whose model it is: the student, the teacher.
    """
    taken = getattr(module, "main_input_name", None)
    if taken is None:
        return _of_unnamed(module, inputs, data, who)
    known = inspect.signature(module.forward).parameters
    problems: list[CompressError] = []
    for name, tensor in inputs.items():
        if name not in known and not name.endswith(BESIDE):
            problems.append(_unlike(module, taken, (name, tensor), data, who))
        elif name == TOKENS:
            problems += _of_tokens(module, tensor, data, who)
        elif name == taken and not tensor.is_floating_point():
            problems.append(_unlike(module, taken, (name, tensor), data, who))
    if problems or data.kind != "arrays":
        return problems[:1]
    reason = _failure(module, inputs)
    if reason is None:
        return []
    if len(inputs) == 1:
        return [_unlike(module, taken, next(iter(inputs.items())), data, who)]
    held = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
    told = f"{who}'s {type(module).__name__} does not run on {held} of {data.name}: {reason}"
    return [RecipeError(told, "check their shapes, and that they belong together")]


def text_problems(module: nn.Module | None, data: Data, who: str = "the model") -> list[CompressError]:
    """An error that says what a model takes, where the data holds texts and that is something else."""
    taken = getattr(module, "main_input_name", None)
    if module is None or taken is None or data.kind == "arrays":
        return []
    if TOKENS in inspect.signature(module.forward).parameters:
        return []
    return [RecipeError(f"{_takes(module, taken, who)}, and {data.name} holds text", HINTS.get(taken, _hint(taken)))]


def _of_unnamed(module: nn.Module, inputs: Mapping[str, Tensor], data: Data, who: str) -> list[CompressError]:
    """What keeps a chain of layers from running; a module with weights, or with no forward, is not tried."""
    parameters = list(module.parameters())
    if len(inputs) != 1 or not parameters or any(not parameter.is_meta for parameter in parameters):
        return []
    (tensor,) = inputs.values()
    reason = run_error(module, (_sample(tensor),), {})
    if reason is None:
        return []
    told = f"{who} does not run on {_words('', tensor)} of {data.name}: {reason}"
    return [RecipeError(told, "check `inputs`, and the first layers of model.sequential")]


def _of_tokens(module: nn.Module, ids: Tensor, data: Data, who: str) -> list[CompressError]:
    """What is wrong with token ids: real numbers, another shape, too many in a sample, or none of the model's."""
    if ids.is_floating_point() or ids.ndim != 2:
        return [_unlike(module, TOKENS, (TOKENS, ids), data, who)]
    kind = f"{who}'s {type(module).__name__}"
    rows, limit = _rows(module), most_positions(module)
    low, high = int(ids.min()), int(ids.max())
    if rows is not None and (low < 0 or high >= rows):
        told = f"{kind} has {rows:,} tokens, and {data.name} holds token {low if low < 0 else high}"
        return [RecipeError(told, "tokenize with the tokenizer of this model")]
    if limit is not None and data.kind == "arrays" and ids.shape[1] > limit:
        told = f"{kind} takes {limit} positions, and {data.name} holds {_words(TOKENS, ids)}"
        return [RecipeError(told, f"samples of up to {limit} tokens")]
    return []


def _rows(module: nn.Module) -> int | None:
    """How many tokens the model's table has; None where it has no table."""
    try:
        table = module.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        return None
    weight = getattr(table, "weight", None)
    return weight.shape[0] if isinstance(table, nn.Embedding) and weight is not None else None


def _unlike(module: nn.Module, taken: str, given: tuple[str, Tensor], data: Data, who: str) -> CompressError:
    told = f"{_takes(module, taken, who)}, and {data.name} holds {_words(*given)}"
    return RecipeError(told, HINTS.get(taken, _hint(taken)))


def _hint(taken: str) -> str:
    return f"give arrays of {taken}"


def _takes(module: nn.Module, taken: str, who: str) -> str:
    """What a model takes, in words, with a shape where that follows from its configuration."""
    such = _example(module).get(taken)
    shape = "" if such is None or taken == TOKENS else f", such as (samples, {', '.join(map(str, such.shape[1:]))})"
    named = f"{NAMES[taken]} ({taken})" if taken in NAMES else taken
    return f"{who}'s {type(module).__name__} takes {named}{shape}"


def _words(name: str, tensor: Tensor) -> str:
    """What the data holds, in words."""
    shape = list(tensor.shape)
    if name == IMAGES and len(shape) == 4 and shape[1] == 1:
        del shape[1]  # images of one channel are stored without that axis
    what = "real numbers" if tensor.is_floating_point() else NAMES[TOKENS]
    return f"{what} ({', '.join(map(str, shape))})"


def _failure(module: nn.Module, inputs: Mapping[str, Tensor]) -> str | None:
    """What a run without numbers on these inputs raises, where one on inputs that the model takes raises nothing."""
    taken = _example(module)
    if not taken:
        return None
    beside = {name: tensor for name, tensor in taken.items() if name.startswith("decoder_")}
    given = {name: _sample(shaped(name, tensor)) for name, tensor in inputs.items()}
    reason = run_error(module, (), {**beside, **given})
    return reason if run_error(module, (), taken) is None else None


def _example(module: Any) -> dict[str, Tensor]:
    """Inputs that the model takes, on the meta device; none where its configuration does not say."""
    if any(not parameter.is_meta for parameter in module.parameters()):
        return {}
    such = example(module, 2, 8)
    inputs = {} if such is None or isinstance(such[0], Tensor) else such[0]
    return {name: tensor.to("meta") for name, tensor in inputs.items()}


def shaped(name: str, tensor: Tensor) -> Tensor:
    """Arrays as a model takes them: images of one channel get that dimension."""
    return tensor[:, None] if name == IMAGES and tensor.ndim == 3 else tensor


def as_taken(module: nn.Module, inputs: Tensor) -> Inputs:
    """Arrays as a module takes them: a model of transformers under its name for them."""
    named = getattr(module, "main_input_name", None)
    return inputs if named is None else {named: shaped(named, inputs)}


def _sample(tensor: Tensor) -> Tensor:
    """Two samples without numbers: normalization over a batch takes no single one."""
    return torch.empty((2, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")


def run_error(module: nn.Module, given: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> str | None:
    """What a run raises; None where it raises nothing, or needs numbers on the meta device."""
    try:
        with torch.no_grad(), without_initialization(), batched_experts(module):
            module(*given, **named)
    except NotImplementedError:
        return None
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError, AssertionError) as error:
        reason = first_line(error)
        return None if "meta" in reason else reason
    return None
