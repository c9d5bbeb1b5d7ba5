"""Recipes that a few lines make endless are refused in one line, soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from aicompress.errors import RecipeError
from aicompress.recipe import load
from aicompress.recipe.files import read_yaml, with_overrides

HEAD = "version: 1\nmethod: {name: rtn, bits: 8}\n"
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 9))


@pytest.mark.parametrize(
    "text",
    [
        HEAD + ALIASES + "seed: *a8\n",
        HEAD + MERGES,
        HEAD + "select: &a {include: [*a]}\n",
        HEAD + "gates: &a [*a]\n",
        "[" * 1_500,
    ],
    ids=["aliases", "merged keys", "a section in itself", "a list in itself", "depth"],
)
def test_an_endless_recipe_is_refused(text: str) -> None:
    start = time.process_time()
    with pytest.raises(RecipeError) as caught:
        read_yaml(text, "bomb.yaml")
    assert len(caught.value.message) < 300
    assert caught.value.hint
    assert time.process_time() - start < 5


@pytest.mark.parametrize("value", ["[" * 1_500, "&a [*a]", "x" * 100_000 + ": : :"])
def test_an_endless_edit_is_refused(value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        with_overrides({}, [f"seed={value}"])
    assert len(caught.value.message) < 300


def test_aliases_may_be_used() -> None:
    plain = read_yaml(
        HEAD + "rules: [&r {match: a, bits: 4}, {<<: [*r], group_size: 32}]\nselect: {include: [x]}\n", "r.yaml"
    )
    assert plain["rules"] == [{"match": "a", "bits": 4}, {"match": "a", "bits": 4, "group_size": 32}]


def test_a_large_value_is_shown_in_part(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(HEAD)
    with pytest.raises(RecipeError, match="seed") as caught:
        load(str(tmp_path / "r.yaml"), "quantize", [f"seed=[{', '.join(['x' * 1000] * 1000)}]"])
    assert len(caught.value.message) < 400
