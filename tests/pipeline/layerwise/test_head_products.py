"""Layers that are compressed two by two: what whole models lose, biases, files of statistics, and refusals."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError, Refused
from aicompress.measure import rel_error
from aicompress.model.loading.load import load
from aicompress.pipeline import steps
from aicompress.pipeline.calibration.request import Request
from aicompress.pipeline.step.options import Options
from tests import checkpoints
from tests.pipeline.calibration.steps import text
from tests.pipeline.layerwise.test_low_rank import divergence, planned, run
from tests.pipeline.ranks import Ranks

VALUES = {"include": ["*.v_proj", "*.o_proj"]}


def test_heads_of_few_directions_lose_nothing_under_biases(tmp_path: Path, text_file: Path) -> None:
    """A BERT whose keys and values have 4 of 12 directions: 6 are kept, one of them for a bias."""
    source = checkpoints.make_bert(tmp_path / "bert", num_hidden_layers=1)
    model, generator = AutoModel.from_pretrained(source).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention" in name and name.endswith("bias"):
                parameter.normal_(0, 0.5, generator=generator)
            if name.endswith(("key.weight", "value.weight")):
                parameter.view(4, 12, -1)[:, 4:] = parameter.view(4, 12, -1)[:, :4].repeat(1, 2, 1)
    model.save_pretrained(source)
    run(source, tmp_path / "out", {"name": "joint", "keep": 0.5, "damping": 1e-6}, text(text_file, samples=16))
    ids = torch.arange(5, 37).view(2, 16)
    with torch.no_grad():
        before, after = (load(folder)(ids)[0] for folder in (source, tmp_path / "out"))
    assert torch.allclose(after, before, atol=5e-3)
    shapes = Checkpoint.open(tmp_path / "out").tensors
    assert shapes["encoder.layer.0.attention.self.value.weight"].spec.shape == (24, 48)
    assert shapes["encoder.layer.0.attention.output.dense.weight"].spec.shape == (48, 24)


def test_a_model_changes_less_than_with_factors_in_as_many_bytes(
    tmp_path: Path, trained_llama: Path, text_file: Path, heldout_file: Path
) -> None:
    lost, sizes = {}, {}
    for name in ("whitened", "joint"):
        method = {"name": name, "keep": 0.5}
        sizes[name] = run(
            trained_llama, tmp_path / name, method, text(text_file, samples=16), select=VALUES
        ).after.by_kind
        lost[name] = divergence(tmp_path / name, trained_llama, heldout_file)
    assert sizes["joint"]["linear"] <= 1.01 * sizes["whitened"]["linear"]
    assert lost["joint"] < 0.7 * lost["whitened"]


def test_files_of_statistics_give_the_same(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    method = {"name": "joint", "keep": 0.5, "shift": 0.0}
    data = {**text(text_file, samples=4), "activations": "original"}
    run(tiny_llama, tmp_path / "walked", method, data)
    request = Request(stats=(tmp_path / "stats.safetensors",))
    steps.run(planned(tiny_llama, tmp_path / "read", method, data, request), Options(latency="off"))
    walked, read = Checkpoint.open(tmp_path / "walked"), Checkpoint.open(tmp_path / "read")
    assert all(torch.allclose(walked.read(name), read.read(name), atol=1e-4) for name in walked.tensors)


@pytest.mark.parametrize("walked", [True, False])
def test_a_run_that_is_stopped_within_a_product_goes_on(
    tmp_path: Path, tiny_llama: Path, text_file: Path, walked: bool
) -> None:
    """One member is written and noted, the other one is not: the same bytes as in one go.

    A file of statistics holds those of members alone, as other layers stay.
    """
    method, data = {"name": "joint", "keep": 0.5, "shift": 1.0 if walked else 0.0}, text(text_file, samples=4)
    request = None if walked else Request(stats=(tmp_path / "stats.safetensors",))
    data |= {} if walked else {"activations": "original"}

    def stop(what: str, done: int, total: int) -> None:
        if what == "model.layers.1.self_attn.v_proj.weight":
            raise KeyboardInterrupt

    for folder, progress in (("whole", None), ("out", stop)):
        options = Options(latency="off") if progress is None else Options(latency="off", progress=progress)
        with pytest.raises(KeyboardInterrupt) if progress else nullcontext():
            steps.run(planned(tiny_llama, tmp_path / folder, method, data, request), options)
    steps.run(planned(tiny_llama, tmp_path / "out", method, data, request), Options(latency="off", resume=True))
    whole, out = (tmp_path / folder / "model.safetensors" for folder in ("whole", "out"))
    assert out.read_bytes() == whole.read_bytes()


def test_two_processes_give_what_one_gives(tmp_path: Path, tiny_llama: Path, text_file: Path, ranks: Ranks) -> None:
    """But for the order of sums over the calibration data."""
    method, data = {"name": "joint", "keep": 0.5}, {**text(text_file, samples=5), "precision": "float32"}
    run(tiny_llama, tmp_path / "one", method, data)
    ranks.together(tiny_llama, tmp_path / "two", tmp_path / "one.yaml", verb="factorize")
    one, two = (Checkpoint.open(tmp_path / folder) for folder in ("one", "two"))
    for name in one.parameters():
        torch.testing.assert_close(two.dense(name), one.dense(name), rtol=1e-3, atol=1e-5)


def test_what_stays_is_told(tmp_path: Path, tiny_llama: Path, text_file: Path) -> None:
    plan = planned(tiny_llama, tmp_path / "out", {"name": "joint"}, text(text_file))
    told = plan.summary().notes
    assert len(told) == 2
    assert "6 of 21 layers stay as they are: a rotary embedding turns them in pairs" in "".join(told)
    assert "9 of 21 layers stay as they are: no attention heads lie in them" in "".join(told)
    assert {row.name.rpartition(".")[2] for row in plan.summary().rows} == {"v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"select": {"include": ["*v_proj", "*mlp*"]}}, "none are projections of attention heads"),
        ({"select": {"include": ["*q_proj", "*k_proj"]}}, "only where `scores` is given"),
        ({"rules": [{"match": "*v_proj", "keep": 0.5}]}, "have different parameters"),
    ],
)
def test_what_cannot_be_coupled_is_refused(
    tmp_path: Path, tiny_llama: Path, text_file: Path, more: dict[str, object], complaint: str
) -> None:
    with pytest.raises((Refused, CompressError), match=complaint):
        planned(tiny_llama, tmp_path / "out", {"name": "joint"}, text(text_file), **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_stays_of_heads_is_quantized_alone(tmp_path: Path, tiny_llama: Path, text_file: Path, method: str) -> None:
    run(tiny_llama, tmp_path / "thin", {"name": "joint", "keep": 0.5, "scores": 0.5}, text(text_file, samples=4))
    fields = {"name": method, "bits": 8, "granularity": "channel"}
    data = text(text_file, samples=4) if method == "gptq" else None
    run(tmp_path / "thin", tmp_path / "codes", fields, data, command="quantize")
    thin, codes = Checkpoint.open(tmp_path / "thin"), Checkpoint.open(tmp_path / "codes")
    for name in thin.manifest.entries:
        before, after = thin.weight(name), codes.weight(name)
        assert (after.form, after.parts()["out"].form) == ("submatrix", "int_grouped")
        assert not after.dense()[before.dense() == 0].any()
        assert rel_error(before.dense(), after) < 0.02
    ids = torch.arange(5, 37).view(2, 16)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path / "codes")(ids).logits, load(tmp_path / "thin")(ids).logits, atol=0.5)
