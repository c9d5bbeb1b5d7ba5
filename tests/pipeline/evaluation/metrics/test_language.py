import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from aicompress.errors import CheckpointError
from aicompress.pipeline.evaluation.metrics import language
from aicompress.pipeline.evaluation.metrics.language import language_figures


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


def test_perplexity_is_what_transformers_computes(model: torch.nn.Module, windows: torch.Tensor) -> None:
    found = language_figures(model, [], windows)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows]
    (figures,) = found
    assert list(figures) == ["perplexity"]
    assert figures["perplexity"].value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert figures["perplexity"].n == 9 * 23


def test_an_identical_baseline_has_no_distance(model: torch.nn.Module, windows: torch.Tensor) -> None:
    (figures,) = language_figures(model, [model], windows)
    assert figures["kl"].value == 0
    assert figures["top1_agreement"].value == 1
    assert figures["perplexity"].baseline == figures["perplexity"].value


def test_kl_and_agreement_by_hand(model: torch.nn.Module, damaged: torch.nn.Module, windows: torch.Tensor) -> None:
    (figures,) = language_figures(damaged, [model], windows)
    with torch.no_grad():
        base, tested = model(windows).logits[:, :-1].double(), damaged(windows).logits[:, :-1].double()
    p, q = base.softmax(-1), tested.softmax(-1)
    assert figures["kl"].value == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert figures["kl"].value > 1e-6
    same = float((base.argmax(-1) == tested.argmax(-1)).double().mean())
    assert figures["top1_agreement"].value == pytest.approx(same)
    assert figures["kl"].low is not None
    assert figures["kl"].low >= 0


def test_every_baseline_has_its_own_figures(
    model: torch.nn.Module, damaged: torch.nn.Module, windows: torch.Tensor
) -> None:
    near, far = language_figures(model, [model, damaged], windows)
    assert near["kl"].value == 0 < far["kl"].value
    assert far["perplexity"].baseline != near["perplexity"].baseline
    assert far["perplexity"].value == near["perplexity"].value


def test_batches_do_not_change_the_figures(
    model: torch.nn.Module, damaged: torch.nn.Module, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = language_figures(damaged, [model], windows)
    monkeypatch.setattr(language, "LOGITS", 1)
    monkeypatch.setattr(language, "ROWS", 7)
    (single,) = language_figures(damaged, [model], windows)
    for name in whole:
        assert single[name].value == pytest.approx(whole[name].value, rel=1e-5)


def test_kl_on_the_first_windows_only(model: torch.nn.Module, damaged: torch.nn.Module, windows: torch.Tensor) -> None:
    (limited,) = language_figures(damaged, [model], windows, kl_samples=4)
    (first,) = language_figures(damaged, [model], windows[:4])
    assert limited["kl"].value == pytest.approx(first["kl"].value, rel=1e-5)
    assert limited["kl"].n == 4 * 23
    assert limited["perplexity"].n == 9 * 23


def test_an_encoder_has_no_perplexity(tiny_bert: Path, windows: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="no logits"):
        language_figures(AutoModel.from_pretrained(tiny_bert), [], windows)


def test_vocabularies_must_agree(model: torch.nn.Module, windows: torch.Tensor, tiny_llama: Path) -> None:
    larger = AutoModelForCausalLM.from_pretrained(tiny_llama)
    larger.resize_token_embeddings(300)
    with pytest.raises(CheckpointError, match="256 and 300"):
        language_figures(model, [larger], windows)
