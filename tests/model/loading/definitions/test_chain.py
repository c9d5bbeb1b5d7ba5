"""Modules that a recipe describes, for files that name no architecture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from aicompress.errors import CheckpointError, RecipeError, Refused
from aicompress.model.loading.definitions.chain import module_for
from aicompress.model.loading.load import load
from aicompress.recipe import Model
from tests import checkpoints
from tests.model.compressed import compress, low_rank

IMAGES = torch.rand(4, 1, 28, 28)
CNN = ("conv1", "bn1", "relu", "maxpool:2", "conv2", "bn2", "relu", "maxpool:2", "flatten", "fc")


def chain(path: Path, *steps: str) -> torch.nn.Module:
    module: torch.nn.Module = load(path, model=module_for(path, Model(sequential=steps)))
    return module


@torch.no_grad()
def test_the_chain_computes_what_the_module_did(mlp_file: Path, cnn_file: Path) -> None:
    mlp, cnn = checkpoints.Mlp().eval(), checkpoints.Cnn().eval()
    mlp.load_state_dict(load(mlp_file))
    cnn.load_state_dict(load(cnn_file))
    found = chain(mlp_file, "flatten", "fc1", "relu", "dropout", "fc2", "relu", "fc3")
    torch.testing.assert_close(found(IMAGES), mlp(IMAGES))
    assert set(found.state_dict()) == set(mlp.state_dict())
    torch.testing.assert_close(chain(cnn_file, *CNN)(IMAGES), cnn(IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("images", [IMAGES, IMAGES[:, 0]])
def test_convolutions_run_with_channels_innermost(cnn_file: Path, images: torch.Tensor) -> None:
    given: list[torch.Tensor] = []
    found = chain(cnn_file, *CNN)
    for name in ("conv1", "conv2"):
        found.get_submodule(name).register_forward_hook(lambda module, inputs, output: given.append(output))
    torch.testing.assert_close(found(images), found(IMAGES))
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in given)
    assert len(given) == 4


@torch.no_grad()
def test_options_and_dotted_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.body = torch.nn.Module()
    net.body.conv = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    net.norm, net.head = torch.nn.LayerNorm(6 * 4 * 4), torch.nn.Linear(6 * 4 * 4, 3, bias=False)
    path = checkpoints.make_file(tmp_path / "net.safetensors", net)
    found = chain(path, "body.conv:stride=2,padding=1,groups=2", "gelu", "flatten", "norm", "head", "softmax")
    images = torch.rand(2, 4, 8, 8)
    expected = net.head(net.norm(torch.nn.functional.gelu(net.body.conv(images)).flatten(1))).softmax(-1)
    torch.testing.assert_close(found(images), expected)


@torch.no_grad()
def test_compressed_layers_run_in_the_chain(mlp_file: Path, tmp_path: Path) -> None:
    path = compress(
        mlp_file, tmp_path / "out.safetensors", lambda info, w: low_rank(w, 6) if info.name != "fc3" else None
    )
    found = chain(path, "flatten", "fc1", "relu", "fc2", "relu", "fc3")
    mlp = checkpoints.Mlp().eval()
    mlp.load_state_dict(load(path))
    torch.testing.assert_close(found(IMAGES), mlp(IMAGES), rtol=1e-4, atol=1e-4)
    assert found.aicompress_kernels["fc1.weight"].startswith("low rank")


@pytest.mark.parametrize(
    ("steps", "message", "hint"),
    [
        (("flatten", "fc1", "rleu"), "'rleu' is neither", "did you mean 'relu'?"),
        (("fc1", "maxpool:two"), "whole number", "maxpool:2"),
        (("conv1:dilate=2",), "unknown option 'dilate'", "stride"),
    ],
)
def test_mistakes_are_named(cnn_file: Path, mlp_file: Path, steps: tuple[str, ...], message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        module_for(cnn_file if steps[0].startswith("conv") else mlp_file, Model(sequential=steps))
    assert hint in caught.value.hint


def test_a_layer_that_is_left_out_is_an_error(mlp_file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected parameters: fc3\.bias, fc3\.weight"):
        chain(mlp_file, "flatten", "fc1", "relu", "fc2")


def test_code_runs_only_with_permission(tmp_path: Path, mlp_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from tests.checkpoints import Mlp\nmade = []\ndef mlp():\n    made.append(1)\n    return Mlp()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    section = Model(factory="my_nets:mlp")
    with pytest.raises(Refused, match="wants to run my_nets:mlp"):
        module_for(mlp_file, section)
    assert "my_nets" not in sys.modules
    model = load(mlp_file, model=module_for(mlp_file, section, allow_code=True))
    assert model(IMAGES).shape == (4, 10)
    with pytest.raises(RecipeError, match="cannot be imported"):
        module_for(mlp_file, Model(factory="my_nets:cnn"), allow_code=True)
