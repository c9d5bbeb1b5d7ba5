"""What a recipe leaves open fits every model; what it says is taken at its word; what nothing comes of is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from aicompress.errors import Refused
from aicompress.pipeline import steps
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.report.model import Report
from aicompress.report.tables import summary as summary_table

ODD = {"conv": (6, 5, 3, 3), "odd": (8, 387), "prime": (8, 509), "narrow": (8, 21), "even": (8, 256)}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Layers of 45, 387, 509, 21 and 256 input columns."""
    torch.manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in ODD.items()}
    save_file(tensors, tmp_path / "odd.safetensors")
    return tmp_path / "odd.safetensors"


def planned(source: Path, recipe: str, *overrides: str) -> Any:
    command = recipe.split("/")[0]
    return steps.make_plan(
        source, Destination(source.parent / "out.safetensors"), load(recipe, command, overrides), command
    )


GROUPS = {"conv": "channel", "odd": 43, "prime": 128, "narrow": "channel", "even": 128}


@pytest.mark.parametrize(
    ("recipe", "groups"),
    [
        ("quantize/rtn-w4", GROUPS),
        ("quantize/hqq-w4", {**GROUPS, "prime": 64, "even": 64}),
        ("quantize/nf4", {**GROUPS, "prime": "channel", "even": 64}),
    ],
)
def test_a_group_size_that_nobody_gave_fits_every_width(odd: Path, recipe: str, groups: dict[str, Any]) -> None:
    step = planned(odd, recipe)
    assert {row.name: row.detail["group"] for row in step.summary().rows} == groups
    report = steps.run(step, Options(latency="off"))
    assert sum(path.stat().st_size for path in odd.parent.glob("out*.safetensors")) == step.summary().weight_bytes
    assert max(row.rel_error or 0 for row in report.layers) < 0.25


def test_after_a_factorization_too(odd: Path) -> None:
    steps.run(planned(odd, "factorize/svd-rank", "method.rank=3", "method.multiple=1"), Options(latency="off"))
    (odd.parent / "out.safetensors").rename(odd.parent / "low.safetensors")
    rows = planned(odd.parent / "low.safetensors", "quantize/rtn-w4").summary().rows
    assert len(rows) > len(ODD)


def test_a_group_size_that_is_given_is_taken_at_its_word(odd: Path) -> None:
    with pytest.raises(Refused, match="group_size 32 does not divide"):
        planned(odd, "quantize/rtn-w4", "method.group_size=32", "select.include=[prime]")


def test_a_group_of_minus_one_is_a_channel() -> None:
    with pytest.raises(Refused, match="one scale for a whole row is `granularity: channel`"):
        load("quantize/rtn-w4", "quantize", ["method.group_size=-1"])


def test_levels_count_from_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = load("quantize/rtn-w4", "quantize", ["levels=[{layers: '-1', skip: true}]"])
    step = steps.make_plan(tiny_llama, Destination(tmp_path / "out"), recipe, "quantize")
    depths = {layer.info.index for layer in step.layers if layer.config is not None}
    last = max(layer.info.index for layer in step.layers if layer.info.index is not None)
    assert last > 0
    assert depths == set(range(last))


def test_a_kind_that_a_model_lacks_is_told(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.LlamaConfig(**shape, vocab_size=64, tie_word_embeddings=True)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    for kinds, told in (("[linear, head]", 1), ("[linear, head, embedding]", 0), ("[linear]", 0)):
        warnings = planned(tmp_path / "tied", "quantize/rtn-w8", f"select.kinds={kinds}").summary().warnings
        assert sum("is the embedding's matrix: add embedding" in line for line in warnings) == told


def test_an_output_of_stored_zeros_says_why_it_is_no_smaller(odd: Path) -> None:
    def told(*overrides: str) -> bool:
        warnings = planned(odd, "prune/magnitude-50", *overrides).summary().warnings
        return any("--set method.store=sparse" in line for line in warnings)

    assert told()
    assert not told("method.store=sparse")
    report = steps.run(planned(odd, "prune/magnitude-50"), Options(latency="off"))
    assert any("--set method.store=sparse" in line for line in report.warnings)
    assert (load_file(odd.parent / "out.safetensors")["even.weight"] == 0).any()


def test_width_of_a_bare_network_names_channels(odd: Path) -> None:
    with pytest.raises(Refused) as caught:
        planned(odd, "prune/width-50")
    assert "`channels`" in caught.value.hint


def test_a_model_of_sounds_is_not_calibrated_on_text(tmp_path: Path) -> None:
    sides = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8, "vocab_size": 64}
    lengths = {"max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1}
    config = hf.WhisperConfig(**sides, **heads, **lengths, eos_token_id=2, decoder_start_token_id=1)
    hf.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "whisper")
    (tmp_path / "s.txt").write_text("one\ntwo\n")
    with pytest.raises(Refused, match=r"takes input_features, and .* holds text"):
        planned(tmp_path / "whisper", "quantize/gptq-w4", f"calibration.text={tmp_path / 's.txt'}")


def test_cells_of_a_bare_file_are_layers_and_what_stays_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {f"rnn.{name}": t.detach() for name, t in torch.nn.LSTMCell(32, 64).named_parameters()}
    save_file({**tensors, "mixing.phase_table": torch.randn(64, 64)}, tmp_path / "voice.safetensors")
    step = planned(tmp_path / "voice.safetensors", "quantize/rtn-w8")
    summary = step.summary()
    assert {row.name for row in summary.rows} == {"rnn.weight_ih", "rnn.weight_hh"}
    numbers, left = 256 * 96 + 512 + 4096, 512 + 4096
    assert (summary.untouched.parameters, summary.untouched.numbers) == (3, left)
    assert summary.untouched.bytes == 4 * left
    (told,) = (line for line in summary.warnings if "are no layer of a kind" in line)
    assert "mixing.phase_table" in told
    report = steps.run(step, Options(latency="off"))
    assert report.untouched == summary.untouched
    assert report.untouched.share == pytest.approx(left / numbers)
    assert any("left as it was: 3 tensors" in row[0].text for row in summary_table(report).rows)
    assert Report.from_json(report.to_json()).untouched == report.untouched
