"""Try a planned output in the classes of stock transformers, on the meta device, before a byte of it is written.

transformers fills parameters that get no tensor with random numbers and merely warns. Which these are follows from
names alone: those of the tensors in the file, and those of the model once its quantizer has prepared it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import MergeModulelist
from transformers.integrations.compressed_tensors import CompressedTensorsDequantize, get_experts_scheme
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from aicompress.checkpoint.layouts import Names, ct_scheme
from aicompress.model import hf
from aicompress.model.loading.weight_reads import reads_weights
from aicompress.weights import IntGrouped

_PACKED = re.compile(r"\.weight_(packed|scale|shape|zero_point)$")


@dataclass(frozen=True)
class Trial:
    """What a class of transformers makes of a planned output.

    Attributes:
        random: parameters that it would fill at random, beside those that a dense checkpoint would leave to it too.
        refused: why it would raise an error, or ''.
    """

    random: tuple[str, ...] = ()
    refused: str = ""

    @property
    def loads(self) -> bool:
        return not self.random and not self.refused


class _Quantizer(CompressedTensorsHfQuantizer):  # type: ignore[misc]
    """transformers' reader of compressed-tensors as far as names go: it decodes nothing, so its package stays out."""

    def __init__(self, dequantize: bool) -> None:
        method = QuantizationMethod.COMPRESSED_TENSORS
        self.quantization_config = SimpleNamespace(quant_method=method, dequantize=dequantize)
        self.pre_quantized = True
        self.use_fp8_kernel = False


class StockReader:
    """A class of transformers that a checkpoint is loaded by.

    Args:
        model: on the meta device; it is of no use after a trial.
        parameters: names in the checkpoint.
    """

    def __init__(self, model: Any, parameters: Iterable[str]) -> None:
        self.model = model
        self.name = type(model).__name__
        self._places = hf.arrivals(model, parameters)
        self._random = _left(model, self._places)  # with or without compression

    def names(self) -> Names:
        """Its names of the checkpoint's modules, and of all that it could take for quantized ones."""
        layers = {name for name, module in self.model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
        modules = {
            name: target.removesuffix(".weight") for name, (target, merge) in self._places.items() if merge is None
        }
        return Names({name: module for name, module in modules.items() if module in layers}, layers)

    def try_packed(
        self, described: Mapping[str, Any], weights: Mapping[str, IntGrouped], stored: Mapping[str, str]
    ) -> Trial:
        """Try the compressed-tensors layout.

        Args:
            described: the quantization_config.
            weights: the compressed parameters.
            stored: tensor in the file -> its parameter.
        """
        quantizer = _Quantizer(bool(described.get("dequantize")))
        quantizer._convert_model_for_quantization(self.model)
        if not described.get("dequantize"):
            if self._reads_weights(list(weights)):
                return Trial(refused=f"{self.name} reads weights by code of its own")
            _pack(self.model, described)
        try:
            places = hf.arrivals(self.model, stored, quantizer)
        except ValueError:  # transformers cannot add scales to the weights that it splits or merges, and says so
            return Trial(refused=f"{self.name} splits or merges weights and cannot do so with compressed ones")
        random = sorted(_left(self.model, places) - self._random)
        return Trial(tuple(random), _unmerged(places, described, weights, stored))

    def try_native(self, described: Mapping[str, Any], held: Mapping[str, torch.Tensor]) -> Trial:
        """Try the native layout.

        Args:
            described: the quantization_config.
            held: every tensor of the file, on the meta device.
        """
        try:
            hf.store(self.model, hf.AicompressConfig(**described), held)
        except ValueError as error:
            return Trial(refused=str(error).removesuffix(hf.INSTEAD))
        return Trial()

    def _reads_weights(self, tensors: list[str]) -> bool:
        """Whether the class fails without these weights; the model is as before."""
        weights = [(module, dict(module._parameters)) for module in self.model.modules()]
        reads = reads_weights(self.model, tensors)
        for module, parameters in weights:
            module._parameters.update(parameters)
        return reads


def _pack(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Give layers that a config group names the parameters that compressed-tensors expects there, empty ones."""
    groups = described["config_groups"].values()
    patterns = [(re.compile(target.removeprefix("re:")), group) for group in groups for target in group["targets"]]
    for name, module in model.named_modules():
        group = next((group for pattern, group in patterns if pattern.match(name)), None)
        if group is None or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        packed = group["format"] == "pack-quantized"
        module._parameters.pop("weight", None)
        for leaf in ("weight_packed", "weight_scale", "weight_shape") if packed else ("weight", "weight_scale"):
            module._parameters[leaf] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)


def _left(model: Any, places: Mapping[str, tuple[str, Any]]) -> set[str]:
    """Parameters of a model that get none of the tensors in these places, nor share one with a parameter that does."""
    known = model.state_dict()
    given: set[str] = set()
    for target, merge in places.values():
        given.add(target)
        if merge is not None:
            first, *others = merge[1].target_patterns
            given |= {target.replace(first, other) for other in others}
    tied = [{target, source} for target, source in model.all_tied_weights_keys.items()]
    shared = set().union(*(pair for pair in tied if pair & given)) if tied else set()
    return {_PACKED.sub(".weight", name) for name in known.keys() - given - shared}


def _unmerged(
    places: Mapping[str, tuple[str, Any]],
    described: Mapping[str, Any],
    weights: Mapping[str, IntGrouped],
    stored: Mapping[str, str],
) -> str:
    """Why transformers raises an error where it merges or splits tensors of a compressed checkpoint; '' if it does not.

    It decodes what it merges into one tensor, such as experts, by one scheme for all of them, and nothing else.
    """
    groups = {key: SimpleNamespace(**group) for key, group in described["config_groups"].items()}
    scheme = get_experts_scheme(SimpleNamespace(config_groups=groups))
    for disk, (_, merge) in places.items():
        if merge is None or merge[1].target_patterns == ["weight"]:  # the conversion of a single layer
            continue
        decode, *merging = merge[1].operations
        weight = weights.get(stored[disk])
        if not isinstance(decode, CompressedTensorsDequantize):
            if weight is not None:
                return f"{stored[disk]} is split or merged as it lies in the file"
        elif weight is None or weight.activation_bits is not None or not _stacks(merging):
            return f"{stored[disk]} is merged with others, which compressed-tensors decodes as packed experts only"
        elif ct_scheme(weight) != scheme.weights:
            return f"{stored[disk]} is merged with others of another scheme"
    return ""


def _stacks(operations: list[Any]) -> bool:
    return bool(operations) and isinstance(operations[0], MergeModulelist)
