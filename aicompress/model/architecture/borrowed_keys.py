"""Find attentions that read keys and values which another attention makes, by running a tiny model.

No shape tells: a block of Gemma 3n may take the keys of a block before it. In a tiny model with all blocks, whose
attentions give nothing to the residual stream, one attention's projections are changed; every other attention whose
heads then give something else has read them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aicompress.errors import CheckpointError
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.attention import Attention
from aicompress.model.architecture.config_fields import fields
from aicompress.model.architecture.small_models import tiny_model
from aicompress.model.architecture.small_models.reduced_model import HEAD, HIDDEN_FIELDS, started, with_few
from aicompress.model.architecture.small_models.tiny_inputs import inputs_of


def coupled(architecture: Architecture, attentions: Sequence[Attention]) -> list[list[int]]:
    """Places of the attentions whose heads belong together, those of one group beside one another.

    Raises:
        CheckpointError: an attention has no keys of its own, and where it gets them cannot be tried out.
    """
    try:
        trial = _Trial(architecture, attentions)
        lent = trial.lent() if trial.any_lent() else {}
    except CheckpointError as error:
        bare = [attention for attention in attentions if not _has_keys(attention)]
        if not bare:
            return [[number] for number in range(len(attentions))]
        message = f"{bare[0].name} makes no keys and values of its own, and whose it reads cannot be tried out"
        raise CheckpointError(f"{message}: {error.message}", "prune feed-forward neurons (width) instead") from error
    groups = {number: [number] for number in range(len(attentions))}
    for lender, borrowers in lent.items():
        for borrower in borrowers:
            one, other = groups[lender], groups[borrower]
            if one is not other:
                one += other
                groups |= dict.fromkeys(other, one)
    return list({id(group): sorted(group) for group in groups.values()}.values())


def _has_keys(attention: Attention) -> bool:
    """Whether the attention makes keys: in sections of their own, or, where heads are not counted apart, in thirds."""
    producers = [tensor for tensor in attention.tensors if tensor.role == "producer"]
    sections = [section.kind for tensor in producers for section in tensor.sections]
    return "key" in sections if attention.count.key is not None else len(sections) > 1


class _Trial:
    """A tiny model whose attentions are changed one by one.

    Raises:
        CheckpointError: it cannot be made or run.
    """

    def __init__(self, architecture: Architecture, attentions: Sequence[Attention]) -> None:
        self.attentions = attentions
        self.model = started(_reduced(architecture, attentions[0]))
        names = {architecture.on_disk(name): name for name, _ in self.model.named_parameters()}
        try:
            self.producers = [[names[t.tensor] for t in a.tensors if t.role == "producer"] for a in attentions]
            consumers = [names[t.tensor] for a in attentions for t in a.tensors if t.role == "consumer"]
        except KeyError as error:
            raise CheckpointError(f"the model has another name for {error.args[0]}", "") from error
        self.read: dict[int, Tensor] = {}
        for number, name in enumerate(consumers):
            self.model.get_parameter(name).zero_()
            module = self.model.get_submodule(name.rpartition(".")[0])
            module.register_forward_pre_hook(self._keep(number))
        self.inputs = inputs_of(self.model)
        self.before = self._run()

    def _keep(self, number: int) -> Any:
        def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            self.read[number] = arguments[0].clone()

        return keep

    def _run(self) -> dict[int, Tensor]:
        self.read = {}
        tiny_model.outputs_of(self.model, self.inputs)
        if len(self.read) != len(self.attentions):
            raise CheckpointError("not every attention runs on tokens alone", "")
        return self.read

    def _readers(self, changed: Collection[int]) -> set[int]:
        """Other attentions whose heads give something else once those are changed."""
        parameters = [self.model.get_parameter(name) for number in changed for name in self.producers[number]]
        kept = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.add_(torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape))
        after = self._run()
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
        return {n for n, value in after.items() if n not in changed and not torch.allclose(value, self.before[n])}

    def any_lent(self) -> bool:
        """Whether any attention reads another's keys: any two are apart in some digit of their binary numbers."""
        places = range(len(self.attentions))
        halves = [
            {n for n in places if n >> bit & 1 == side} for bit in range(len(places).bit_length()) for side in (0, 1)
        ]
        return any(self._readers(half) for half in halves if half)

    def lent(self) -> dict[int, set[int]]:
        """By attention those that read its keys and values."""
        return {number: self._readers({number}) for number in range(len(self.attentions))}


def _reduced(architecture: Architecture, attention: Attention) -> dict[str, Any]:
    """config.json with few of everything but heads and blocks, wherever the architecture takes it."""
    count = attention.count
    further = [(field, HEAD * count.heads) for field in fields(architecture.config, HIDDEN_FIELDS)]
    return with_few(architecture.config, [*further, *([(count.size, HEAD)] if count.size else [])])
