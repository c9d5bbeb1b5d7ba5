"""Patterns, kinds and depth pick layers; a pattern that matches nothing is an error."""

from __future__ import annotations

import time

import pytest
import torch

from aicompress.errors import RecipeError
from aicompress.layer import Kind, LayerInfo
from aicompress.selection import from_the_start, in_levels, matches, select, unmatched


def info(name: str, kind: Kind = "linear") -> LayerInfo:
    return LayerInfo(name, f"{name}.weight", kind, (4, 4), (4, 4), torch.float32)


LAYERS = [
    info("model.embed_tokens", "embedding"),
    *(info(f"model.layers.{n}.{part}") for n in range(12) for part in ("self_attn.q_proj", "mlp.down_proj")),
    info("lm_head", "head"),
]


def picked(include: list[str], exclude: list[str], kinds: tuple[Kind, ...] = ("linear", "conv")) -> list[str]:
    found, problems = select(LAYERS, include, exclude, kinds)
    assert not problems
    return [layer.name for layer in found]


@pytest.mark.parametrize(
    ("include", "exclude", "count"),
    [
        ([], [], 24),
        (["model.layers.1.*"], [], 2),
        (["model.layers.1*"], [], 6),
        (["*.q_proj"], [], 12),
        (["model.layers.[01].*"], [], 4),
        (["model.layers.?.mlp.down_proj"], [], 10),
        (["re:model\\.layers\\.(0|11)\\..*"], [], 4),
        (["re:.*q_proj"], ["model.layers.0.*"], 11),
        (["model.layers.3.mlp.down_proj"], [], 1),
        ([], ["*.down_proj"], 12),
    ],
)
def test_include_and_exclude(include: list[str], exclude: list[str], count: int) -> None:
    assert len(picked(include, exclude)) == count


def test_order_is_the_files() -> None:
    names = [layer.name for layer in LAYERS]
    found = picked(["*.down_proj", "model.layers.0.*"], [])
    assert found == sorted(found, key=names.index)


def test_kinds() -> None:
    assert picked([], [], ("embedding", "head")) == ["model.embed_tokens", "lm_head"]


def test_a_regular_expression_matches_the_whole_name() -> None:
    assert not matches("re:q_proj", info("a.q_proj"))
    assert matches("re:.*q_proj", info("a.q_proj"))
    assert not matches("re:a|a.q", info("a.q_proj"))


def test_a_pattern_that_matches_nothing_is_an_error_with_a_suggestion() -> None:
    _, problems = select(LAYERS, ["lm_haed"], ["*.gate_proj"], ("linear",))
    assert [problem.message for problem in problems] == [
        "include pattern 'lm_haed' matches no layer",
        "exclude pattern '*.gate_proj' matches no layer",
    ]
    assert problems[0].hint == "did you mean 'lm_head'?"
    assert all(isinstance(problem, RecipeError) for problem in unmatched(["x"], LAYERS, "rules"))


def test_a_kind_that_is_left_out_is_named() -> None:
    _, (problem,) = select(LAYERS, ["lm_head"], [], ("linear",))
    assert problem.message == "the recipe selects only head layers, which it does not act on"
    assert problem.hint == "set select.kinds: [head] to act on them"


def test_a_kind_that_the_checkpoint_lacks_is_named() -> None:
    """Such as the head of a tied model, whose tensor is the embedding's."""
    _, (problem,) = select(LAYERS[:-1], [], [], ("head",))
    assert problem.message == "the checkpoint has no head layers of its own, only embedding and linear"


def test_everything_excluded_is_an_error() -> None:
    found, problems = select(LAYERS, [], ["*"], ("linear",))
    assert not found
    assert problems[0].message == "the recipe selects no layer"


def test_a_regular_expression_that_takes_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aicompress.selection.SECONDS", 0.05)
    layers = [info(f"{'a' * 40}.{number}") for number in range(200)]
    start = time.process_time()
    for pattern in ("re:(a|a)*$", "re:(a|aa)+$", r"re:(?:a|aa)+\.[a-z]"):
        with pytest.raises(RecipeError, match="takes more than"):
            select(layers, [pattern], [], ("linear",))
    assert select(layers, ["re:(a+)+$"], [], ("linear",))[1][0].message.endswith("matches no layer")
    assert time.process_time() - start < 3
    assert len(select(layers, [r"re:a+\.\d+"], ["re:.*[02468]"], ("linear",))[0]) == 100


def test_a_broken_regular_expression_is_an_error() -> None:
    with pytest.raises(RecipeError, match="is not a regular expression"):
        matches("re:(", LAYERS[0])


@pytest.mark.parametrize(
    ("span", "depths"),
    [("0", [0]), ("0-1", [0, 1]), ("0-1,10-11", [0, 1, 10, 11]), (" 2 - 3 , 5 ", [2, 3, 5]), ("9-20", [9, 10, 11])],
)
def test_levels(span: str, depths: list[int]) -> None:
    found = [layer.index for layer in LAYERS if layer.name.endswith("q_proj") and in_levels(layer, span)]
    assert found == depths


@pytest.mark.parametrize(
    ("span", "counted"),
    [("-1", "11"), ("-2--1", "10-11"), ("0-1,-1", "0-1,11"), ("2--3", "2-9"), ("0-1", "0-1"), ("a-b", "a-b")],
)
def test_depths_are_counted_from_the_end_too(span: str, counted: str) -> None:
    assert from_the_start(span, LAYERS) == counted


def test_a_layer_without_depth_is_in_no_level() -> None:
    assert not in_levels(info("lm_head"), "0-99")


@pytest.mark.parametrize("span", ["", "a", "1-", "0..3", "1,,2"])
def test_a_span_that_does_not_parse(span: str) -> None:
    with pytest.raises(RecipeError, match="is not a list of depths"):
        in_levels(LAYERS[1], span)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("model.layers.0", "did you mean 'model.layers.0.*'? It matches 2"),
        ("q_proj", "did you mean '*.q_proj'? It matches 12"),
        ("layers.3.mlp.down_proj", "did you mean '*.layers.3.mlp.down_proj'?"),
        ("lm_head.weight", "did you mean 'lm_head'?"),
        ("self_attn", "did you mean '*self_attn*'? It matches 12"),
        ("*.gate_proj", "did you mean 'model.layers.1.self_attn.q_proj'?"),
    ],
)
def test_a_module_or_a_last_word_is_answered_with_its_glob(pattern: str, hint: str) -> None:
    (problem,) = unmatched([pattern], LAYERS, "include")
    assert problem.hint == hint or pattern.startswith("*")
