"""Layers that are compressed two by two, because of an attention's heads only their products count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from aicompress.errors import RecipeError, Refused, listed
from aicompress.methods.head_products import HeadProduct
from aicompress.methods.layerwise import AnyLayerMethod
from aicompress.model.architecture.architecture import Architecture
from aicompress.model.architecture.attention import head_counts
from aicompress.model.equivalence.head_products import HeadCounts, find_head_products
from aicompress.pipeline.calibration.random_weights import on_noise
from aicompress.pipeline.calibration.request import StepInput
from aicompress.pipeline.step.layer_plan import LayerPlan


def coupled(
    step: StepInput, method: AnyLayerMethod, layers: Mapping[str, LayerPlan]
) -> tuple[dict[str, LayerPlan], list[str]]:
    """The layers that are members of products, with these, and notes that tell which are left as they are.

    The model's structure decides, which `on_noise` searches for on random weights.

    Raises:
        Refused: there are none, or the model does not run.
    """
    if method.couples is None:
        return dict(layers), []
    by_tensor = {layer.info.tensor: layer for layer in layers.values()}
    coupled: dict[str, LayerPlan] = {}
    whole: dict[str, str] = {}
    for product in _products(step):
        members = [by_tensor[name] for name in product.members if name in by_tensor]
        if len(members) == 2:
            _require_one_config(members)
            why = method.couples.stays(product, members[0].config)
            if why:
                whole |= {member.info.name: why for member in members}
                continue
            coupled |= {member.info.name: replace(member, product=product) for member in members}
    if not coupled:
        why = "".join(f" ({reason})" for reason in dict.fromkeys(whole.values()))
        raise Refused(
            f"{method.name}: of the selected layers none are projections of attention heads that can be reduced{why}",
            "select both layers of a product, such as v_proj and o_proj; or take whitened or two_sided",
        )
    return {name: coupled[name] for name in layers if name in coupled}, _left(layers, coupled, whole)


def _products(step: StepInput) -> tuple[HeadProduct, ...]:
    architecture = Architecture.of(step.checkpoint.config, step.checkpoint.parameters())
    counts = dict.fromkeys(HeadCounts(c.heads, c.groups, c.width) for c in head_counts(architecture.config))
    return on_noise(step, partial(find_head_products, tuple(counts)))


def _require_one_config(members: Sequence[LayerPlan]) -> None:
    """Members of a product lose the same directions.

    Raises:
        RecipeError: rules give them different parameters.
    """
    first, second = members
    if first.config != second.config:
        raise RecipeError(
            f"{first.info.name} and {second.info.name} are compressed together, and have different parameters",
            "give both the same",
        )


def _left(layers: Mapping[str, LayerPlan], coupled: Mapping[str, LayerPlan], whole: Mapping[str, str]) -> list[str]:
    """Notes on selected layers that stay as they are, by the reason."""
    other = (
        "no attention heads lie in them, or a norm of queries and keys, a fused projection or biases of heads that "
        "share a key hold these together"
    )
    reasons: dict[str, list[str]] = {}
    for name in layers:
        if name not in coupled:
            reasons.setdefault(whole.get(name, other), []).append(name)
    return [
        f"{len(names)} of {len(layers)} layers stay as they are: {why}: " + listed(names)
        for why, names in reasons.items()
    ]
