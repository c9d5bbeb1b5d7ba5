"""Recipes: what is accepted, what is refused and in which words, and how rules give a layer its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from aicompress import recipe
from aicompress.errors import Problems, RecipeError
from aicompress.layer import LayerInfo
from aicompress.methods import get
from aicompress.methods.layerwise import LayerMethod
from aicompress.recipe.files import find, read_yaml

GOOD = "version: 1\nmethod: {name: rtn, bits: 4, group_size: 64}\n"


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(folder: Path, text: str, *overrides: str, command: str = "quantize") -> Any:
    return recipe.load(write(folder, text), command, overrides)


def info(name: str) -> LayerInfo:
    return LayerInfo(name, f"{name}.weight", "linear", (4, 128), (4, 128), torch.float32)


REFUSED = {
    "unknown key": (GOOD + "sede: 3", "sede: unknown key", "did you mean 'seed'?"),
    "unknown method key": ("version: 1\nmethod: {name: rtn, bist: 4}", "bist: unknown key", "did you mean 'bits'?"),
    "unknown nested key": (GOOD + "select: {inclde: [a]}", "select.inclde: unknown key", "did you mean 'include'?"),
    "key of a section": (GOOD + "bits: 4", "bits: unknown key", "did you mean method.bits?"),
    "key of several": (GOOD + "samples: 4", "samples: unknown key", "method.samples or calibration.samples or"),
    "no list": (GOOD + "select: {include: fc1}", "select.include: is not a list, got 'fc1'", "select.include=['fc1']"),
    "a name alone": ("version: 1\nmethod: rtn", "method.name is missing", "method.name=rtn; see"),
    "ratio": ("version: 1\nmethod: {name: rtn, ratio: 0.5}", "'ratio' is ambiguous", "say sparsity, keep, rank"),
    "key given twice": (GOOD + "seed: 1\nseed: 2", "line 4: key 'seed' is given twice", "keep one"),
    "nested key given twice": ("version: 1\nmethod: {name: rtn, bits: 4, bits: 8}", "key 'bits' is given twice", ""),
    "no method": ("version: 1", "method.name is missing", "aicompress methods quantize"),
    "no method name": ("version: 1\nmethod: {bits: 4}", "method.name is missing", ""),
    "no version": ("method: {name: rtn}", "version: missing", "add it"),
    "wrong version": ("version: 2\nmethod: {name: rtn}", "version: input should be 1, got 2", ""),
    "unknown method": ("version: 1\nmethod: {name: rtm}", "quantize has no method 'rtm'", "did you mean 'rtn'?"),
    "another command's method": ("version: 1\nmethod: {name: svd, keep: 0.5}", "has no method 'svd'", "factorize"),
    "wrong type": ("version: 1\nmethod: {name: rtn, group_size: many}", "method.group_size: input should be", ""),
    "value out of range": ("version: 1\nmethod: {name: rtn, group_size: 0}", "greater than or equal to 1, got 0", ""),
    "value not a choice": ("version: 1\nmethod: {name: rtn, bits: 5}", "method.bits: input should be 2, 3, 4", ""),
    "unknown preset": ("version: 1\nmethod: {name: rtn, preset: W4}", "unknown preset 'W4': known are", ""),
    "fields that contradict": (
        "version: 1\nmethod: {name: rtn, activation_bits: 8}", "activation_bits needs bits: 8, granularity: channel", ""
    ),
    "a list": ("- version: 1", "is not a recipe", "configs/"),
    "nothing": ("", "is not a recipe", "configs/"),
    "not YAML": ("version: [1", "is not YAML at line", "indentation"),
    "unknown kind": (GOOD + "select: {kinds: [linaer]}", "select.kinds.0: input should be", ""),
    "negative seed": (GOOD + "seed: -1", "seed: input should be greater", ""),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_refused_with_one_clear_line(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        load(tmp_path, text)
    assert message in refusal.value.message
    assert "\n" not in refusal.value.message
    assert hint in refusal.value.hint


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(Problems) as refusal:
        load(tmp_path, "version: 1\nmethod: {name: rtn, bits: 5, gruop_size: 64}")
    assert len(refusal.value.problems) == 2


def test_exactly_one_size(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="exactly one of rank, energy, keep, target_bytes"):
        load(tmp_path, "version: 1\nmethod: {name: svd, rank: 4, keep: 0.5}", command="factorize")


def test_sizes_with_units(tmp_path: Path) -> None:
    found = load(tmp_path, "version: 1\nmethod: {name: svd, target_bytes: 20MB}", command="factorize")
    assert found.method.target_bytes == 20_000_000
    assert found.resolved()["method"]["target_bytes"] == 20_000_000


RULES = """
version: 1
method: {name: rtn, bits: 4, group_size: 64}
rules:
  - {match: "*.0.down_proj", bits: 3}
  - {match: "*.down_proj", bits: 8}
  - {match: "*.o_proj", skip: true}
  - {match: "*.w8", preset: W8A8}
