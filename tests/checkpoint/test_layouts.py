"""compressed-tensors configs name exactly the modules they describe, and those of other tools are read."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.layouts import Names, ct_config, targets
from aicompress.errors import CheckpointError
from aicompress.pipeline.layerwise import planner
from aicompress.pipeline.layerwise import run as layerwise
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.weights import IntGrouped

OFF = Options(latency="off")


def matched(patterns: list[str], names: list[str]) -> set[str]:
    """As compressed-tensors does it: `re.match` of what follows `re:`."""
    return {name for name in names if any(re.match(p.removeprefix("re:"), name) for p in patterns)}


def layer_names(count: int = 12, prefix: str = "model.layers") -> list[str]:
    return [f"{prefix}.{i}.mlp.{part}" for i in range(count) for part in ("up_proj", "down_proj")]


def test_a_family_of_layers_has_one_target() -> None:
    found = targets(layer_names(), ["model.norm", "lm_head"])
    assert found == [r"re:(.*\.)?model\.layers\.\d+\.mlp\.up_proj$", r"re:(.*\.)?model\.layers\.\d+\.mlp\.down_proj$"]
    assert matched(found, [f"base.{name}" for name in layer_names()])  # a head may add a prefix


def test_a_family_that_is_not_whole_is_listed() -> None:
    modules, left = layer_names(3), ["model.layers.3.mlp.up_proj"]
    found = targets(modules, left)
    assert matched(found, modules + left) == set(modules)
    assert sum(r"\d+" in pattern for pattern in found) == 1  # down_proj is whole


def test_another_model_inside_the_checkpoint_is_not_matched() -> None:
    modules, others = layer_names(2, "layers"), layer_names(2, "vision.layers")
    assert matched(targets(modules, others), modules + others) == set(modules)


def int8() -> IntGrouped:
    return IntGrouped.outline((8, 8), (torch.float16, (8, 1)), True, 8, 0)


def test_names_of_every_reader_are_matched_and_no_others() -> None:
    """A base model lacks the head's prefix; another reader renames: all names of one module are targets."""
    stored = [f"language_model.{name}.weight" for name in layer_names(2)]
    head = dict(zip(stored, layer_names(2, "model.language_model.layers"), strict=True))
    base = {name: module.removeprefix("model.") for name, module in head.items()}
    new = "model.vision_tower.layers.0.mlp.up_proj"
    readers = [Names(head, {*head.values(), new}), Names(base, {*base.values(), new.removeprefix("model.")})]
    config = ct_config(dict.fromkeys(stored, int8()), False, ["vision_tower.layers.0.mlp.up_proj.weight"], readers)
    assert config is not None
    (group,) = config["config_groups"].values()
    for wanted, others in (
        (head, {new}),
        (base, {new.removeprefix("model.")}),
        ({name: name for name in stored}, set()),
    ):
        modules = [module.removesuffix(".weight") for module in wanted.values()]
        assert matched(group["targets"], [*modules, *others]) == set(modules)
    assert len(group["targets"]) == 4


def test_a_name_that_means_two_modules_cannot_be_a_target() -> None:
    reader = Names({"a.weight": "b"}, {"a", "b"})
    assert ct_config({"a.weight": int8()}, False, ["b.weight"], [reader]) is None


