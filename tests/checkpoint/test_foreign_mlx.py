"""Words that MLX itself has written, and the settings that it keeps in config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aicompress.checkpoint import Checkpoint
from aicompress.errors import Unsupported
from aicompress.pipeline import export, steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.recipe.made import ExportRecipe
from tests import foreign

OFF = Options(latency="off")
# A row of 32 numbers, in 64ths, and what `mlx.core.quantize` of MLX 0.32.4 makes of it: words, scales, biases.
ROW = [
    27,
    8,
    -42,
    86,
    22,
    57,
    69,
    -99,
    84,
    -73,
    60,
    16,
    52,
    -9,
    -79,
    -133,
    -63,
    -9,
    -78,
    37,
    -53,
    -7,
    -6,
    -20,
    -85,
    -18,
    -100,
    -114,
    -12,
    98,
    -120,
    -18,
]
WRITTEN: dict[tuple[int, str], tuple[list[int], list[float], list[float] | None]] = {
    (2, "affine"): ([465010394, 2382997977], [1.0390625], [-2.078125]),
    (3, "affine"): ([2537250533, 715262569, 1673681266], [0.51953125], [-2.078125]),
    (4, "affine"): ([786101931, 76393807, 2308293765, 2180518531], [0.2309027761220932], [-2.078125]),
    (5, "affine"): ([4116656758, 2590580014, 2653487587, 108815035, 2160001426], [0.1154513880610466], [-2.078125]),
    (6, "affine"): (
        [3941439915, 1144727420, 16298659, 2528704659, 2546826792, 2085609748],
        [0.0577256940305233],
        [-2.078125],
    ),
    (8, "affine"): (
        [4066745521, 652202667, 2782216944, 3967436, 3158149453, 2106362712, 354713397, 2131689350],
        [0.01413690485060215],
        [-2.078125],
    ),
    (4, "mxfp4"): ([3561052930, 3969062085, 2416651420, 2656693661], [126], None),
    (8, "mxfp8"): (
        [1944737894, 4101074531, 1617949042, 4176664941, 1777523184, 3805599469, 4143243763, 3791090908],
        [120],
        None,
    ),
    (4, "nvfp4"): ([3847384082, 4271117782, 2845658781, 2942959278], [43, 42], None),
}
SIZES = {"affine": 32, "mxfp4": 32, "mxfp8": 32, "nvfp4": 16}


def words(numbers: list[int]) -> Tensor:
    return torch.from_numpy(np.array([numbers], dtype=np.uint32))


@pytest.mark.parametrize(("bits", "mode"), WRITTEN)
def test_what_mlx_has_written(bits: int, mode: str, tmp_path: Path) -> None:
    packed, scales, biases = WRITTEN[bits, mode]
    tensors = {"m.weight": words(packed)}
    if biases is None:
        tensors["m.scales"] = torch.tensor([scales], dtype=torch.uint8)
    else:
        tensors |= {"m.scales": torch.tensor([scales]), "m.biases": torch.tensor([biases])}
    save_file(tensors, tmp_path / "model.safetensors")
    told = {"bits": bits, "group_size": SIZES[mode], "mode": mode}
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "quantization": told}))
    found, row = Checkpoint.open(tmp_path).dense("m.weight"), torch.tensor([ROW]) / 64
    # Half a step, and more at the ends, which MLX clips; of floating numbers the widest step counts.
    step = scales[0] if biases is not None else {"mxfp4": 1.0, "mxfp8": 0.25, "nvfp4": 0.7}[mode]
    assert float((found - row).abs().max()) <= 0.65 * step


@pytest.fixture
def llama(tiny_llama: Path, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """As MLX quantizes it: settings twice in config.json, one layer in 6 bits and the others in 4."""
    folder, name = tmp_path / "in", "model.layers.0.mlp.down_proj"
    dense = foreign.convert(tiny_llama, folder, foreign.mlx(4, 32), None)
    finer = foreign.mlx(6, 32)(Checkpoint.open(tiny_llama).dense(f"{name}.weight").float())
    tensors = load_file(folder / "model.safetensors") | {f"{name}{end}": each for end, each in finer.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    told = {"group_size": 32, "bits": 4, "mode": "affine", name: {"group_size": 32, "bits": 6}, "lm_head": False}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": told, "quantization_config": told}))
    return folder, {**dense, f"{name}.weight": finer.dense}


def test_every_module_is_read_by_its_own_settings(llama: tuple[Path, dict[str, Tensor]]) -> None:
    folder, dense = llama
    checkpoint = Checkpoint.open(folder)
    for name, wanted in dense.items():
        torch.testing.assert_close(checkpoint.dense(name), wanted.to(checkpoint.dense(name).dtype))


def test_outputs_say_nothing_of_mlx(llama: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """MLX would take their plain numbers for words; and so would this reader."""
    folder, dense = llama
    out = tmp_path / "plain"
    export.run(export.make_plan(folder, Destination(out), ExportRecipe()), OFF)
    assert not {"quantization", "quantization_config"} & json.loads((out / "config.json").read_text()).keys()
    for name, wanted in dense.items():
        torch.testing.assert_close(Checkpoint.open(out).dense(name).float(), wanted, rtol=1e-2, atol=1e-3)
    recipe = load("quantize/rtn-w8", "quantize", ["report.html=false"])
    plan = steps.make_plan(folder, Destination(tmp_path / "codes"), recipe, "quantize")
    assert any("mlx, 4-bit" in warning for warning in plan.summary().warnings)
    steps.run(plan, OFF)
    assert "quantization" not in json.loads((tmp_path / "codes" / "config.json").read_text())


@pytest.mark.parametrize(
    "told",
    [{"bits": 7, "group_size": 32}, {"bits": 4, "group_size": 64}, {"bits": 4, "group_size": 32, "mode": "log"}, None],
)
def test_settings_that_do_not_fit_are_refused(told: Any, tmp_path: Path) -> None:
    encoded = foreign.mlx(4, 32)(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    folder = foreign.write(tmp_path / "in", encoded, None, **({} if told is None else {"quantization": told}))
    with pytest.raises(Unsupported, match="mlx weights are not understood"):
        Checkpoint.open(folder)


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    tensors = {"m.weight": torch.zeros(2, 8, 8, dtype=torch.uint32), "m.scales": torch.ones(2, 8, 2)}
    save_file({**tensors, "m.biases": torch.ones(2, 8, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"bits": 4, "group_size": 32}}))
    with pytest.raises(Unsupported, match="is not understood"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("edits", [(), ("select.kinds=[embedding]",)])
def test_a_table_alone_is_decoded_for_a_method_that_needs_it(edits: tuple[str, ...], tmp_path: Path) -> None:
    """Whether the recipe names embeddings or finds nothing else: codes of a table hold no mask."""
    encoded = foreign.mlx(4, 32, "mxfp4")(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)))
    source, told = tmp_path / "in", {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    source.mkdir()
    save_file({f"embedding{end}": each for end, each in encoded.tensors.items()}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"dtype": "float32", "quantization": told}))
    recipe = load("prune/magnitude-50", "prune", [*edits, "report.html=false"])
    steps.run(steps.make_plan(source, Destination(tmp_path / "out.safetensors"), recipe, "prune"), OFF)
    pruned = load_file(tmp_path / "out.safetensors")["embedding.weight"]
    stays = pruned != 0
    assert 0.4 < float(stays.float().mean()) <= 0.5
    assert torch.equal(pruned[stays], encoded.dense[stays])
