"""The table of all methods: what is in it, and that none is left out that could be."""

from __future__ import annotations

from aicompress.methods import get, methods
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import OF_TRAINING
from scripts.bench.methods import settings, shown

ELSEWHERE = {"smoothquant"}  # 8 bits alone


def test_all_methods_for_single_weights_are_in_it() -> None:
    made = [
        (command, what, get(command, given["name"]).config.model_validate(given)) for command, what, given in settings()
    ]
    for command in ("prune", "quantize"):
        known = {
            name
            for name, method in methods(command).items()
            if isinstance(method, LayerMethod) and not method.needs & OF_TRAINING
        }
        assert {config.name for own, _, config in made if own == command} == known - ELSEWHERE
    names = [(what, shown(given)) for _, what, given in settings()]
    assert len(set(names)) == len(names)