PIECES = ["a", "b", "0", "1", "2", "x.y", "w+"]
NAMES = st.lists(
    st.one_of(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(".".join),
        st.sampled_from([name.format(n) for name in ("a.{}.b", "a.{}.w+", "b.a.{}.b") for n in range(4)]),
    ),
    unique=True, max_size=12,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(NAMES, st.data())
def test_targets_match_exactly_what_they_are_for(names: list[str], data: st.DataObject) -> None:
    chosen = [name for name in names if data.draw(st.booleans())]
    others = [name for name in names if name not in chosen]
    assert matched(targets(chosen, others), names) == set(chosen)


def test_mixed_bits_stay_apart() -> None:
    def weight(bits: int) -> IntGrouped:
        return IntGrouped.outline((8, 8), (torch.float16, (8, 1)), True, bits, 0)

    names = [f"{name}.weight" for name in layer_names(4)]
    weights = {name: weight(8 if "down" in name or ".0." in name else 4) for name in names}
    config = ct_config(weights, False, ["model.norm.weight"])
    assert config is not None
    for group in config["config_groups"].values():
        bits = group["weights"]["num_bits"]
        wanted = {name.removesuffix(".weight") for name, w in weights.items() if w.bits == bits}
        assert matched(group["targets"], layer_names(4)) == wanted


@pytest.fixture(scope="module")
def w4(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The Llama in 4 bits as compressed-tensors."""
    out = tmp_path_factory.mktemp("w4") / "llama"
    layerwise.run(
        planner.make_plan(tiny_llama, Destination(out), load("quantize/rtn-w4-channel", "quantize"), "quantize"), OFF
    )
    return out


def edited(w4: Path, folder: Path, edit: Any) -> Path:
    """A copy with another quantization_config."""
    shutil.copytree(w4, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_written_config_is_short_and_exact(w4: Path, tiny_llama: Path) -> None:
    config = json.loads((w4 / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert len(group["targets"]) == 7  # q k v o gate up down, of three layers each
    modules = [name.removesuffix(".weight") for name in Checkpoint.open(tiny_llama).tensors]
    packed = {name.removesuffix(".weight") for name in Checkpoint.open(w4).manifest.entries}
    assert matched(group["targets"], modules) == packed


def test_configs_of_other_tools_name_classes(w4: Path, tmp_path: Path) -> None:
    def by_class(config: Any) -> None:
        config["config_groups"]["group_0"]["targets"] = ["Linear"]
        config["ignore"] = ["lm_head"]

    other = Checkpoint.open(edited(w4, tmp_path / "other", by_class))
    ours = Checkpoint.open(w4)
    assert other.manifest.entries == ours.manifest.entries
    name = next(iter(ours.manifest.entries))
    assert torch.equal(other.dense(name), ours.dense(name))


def group0(**change: Any) -> Any:
    def edit(config: Any) -> None:
        config["config_groups"]["group_0"].update(copy.deepcopy(change))

    return edit


def weights(**change: Any) -> Any:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(change)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (weights(type="float", num_bits=8), "not supported"),
        (weights(strategy="block"), "not supported"),
        (weights(num_bits=8), "malformed"),
        (weights(num_bits=0), "malformed"),
        (weights(num_bits="four"), "malformed"),
        (weights(strategy="group", group_size=7), "malformed"),
        (weights(strategy="group", group_size=None), "malformed"),
        (weights(symmetric=False), "not what its description says"),
        (group0(targets=["re:("]), "malformed"),
        (group0(targets=["model.other"]), "no config group names it"),
        (group0(targets=None), "malformed"),
        (group0(weights=None), "malformed"),
        (lambda config: config.update(config_groups=[]), "malformed"),
    ],
)
def test_what_is_not_understood_is_refused(w4: Path, tmp_path: Path, edit: Any, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        Checkpoint.open(edited(w4, tmp_path / "bad", edit))


@pytest.mark.parametrize(
    "activations",
    [
        {"num_bits": 8, "type": "int", "dynamic": False},
        {"num_bits": 8, "type": "int", "dynamic": True, "symmetric": False},
        {"num_bits": 8, "type": "float", "dynamic": True},
    ],
)
def test_inputs_that_are_rounded_as_no_form_holds_it_are_told(w4: Path, tmp_path: Path, activations: Any) -> None:
    checkpoint = Checkpoint.open(edited(w4, tmp_path / "rounded", group0(input_activations=activations)))
    assert checkpoint.manifest.entries == Checkpoint.open(w4).manifest.entries
    assert checkpoint.foreign.rounds_inputs
    assert not Checkpoint.open(w4).foreign.rounds_inputs


def test_an_order_of_columns_that_does_not_fit_is_refused(w4: Path, tmp_path: Path) -> None:
    folder = edited(w4, tmp_path / "order", lambda config: None)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_scale")).removesuffix("_scale")
    save_file({**tensors, f"{name}_g_idx": torch.arange(4)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not understood"):
        Checkpoint.open(folder)
