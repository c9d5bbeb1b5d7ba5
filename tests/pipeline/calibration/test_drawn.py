"""Calibration on tokens that are drawn from the tokenizer, alone and beside a little text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CompressError
from aicompress.methods.layerwise import LayerMethod
from aicompress.methods.method import OF_TRAINING
from aicompress.model.loading.load import build
from aicompress.pipeline import steps
from aicompress.pipeline.calibration.data import calibration_inputs, samples
from aicompress.pipeline.step.output import Destination
from aicompress.pipeline.step.workers import Processes
from aicompress.pipeline.verify import verify
from aicompress.recipe import Calibration, Recipe, Select
from tests.methods.contract import LAYERWISE, variants
from tests.pipeline.calibration.steps import OFF
from tests.pipeline.test_rederived_numbers import File, check

FEW = Calibration(drawn=4, length=16)
ONE_LAYER = Select(include=("model.layers.0.mlp.gate_proj",))
CALIBRATED = [method for method in LAYERWISE if method.needs and not method.needs & OF_TRAINING]


@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: f"{method.command}-{method.name}")
def test_every_calibrated_method_works_without_data(
    tmp_path: Path, tiny_llama_untied: Path, method: LayerMethod
) -> None:
    """What it writes is sound, and its report says what the files do."""
    reads = method.reading.statistics if method.reading else None
    known = (fields for fields in variants(method) if reads is None or reads(method.config(**fields)))
    fields = {**next(known), "name": method.name}
    if "group_size" in method.config.model_fields:
        fields["group_size"] = 16
    together = method.rewrites or method.rotates or method.shares or method.couples
    select = Select() if together else ONE_LAYER
    recipe = Recipe(version=1, method=method.config(**fields), select=select, calibration=FEW)
    planned = steps.make_plan(tiny_llama_untied, Destination(tmp_path / "out"), recipe, method.command)
    report = steps.run(planned, OFF)
    (source,) = report.calibration["data"]
    assert (source["kind"], source["samples"], source["seed"]) == ("drawn", 4, 0)
    changed = [row for row in report.layers if row.method != "-"]
    assert changed
    assert not [row.note for row in changed if "data-free" in row.note]
    assert verify(tmp_path / "out").sound
    before, after = File.of(tiny_llama_untied), File.of(tmp_path / "out")
    check(json.loads(report.to_json()), before, after, rewritten=bool(method.rewrites or method.rotates))


def test_both_kinds_count_as_much_however_many_there_are(tiny_llama: Path, tiny_bert: Path, text_file: Path) -> None:
    for path in (tiny_llama, tiny_bert):
        checkpoint = Checkpoint.open(path)
        model = build(checkpoint)
        data = Calibration(text=str(text_file), samples=3, drawn=9, length=16)
        inputs = calibration_inputs(checkpoint, model, data, 0, Processes(), most=3)
        assert [source.kind for source in inputs.sources] == ["text", "drawn"]
        assert len(inputs.batches) == len(inputs.weights) == 4
        masks = [batch.get("attention_mask", batch["input_ids"] >= 0).sum().item() for batch in inputs.batches]
        mass = [count * weight for count, weight in zip(masks, inputs.weights, strict=True)]
        assert mass[0] == pytest.approx(sum(mass[1:]))
        assert sum(mass) == pytest.approx(sum(masks))
        own = samples(checkpoint, model, data, 0, Processes())
        assert sum(sample.weight for sample in own) == pytest.approx(len(own)) == 12
        assert sum(sample.weight for sample in own[:3]) == pytest.approx(6)


def test_a_source_alone_weighs_as_it_did(tiny_llama: Path, text_file: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    data = Calibration(text=str(text_file), samples=3, length=16)
    inputs = calibration_inputs(checkpoint, build(checkpoint), data, 0, Processes())
    assert inputs.weights == ()
    assert {sample.weight for sample in samples(checkpoint, build(checkpoint), data, 0, Processes())} == {1.0}
    assert not {"drawn", "bos"} & data.model_dump().keys()  # recipes keep their digests


def test_what_has_no_tokenizer_is_refused_before_work(tmp_path: Path, tiny_vit: Path) -> None:
    method = next(method for method in CALIBRATED if method.name == "gptq")
    recipe = Recipe(version=1, method=method.config(), calibration=FEW)
    with pytest.raises(CompressError) as caught:
        steps.make_plan(tiny_vit, Destination(tmp_path / "out"), recipe, "quantize")
    assert "tokens are drawn from a tokenizer, and it has none" in str(caught.value)
