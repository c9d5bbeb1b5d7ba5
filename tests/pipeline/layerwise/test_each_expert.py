"""Experts in one tensor, each compressed with what is known of its own inputs: as if each were a matrix in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import aicompress
from aicompress.checkpoint import Checkpoint
from aicompress.pipeline import steps
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.verify import verify
from aicompress.recipe import load
from aicompress.report.model import Report
from aicompress.weights import IntGrouped, LowRank, PerExpert

TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
MIXTURE = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
IDS = torch.randint(3, 64, (48, 16), generator=torch.Generator().manual_seed(0))
CALIBRATION, HELD_OUT = IDS[:32], IDS[32:]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What makes the inputs of the original model a recipe's calibration data."""
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": CALIBRATION}, path)
    told = {"arrays": str(path), "inputs": ["input_ids"], "precision": "float32", "activations": "original"}
    return f"calibration={json.dumps(told)}"


def saved(model: Any, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts as (in, out), gate and up taking turns, with biases; no token goes to the last one."""
    torch.manual_seed(0)
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**SHAPE, **TEXT, **MIXTURE, sliding_window=8))
    model.model.layers[0].mlp.router.bias.data[3] = -1e4
    return saved(model, tmp_path_factory.mktemp("gpt-oss"))


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts as (in, out), gate before up, all multiplied at once."""
    torch.manual_seed(0)
    wide = {"intermediate_size_mlp": 48, "moe_layers": [0], "attention_chunk_size": 16}
    config = hf.Llama4TextConfig(**SHAPE, **TEXT, **{**MIXTURE, "num_experts_per_tok": 1}, **wide)
    return saved(hf.Llama4ForCausalLM(config), tmp_path_factory.mktemp("llama4"))


@pytest.fixture(scope="module")
def in_one_tensor(tiny_qwen_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its experts as transformers holds them: gate and up (4, 48, 32), down (4, 32, 24)."""
    folder = tmp_path_factory.mktemp("qwen-moe")
    (folder / "config.json").write_bytes((tiny_qwen_moe / "config.json").read_bytes())
    single = load_file(tiny_qwen_moe / "model.safetensors")
    rest = {name: value for name, value in single.items() if ".mlp.experts." not in name}
    save_file({**rest, **merged(tiny_qwen_moe)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def merged(folder: Path) -> dict[str, Tensor]:
    """The experts as the model holds them."""
    model = aicompress.load(folder, kernels="reference")
    return {name: value.clone() for name, value in model.state_dict().items() if ".mlp.experts." in name}


def compressed(source: Path, out: Path, recipe: str, *overrides: str, request: Request | None = None) -> Report:
    command = recipe.split("/")[0]
    read = load(recipe, command, ["report.html=false", *overrides])
    plan = steps.make_plan(source, Destination(out), read, command, request)
    report = steps.run(plan, Options(latency="off"))
    assert isinstance(report, Report)
    assert plan.summary().weight_bytes == report.after.weight_bytes
    assert not verify(out).problems
    return report


def taken(report: Report) -> int:
    return sum(row.kind == "experts" and row.method != "-" for row in report.layers)


@pytest.mark.parametrize(
    ("recipe", "overrides", "alike"),
    [
        ("quantize/gptq-w4", ["method.group_size=8"], ("gate_up_proj", "down_proj")),
        ("prune/wanda-50", [], ("gate_up_proj", "down_proj")),
        ("quantize/smoothquant-w8a8", [], ("gate_up_proj", "down_proj")),
        # These compare gate and up, which are two matrices in the other file.
        ("prune/sparsegpt-50", [], ("down_proj",)),
        ("prune/taylor-50", [], ("down_proj",)),
    ],
)
def test_the_numbers_are_those_of_a_matrix_for_each(
    recipe: str,
    overrides: list[str],
    alike: tuple[str, ...],
    in_one_tensor: Path,
    tiny_qwen_moe: Path,
    calibration: str,
    tmp_path: Path,
) -> None:
    assert taken(compressed(in_one_tensor, tmp_path / "one", recipe, calibration, *overrides)) == 4
    compressed(tiny_qwen_moe, tmp_path / "each", recipe, calibration, *overrides)
    original, found, wanted = merged(in_one_tensor), merged(tmp_path / "one"), merged(tmp_path / "each")
    for name, value in wanted.items():
        assert not torch.equal(found[name], original[name])
        if name.endswith(alike):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def given(folder: Path) -> Tensor:
    """What the experts of the first block give for text that is held out."""
    model, seen = aicompress.load(folder, kernels="reference"), []
    block = model.model.layers[0]
    experts = (block.feed_forward if hasattr(block, "feed_forward") else block.mlp).experts
    experts.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(HELD_OUT)
    return torch.cat(seen)


@pytest.mark.parametrize("fixture", ["gpt_oss", "llama4"])
@pytest.mark.parametrize(
    ("calibrated", "data_free", "overrides", "part"),
    [
        ("quantize/gptq-w3", "quantize/rtn-w3", ["method.group_size=16", "method.shift=0"], 0.8),
        ("factorize/whitened-keep", "factorize/svd-keep", ["method.keep=0.7", "method.shift=0"], 0.8),
    ],
)
def test_less_of_what_experts_give_is_lost_than_without_data(
    calibrated: str,
    data_free: str,
    overrides: list[str],
    part: float,
    fixture: str,
    calibration: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    source: Path = request.getfixturevalue(fixture)
    only = 'select.include=["*experts*"]'
    report = compressed(source, tmp_path / "one", calibrated, calibration, only, *overrides)
    assert taken(report) == 2
    free = compressed(source, tmp_path / "other", data_free, only, *overrides[:1])
    assert report.after.weight_bytes < 1.05 * free.after.weight_bytes
    wanted = given(source)
    errors = [float((given(tmp_path / each) - wanted).norm()) for each in ("one", "other")]
    assert errors[0] < part * errors[1]


def test_an_expert_without_tokens_is_compressed_without_data(gpt_oss: Path, calibration: str, tmp_path: Path) -> None:
    report = compressed(gpt_oss, tmp_path / "out", "quantize/gptq-w4", calibration, "method.group_size=16")
    rows = {row.name: row for row in report.layers if row.kind == "experts"}
    assert all(row.note == "1 of 4 experts saw fewer than 16 rows: data-free" for row in rows.values())
    (told,) = (line for line in report.warnings if "hold experts that saw fewer than 16 calibration rows" in line)
    assert "mlp.experts.down_proj (1 of 4)" in told
    (whole,) = (value for name, value in merged(gpt_oss).items() if name.endswith("down_proj"))
    (after,) = (value for name, value in merged(tmp_path / "out").items() if name.endswith("down_proj"))
    assert 0 < (after[3] - whole[3]).norm() < 0.15 * whole[3].norm()


def test_zeros_load_in_stock_transformers(llama4: Path, calibration: str, tmp_path: Path) -> None:
    report = compressed(llama4, tmp_path / "out", "prune/wanda-50", calibration)
    assert {row.form for row in report.layers if row.kind == "experts"} == {"dense"}
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    experts = stock.model.layers[0].feed_forward.experts
    for weight in (experts.gate_up_proj, experts.down_proj):
        kept = (weight != 0).float()
        assert (kept.mean(dim=1) == 0.5).all()  # (experts, in, out): half of what each output has


def test_a_file_of_statistics_holds_each_expert(gpt_oss: Path, calibration: str, tmp_path: Path) -> None:
    request = Request(stats=(tmp_path / "stats.safetensors",))
    options = ("quantize/gptq-w4", calibration, "method.group_size=16")
    compressed(gpt_oss, tmp_path / "collected", *options, request=request)
    compressed(gpt_oss, tmp_path / "direct", *options)
    for name, value in merged(tmp_path / "direct").items():
        assert torch.equal(merged(tmp_path / "collected")[name], value)


def test_the_plan_says_where_experts_are_stored_alike(llama4: Path, tmp_path: Path) -> None:
    recipe = load("factorize/svd-energy", "factorize", ["method.energy=0.7"])
    plan = steps.make_plan(llama4, Destination(tmp_path / "out"), recipe, "factorize")
    (told,) = (line for line in plan.summary().notes if "stored alike" in line)
    assert "get rank" in told


def test_the_plan_says_what_is_not_seen(
    llama4: Path, calibration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aicompress.model.equivalence.expert_products.product_of", lambda function, args: None)
    recipe = load("quantize/gptq-w4", "quantize", [calibration])
    plan = steps.make_plan(llama4, Destination(tmp_path / "out"), recipe, "quantize")
    (told,) = (line for line in plan.warnings if "hold all experts" in line)
    assert "no product with one expert's matrix is seen as the model runs" in told


def test_factors_of_experts_are_quantized_as_factors(llama4: Path, calibration: str, tmp_path: Path) -> None:
    only = 'select.include=["*experts*"]'
    compressed(llama4, tmp_path / "thin", "factorize/svd-rank", "method.rank=8", "method.multiple=1", only)
    report = compressed(tmp_path / "thin", tmp_path / "w8", "quantize/rtn-w8", "method.granularity=channel", only)
    rows = [row for row in report.layers if row.kind == "experts"]
    assert [(row.name.rsplit(".", 1)[1], row.form) for row in rows] == [("in", "per_expert"), ("out", "per_expert")] * 2
    assert all(row.bytes_after < 0.4 * row.bytes_before for row in rows)
    thin, after = Checkpoint.open(tmp_path / "thin"), Checkpoint.open(tmp_path / "w8")
    for name in thin.manifest.entries:
        weight = after.weight(name)
        assert isinstance(weight, PerExpert)
        assert all(isinstance(own, LowRank) and isinstance(own.inner, IntGrouped) for own in weight.weights)
        assert 0 < (after.dense(name) - thin.dense(name)).norm() < 0.02 * thin.dense(name).norm()
    calibrated = compressed(tmp_path / "thin", tmp_path / "left", "quantize/gptq-w4", calibration)
    (told,) = (line for line in calibrated.warnings if "hold all experts" in line)
    assert "calibration sees the inputs of whole experts, and these are parts of them" in told


def test_codes_of_a_whole_tensor_get_new_ones_and_those_of_experts_keep_them(
    gpt_oss: Path, calibration: str, tmp_path: Path
) -> None:
    only = 'select.include=["*experts*"]'
    compressed(gpt_oss, tmp_path / "w8", "quantize/rtn-w8", only, "method.granularity=channel")
    assert taken(compressed(tmp_path / "w8", tmp_path / "w4", "quantize/gptq-w4", calibration, only)) == 2
    report = compressed(tmp_path / "w4", tmp_path / "thin", "prune/magnitude-50", only, "method.store=sparse")
    assert all(row.form == "per_expert" for row in report.layers if row.kind == "experts")
    coded, thin = Checkpoint.open(tmp_path / "w4"), Checkpoint.open(tmp_path / "thin")
    for name in thin.manifest.entries:
        kept = thin.dense(name) != 0
        assert abs(float(kept.float().mean()) - 0.5) < 0.05  # some codes were zero
        assert torch.equal(thin.dense(name)[kept], coded.dense(name)[kept])
    assert taken(compressed(tmp_path / "thin", tmp_path / "again", "quantize/rtn-w8", only)) == 2
    for name, value in merged(tmp_path / "again").items():
        if name in thin.manifest.entries:
            assert not value[thin.dense(name) == 0].any()


def test_experts_share_out_bytes(llama4: Path, tmp_path: Path) -> None:
    """Each by what it gains, then all of a tensor alike; what is set aside for descriptions is much of this file."""
    whole = compressed(llama4, tmp_path / "half", "factorize/svd-keep", "method.keep=0.5").after.weight_bytes
    report = compressed(llama4, tmp_path / "out", "factorize/svd-bytes", f"method.target_bytes={whole}")
    assert 0.7 * whole < report.after.weight_bytes <= whole
    assert any("stored alike" in note for note in report.notes)
