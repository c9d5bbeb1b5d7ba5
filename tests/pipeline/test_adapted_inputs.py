"""`--adapter` merges an adapter into the input of any step; the output is that of the merged model, and says so."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from aicompress.checkpoint import Checkpoint
from aicompress.cli.app import app
from aicompress.cli.step import adapted
from aicompress.errors import CheckpointError, Refused
from aicompress.pipeline.step.input import Adapted, open_input
from tests.checkpoint.test_adapters import GATE, merged, pair, save_adapter


def test_export_and_quantize_read_the_merged_model(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_adapter(tmp_path / "lora", pair(GATE, 128, 64))
    wanted = merged(tiny_llama, adapter, 0.5)
    given = ["--adapter", f"{adapter}:0.5", "--latency", "off"]
    app(["export", str(tiny_llama), str(tmp_path / "dense"), "--to", "dense", *given], standalone_mode=False)
    assert "is merged, weight 0.5: 1 layers" in capsys.readouterr().out
    dense = Checkpoint.open(tmp_path / "dense")
    assert all(torch.equal(dense.dense(name), wanted.dense(name)) for name in wanted.parameters())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(stock.get_parameter(f"{GATE}.weight"), wanted.dense(f"{GATE}.weight"))

    (step,) = json.loads((tmp_path / "dense" / "aicompress.json").read_text())["lineage"]
    sha256 = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert step["adapter 1, weight 0.5"] == {"inputs": {"adapter_model.safetensors": sha256}}

    recipe = ["-r", "quantize/rtn-w8", "--set", "method.group_size=32", "--latency", "off", "-q"]
    app(["quantize", str(tiny_llama), str(tmp_path / "one"), *recipe, *given[:2]], standalone_mode=False)
    app(["quantize", str(tmp_path / "dense"), str(tmp_path / "two"), *recipe], standalone_mode=False)
    one, two = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "two")
    assert all(torch.equal(one.dense(name), two.dense(name)) for name in two.parameters())


@pytest.mark.parametrize("keeps_ties", [False, True])
@pytest.mark.parametrize("adapted", ["model.embed_tokens", "lm_head"])
def test_what_is_tied_to_an_adapted_weight_keeps_its_numbers(
    tiny_llama: Path, tmp_path: Path, adapted: str, keeps_ties: bool
) -> None:
    """PEFT adapts the module that is named: the other one still multiplies by what they shared."""
    other = {"model.embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[adapted]
    adapter = save_adapter(tmp_path / "lora", pair(adapted, 256, 64), ensure_weight_tying=keeps_ties)
    base = Checkpoint.open(tiny_llama).dense("model.embed_tokens.weight")
    after, warnings = open_input(Adapted(tiny_llama, ((str(adapter), 1.0),)))
    moved = merged(tiny_llama, save_adapter(tmp_path / "same", pair("model.embed_tokens", 256, 64)))
    assert torch.equal(after.dense(f"{adapted}.weight"), moved.dense("model.embed_tokens.weight"))
    if keeps_ties and adapted == "model.embed_tokens":
        assert f"{other}.weight" not in after.parameters()
    else:
        assert torch.equal(after.dense(f"{other}.weight"), base)
        assert "differ: both are kept" in warnings[0]


def test_eval_reads_the_merged_model(tiny_llama: Path, tmp_path: Path, heldout_file: Path) -> None:
    """IN with adapters, or baselines with theirs."""
    adapter = save_adapter(tmp_path / "lora", pair(GATE, 128, 64))
    rewritten = merged(tiny_llama, adapter, 0.5)
    dense = Path(shutil.copytree(tiny_llama, tmp_path / "dense"))
    tensors = {name: rewritten.dense(name) for name in rewritten.parameters()}
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    recipe = ["-r", "eval/language-model", "--text", str(heldout_file), "-q", "--set", "quality.perplexity.samples=4"]
    quick = ["--set", "quality.perplexity.length=32", "--set", "latency=null"]
    given = ["--against", str(dense), "--adapter", f"{adapter}:0.5"]
    app(["eval", str(tiny_llama), *given, *recipe, *quick, "-o", str(tmp_path / "one")], standalone_mode=False)
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["quality"]["kl"]["value"] == 0
    assert report["after"]["path"] == f"{tiny_llama} + {adapter} × 0.5"
    assert any("is merged, weight 0.5" in note for note in report["notes"])

    given = ["--against", str(tiny_llama), "--against-adapter", f"{adapter}:0.5"]
    app(["eval", str(dense), *given, *recipe, *quick, "-o", str(tmp_path / "two")], standalone_mode=False)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["quality"]["kl"]["value"] == 0
    assert report["before"]["path"] == f"{tiny_llama} + {adapter} × 0.5"


def test_an_adapter_alone_is_nothing_to_measure(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = str(save_adapter(tmp_path / "lora", pair(GATE, 128, 64)))
    for given, hint in (
        ([adapter], f"--adapter {adapter}"),
        ([str(tiny_llama), "--against", adapter], f"--against-adapter {adapter}"),
    ):
        with pytest.raises(CheckpointError, match="is an adapter, no checkpoint") as refusal:
            app(["eval", *given, "-q"], standalone_mode=False)
        assert hint in refusal.value.hint
    with pytest.raises(Refused, match="merged into baselines, and there is none"):
        app(["eval", str(tiny_llama), "--against-adapter", adapter, "-q"], standalone_mode=False)


def test_how_adapters_are_named(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    odd, one, two = str(tmp_path / "a:2"), "hf://org/name", "hf://org/name@main"
    read = adapted("model", ["lora", "lora/:0.5", one, f"{two}:-1", odd]).adapters
    assert read == (("lora", 1.0), ("lora/", 0.5), (one, 1.0), (two, -1.0), (odd, 1.0))
    for wrong in ("lora:half", "lora:nan"):
        with pytest.raises(Refused, match="no weight") as refusal:
            adapted("model", [wrong])
        assert "DIR:0.5" in refusal.value.hint
