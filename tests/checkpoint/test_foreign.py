"""Weights of other tools' layouts decode to what their published layouts, and the libraries installed here, say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.foreign.recognize import layouts
from aicompress.errors import CheckpointError, Unsupported
from aicompress.weights.coding.rows import row_slices
from tests import foreign
from tests.foreign import Encode, Encoded, write

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CT = {"quant_method": "compressed-tensors", "config_groups": {}}
MLX = {"quant_method": "mlx", "bits": 4, "group_size": 32}

CASES: dict[str, tuple[Encode, dict[str, Any] | None, str]] = {
    "gptq, one less": (foreign.gptq(symmetric=False), GPTQ, "int_grouped"),
    "gptq, v2": (foreign.gptq(symmetric=False, v2=True), {**GPTQ, "checkpoint_format": "gptq_v2"}, "int_grouped"),
    "gptq, symmetric": (foreign.gptq(), {**GPTQ, "sym": True}, "int_grouped"),
    "gptq, symmetric, version not said": (foreign.gptq(v2=True), {**GPTQ, "sym": True}, "int_grouped"),
    "gptq, 3 bits": (foreign.gptq(bits=3, symmetric=False), {**GPTQ, "bits": 3}, "int_grouped"),
    "gptq, 8 bits": (foreign.gptq(bits=8, symmetric=False), {**GPTQ, "bits": 8}, "int_grouped"),
    "gptq, 2 bits, rows": (foreign.gptq(bits=2, group=64), {**GPTQ, "bits": 2, "group_size": -1}, "int_grouped"),
    "gptq, act-order": (foreign.gptq(symmetric=False, order=True), {**GPTQ, "desc_act": True}, ""),
    "gptq, nothing said": (foreign.gptq(symmetric=False), None, "int_grouped"),
    "awq": (foreign.awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "int_grouped"),
    "awq, nothing said": (foreign.awq(), None, "int_grouped"),
    "nf4": (foreign.nf4(), BNB, "codebook"),
    "nf4, nested": (foreign.nf4(nested=True), BNB, "codebook"),
    "nf4, blocks over rows": (foreign.nf4(block=128), BNB, ""),
    "int8": (foreign.int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int_grouped"),
    "fp8, blocks": (foreign.fp8(), FP8, "float8"),
    "fp8, small blocks": (foreign.fp8(16, 16), {**FP8, "weight_block_size": [16, 16]}, "float8"),
    "fp8, rows": (foreign.fp8(1, None, ".weight_scale"), {"quant_method": "fbgemm_fp8"}, "float8"),
    "fp8, tensor": (foreign.fp8(None, None, ".weight_scale"), {"quant_method": "modelopt"}, "float8"),
    "fp8, bare scale": (foreign.fp8(name=".scale"), None, "float8"),
    "fp8, nothing said": (foreign.fp8(None, None, ".scale_weight"), None, "float8"),
    "mxfp4": (foreign.mxfp4, CT, "codebook"),
    "decompressed": (foreign.decompressed, {**CT, "quantization_status": "decompressed"}, ""),
    "nvfp4": (foreign.nvfp4(), {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "codebook"),
    "nvfp4, divided": (foreign.nvfp4(True), CT, "codebook"),
    **{f"mlx, {bits} bits": (foreign.mlx(bits), {**MLX, "bits": bits}, "") for bits in (1, 2, 3, 4, 5, 6, 8)},
    "mlx, mxfp4": (foreign.mlx(4, 32, "mxfp4"), {**MLX, "mode": "mxfp4"}, "codebook"),
    "mlx, mxfp8": (foreign.mlx(8, 32, "mxfp8"), {**MLX, "bits": 8, "mode": "mxfp8"}, ""),
    "mlx, nvfp4": (foreign.mlx(4, 16, "nvfp4"), {**MLX, "group_size": 16, "mode": "nvfp4"}, "codebook"),
}  # fmt: skip


def matrix(rows: int = 40, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 8


def opened(tmp_path: Path, encoded: Encoded, settings: dict[str, Any] | None = None) -> Checkpoint:
    return Checkpoint.open(write(tmp_path / "in", encoded, settings))


def require_rows(checkpoint: Checkpoint, name: str, length: int) -> None:
    """Rows that are read alone, as many as lie together, are those of the whole."""
    multiple = checkpoint.row_multiple(name)
    parts = [checkpoint.dense(name, rows) for rows in row_slices(length, 1, 1, multiple)]
    assert torch.equal(torch.cat(parts, checkpoint.row_axis(name)), checkpoint.dense(name))


@pytest.mark.parametrize("case", CASES)
def test_rows_are_decoded_alone(tmp_path: Path, case: str) -> None:
    encode, settings, _ = CASES[case]
    checkpoint = opened(tmp_path, encode(matrix(296)), settings)
    assert 0 < checkpoint.row_multiple("m.weight") <= 256
    require_rows(checkpoint, "m.weight", 296)


@pytest.mark.parametrize("nested", [False, True])
def test_rows_of_blocks_that_go_over_their_ends_are_decoded_alone(tmp_path: Path, nested: bool) -> None:
    """The last block is not full, nor is the last byte."""
    checkpoint = opened(tmp_path, foreign.nf4(block=8, nested=nested)(matrix(4097, 15)), BNB)
    assert checkpoint.row_multiple("m.weight") == (8 * 256 if nested else 8)
    require_rows(checkpoint, "m.weight", 4097)


@pytest.mark.parametrize("case", CASES)
def test_decodes_to_what_the_layout_says(tmp_path: Path, case: str) -> None:
    encode, settings, form = CASES[case]
    encoded = encode(matrix())
    checkpoint = opened(tmp_path, encoded, settings)
    assert list(checkpoint.parameters()) == ["m.weight"]
    torch.testing.assert_close(checkpoint.dense("m.weight"), encoded.dense, rtol=3e-7, atol=0)
    assert checkpoint.nbytes("m.weight") == sum(t.nbytes for t in encoded.tensors.values())
    outline = checkpoint.outline("m.weight")
    assert (outline.form if outline else "") == form
    if outline is not None:
        assert checkpoint.weight("m.weight").specs() == outline.specs()
        assert checkpoint.weight("m.weight").meta() == outline.meta()
    (info,) = checkpoint.layers()
    assert torch.equal(checkpoint.layer(info).weight, checkpoint.dense("m.weight"))
    if outline is None:
        assert torch.equal(checkpoint.rows("m.weight", 8, 16), checkpoint.dense("m.weight")[8:16])


def test_every_layout_has_a_case() -> None:
    tried = {"gptq", "awq", "bitsandbytes", "float8", "mxfp4", "nvfp4", "mxfp6", "mlx", "reordered", "decompressed"}
    assert set(layouts()) == tried


@pytest.mark.parametrize(("rows", "columns"), [(256, 128), (130, 200)])
def test_block_scales_as_transformers_does_it(tmp_path: Path, rows: int, columns: int) -> None:
    """Its own decoder takes whole blocks only; at the edges blocks are cropped."""
    encoded = foreign.fp8()(matrix(rows, columns))
    dense = opened(tmp_path, encoded, FP8).dense("m.weight")
    assert torch.equal(dense, encoded.dense)
    if rows % 128 == columns % 128 == 0:
        theirs = Fp8Dequantize(None)._dequantize_one(encoded.tensors[".weight"], encoded.tensors[".weight_scale_inv"])
        assert torch.equal(dense, theirs)


def test_stacks_of_experts_in_float8(tmp_path: Path) -> None:
    encoded = [foreign.fp8()(matrix(130, 160) * (number + 1)) for number in range(3)]
    tensors = {suffix: torch.stack([each.tensors[suffix] for each in encoded]) for suffix in encoded[0].tensors}
    stacked = {".experts.down_proj": tensors[".weight"], ".experts.down_proj_scale_inv": tensors[".weight_scale_inv"]}
    dense = opened(tmp_path, Encoded(stacked, matrix()), FP8).dense("m.experts.down_proj")
    assert torch.equal(dense, torch.stack([each.dense for each in encoded]))


def test_experts_of_gpt_oss_as_transformers_does_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 24, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 130, (2, 24, 3), dtype=torch.uint8, generator=generator)
    tensors = {".experts.gate_up_proj_blocks": blocks, ".experts.gate_up_proj_scales": scales}
    folder = write(tmp_path / "in", Encoded(tensors, matrix()), {"quant_method": "mxfp4"}, dtype="bfloat16")
    dense = Checkpoint.open(folder).dense("m.experts.gate_up_proj")
    assert torch.equal(dense, convert_moe_packed_tensors(blocks, scales))


def damaged(case: str, **change: Any) -> Any:
    """A case of above with some tensors replaced (or removed: None) by what follows their module's name."""
    encode, settings, _ = CASES[case]
    encoded = encode(matrix())
    tensors = {suffix: tensor for suffix, tensor in {**encoded.tensors, **change}.items() if tensor is not None}
    return Encoded(tensors, encoded.dense), settings


