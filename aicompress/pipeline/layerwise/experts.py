"""Experts in one tensor, each compressed by itself: which layers can be, their outlines, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.reader import require_finite
from aicompress.errors import CompressError
from aicompress.layer import Layer, LayerInfo, MergedExperts
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.methods.method import MethodConfig
from aicompress.methods.zeros import mask_of
from aicompress.pipeline.calibration.random_weights import on_noise
from aicompress.pipeline.calibration.request import StepInput
from aicompress.pipeline.step.layer_plan import layer_seed
from aicompress.weights import Dense, PerExpert, Weight


@dataclass(frozen=True)
class Divisible:
    """The parameters among the chosen layers that hold experts which are compressed one by one.

    Attributes:
        experts: of a parameter, by its name; empty where the method takes none, or all of a tensor as one matrix.
        decoded: parameters of these whose stored form is not divided: new codes are made of what it stands for.
        why: why those that it lacks cannot be divided, in a few words; by name of the parameter.
    """

    experts: Mapping[str, MergedExperts]
    why: Mapping[str, str]
    decoded: frozenset[str] = frozenset()

    def of(self, info: LayerInfo) -> LayerInfo:
        """A layer with the experts that it holds."""
        if info.tensor not in self.experts:
            return info
        outline = None if info.tensor in self.decoded else info.outline
        return replace(info, experts=self.experts[info.tensor], outline=outline)


ALL_WHOLE = Divisible({}, {})


def divisible(step: StepInput, method: AnyLayerMethod, chosen: Sequence[LayerInfo]) -> Divisible:
    """Find the experts that a method takes one by one.

    With statistics of their inputs, the model is run on random weights to see how they are multiplied with these.
    """
    checkpoint, recipe = step.checkpoint, step.recipe
    configs = {info.tensor: recipe.config_for(info)[0] for info in chosen if info.kind == "experts"}
    parts = {info.tensor for info in chosen if info.kind == "experts" and info.part}
    stored = {name for name in configs if isinstance(checkpoint.outline(name), PerExpert)}
    each = {
        name: config
        for name, config in configs.items()
        if config is not None
        and (name in parts | stored or not method.takes("experts", config))
        and method.takes_each(config)
    }
    made = _made(checkpoint, method, {name: each.pop(name) for name in parts & each.keys()})
    if not each:
        return made
    seen: Mapping[str, MergedExperts] = {}
    reads = any(method.reads(config) for config in each.values())
    if reads:
        from aicompress.model.equivalence.expert_products import expert_products

        try:
            seen = on_noise(step, expert_products)
        except CompressError as error:
            told = f"the model does not run on random weights ({error.message})"
            return Divisible(made.experts, {**made.why, **dict.fromkeys(each, told)})
    else:
        shapes = {info.tensor: info.tensor_shape for info in chosen}
        seen = {
            name: _lying(checkpoint, name, shapes[name]) for name in each if name in stored or len(shapes[name]) == 3
        }
    experts, why, decoded = dict(made.experts), dict(made.why), set[str]()
    for name in each:
        if name not in seen:
            why[name] = "no product with one expert's matrix is seen as the model runs"
        elif _forms(outline := checkpoint.outline(name), seen[name]) is not None:
            experts[name] = seen[name]
        elif method.recodes and mask_of(outline) is None:
            experts[name] = seen[name]
            decoded.add(name)
        else:
            why[name] = "they are compressed already, in a form that is not divided into experts"
    return Divisible(experts, why, frozenset(decoded))


def _lying(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> MergedExperts:
    """Experts as they are stored, or as a tensor of three axes holds them."""
    outline = checkpoint.outline(name)
    if isinstance(outline, PerExpert):
        return MergedExperts(len(outline.weights), outline.transposed)
    return MergedExperts(shape[0])


def _made(checkpoint: Checkpoint, method: AnyLayerMethod, factors: Mapping[str, MethodConfig]) -> Divisible:
    """Those whose experts are several parts each, such as factors; calibration sees no inputs of these."""
    experts: dict[str, MergedExperts] = {}
    why: dict[str, str] = {}
    for name, config in factors.items():
        outline = checkpoint.outline(name)
        if method.reads(config) or not isinstance(outline, PerExpert):
            why[name] = "calibration sees the inputs of whole experts, and these are parts of them"
        else:
            experts[name] = MergedExperts(len(outline.weights))
    return Divisible(experts, why)


def _forms(stored: Weight | None, experts: MergedExperts) -> Sequence[Weight | None] | None:
    """The forms of single experts in the input; None where theirs cannot be divided."""
    if stored is None:
        return [None] * experts.count
    if isinstance(stored, PerExpert):
        same = len(stored.weights) == experts.count and stored.transposed == experts.transposed
        return stored.weights if same else None
    if experts.transposed or stored.shape[0] % experts.count:
        return None
    device = next(iter(stored.tensors().values())).device
    parts = torch.arange(stored.shape[0], device=device).tensor_split(experts.count)
    cut = [stored.cut(0, rows) for rows in parts]
    return None if None in cut else cut


def infos_of(info: LayerInfo) -> list[LayerInfo]:
    """The experts of a parameter as layers."""
    assert info.experts is not None
    forms = _forms(info.outline, info.experts)
    assert forms is not None
    return [info.of_expert(number, form) for number, form in enumerate(forms)]


def outline(method: AnyLayerMethod, info: LayerInfo, config: MethodConfig | None) -> Weight:
    """The stored weight of a layer without data, of one that holds experts that of each."""
    if info.experts is None:
        return method.planned(info, config)
    weights = [method.planned(own, config) for own in infos_of(info)]
    return PerExpert.joined(weights, info.experts.transposed)


def one_of(weight: Weight) -> Weight:
    """A weight as a method gave it: of experts that of the first."""
    return weight.weights[0] if isinstance(weight, PerExpert) else weight


def reader(checkpoint: Checkpoint, info: LayerInfo, seed: int) -> Callable[[int], Layer]:
    """What reads an expert of a parameter by its number, as a layer.

    Args:
        checkpoint: where they are.
        info: the parameter.
        seed: of the step.

    Raises:
        CheckpointError: the checkpoint does not hold what it describes.
    """
    experts, infos = info.experts, infos_of(info)
    assert experts is not None
    step = info.tensor_shape[0] // experts.count
    multiple = checkpoint.row_multiple(info.tensor)
    alone = info.tensor not in checkpoint.manifest.entries and multiple > 0 and step % multiple == 0
    apart = isinstance(info.outline, PerExpert) and not info.part and multiple == 1  # each can be read without others
    whole = None if alone or apart else checkpoint.weight(info.tensor)
    whole = whole.parts()[info.part] if info.part and whole is not None else whole
    if whole is not None and info.outline is None:  # decoded for new codes
        whole = Dense(whole.dense())
    forms = None if whole is None or isinstance(whole, Dense) else _forms(whole, experts)

    def stored(number: int) -> Weight:
        if forms is not None and (form := forms[number]) is not None:
            return form
        if isinstance(whole, Dense):
            return Dense(experts.split(info.matrix(whole.matrix))[number])
        if apart:
            block = checkpoint.weight(info.tensor, slice(number, number + 1))
            assert isinstance(block, PerExpert)
            return block.weights[0]
        rows = checkpoint.rows(info.tensor, number * step, (number + 1) * step)
        return Dense(replace(experts, count=1).split(rows)[0])

    def read(number: int) -> Layer:
        own, weight = infos[number], stored(number)
        matrix = weight.dense().contiguous()
        require_finite(matrix, own.name, checkpoint.path)
        return Layer(own, matrix, weight, seed=layer_seed(seed, own.name))

    return read
