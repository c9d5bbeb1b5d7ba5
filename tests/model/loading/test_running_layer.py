from pathlib import Path

import pytest
import torch

from aicompress.checkpoint import Checkpoint
from aicompress.layer import LayerInfo
from aicompress.model.loading.running_layer import running_layer
from tests.model.compressed import compress, halved, integers, low_rank


def layer(path: Path, name: str) -> tuple[Checkpoint, LayerInfo]:
    checkpoint = Checkpoint.open(path)
    return checkpoint, next(info for info in checkpoint.layers() if name in info.names)


@pytest.mark.parametrize("form", [lambda w: integers(w, 4, 32), lambda w: low_rank(w, 8), halved])
def test_a_compressed_layer_runs(form, tiny_llama: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    name = "model.layers.0.mlp.up_proj"
    out = compress(tiny_llama, tmp_path / "out", lambda info, w: form(w) if info.name == name else None)
    checkpoint, info = layer(out, name)
    inputs = torch.randn(5, 64)
    with torch.inference_mode():
        found = running_layer(checkpoint, info)(inputs)
    expected = inputs @ checkpoint.dense(f"{name}.weight").t()
    assert float((found - expected).norm() / expected.norm()) < 5e-3  # a kernel may work in bfloat16


def test_a_transposed_layer_runs(tiny_gpt2: Path, tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_fc"
    dense, info = layer(tiny_gpt2, name)
    inputs = torch.randn(5, 48)
    expected = inputs @ dense.read(f"{name}.weight")
    torch.testing.assert_close(running_layer(dense, info)(inputs), expected)
    out = compress(tiny_gpt2, tmp_path / "out", lambda each, w: integers(w, 8) if each.name == name else None)
    with torch.inference_mode():
        found = running_layer(*layer(out, name))(inputs)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_convolution_runs(cnn_file: Path, tmp_path: Path) -> None:
    dense, info = layer(cnn_file, "conv2")
    images = torch.randn(1, 8, 16, 16)
    expected = torch.nn.functional.conv2d(images, dense.read("conv2.weight"))
    torch.testing.assert_close(running_layer(dense, info)(images), expected)
    out = compress(cnn_file, tmp_path / "out.safetensors", lambda each, w: halved(w) if each.name == "conv2" else None)
    assert running_layer(*layer(out, "conv2"))(images).shape == expected.shape