@pytest.mark.parametrize(
    ("case", "change", "settings", "why"),
    [
        ("fp8, blocks", {".weight_scale_inv": torch.ones(3, 5)}, {}, "scales"),
        ("fp8, blocks", {".weight_scale_inv": None}, {}, "its scale is not understood"),
        ("fp8, blocks", {".weight_scale_inv": None, ".wscale": torch.ones(1)}, None, "'m.wscale' does to it is not"),
        ("fp8, blocks", {".weight_scale": torch.ones(1)}, {}, "has the scales"),
        ("fp8, bare scale", {".weight": torch.ones(40, 64, dtype=torch.int8)}, None, "int8"),
        ("gptq, one less", {}, {"bits": 3}, "codes"),
        ("gptq, one less", {}, {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq, one less", {".scales": None}, {}, "'m.qzeros' does to it is not understood"),
        ("gptq, one less", {".qzeros": torch.zeros(2, 6, dtype=torch.int32)}, {}, "zero points"),
        ("awq", {}, {"version": "gemv"}, "gemv"),
        ("awq", {".qzeros": torch.zeros(3, 5, dtype=torch.int32)}, {}, "not understood"),
        ("nf4", {".weight.absmax": torch.ones(3)}, {}, "not understood"),
        ("nf4", {".weight.quant_state.bitsandbytes__nf4": None}, {}, "'m.weight.absmax' does to it is not"),
        ("int8", {".weight_format": torch.tensor(2, dtype=torch.uint8)}, {}, "in tiles"),
        ("int8", {".SCB": None}, {}, "its scale is not understood"),
        ("nvfp4", {".weight_scale_2": None}, {}, "not understood"),
        ("nvfp4", {".weight_scale_2": torch.ones(2)}, {}, "not understood"),
        ("mxfp4", {".weight_scale": torch.ones(40, 3, dtype=torch.uint8)}, {}, "m"),
        ("nvfp4", {".pre_quant_scale": torch.ones(64)}, {}, "'m.pre_quant_scale' does to the weight beside it"),
        ("fp8, bare scale", {".input_smooth": torch.ones(64)}, None, "'m.input_smooth' does to the weight"),
        ("mxfp4", {}, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ("mxfp4", {}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("awq", {}, {"quant_method": "aqlm"}, "quantized by 'aqlm', which is not read"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(
    tmp_path: Path, case: str, change: dict[str, Any], settings: dict[str, Any] | None, why: str
) -> None:
    encoded, told = damaged(case, **change)
    told = None if settings is None else {**(told or {}), **settings}
    with pytest.raises(CheckpointError, match=why) as refusal:
        opened(tmp_path, encoded, told)
    assert refusal.value.hint
    damage = "no config group names it" in refusal.value.message  # anything else may be sound, and not known here
    assert isinstance(refusal.value, Unsupported) != damage


@pytest.mark.parametrize(
    ("case", "change", "settings", "why"),
    [
        ("gptq, one less", {}, {"sym": True}, "zero points differ"),
        ("gptq, act-order", {".g_idx": torch.full((64,), 7, dtype=torch.int32)}, {}, "group that is not there"),
        ("fp8, blocks", {".weight_zero_point": torch.ones(1, 1)}, {}, "zero points"),
    ],
)  # fmt: skip
def test_what_shows_in_the_numbers_is_refused_when_they_are_read(
    tmp_path: Path, case: str, change: dict[str, Any], settings: dict[str, Any], why: str
) -> None:
    encoded, told = damaged(case, **change)
    checkpoint = opened(tmp_path, encoded, {**told, **settings})
    with pytest.raises(CheckpointError, match=why):
        checkpoint.dense("m.weight")


def state(**change: Any) -> Tensor:
    """The quant_state of bitsandbytes with other values."""
    plain = {"blocksize": 64, "shape": [40, 64], "nested_blocksize": 256, "nested_offset": 0.1, **change}
    return torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("case", "change", "settings"),
    [
        ("nf4, nested", {".weight.quant_state.bitsandbytes__nf4": state(blocksize=0)}, {}),
        ("nf4, nested", {".weight.quant_state.bitsandbytes__nf4": state(blocksize=-64)}, {}),
        ("nf4, nested", {".weight.quant_state.bitsandbytes__nf4": state(blocksize=10**15)}, {}),
        ("nf4, nested", {".weight.quant_state.bitsandbytes__nf4": state(shape=[10**9, 10**9])}, {}),
        ("nf4, nested", {".weight.quant_state.bitsandbytes__nf4": state(shape="40")}, {}),
        ("nf4, nested", {".weight.quant_state.bitsandbytes__nf4": torch.tensor([255], dtype=torch.uint8)}, {}),
        ("fp8, small blocks", {}, {"weight_block_size": [0, 0]}),
        ("fp8, small blocks", {}, {"weight_block_size": 5}),
        ("gptq, one less", {}, {"group_size": "all"}),
        ("awq", {}, {"bits": "four"}),
    ],
)
def test_nonsense_is_refused_at_once(
    tmp_path: Path, case: str, change: dict[str, Any], settings: dict[str, Any]
) -> None:
    encoded, told = damaged(case, **change)
    with pytest.raises(CheckpointError, match="not understood"):
        opened(tmp_path, encoded, {**told, **settings})


def test_a_block_as_large_as_anything_takes_no_more_memory(tmp_path: Path) -> None:
    change = {".weight.quant_state.bitsandbytes__nf4": state(nested_blocksize=10**15)}
    encoded, told = damaged("nf4, nested", **change)
    assert opened(tmp_path, encoded, told).dense("m.weight").shape == (40, 64)
    encoded, told = damaged("fp8, blocks")
    huge = Checkpoint.open(write(tmp_path / "huge", encoded, {**told, "weight_block_size": [10**15, 10**15]}))
    assert torch.equal(huge.dense("m.weight"), encoded.dense)


def test_a_group_of_columns_that_are_apart_is_seen_whatever_the_settings_say(tmp_path: Path) -> None:
    encoded = foreign.gptq(symmetric=False, order=True)(matrix())
    dense = opened(tmp_path, encoded, GPTQ).dense("m.weight")  # desc_act: False
    torch.testing.assert_close(dense, encoded.dense, rtol=1e-6, atol=0)


def test_settings_that_lie_beside_config_json_are_read(tmp_path: Path) -> None:
    encoded = foreign.gptq(symmetric=False, v2=True)(matrix())
    folder = write(tmp_path / "in", encoded, None)
    (folder / "quantize_config.json").write_text(json.dumps({**GPTQ, "checkpoint_format": "gptq_v2"}))
    torch.testing.assert_close(Checkpoint.open(folder).dense("m.weight"), encoded.dense, rtol=1e-6, atol=0)


def test_a_tool_that_is_not_read_is_named_by_its_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", Encoded({".weight._data": torch.ones(8, 8, dtype=torch.int8)}, matrix()), None)
    (folder / "quantization_map.json").write_text(json.dumps({"m": {"weights": "qint8"}}))
    with pytest.raises(Unsupported, match="already quantized by 'quanto', which is not read"):
        Checkpoint.open(folder)


def test_float8_without_a_scale_is_what_it_says(tmp_path: Path) -> None:
    codes = matrix().to(torch.float8_e4m3fn)
    checkpoint = opened(tmp_path, Encoded({".weight": codes}, matrix()))
    assert torch.equal(checkpoint.dense("m.weight").float(), codes.float())
    assert not checkpoint.foreign.weights


def test_scales_of_caches_are_read_and_those_of_activations_are_not(tmp_path: Path) -> None:
    encoded = foreign.fp8()(matrix())
    riders = {".input_scale": torch.ones(()), ".k_scale": torch.ones(1), ".v_proj.v_scale": torch.ones(1)}
    checkpoint = opened(tmp_path, Encoded({**encoded.tensors, **riders}, encoded.dense), FP8)
    assert set(checkpoint.parameters()) == {"m.weight", "m.k_scale", "m.v_proj.v_scale"}
    assert checkpoint.foreign.riders == ("m.input_scale",)
    assert checkpoint.foreign.cache_scales == ("m.k_scale", "m.v_proj.v_scale")
    assert [info.name for info in checkpoint.layers()] == ["m"]


def test_a_bare_file_tells_by_its_tensors(tmp_path: Path) -> None:
    encoded = foreign.fp8(None, None, ".scale")(matrix())
    save_file({f"m{suffix}": tensor for suffix, tensor in encoded.tensors.items()}, tmp_path / "bare.safetensors")
    assert load_file(tmp_path / "bare.safetensors")["m.scale"].numel() == 1
    assert torch.equal(Checkpoint.open(tmp_path / "bare.safetensors").dense("m.weight"), encoded.dense)
