"""SVD-LLM v1 as a reference: whitened singular value decomposition by a Cholesky factor (arXiv:2403.07378).

Written from the paper, on transformers alone: Gram matrices of the original model's inputs, S = chol(H), and
W ≈ SVD_r(W S) S⁻¹ for every linear layer of the decoder. The factors are multiplied again, for only the outputs are
judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DAMPING = 1e-6  # of the mean diagonal, tenfold until a Cholesky factor exists


@torch.no_grad()
def compress(source: Path, calibration: Path, samples: int, length: int, keep: float, out: Path) -> None:
    """Write the dense model of rank keep · mn / (m + n) in every decoder layer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    text = calibration.read_text(encoding="utf-8-sig")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: samples * length].view(-1, length)
    layers = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    for name, gram in grams(model, layers, windows).items():
        weight = layers[name].weight
        weight.copy_(whitened(weight.double(), gram, int(keep * weight.numel() / sum(weight.shape))))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def grams(model: Any, layers: Mapping[str, nn.Module], windows: Tensor) -> dict[str, Tensor]:
    """Σ x xᵀ of every layer's inputs, float64."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, layer in layers.items():

        def see(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
            rows = given[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + (rows.t() @ rows).double()

        hooks.append(layer.register_forward_pre_hook(see))
    for batch in torch.split(windows, 8):
        model(batch)
    for hook in hooks:
        hook.remove()
    return sums


def whitened(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """SVD_r(W S) S⁻¹ with S Sᵀ = H."""
    damping, factor = DAMPING, None
    while factor is None:
        raised = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        root, failed = torch.linalg.cholesky_ex(raised)
        factor, damping = (None if failed else root), 10 * damping
    u, s, v = torch.linalg.svd(weight @ factor, full_matrices=False)
    inner = torch.linalg.solve_triangular(factor, v[:rank], upper=False, left=False)
    return ((u[:, :rank] * s[:rank]) @ inner).float()
