"""What calibrated methods of factorize share: from a weighting of a layer's error to its factors, and to ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from pydantic import Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Batched, Candidate, Reads, Rounded
from aicompress.methods.curvature import shifted
from aicompress.methods.decisions import Allocates, Surveys, SurveySetting
from aicompress.methods.effort import Effort, Level, one_pass
from aicompress.methods.factorize import svd
from aicompress.methods.factorize.budget import allocation
from aicompress.methods.factorize.budget.sizes import Gains, RankConfig, alike, check, describe, outline, stored
from aicompress.methods.factorize.weighting.roots import Root, Weighting
from aicompress.methods.factorize.weighting.rounding import weighed_rounding
from aicompress.methods.layerwise import LayerMethod
from aicompress.weights import Weight


class DampedConfig(RankConfig):
    """Parameters of methods that know something of a layer's inputs.

    At a damping of 0.1 outputs diverge 2 to 5 % less than at 0.01: measured on a language model of 7 million parameters
    at keep 0.6, on other text than it was calibrated on.
    """

    damping: float = Field(0.1, ge=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")


# Half way: on a model of 7 million parameters outputs diverge 11 and 13 % less than all of the way, and 14 and 19 %
# less than with none of it, at keep 0.8 and 0.6. On one of 135 million at keep 0.6 log-perplexity grows by 1.09 half
# way, by 1.25 with none of it, and by more all of the way: where layers before have changed much, inputs tell little of
# the original ones, and every layer would answer less than it should.
SHIFT = 0.5
AIM = (
    "where the target lies between what the original layer gives on the inputs that come from compressed layers (0) "
    "and what it gives on the original model's (1)"
)
AIM_AS_TRIED = f"{AIM}; beside max_kl 0 where it is not given, so that layers are written as they were tried"


class AnchoredConfig(DampedConfig):
    """Parameters of methods that know the Gram matrix of a layer's inputs, and aim at the original model's outputs."""

    shift: float = Field(
        SHIFT,
        ge=0,
        le=1,
        description=AIM_AS_TRIED,
    )


W = TypeVar("W", bound=RankConfig)


def shift_of(config: AnchoredConfig) -> float:
    """How far the target moves."""
    return config.shift


@dataclass(frozen=True)
class Sides(Generic[W]):
    """What an error of a layer's weight counts, by both sides of the layer.

    Attributes:
        inputs: (layer, config) -> the inputs' side.
        outputs: (layer, config) -> the outputs' side; None: all alike.
        shift: config -> how far the target moves towards the original model's outputs.
        shared: layers with the same inputs have the same inputs' side.
        comparable: (layer) -> whether the error of this one is in the unit of the others.
        efforts: presets.
    """

    inputs: Callable[[Layer, W], Root]
    outputs: Callable[[Layer, W], Root | None] = lambda layer, given: None
    shift: Callable[[W], float] = lambda given: 0.0
    shared: bool = True
    comparable: Callable[[Layer], bool] = lambda layer: True
    efforts: Mapping[Level, Effort] = field(default_factory=dict)

    def rows(self, layer: Layer, given: W) -> Root | None:
        """The outputs' side; of an embedding whose gradients are not read, how often its rows are looked up."""
        weighed = self.outputs(layer, given)
        return lookups(layer) if weighed is None else weighed

    def weighting(self, layer: Layer, given: W) -> Weighting:
        """Both sides of a layer."""
        return Weighting(self.inputs(layer, given), self.rows(layer, given))


def _aimed(given: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FAST = Effort(
    "one forward pass over the calibration data, of the original model",
    lambda given: {"shift": 0.0},
    calibration=lambda given: one_pass({"shift": 0.0, **given}),
)
EFFORTS: dict[Level, Effort] = {
    "fast": FAST,
    "balanced": Effort("three forward passes, for targets that make up for compressed blocks", _aimed),
    "best": Effort(
        "block tuning on top: 400 steps of 4 samples forward and back per block, ten to thirty times balanced",
        _aimed,
        {"steps": 400, "batch": 4, "norms": True},
    ),
}


def weighted(config: type[W], sides: Sides[W], reads: frozenset[str], summary: str, *, when: str) -> LayerMethod[W]:
    """A method whose factors have the least error under a weighting.

    Args:
        config: its parameters; their name is the method's.
        sides: the weighting.
        reads: statistics that it reads.
        summary: a line for the list of methods.
        when: as of every method.
    """

    def factorized(layer: Layer, given: W, root: Root) -> Weight:
        def factors(rank: int) -> tuple[Tensor, Tensor]:
            target = shifted(layer, sides.shift(given), root.solve)
            return Weighting(root, sides.rows(layer, given)).factors(target, rank)

        return stored(layer, given, factors)

    def apply(layer: Layer, given: W) -> Weight:
        return factorized(layer, given, sides.inputs(layer, given))

    def batched(layers: Sequence[Layer], given: W) -> list[Weight]:
        root = sides.inputs(layers[0], given)
        return [factorized(layer, given, root) for layer in layers]

    def gains(candidate: Candidate[W]) -> Gains:
        layer, given = candidate.read(), candidate.config
        weighting = sides.weighting(layer, given)
        seen = layer.inputs is None or layer.inputs.count > 1  # white noise counts one row
        return Gains(weighting.squares(layer.weight), seen and sides.comparable(layer))

    def alternative(layer: Layer, given: W, weight: Weight, nbytes: int) -> Rounded | None:
        return weighed_rounding(layer, weight, nbytes, sides.weighting(layer, given))

    def decide(candidates: Sequence[Candidate[W]], setting: SurveySetting) -> list[W]:
        return allocation.resolve(candidates, setting.other_bytes, gains, setting.divergence)

    return LayerMethod(
        name=config.model_fields["name"].default,
        command="factorize",
        summary=summary,
        when=when,
        config=config,
        needs=reads,
        apply=apply,
        outline=outline,
        check=check,
        batched=Batched(batched) if sides.shared else None,
        allocates=Allocates(estimated, alike),
        surveys=Surveys(lambda given: reads if given.by_spectrum else frozenset(), decide, lambda given: given.tried),
        describe=describe,
        rounded=alternative,
        efforts=sides.efforts,
        reading=Reads(shift=sides.shift),
    )


def lookups(layer: Layer) -> Root | None:
    """Roots of an embedding's token frequencies, which make E‖w_t − ŵ_t‖² of the error; None of any other layer.

    Each row counts as looked up once more than it was: of N lookups of V rows (n + 1) / (N + V). So a row that never
    was keeps what the directions of the others hold of it.
    """
    if layer.inputs is None or layer.inputs.frequency is None:
        return None
    frequency, number = layer.inputs.frequency.double(), max(1, layer.inputs.count)
    return Root.diagonal((frequency * number + 1) / (number + len(frequency)), 0.0)


def estimated(candidates: Sequence[Candidate[W]], other_bytes: int) -> list[W]:
    """Ranks by the weights alone where a survey will decide, so that the output can be laid out.

    Raises:
        RecipeError: a budget does not hold even rank 1 everywhere, or a compressed layer would grow.
    """
    candidates = [replace(candidate, config=candidate.config.as_tried()) for candidate in candidates]
    plain = allocation.resolve(candidates, other_bytes, svd.gains)
    return allocation.still_open(candidates, plain, lambda config: config.by_spectrum)
