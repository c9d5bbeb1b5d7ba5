"""What every metric owes, found by discovery: a new metric file is covered without being named here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aicompress.data import Data
from aicompress.metrics import Estimate, FigureSpec, MeasuredFigures, Metric, metrics
from aicompress.metrics.outputs import (
    KINDS,
    ClassLogits,
    ModelOutputs,
    PairEmbeddings,
    SentenceEmbeddings,
    TokenLogits,
)
from aicompress.report.quality import direction

SOURCES: dict[str, dict[str, Any]] = {
    "text": {"text": "a.txt"},
    "arrays": {"arrays": "a.npz", "inputs": "x", "labels": "y"},
    "pairs": {"pairs": "a.tsv", "columns": (1, 2), "score": 0},
}
FIRST = ["perplexity", "accuracy", "similarity", "embedding"]  # whose reports did not say which way is better
ALL = [pytest.param(metric, id=metric.name) for metric in metrics().values()]


def config(metric: Metric[Any, Any]) -> Data:
    source: Data = metric.config(**SOURCES[metric.reads.sources[0]])
    return source


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(kind: type[ModelOutputs], models: int) -> list[ModelOutputs]:
    """Random outputs of some models in two batches, or in one where metrics read all samples at once."""
    if kind is TokenLogits:
        targets = torch.arange(40).view(4, 10) % 7
        return [TokenLogits(i, tuple(random(2, 10, 7, seed=m) for m in range(models))) for i in targets.split(2)]
    if kind is ClassLogits:
        logits = tuple(random(10, 3, seed=m) for m in range(models))
        return [ClassLogits(torch.arange(10) % 3, logits, "samples") for _ in range(2)]
    embeddings = tuple(random(50, 8, seed=m) for m in range(models))
    if kind is PairEmbeddings:
        return [PairEmbeddings(random(25, seed=9), torch.arange(25), torch.arange(25, 50), embeddings)]
    return [SentenceEmbeddings(embeddings)]


def test_metrics_are_ordered_by_what_they_read() -> None:
    places = [(KINDS.index(metric.reads), metric.name) for metric in metrics().values()]
    assert places == sorted(places)
    assert [name for name in metrics() if name in FIRST] == FIRST


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_the_declared_figures_are_measured(metric: Metric[Any, Any], models: int) -> None:
    entries = metric.entries(metric.measure(outputs(metric.reads, models), config(metric), 0))
    assert len(entries) == max(1, models - 1)
    expected = [figure for figure in metric.figures if models > 1 or not figure.compared]
    for row in entries:
        assert list(row) == [figure.name for figure in expected]
        for figure in expected:
            entry = row[figure.name]
            assert entry["low"] <= entry["value"] <= entry["high"]
            assert entry["n"] > 1
            assert entry["better"] == figure.better
            assert ("baseline" in entry) == (models > 1 and not figure.compared)


@pytest.mark.parametrize("metric", ALL)
def test_the_same_seed_gives_the_same_figures(metric: Metric[Any, Any]) -> None:
    first, second = (metric.measure(outputs(metric.reads, 2), config(metric), 5) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", FIRST)
def test_a_report_written_before_directions_were_stated_ranks_the_same(name: str) -> None:
    metric = metrics()[name]
    assert {figure.name: direction(figure.name) for figure in metric.figures} == {
        figure.name: figure.better for figure in metric.figures
    }


@pytest.mark.parametrize("metric", ALL)
def test_a_metric_says_what_it_reads(metric: Metric[Any, Any]) -> None:
    assert metric.reads in KINDS
    assert metric.summary
    assert metric.check(10, config(metric)) is None


def test_a_metric_without_comparisons_gives_its_figures_beside_each_baseline() -> None:
    one, other = Estimate(1.0, 0.5, 1.5, 10, "texts", "none"), Estimate(2.0, 1.5, 2.5, 10, "texts", "none")
    figures = (FigureSpec("width", "lower"),)
    measured = MeasuredFigures(({"width": one}, {"width": other}, {"width": one}))
    metric = Metric("size", "", Data, SentenceEmbeddings, figures, lambda batches, data, seed: measured)
    assert [row["width"]["baseline"] for row in metric.entries(measured)] == [2.0, 1.0]


def test_a_figure_that_is_not_declared_is_a_mistake() -> None:
    one = Estimate(1.0, 0.5, 1.5, 10, "texts", "none")
    nothing = MeasuredFigures((), ())
    figures = (FigureSpec("width", "lower"),)
    metric = Metric("size", "", Data, SentenceEmbeddings, figures, lambda batches, data, seed: nothing)
    assert metric.entries(MeasuredFigures(({"width": one},), ())) == [{"width": {**one.plain(), "better": "lower"}}]
    with pytest.raises(TypeError, match="does not declare height"):
        metric.entries(MeasuredFigures(({"width": one, "height": one},), ()))