levels:
  - {layers: "0-1", bits: 2}
  - {layers: "1-2", group_size: 32}
"""


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "rule"),
    [
        ("layers.0.down_proj", 3, 64, "rules[0]: *.0.down_proj"),
        ("layers.1.down_proj", 8, 64, "rules[1]: *.down_proj"),
        ("layers.1.up_proj", 2, 64, "levels[0]: 0-1"),
        ("layers.2.up_proj", 4, 32, "levels[1]: 1-2"),
        ("layers.3.up_proj", 4, 64, "method"),
        ("lm_head", 4, 64, "method"),
    ],
)
def test_the_first_rule_that_matches_wins(tmp_path: Path, name: str, bits: int, group_size: int, rule: str) -> None:
    config, found = load(tmp_path, RULES).config_for(info(name))
    assert (config.bits, config.group_size, found) == (bits, group_size, rule)


def test_a_rule_may_skip_and_a_preset_replaces(tmp_path: Path) -> None:
    loaded = load(tmp_path, RULES)
    assert loaded.config_for(info("layers.5.o_proj")) == (None, "rules[2]: *.o_proj")
    config, _ = loaded.config_for(info("layers.5.w8"))
    assert (config.bits, config.granularity, config.activation_bits) == (8, "channel", 8)


def test_a_rule_that_gives_one_of_several_sizes_replaces_the_methods(tmp_path: Path) -> None:
    text = 'version: 1\nmethod: {name: svd, keep: 0.5, multiple: 8}\nrules: [{match: "fc1", rank: 16}]'
    config, _ = load(tmp_path, text, command="factorize").config_for(info("fc1"))
    assert (config.rank, config.keep, config.multiple) == (16, None, 8)


def test_a_rules_fields_are_the_methods(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD + 'rules: [{match: "*", sparsity: 0.5}]')
    with pytest.raises(RecipeError, match=r"rules\[0\]: \*\.sparsity: unknown key"):
        loaded.config_for(info("fc1"))


def test_rules_that_match_nothing_are_problems(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, GOOD + 'rules: [{match: "fc3", bits: 8}]').problems([info("fc1"), info("fc2")])
    assert problem.message == "rules pattern 'fc3' matches no layer"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("method.bits=3", lambda r: r.method.bits, 3),
        ("seed=7", lambda r: r.seed, 7),
        ("select.include=[fc1, fc2]", lambda r: r.select.include, ("fc1", "fc2")),
        ("select.exclude=['*.o_proj']", lambda r: r.select.exclude, ("*.o_proj",)),
        ("rules.0.bits=8", lambda r: r.rules[0].fields["bits"], 8),
        ("method.symmetric=false", lambda r: r.method.symmetric, False),
        ("method.bits = 3", lambda r: r.method.bits, 3),
    ],
)
def test_overrides(tmp_path: Path, override: str, read: Any, value: object) -> None:
    text = GOOD + 'rules: [{match: "fc1", bits: 2}]'
    assert read(load(tmp_path, text, override)) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.bits", "is not KEY=VALUE"),
        ("=3", "is not KEY=VALUE"),
        ("version.x=3", "holds a value, not a section"),
        ("method.bist=3", "unknown key"),
        ("method.bits=5", "input should be 2, 3, 4, 8, 'auto' or 'range'"),
    ],
)
def test_refused_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, GOOD, override)


def test_two_ways_to_say_one_thing_are_both_named(tmp_path: Path) -> None:
    """As after `--set` beside what the recipe has."""
    with pytest.raises(RecipeError, match="not sparsity and keep: null takes one back"):
        load(tmp_path, "version: 1\nmethod: {name: width, keep: 0.5}", "method.sparsity=0.5", command="prune")
    edits = ("method.sparsity=0.5", "method.keep=null")
    assert load(tmp_path, "version: 1\nmethod: {name: width, keep: 0.5}", *edits, command="prune").method.keep is None


def test_shipped_recipes_are_found_by_name() -> None:
    assert find("quantize/rtn-w4") == find("quantize/rtn-w4.yaml")
    assert recipe.load("quantize/rtn-w4", "quantize").method.name == "rtn"
    for wrong, command in (("quantize/rtn-w44", None), ("rtn-w44", "quantize"), ("rtn-w4", "quantize")):
        with pytest.raises(RecipeError) as refusal:
            find(wrong, command)
        assert refusal.value.hint == "did you mean 'quantize/rtn-w4'?"


@pytest.mark.parametrize("path", sorted((recipe.shipped() / "quantize").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_suit_layers_of_any_width(path: Path) -> None:
    made = recipe.load(f"quantize/{path.stem}", "quantize")
    method = get("quantize", made.method.name)
    layer = LayerInfo("fc", "fc.weight", "linear", (90, 100), (90, 100), torch.float32)
    config, _ = made.config_for(layer)
    assert isinstance(method, LayerMethod)
    assert config is not None
    assert method.check(layer, config.fitted(100)) is None


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD + "calibration: {text: ../calib.txt}")
    assert loaded.calibration.text == str((tmp_path.parent / "calib.txt").resolve())


def test_the_digest_is_of_the_resolved_recipe(tmp_path: Path) -> None:
    plain = load(tmp_path, GOOD)
    assert plain.sha256() == load(tmp_path, GOOD + "seed: 0  # the default").sha256()
    assert plain.sha256() != load(tmp_path, GOOD, "seed=1").sha256()
    assert plain.resolved()["method"]["symmetric"] is True


def test_a_path_set_on_the_command_line_is_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text(
        "version: 1\nmethod: {name: gptq}\ncalibration: {text: beside.txt, samples: 2}\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    plain = recipe.load("recipes/r.yaml", "quantize")
    edited = recipe.load("recipes/r.yaml", "quantize", ["calibration.text=mine.txt"])
    assert plain.calibration is not None
    assert edited.calibration is not None
    assert plain.calibration.text == str(tmp_path / "recipes" / "beside.txt")
    assert edited.calibration.text == str(tmp_path / "mine.txt")


CALIBRATED = "version: 1\ncalibration: {text: a.txt}\n"


def test_effort_fills_what_the_recipe_leaves_open(tmp_path: Path) -> None:
    text = CALIBRATED + "method: {name: gptq, bits: 2, shift: 0.1}\neffort: %s\n"
    fast, balanced, best = (load(tmp_path, text % level) for level in ("fast", "balanced", "best"))
    assert [found.method.shift for found in (fast, balanced, best)] == [0.1, 0.1, 0.1]
    assert fast.method.refine < balanced.method.refine == best.method.refine
    assert fast.tune is None
    assert balanced.tune is None
    assert best.tune is not None
    assert best.resolved()["tune"]["steps"] == best.tune.steps
    assert best.resolved()["method"]["refine"] == best.method.refine
    searched = load(tmp_path, text % "balanced", "method.bits=auto", "method.target_bpw=2.5").method
    assert searched.refine == balanced.method.refine  # some layers may get as few bits
    mine = load(tmp_path, text % "best", "tune.steps=7")
    assert mine.tune.steps == 7
    assert mine.tune.batch == best.tune.batch
    assert load(tmp_path, text % "best", "tune=null").tune is None


def test_fast_calibrates_in_one_pass_where_nothing_needs_two(tmp_path: Path) -> None:
    text = CALIBRATED + "method: {name: gptq}\neffort: fast\n"
    assert load(tmp_path, text).calibration.activations == "original"
    assert load(tmp_path, text, "calibration.activations=compressed").calibration.activations == "compressed"
    assert load(tmp_path, text, "method.shift=0.5").calibration.activations == "compressed"
    assert load(tmp_path, text, "effort=balanced").calibration.activations == "original"
    assert load(tmp_path, text, "effort=balanced", "method.bits=3").calibration.activations == "compressed"
    assert (
        load(tmp_path, text, "effort=balanced", "method.bits=3", "method.shift=0").calibration.activations == "original"
    )
    assert load(tmp_path, text, "effort=best").calibration.activations == "compressed"
    assert load(tmp_path, "version: 1\nmethod: {name: gptq}\neffort: fast\n").calibration is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "effort: best", "effort: rtn has no presets"),
        (CALIBRATED + "method: {name: gptq}\neffort: bset", "effort: unknown 'bset'"),
        (GOOD + "tune: {steps: 3}", "tune: rtn runs no block"),
    ],
)
def test_efforts_and_tuning_that_a_method_does_not_have(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as found:
        load(tmp_path, text)
    assert message in found.value.message
    assert found.value.hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("{name: magnitude, pattern: 2:4}", 'quote it, pattern: "2:4", for YAML reads that as 124'),
        ("{name: magnitude, sparsity: 50}", "it is a share: 0.5 for 50 %"),
        ("{name: magnitude, sparsity: 50%}", "it is a share: 0.5 for 50 %"),
        ("{name: rtn, bits: 16}", "a layer that is to stay as it is has `skip: true` in its rule"),
        ("{name: rtn, bits: '8'}", "write it without quotes: bits: 8"),
    ],
)
def test_what_is_often_written_is_answered_with_what_is_meant(text: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refusal:
        load(tmp_path, f"version: 1\nmethod: {text}\n", command="quantize" if "rtn" in text else "prune")
    assert refusal.value.hint == hint


def test_sections_of_comments_alone_are_as_if_they_were_not_there(tmp_path: Path) -> None:
    plain = load(tmp_path, GOOD)
    assert load(tmp_path, GOOD + "select:\nrules:\n# - {match: fc1}\nlevels:\ngates:\nreport:\n") == plain


def test_null_takes_back_what_a_recipe_gives(tmp_path: Path) -> None:
    taken = load(tmp_path, GOOD, "method.group_size=null")
    assert taken.method.model_fields_set == {"name", "bits"}
    with pytest.raises(RecipeError, match=r"method\.name is missing"):
        load(tmp_path, GOOD, "method=null")


@pytest.mark.parametrize(("written", "read"), [("0", "0"), ("-1", "-1"), ("[0, 2]", "0,2"), ('"0-1"', "0-1")])
def test_depths_may_be_numbers(written: str, read: str, tmp_path: Path) -> None:
    (level,) = load(tmp_path, GOOD + f"levels: [{{layers: {written}, bits: 8}}]\n").levels
    assert level.layers == read


def test_a_merged_key_may_be_given_anew_and_an_own_one_not_twice() -> None:
    text = "rules:\n  - &one {match: fc1, bits: 8}\n  - {<<: *one, match: fc2}\n"
    assert read_yaml(text, "r")["rules"][1] == {"match": "fc2", "bits": 8}
    with pytest.raises(RecipeError, match="'match' is given twice"):
        read_yaml(text.replace("match: fc2", "match: fc2, match: fc3"), "r")
