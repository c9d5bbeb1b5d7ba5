"""The best values of the survivors: least squares on a given mask, all rows at once.

With S the survivors of a row, its loss (w − ŵ) H (w − ŵ)ᵀ is least at ŵ_S = H_SS⁻¹ H_S: w. Conjugate gradients
(Hestenes and Stiefel 1952) with the diagonal of H as preconditioner solve the systems of all rows together: each
iteration is one product with H, masked. ALPS (Meng et al. 2024, arXiv:2406.07831, section 3.2) does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 50
TOLERANCE = 1e-3  # of the residual's norm: the loss is off by its square


def refit(wanted: Tensor, hessian: Tensor, mask: Tensor, start: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Least tr((W − Ŵ) H (W − Ŵ)ᵀ) over all Ŵ that are zero where the mask is; never above the start's.

    Args:
        wanted: W, (out, in) float32.
        hessian: H, (in, in) float32, positive definite.
        mask: (out, in) bool.
        start: where to begin, (out, in).
        iterations: at most; fewer where the residual is small before.
    """
    fitted = start * mask
    inverse = hessian.diagonal().reciprocal()
    residual = ((wanted - fitted) @ hessian).mul_(mask)
    direction = residual * inverse
    size = (residual * direction).sum(dim=1)
    enough = TOLERANCE**2 * (((wanted @ hessian).mul_(mask)).square_() * inverse).sum()
    for _ in range(iterations):
        if size.sum() <= enough:
            break
        image = (direction @ hessian).mul_(mask)
        step = size / (direction * image).sum(dim=1)
        step = torch.nan_to_num(step, 0.0, 0.0, 0.0)[:, None]  # a row that is solved has direction 0
        fitted.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        scaled = residual * inverse
        new = (residual * scaled).sum(dim=1)
        direction.mul_(torch.nan_to_num(new / size, 0.0, 0.0, 0.0)[:, None]).add_(scaled)
        size = new
    return fitted
