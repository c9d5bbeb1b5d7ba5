"""The hidden width of a transformer: every axis that its residual stream lies on, found by asking for another width.

config.json's `hidden_size` is changed and the model built again on the meta device. Where heads have a size of their
own, exactly the axes of the residual stream change: of embeddings, norms, heads, and the one side of each matrix that
reads it or adds to it. Where heads are a share of the hidden width, other axes change as well, and the shapes do not
tell which is which. What the shapes tell is tried on a miniature: residual coordinates in another order must compute
the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.checkpoint.naming import is_transposed
from aicompress.errors import CheckpointError
from aicompress.model.architecture import (
    DEPTH_FIELDS,
    Architecture,
    Coupling,
    Path,
    fields,
    keep_blocks,
    value_at,
    with_value,
)
from aicompress.model.kinds import layer_kinds
from aicompress.model.shapes import build, stored_shapes

FIELDS = ("hidden_size", "d_model", "n_embd", "dim")
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
HINT = "prune its heads, feed-forward neurons or layers instead"


@dataclass(frozen=True)
class Residual:
    """The coordinates of the residual stream.

    Attributes:
        width: how many there are.
        field: their number in config.json.
        config: config.json with the size of a head given, where it would follow from the hidden width otherwise.
        couplings: every tensor that has an axis of coordinates: one that adds to the stream is a producer, one that
            reads it a consumer; norms count as producers.
    """

    width: int
    field: Path
    config: Mapping[str, Any]
    couplings: tuple[Coupling, ...]

    def narrowed(self, width: int) -> dict[str, Any]:
        """config.json of a model of another hidden width."""
        return with_value(self.config, self.field, width)

    def refusal(self, width: int) -> str | None:
        """Why transformers does not take a width; None where it does."""
        try:
            build(self.narrowed(width))
        except CheckpointError as error:
            return error.message
        return None


def residual(architecture: Architecture) -> Residual:
    """The residual stream of a checkpoint.

    Raises:
        CheckpointError: no field of config.json sets its width alone.
    """
    reasons: list[str] = []
    for field in fields(architecture.config, FIELDS):
        width = value_at(architecture.config, field)
        if not isinstance(width, int) or width < 2:
            continue
        for config in _with_head_sizes(architecture.config, field, width):
            found = _probed(architecture, config, field, width)
            if isinstance(found, Residual):
                _require_alike(found)
                return found
            reasons.append(found)
    raise CheckpointError(
        f"the hidden width cannot be narrowed: {reasons[-1]}" if reasons else "config.json sets no hidden width", HINT
    )


def _with_head_sizes(config: Mapping[str, Any], field: Path, width: int) -> Iterator[dict[str, Any]]:
    """config.json, and the same with the size of a head written down."""
    section = value_at(config, field[:-1])
    if section.get("head_dim") or section.get("d_kv"):
        yield copy.deepcopy(dict(config))
        return
    heads = next((section[name] for name in HEAD_COUNTS if isinstance(section.get(name), int)), 0)
    if heads and width % heads == 0:
        edited = copy.deepcopy(dict(config))
        value_at(edited, field[:-1])["head_dim"] = width // heads
        yield edited
    else:
        yield copy.deepcopy(dict(config))


def _probed(architecture: Architecture, config: Mapping[str, Any], field: Path, width: int) -> Residual | str:
    """The residual stream as another width shows it, or why the shapes do not tell."""
    model = build(config)
    before, after = stored_shapes(model), stored_shapes(build(with_value(config, field, 2 * width)))
    if before != stored_shapes(build(architecture.config)):
        return "the size of its heads cannot be written down in config.json"
    if set(after) != set(before):
        return f"{'.'.join(field)} of config.json adds or removes tensors"
    kinds = layer_kinds(dict(architecture.config), [architecture.on_disk(name) for name in before]) or {}
    ties = getattr(model, "all_tied_weights_keys", {})
    tied = {architecture.on_disk(name) for pair in ties.items() for name in pair}
    couplings: list[Coupling] = []
    for name, shape in before.items():
        axes = [axis for axis, size in enumerate(shape) if after[name][axis] != size]
        if not axes:
            continue
        disk = architecture.on_disk(name)
        if len(axes) > 1 or shape[axes[0]] != width or after[name][axes[0]] != 2 * width:
            return f"{disk} of shape {shape} follows it in more than one way: heads are a share of it"
        if disk in tied and disk not in architecture.specs:
            continue  # stored once, under its other name
        transposed = is_transposed(disk, dict(architecture.config)) and len(shape) == 2
        matrix = len(shape) == 2 and kinds.get(disk) != "embedding" and disk not in tied
        reads = matrix and axes[0] == (0 if transposed else 1)
        couplings.append(Coupling(disk, axes[0], 1, "consumer" if reads else "producer"))
    roles = {coupling.role for coupling in couplings}
    if roles != {"producer", "consumer"}:
        return f"{'.'.join(field)} of config.json governs no stream that is written and read"
    return Residual(width, field, config, tuple(couplings))


def _require_alike(found: Residual) -> None:
    """Coordinates in another order must compute the same: tried on a narrow model of two blocks with random weights.

    Raises:
        CheckpointError: they do not, or the model cannot be tried.
    """
    heads = max(_integers(found.config, HEAD_COUNTS), default=1)
    narrow, wide = (build(_shallow(found.narrowed(heads * times))) for times in (4, 6))
    shapes = {name: parameter.shape for name, parameter in wide.named_parameters()}
    axes = {
        name: [axis for axis, size in enumerate(parameter.shape) if shapes[name][axis] != size]
        for name, parameter in narrow.named_parameters()
    }
    model = type(narrow)(narrow.config).double().eval()
    order = torch.randperm(4 * heads, generator=torch.Generator().manual_seed(1))
    model.config._experts_implementation = "eager"  # grouped kernels have no float64
    inputs = _inputs(model)
    with torch.no_grad():
        _randomize(model)
        before = _output(model, inputs)
        for name, parameter in model.named_parameters():
            for axis in axes[name]:
                parameter.copy_(parameter.index_select(axis, order))
        after = _output(model, inputs)
    if before.shape[-1] == 4 * heads and getattr(model, "get_output_embeddings", lambda: None)() is None:
        before = before[..., order]
    if not torch.allclose(before, after, rtol=1e-6, atol=1e-6 * float(before.abs().max())):
        raise CheckpointError("the hidden width cannot be narrowed: its coordinates do not all play one part", HINT)


def _integers(config: Mapping[str, Any], names: Iterable[str]) -> list[int]:
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    return [section[name] for section in sections for name in names if isinstance(section.get(name), int)]


def _shallow(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same with two blocks in every stack."""
    edited = dict(config)
    for field in fields(config, DEPTH_FIELDS):
        size = value_at(config, field)
        if isinstance(size, int) and size > 2:
            edited = keep_blocks(edited, field, range(2))
    return edited


def _randomize(model: nn.Module) -> None:
    """Random weights of a size that keeps activations alive; nothing at its initial value."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan = parameter.shape[-1] if parameter.ndim > 1 else 4
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan**0.5)


def _inputs(model: Any) -> dict[str, Tensor]:
    """A few random tokens, or an image.

    Raises:
        CheckpointError: the model reads neither.
    """
    taken, config, generator = getattr(model, "main_input_name", None), model.config, torch.Generator().manual_seed(0)
    if taken == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        shape = (1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return {taken: torch.randn(shape, generator=generator, dtype=torch.float64)}
    if taken != "input_ids":
        raise CheckpointError(f"the hidden width of a model that reads {taken} cannot be tried out", HINT)
    ids = torch.randint(0, config.get_text_config().vocab_size, (2, 6), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**found, "decoder_input_ids": ids} if config.is_encoder_decoder else found


def _output(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits, or hidden states where there is no head.

    Raises:
        CheckpointError: it does not run on these alone.
    """
    try:
        output = model(**inputs)
        return output.logits if "logits" in output else output[0]  # type: ignore[no-any-return]
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the hidden width cannot be tried out: {reason}", HINT) from error
