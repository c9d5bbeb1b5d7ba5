"""Perplexity, KL and top-1 agreement from the logits of real models."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aicompress.metrics import MeasuredFigures, perplexity
from aicompress.metrics.outputs import NO_TOKEN, TokenLogits
from aicompress.metrics.perplexity import METRIC, Perplexity


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (9, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def damaged(tiny_llama: Path) -> torch.nn.Module:
    changed = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    return changed


@torch.no_grad()
def measured(
    models: Sequence[torch.nn.Module], windows: torch.Tensor, kl_samples: int | None = None, batch: int = 4
) -> MeasuredFigures:
    batches = [
        TokenLogits(ids[:, 1:], tuple(model(ids).logits[:, :-1] for model in models)) for ids in windows.split(batch)
    ]
    return METRIC.measure(batches, Perplexity(text="unread.txt", kl_samples=kl_samples), 0)


def test_perplexity_is_what_transformers_computes(model: torch.nn.Module, windows: torch.Tensor) -> None:
    figures = measured([model], windows)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows]
    (alone,) = figures.alone
    assert list(alone) == ["perplexity"]
    assert alone["perplexity"].value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert alone["perplexity"].n == 9 * 23
    assert figures.against == ()


def test_an_identical_baseline_has_no_distance(model: torch.nn.Module, windows: torch.Tensor) -> None:
    figures = measured([model, model], windows)
    (against,) = figures.against
    assert against["kl"].value == 0
    assert against["top1_agreement"].value == 1
    tested, baseline = figures.alone
    assert tested["perplexity"].value == baseline["perplexity"].value


def test_kl_and_agreement_by_hand(model: torch.nn.Module, damaged: torch.nn.Module, windows: torch.Tensor) -> None:
    (against,) = measured([damaged, model], windows).against
    with torch.no_grad():
        base, tested = model(windows).logits[:, :-1].double(), damaged(windows).logits[:, :-1].double()
    p, q = base.softmax(-1), tested.softmax(-1)
    assert against["kl"].value == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert against["kl"].value > 1e-6
    same = float((base.argmax(-1) == tested.argmax(-1)).double().mean())
    assert against["top1_agreement"].value == pytest.approx(same)
    assert against["kl"].low is not None
    assert against["kl"].low >= 0


def test_every_baseline_has_its_own_figures(
    model: torch.nn.Module, damaged: torch.nn.Module, windows: torch.Tensor
) -> None:
    figures = measured([model, model, damaged], windows)
    near, far = figures.against
    assert near["kl"].value == 0 < far["kl"].value
    tested, same, other = (alone["perplexity"].value for alone in figures.alone)
    assert tested == same != other


def test_batches_do_not_change_the_figures(
    model: torch.nn.Module, damaged: torch.nn.Module, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured([damaged, model], windows, batch=9)
    monkeypatch.setattr(perplexity, "ROWS", 7)
    single = measured([damaged, model], windows, batch=1)
    assert single.alone[0]["perplexity"].value == pytest.approx(whole.alone[0]["perplexity"].value, rel=1e-5)
    for name in whole.against[0]:
        assert single.against[0][name].value == pytest.approx(whole.against[0][name].value, rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_kl_on_the_first_windows_only(
    model: torch.nn.Module, damaged: torch.nn.Module, windows: torch.Tensor, batch: int
) -> None:
    limited = measured([damaged, model], windows, kl_samples=4, batch=batch)
    first = measured([damaged, model], windows[:4])
    assert limited.against[0]["kl"].value == pytest.approx(first.against[0]["kl"].value, rel=1e-5)
    assert limited.against[0]["kl"].n == limited.against[0]["top1_agreement"].n == 4 * 23
    assert limited.alone[0]["perplexity"].n == 9 * 23


def test_windows_count_by_their_tokens_and_one_without_any_counts_nothing() -> None:
    logits = [torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    targets = torch.tensor([[1, 2, 3, 4, 5], [6, 7, *[NO_TOKEN] * 3], [NO_TOKEN] * 5])
    found = METRIC.measure([TokenLogits(targets, tuple(logits))], Perplexity(text="unused.txt"), 0)
    nll = torch.nn.functional.cross_entropy(logits[0].flatten(0, 1), targets.flatten())
    assert found.alone[0]["perplexity"].value == pytest.approx(float(nll.exp()))
    counted = targets.flatten() != NO_TOKEN
    tested, base = (each.flatten(0, 1).log_softmax(-1)[counted] for each in logits)
    assert found.against[0]["kl"].value == pytest.approx(float((base.exp() * (base - tested)).sum(-1).mean()))
