"""A metric is added by one file: recipes, their schema, gates, evaluation and comparisons find it by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from aicompress import load as load_model
from aicompress import metrics
from aicompress.data import Data, token_windows
from aicompress.errors import RecipeError
from aicompress.model.loading.tokenizer import load_tokenizer
from aicompress.pipeline.evaluation.run import EvalOptions, evaluate
from aicompress.recipe.evaluation import load
from aicompress.recipe.schema import schema
from aicompress.report.compare import comparison
from aicompress.report.model import Report
from aicompress.report.quality import direction

FILE = '''
"""Hits: how often the next token is one of the k that a language model holds most likely."""

from __future__ import annotations

import torch
from pydantic import Field

from aicompress.data.section import Data
from aicompress.metrics.intervals import window_mean
from aicompress.metrics.metric import FigureSpec, MeasuredFigures, Metric
from aicompress.metrics.outputs import TokenLogits


class Hits(Data):
    """Text whose next tokens are guessed."""

    k: int = Field(5, ge=1, description="guesses")


def measure(batches, config, seed):
    """The share of hits of each model."""
    shares, tokens = [], []
    for batch in batches:
        next_tokens = batch.targets[..., None]
        guesses = (logits.topk(config.k).indices for logits in batch.logits)
        shares.append(tuple((each == next_tokens).any(-1).double().mean(1) for each in guesses))
        tokens.append(torch.full(next_tokens.shape[:1], next_tokens.shape[1]))
    models = [torch.cat(each) for each in zip(*shares)]
    return MeasuredFigures(
        tuple({"hits": window_mean(each, torch.cat(tokens), seed)} for each in models),
        tuple({"hits_lost": window_mean(each - models[0], torch.cat(tokens), seed)} for each in models[1:]),
    )


METRIC = Metric(
    "hits", "language models: the next token among the k likeliest", Hits, TokenLogits,
    (FigureSpec("hits", "higher"), FigureSpec("hits_lost", "lower", compared=True)), measure,
)
'''


@pytest.fixture
def added(joins: Callable[[ModuleType, str, str], None]) -> None:
    """The metric `hits`."""
    joins(metrics, "hits", FILE)


def written(folder: Path, text: Path, gates: list[str], **fields: object) -> str:
    path = folder / "recipe.json"
    quality = {"hits": {"text": str(text), "samples": 6, "length": 32, **fields}}
    path.write_text(json.dumps({"version": 1, "quality": quality, "gates": gates}))
    return str(path)


def measured(source: Path, against: list[Path], recipe: str) -> Report:
    return evaluate(str(source), [str(path) for path in against], load(recipe), EvalOptions())


def share_of_hits(path: Path, text: Path, k: int) -> float:
    """The same figure by hand."""
    windows, _ = token_windows(Data(text=str(text), samples=6, length=32), load_tokenizer(path))
    with torch.no_grad():
        guesses = load_model(path)(windows).logits[:, :-1].topk(k).indices
    return float((guesses == windows[:, 1:, None]).any(-1).double().mean())


@pytest.mark.usefixtures("added")
def test_a_recipe_measures_it(trained_llama: Path, tiny_llama: Path, heldout_file: Path, tmp_path: Path) -> None:
    gates = ["quality.hits >= 0.01", "quality.hits_lost.high < -1"]
    report = measured(trained_llama, [tiny_llama], written(tmp_path, heldout_file, gates, k=3))
    hits = report.quality["hits"]
    assert hits["value"] == pytest.approx(share_of_hits(trained_llama, heldout_file, 3))
    assert hits["baseline"] == pytest.approx(share_of_hits(tiny_llama, heldout_file, 3))
    assert hits["low"] < hits["value"] < hits["high"]
    assert hits["n"] == 6 * 31
    assert report.quality["hits_lost"]["value"] == pytest.approx(hits["baseline"] - hits["value"])
    assert [gate.passed for gate in report.gates] == [True, False]
    assert report.recipe["quality"]["hits"]["k"] == 3


@pytest.mark.usefixtures("added")
def test_a_comparison_knows_which_way_is_better(trained_llama: Path, heldout_file: Path, tmp_path: Path) -> None:
    report = measured(trained_llama, [], written(tmp_path, heldout_file, []))
    assert list(report.quality) == ["hits"]
    assert direction("hits") is None  # the name does not say it
    assert comparison([Report.from_json(report.to_json())]).objectives == {"hits": "higher"}


@pytest.mark.usefixtures("added")
def test_a_recipe_is_checked(tmp_path: Path, heldout_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"quality\.hits\.k"):
        load(written(tmp_path, heldout_file, [], k=0))
    with pytest.raises(RecipeError, match=r"quality\.hits\.kk: unknown key") as caught:
        load(written(tmp_path, heldout_file, [], kk=1))
    assert "'k'" in caught.value.hint
    with pytest.raises(RecipeError, match="will not be measured") as caught:
        evaluate("nowhere", [], load(written(tmp_path, heldout_file, ["quality.hitss > 0"])), EvalOptions())
    assert "'hits'" in caught.value.hint
    assert schema("eval")["$defs"]["Hits"]["properties"]["k"]["description"] == "guesses"


def test_without_its_file_there_is_no_such_metric(tmp_path: Path, heldout_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"quality\.hits: unknown key"):
        load(written(tmp_path, heldout_file, []))
    assert "Hits" not in schema("eval")["$defs"]
