"""Inputs of layers as rows, one for each product with the layer's matrix."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def rows_of(module: nn.Module, given: Tensor, mask: Tensor | None) -> Tensor | None:
    """A layer's input as rows (tokens, in).

    A convolution's rows are its patches (positions, channels*kernel) in the order of its weight matrix; a grouped one
    has no single matrix of inputs, and an embedding none at all: None.
    """
    if isinstance(module, Convolution):
        return _patches(module, given) if module.groups == 1 else None
    if not given.is_floating_point():
        return None
    if mask is not None and given.shape[: mask.ndim] == mask.shape:
        return given[mask]
    return given.reshape(-1, given.shape[-1])


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, given: Tensor) -> Tensor:
    """im2col; a one-dimensional convolution is a two-dimensional one of height 1."""
    axes, padding = len(module.kernel_size), module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        given, padding = functional.pad(given, module._reversed_padding_repeated_twice, mode), (0,) * axes
    if isinstance(module, nn.Conv3d):
        return _windows(module, functional.pad(given, [side for each in reversed(padding) for side in (each, each)]))
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if axes == 1:
        given, kernel, dilation, stride = given.unsqueeze(-2), (1, *kernel), (1, *dilation), (1, *stride)
        padding = (0, *padding)
    patches = functional.unfold(given, kernel, dilation, padding, stride)  # (N, I*kh*kw, positions)
    return patches.movedim(-1, -2).reshape(-1, patches.shape[-2])


def _windows(module: nn.Conv3d, given: Tensor) -> Tensor:
    """im2col along three axes, (positions, I*kd*kh*kw)."""
    for size, step, apart in zip(module.kernel_size, module.stride, module.dilation, strict=True):
        given = given.unfold(-3, apart * (size - 1) + 1, step)[..., ::apart]
    return given.movedim(-7, -4).flatten(-4).flatten(0, -2)  # from (N, I, *positions, *kernel)
