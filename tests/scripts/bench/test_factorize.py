"""The benchmark of factorize: its reference is the least whitened error, its rows are recipes, its targets are told."""

from __future__ import annotations

import pytest
import torch

from aicompress.methods import get
from scripts.bench.factorize import times
from scripts.bench.factorize.__main__ import FIRST, FOUR_BITS, GROWTH, OURS, REFERENCE, ROUNDED, TARGETS, verdicts
from scripts.bench.factorize.svd_llm import whitened


@pytest.mark.parametrize("tokens", [200, 9])
def test_the_reference_is_whitened_svd(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(tokens, 16, generator=generator) @ torch.randn(16, 16, generator=generator)).double()
    weight, gram = torch.randn(12, 16, generator=generator).double(), rows.t() @ rows
    error = weight - whitened(weight, gram, 5).double()
    lost = float(((error @ gram) * error).sum())
    best = float(torch.linalg.svdvals(weight @ rows.t())[5:].square().sum())
    assert lost == pytest.approx(best, rel=1e-2, abs=1e-3 * float((weight @ rows.t()).square().sum()))


def test_rows_are_parameters_of_methods() -> None:
    for sections in OURS.values():
        method = get("factorize", sections["method"]["name"])
        method.config(**sections["method"], keep=0.8)
        assert sections.get("effort", "best") in (method.efforts or {"best": None})
    for sections in FOUR_BITS.values():
        get("quantize", sections["method"]["name"]).config(**sections["method"])
    assert set(TARGETS) <= set(OURS)
    assert {other for _, other in TARGETS.values()} <= {REFERENCE, *OURS}


def test_targets_are_told_where_both_rows_are_there() -> None:
    known = {
        ("two_sided", 0.6): [{"value": 0.05, "growth": 0.04}, {"value": 0.03, "growth": 0.04}],
        (REFERENCE, 0.6): [{"value": 0.08, "growth": 0.05}, {"value": 0.06, "growth": 0.05}],
    }
    known["two_sided", 0.8] = [{"value": 0.1, "growth": 0.1}]
    assert verdicts(known, large=False) == ["- two_sided, keep 0.6: 0.57 × SVD-LLM v1, at most 0.82 is the target: met"]
    growth = "0.80 × the growth of log-perplexity of SVD-LLM v1, at most 0.7 is the target: **missed**"
    assert verdicts(known, large=True) == [f"- two_sided, keep 0.6: {growth}"]
    assert set(GROWTH) <= set(OURS)


@pytest.mark.parametrize("chain", ROUNDED)
def test_a_chain_is_held_to_the_sum_of_its_steps(chain: str) -> None:
    rows = {FIRST: 0.02, ROUNDED[chain]: 0.01, chain: 0.036}
    known = {(name, 0.8): [{"value": value, "growth": value}] for name, value in rows.items()}
    told = f"- {chain}, keep 0.8: 1.20 × the sum of both, at most 1.1 is the target: **missed**"
    assert verdicts(known, large=False) == [told]


def test_times_of_factors_are_measured() -> None:
    for (figure,) in times.ratios((32, 64), 4, torch.float32, [8]):
        assert figure > 0
