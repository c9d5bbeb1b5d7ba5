"""Find how experts in one tensor are multiplied with their inputs: how many there are, and which way round they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aicompress.layer import MergedExperts
from aicompress.model.blocks.expert_inputs import product_of
from aicompress.model.equivalence.search import each_kind
from aicompress.model.loading.partial_model import PartialModel


class _Watch(TorchFunctionMode):
    """Notes the experts that parameters hold; None for one that is used in several ways."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.seen: dict[str, MergedExperts | None] = {}
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in parameters.items()}
        self._sizes = {name: tensor.numel() for name, tensor in parameters.items()}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = product_of(function, args)
        if product is not None:
            _, weight, transposed = product
            name = self._names.get(weight.untyped_storage().data_ptr())
            rows, columns = weight.shape[-2:]
            if name is not None and self._sizes[name] > rows * columns:
                experts = MergedExperts(self._sizes[name] // (rows * columns), transposed)
                same = self.seen.setdefault(name, experts) == experts
                self.seen[name] = experts if same else None
        return function(*args, **(kwargs or {}))


def _watched(block: nn.Module, run: Callable[[], Any]) -> dict[str, MergedExperts]:
    """The parameters of a block that hold experts."""
    parameters = {name: tensor for name, tensor in block.named_parameters() if tensor.ndim in (2, 3)}
    with _Watch(parameters) as watch:
        run()
    return {name: experts for name, experts in watch.seen.items() if experts is not None}


def expert_products(model: Any, loader: PartialModel, batch: Mapping[str, Tensor]) -> dict[str, MergedExperts]:
    """The experts that parameters hold whose products can be watched, by name in the checkpoint.

    Args:
        model: on the meta device.
        loader: fills parts of it with float32 noise.
        batch: a few samples, as keyword arguments of its forward.

    Raises:
        Exception: whatever the model raises for such a batch.
    """
    searched = each_kind(model, loader, batch, _watched)
    held = {f"{prefix}{name}": own for prefix, experts in searched.named() for name, own in experts.items()}
    return {name: held[target] for name, target in loader.paths.items() if target in held}
