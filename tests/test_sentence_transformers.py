"""Quantized sentence encoders in the sentence-transformers library itself, by kind of stored form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.quantizers import auto

from aicompress.checkpoint import Checkpoint
from aicompress.errors import CheckpointError, Refused
from aicompress.pipeline import export, steps
from aicompress.pipeline.step.models.running_model import Setting, encoder
from aicompress.pipeline.step.options import Options
from aicompress.pipeline.step.output import Destination
from aicompress.recipe import load
from aicompress.recipe.made import ExportRecipe
from tests import checkpoints

DEMO = Path(__file__).parents[1] / "configs" / "demo" / "quantize.yaml"
SMALL = "method.group_size=16"
SENTENCES = ["a function returns its last value", "the cat sees a dog", "names are bound by assignment"]
# Recipe and changes; whether sentence-transformers needs the code in the checkpoint.
CASES = {
    "packed": ("quantize/rtn-w8", (), False),
    "rounded inputs": ("quantize/w8a8", (), False),
    "two schemes": ("quantize/rtn-w8", ("rules=[{match: '*.query', bits: 4}]",), True),
    "codes first": (str(DEMO), (SMALL, "select.include=['*.word_embeddings', '*.query']"), True),
    "codebooks": ("quantize/kmeans-w4", (), True),
    "columns scaled": ("quantize/sinq-w4", (SMALL,), True),
    "corrected": ("quantize/qera-w3", (), True),
}


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, and a Dense module between pooling and normalization."""
    folder = checkpoints.make_bert(tmp_path_factory.mktemp("encoder") / "in", num_hidden_layers=1)
    return checkpoints.add_dense(folder, 24)


def encoder_of(folder: Path, **options: bool) -> Any:
    """The folder in sentence-transformers; only the worker that needs the library spends seconds on importing it."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", **options)


@contextmanager
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers without `import aicompress.hf`."""
    with monkeypatch.context() as context:
        for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
            context.delitem(mapping, "aicompress", raising=False)
        yield


def embeddings(folder: Path, **options: bool) -> np.ndarray:
    """What sentence-transformers makes of the sentences."""
    return np.asarray(encoder_of(folder, **options).encode(SENTENCES))


@pytest.mark.parametrize("form", CASES)
def test_a_quantized_encoder_encodes_as_it_does_here(
    form: str, sentence_encoder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes, own_code = CASES[form]
    sets = [*changes, "report.html=false"]
    if form in ("codes first", "corrected"):
        sets += [f"calibration.text={text_file}", "calibration.samples=4", "calibration.length=16"]
    plan = steps.make_plan(sentence_encoder, Destination(tmp_path / "out"), load(name, "quantize", sets), "quantize")
    told = plan.summary().warnings
    assert any("trust_remote_code" in line for line in told) == own_code
    assert any("rounds inputs" in line for line in told) == (form == "rounded inputs")
    assert any("3_Dense/model.safetensors" in line for line in told)
    steps.run(plan, Options(latency="off"))
    if own_code:
        with stock(monkeypatch), pytest.raises(RuntimeError, match="mismatch"):
            embeddings(tmp_path / "out")
    theirs = embeddings(tmp_path / "out", trust_remote_code=own_code)
    ours = encoder(Setting().start(str(tmp_path / "out")), 64)(SENTENCES).numpy()
    np.testing.assert_allclose(theirs, ours, atol=0.02)
    assert (theirs * embeddings(sentence_encoder)).sum(axis=1).min() > 0.9


def test_an_encoder_in_a_folder_of_its_own(sentence_encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    encoder_of(sentence_encoder).save(str(folder))
    inner = folder / "0_Transformer"
    inner.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).rename(inner / file)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = inner.name
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(folder)
    assert str(inner) in refused.value.hint
    recipe = load("quantize/rtn-w8", "quantize", ["report.html=false"])
    steps.run(steps.make_plan(inner, Destination(tmp_path / "out"), recipe, "quantize"), Options(latency="off"))
    before = encoder(Setting().start(str(inner)), 64)(SENTENCES).numpy()
    np.testing.assert_allclose(before, embeddings(sentence_encoder), atol=1e-5)  # with pooling and Dense of the encoder
    inner.rename(tmp_path / "before")
    (tmp_path / "out").rename(inner)
    np.testing.assert_allclose(embeddings(folder), before, atol=0.02)


# As sentence-transformers writes its table, and as model2vec does, with a config that transformers does not know.
TABLES = {"own": ("embedding.weight", "", None), "model2vec": ("embeddings", ".", {"model_type": "model2vec"})}


@pytest.fixture(params=TABLES)
def static_encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    table, place, config = TABLES[request.param]
    folder = checkpoints.make_static_encoder(tmp_path / "in", table, place)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["StaticModel"]}))
    return folder


def test_a_table_of_embeddings_is_compressed_and_comes_back(static_encoder: Path, tmp_path: Path) -> None:
    """A recipe that names no kinds takes what there is; what sentence-transformers cannot read, it does not misread."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    plan = steps.make_plan(static_encoder, Destination(out), load("quantize/rtn-w8", "quantize"), "quantize")
    assert any("as the checkpoint has no other layers" in note for note in plan.summary().notes)
    assert any("export --to dense" in warning for warning in plan.summary().warnings)
    steps.run(plan, Options(latency="off"))
    with pytest.raises((AssertionError, KeyError)):
        embeddings(out)
    export.run(export.make_plan(out, Destination(plain), ExportRecipe()), Options(latency="off"))
    before = embeddings(static_encoder)
    np.testing.assert_allclose(embeddings(plain), before, atol=0.02)
    assert not np.array_equal(embeddings(plain), before)


def test_a_factor_is_not_written_where_it_would_be_read_as_the_table(static_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="would take one of its factors for the whole"):
        steps.make_plan(
            static_encoder, Destination(tmp_path / "out"), load("factorize/svd-keep", "factorize"), "factorize"
        )
    single = Destination(tmp_path / "out.safetensors")
    recipe = load("factorize/svd-keep", "factorize", ["method.keep=0.8", "report.html=false"])
    steps.run(steps.make_plan(static_encoder, single, recipe, "factorize"), Options(latency="off"))
    assert Checkpoint.open(single.path).manifest.entries
