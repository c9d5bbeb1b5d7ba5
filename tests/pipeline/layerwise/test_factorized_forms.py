"""What factorize stores beside two plain factors is written, read, and runs from there as the same matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from aicompress.checkpoint import Checkpoint
from aicompress.model.loading.load import load as load_model
from aicompress.pipeline.verify import verify
from tests.pipeline.calibration.steps import text
from tests.pipeline.layerwise.test_low_rank import run

METHODS: dict[str, tuple[dict[str, Any], str, int]] = {  # fields, form, and layers of a block
    "residual": ({"rank": 4, "base": {"name": "rtn", "bits": 3, "group_size": 16}}, "corrected", 7),
    "dictionary": ({"keep": 0.7, "rounds": 2}, "low_rank", 7),
    "joint": ({"keep": 0.5, "scores": 0.5}, "submatrix", 4),
}
IDS = torch.arange(2, 26).reshape(2, 12)


@pytest.mark.parametrize("name", METHODS)
def test_written_read_and_run(name: str, tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    fields, form, layers = METHODS[name]
    out = tmp_path / "out"
    run(tiny_llama, out, {"name": name, **fields}, text(text_file))
    assert verify(out).problems == ()
    written = Checkpoint.open(out)
    entries = written.manifest.entries
    assert {written.weight(tensor).form for tensor in entries} == {form}
    assert len(entries) == 3 * layers

    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for tensor in entries:
        model.get_parameter(tensor).data = written.weight(tensor).dense()
    with torch.no_grad():
        wanted = model(IDS).logits
        for running in (load_model(out), AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()):
            torch.testing.assert_close(running(IDS).logits, wanted, rtol=2e-3, atol=2e-2)


def test_codes_in_a_dictionary_keep_its_zeros(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    run(tiny_llama, tmp_path / "thin", {"name": "dictionary", "keep": 0.7, "rounds": 1}, text(text_file, samples=2))
    method = {"name": "rtn", "bits": 4, "granularity": "channel"}
    run(tmp_path / "thin", tmp_path / "codes", method, command="quantize")
    thin, codes = Checkpoint.open(tmp_path / "thin"), Checkpoint.open(tmp_path / "codes")
    assert codes.nbytes("model.layers.0.mlp.up_proj.weight") < 0.4 * thin.nbytes("model.layers.0.mlp.up_proj.weight")
    for name in thin.manifest.entries:
        before, after = (source.weight(name).parts()["out"] for source in (thin, codes))
        assert after.form == "sparse_codes"
        assert not after.dense()[before.dense() == 0].any()


def test_dictionaries_share_out_bytes_and_a_divergence(tmp_path: Path, trained_llama: Path, text_file: Path) -> None:
    data, fast = text(text_file, samples=4), {"name": "dictionary", "rounds": 0}
    report = run(trained_llama, tmp_path / "bytes", {**fast, "target_bytes": 150_000}, data)
    assert 140_000 < sum(path.stat().st_size for path in (tmp_path / "bytes").glob("*.safetensors")) <= 150_000
    assert len({round(row.bytes_after / row.bytes_before, 2) for row in report.layers if row.method != "-"}) > 2
    report = run(trained_llama, tmp_path / "bound", {**fast, "max_kl": 0.1}, data)
    told = next(float(line.split()[4]) for line in report.notes if line.startswith("max_kl: the outputs lose"))
    assert 0.07 < told <= 0.1
