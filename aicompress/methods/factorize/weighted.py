"""What calibrated methods of factorize share: from a weighting of a layer's error to its factors, and to ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import Field
from torch import Tensor

from aicompress.layer import Layer
from aicompress.methods.capabilities import Allocates, Candidate, Joint, Reads, Setting, Surveys
from aicompress.methods.curvature import shifted
from aicompress.methods.factorize import sizes, svd
from aicompress.methods.factorize.roots import Root, Weighting
from aicompress.methods.factorize.sizes import RankConfig, check, describe, outline, stored
from aicompress.methods.layerwise import LayerMethod
from aicompress.weights import Weight


class AnchoredConfig(RankConfig):
    """Parameters of methods that know the Gram matrix of a layer's inputs, and aim at the original model's outputs."""

    damping: float = Field(0.01, ge=0, le=1, description="added to the Gram matrix, as a part of its mean diagonal")
    shift: float = Field(
        1.0, ge=0, le=1, description="how far the target moves to make up for what compressed layers before it changed"
    )


W = TypeVar("W", bound=RankConfig)


def shift_of(config: AnchoredConfig) -> float:
    """How far the target moves."""
    return config.shift


def weighted(
    config: type[W],
    inputs: Callable[[Layer, W], Root],
    outputs: Callable[[Layer, W], Root | None],
    shift: Callable[[W], float] = lambda given: 0.0,
    *,
    reads: frozenset[str],
    about: tuple[str, str],
) -> LayerMethod[W]:
    """A method whose factors have the least error under a weighting.

    Args:
        config: its parameters; their name is the method's.
        inputs: what the inputs' side of an error counts; of layers with the same inputs the same.
        outputs: what the outputs' side counts; None: all alike.
        shift: config -> how far the target moves towards the original model's outputs.
        reads: statistics that these read.
        about: the line for the list of methods, and when to take it.
    """

    def factorized(layer: Layer, given: W, root: Root) -> Weight:
        def factors(rank: int) -> tuple[Tensor, Tensor]:
            target = shifted(layer, shift(given), root.solve)
            return Weighting(root, outputs(layer, given)).factors(target, rank)

        return stored(layer, given, factors)

    def apply(layer: Layer, given: W) -> Weight:
        return factorized(layer, given, inputs(layer, given))

    def joint(layers: Sequence[Layer], given: W) -> list[Weight]:
        root = inputs(layers[0], given)
        return [factorized(layer, given, root) for layer in layers]

    def squares(candidate: Candidate[W]) -> Tensor:
        layer = candidate.read()
        return Weighting(inputs(layer, candidate.config), outputs(layer, candidate.config)).squares(layer.weight)

    def decide(candidates: Sequence[Candidate[W]], setting: Setting) -> list[W]:
        return sizes.resolve(candidates, setting.other_bytes, squares)

    return LayerMethod(
        name=config.model_fields["name"].default,
        command="factorize",
        summary=about[0],
        when=about[1],
        config=config,
        needs=reads,
        apply=apply,
        outline=outline,
        check=check,
        joint=Joint(joint),
        allocates=Allocates(estimated),
        surveys=Surveys(lambda given: reads if given.by_spectrum else frozenset(), decide),
        describe=describe,
        reading=Reads(compares=lambda given: shift(given) > 0),
    )


def estimated(candidates: Sequence[Candidate[W]], other_bytes: int) -> list[W]:
    """Ranks by the weights alone where a survey will decide, so that the output can be laid out.

    Raises:
        RecipeError: a budget does not hold even rank 1 everywhere, or a compressed layer would grow.
    """
    plain = sizes.resolve(
        candidates, other_bytes, lambda candidate: svd.squared_singular_values(candidate.read().weight)
    )
    return [
        candidate.config.model_copy(update={"rank": config.rank}) if candidate.config.by_spectrum else config
        for candidate, config in zip(candidates, plain, strict=True)
    ]
