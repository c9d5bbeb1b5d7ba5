"""How many tokens a model takes: architectures whose table of positions has rows that no token gets."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

from aicompress.checkpoint import Checkpoint
from aicompress.model.distillation.outputs import runner
from aicompress.model.loading.definitions.config import configurations, most_positions
from aicompress.model.loading.load import load
from aicompress.pipeline.calibration.data import calibration_inputs
from aicompress.pipeline.distillation.data.samples import fitting_samples
from aicompress.pipeline.step.models.running_model import Running, encoder, example
from aicompress.pipeline.step.workers import Processes
from aicompress.recipe import Calibration
from tests.model.compressed import compress, integers

SHAPE = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 16, "max_position_embeddings": 40}


@pytest.mark.parametrize(
    ("name", "padding", "most"),
    [("Roberta", 1, 38), ("MPNet", 1, 38), ("IBert", 1, 38), ("Roberta", 0, 39), ("Bert", 0, 40)],
)
def test_a_model_runs_on_as_many_tokens_as_it_takes_and_on_no_more(name: str, padding: int, most: int) -> None:
    config = getattr(hf, f"{name}Config")(**SHAPE, pad_token_id=padding)
    model = getattr(hf, f"{name}Model")(config).eval()
    assert most_positions(model) == most
    assert model(input_ids=torch.full((1, most), 5)).last_hidden_state.shape[1] == most
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_an_architecture_without_positions_of_its_own_has_no_limit() -> None:
    with torch.device("meta"):
        assert (
            most_positions(hf.XLNetModel(hf.XLNetConfig(vocab_size=8, d_model=8, n_layer=1, n_head=1, d_inner=8)))
            is None
        )


def test_a_model_on_kernels_takes_as_many(tmp_path: Path, tiny_bert: Path) -> None:
    """The tables of embeddings then have no weight of numbers."""
    path = compress(tiny_bert, tmp_path / "out", lambda info, matrix: integers(matrix, 4, 16))
    running = load(path)
    assert "row gather" in set(running.aicompress_kernels.values())
    assert most_positions(running) == most_positions(load(path, kernels="reference")) == most_positions(load(tiny_bert))


def test_texts_are_cut_to_what_the_model_takes(tmp_path: Path, tiny_bert: Path) -> None:
    """In evaluation, latency, calibration and training alike; training says so before it begins."""
    folder = shutil.copytree(tiny_bert, tmp_path / "roberta")
    model = hf.RobertaModel(hf.RobertaConfig(**SHAPE, pad_token_id=0)).eval()
    model.save_pretrained(folder)
    running = Running(str(folder), model, Path(folder))
    (tmp_path / "long.txt").write_text("a text of many words " * 40 + "\nshort\n")
    assert encoder(running, 128)((tmp_path / "long.txt").read_text().splitlines()).isfinite().all()
    made = example(model, 2, 128)
    assert made is not None
    assert made[1] == "2 × 39 tokens"
    checkpoint = Checkpoint.open(folder)
    data = Calibration(text=str(tmp_path / "long.txt"), drawn=2, length=128)
    inputs = calibration_inputs(checkpoint, model, data, 0, Processes())
    assert [batch["input_ids"].shape[1] for batch in inputs.batches] == [39, 39]
    assert all(model(**batch).last_hidden_state.isfinite().all() for batch in inputs.batches)
    samples, told = fitting_samples(data, runner(checkpoint).task, [("the student", checkpoint, model)])
    assert samples.columns["input_ids"].shape == (2, 39)
    assert told == ["training samples are 39 tokens long, not 128: the models take no more"]


def test_parts_that_hold_a_number_under_the_name_of_a_configuration() -> None:
    """The cross attention of IDEFICS keeps its dropout there."""
    model = hf.BertModel(hf.BertConfig(**SHAPE))
    model.encoder.layer[0].config = 0.1
    assert {type(each) for each in configurations(model)} == {hf.BertConfig}
