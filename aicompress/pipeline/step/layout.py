"""Choose the layout of an output: the first that all classes of transformers load, each tried without data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from aicompress.checkpoint import Checkpoint
from aicompress.checkpoint.layouts import Layout, Names, candidates, ct_config, native_names, on_disk
from aicompress.checkpoint.manifest import KEY, Manifest
from aicompress.errors import Refused
from aicompress.layer import LayerInfo
from aicompress.model.loading.definitions.definition import auto_class_names, parts_are_called, stock_models
from aicompress.weights import IntGrouped, TensorSpec, Weight

if TYPE_CHECKING:
    from aicompress.model.loading.stock import Trial


@dataclass(frozen=True)
class Described:
    """A layout with the config.json that its readers need.

    Attributes:
        layout: names of compressed parameters.
        config: config.json, or None.
        readers: classes of transformers that were tried and load it; with the code in the checkpoint if it is native.
        warnings: what the user should know of it.
        stored: by parameter, its tensors by their names in the file.
    """

    layout: Layout
    config: dict[str, Any] | None
    stored: Mapping[str, Mapping[str, TensorSpec]]
    readers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Contents:
    """What an output holds, whatever the layout; two that hold the same are equal.

    Attributes:
        config: config.json without a quantization_config; None where there will be no such file.
        dense: every parameter as it is, or decodes to.
        compressed: the compressed ones: layer and outline.
        manifest: entries and widths.
        encoder_module: the class of sentence-transformers that has to load it too; '' if there is none.
        cache_scheme: how the input rounds keys and values in the cache; None where it says nothing.
        entropy_coded: codes are to be entropy-coded, which the native layout alone holds.
    """

    config: dict[str, Any] | None
    dense: Mapping[str, TensorSpec]
    compressed: Mapping[str, tuple[LayerInfo, Weight]]
    manifest: Manifest = field(default_factory=Manifest)
    encoder_module: str = ""
    cache_scheme: Any = None
    entropy_coded: bool = False

    @cached_property
    def _identity(self) -> tuple[Any, ...]:
        """All that a trial of a layout depends on."""
        weights = [(name, weight) for name, (_, weight) in self.compressed.items()]
        outlines = tuple((name, json.dumps(each.meta()), tuple(each.specs().items())) for name, each in weights)
        plain = json.dumps([self.config, self.manifest.to_json(), self.cache_scheme])
        return plain, self.encoder_module, self.entropy_coded, tuple(self.dense.items()), outlines

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @cached_property
    def integers(self) -> dict[str, IntGrouped]:
        """The compressed parameters of integer codes."""
        return {name: weight for name, (_, weight) in self.compressed.items() if isinstance(weight, IntGrouped)}

    def stored(self, layout: Layout) -> dict[str, dict[str, TensorSpec]]:
        """By parameter, its tensors by their names in the file."""
        return {name: self._stored(name, layout) for name in self.dense}

    def _stored(self, name: str, layout: Layout) -> dict[str, TensorSpec]:
        if name not in self.compressed:
            return {name: self.dense[name]}
        tensors = on_disk(name, self.compressed[name][1], layout)
        lent = {native_names(name, [suffix])[suffix] for suffix in self.manifest.entries[name].shared}
        return {disk: TensorSpec.of(tensor) for disk, tensor in tensors.items() if disk not in lent}


def stores_entropy(step: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Whether a step's output has entropy-coded codes: as its recipe says, or else as its input has them."""
    asked = step.get("recipe", {}).get("storage")
    return checkpoint.entropy_coded if asked is None else bool(asked == "entropy")


def cache_scheme(checkpoint: Checkpoint) -> Any:
    """How an input rounds keys and values in the cache; None where it says nothing, or its scales do not come along."""
    described = (checkpoint.original.config or {}).get("quantization_config")
    scheme = described.get("kv_cache_scheme") if isinstance(described, dict) else None
    known = bool(checkpoint.foreign.cache_scales) or (isinstance(scheme, dict) and scheme.get("dynamic") is True)
    return scheme if known else None


def described(contents: Contents) -> Described:
    """The layout that most readers load.

    A class of transformers that would fill parameters at random rules a layout out. One that refuses it does so where
    all classes load another.

    Raises:
        CheckpointError: the config is not one that the architecture takes.
        Refused: sentence-transformers would take a part of a weight for the whole.
    """
    by_parts = bool(contents.encoder_module) or parts_are_called(contents.config or {})
    layouts = candidates(contents.compressed, contents.config is not None, by_parts)
    if contents.entropy_coded and contents.compressed:
        layouts = [("native", False)]
    if contents.manifest.widths and contents.config is not None:
        layouts = [("native", False)]  # what config.json says of the widths is not enough
    if contents.config is None or layouts[0][0] == "plain":
        (layout, dequantize), *_ = layouts
        config, stored = _config(contents, layout, dequantize, ()), contents.stored(layout)
        warnings = [*_without_cache_scheme(contents, layout), *_of_other_modules(contents, stored)]
        return Described(layout, config, stored, warnings=tuple(warnings))
    tried: list[tuple[Described, dict[str, Trial]]] = []
    for layout, dequantize in layouts:
        outcome = _tried(contents, layout, dequantize)
        if outcome is not None:
            tried.append(outcome)
            if all(trial.loads for trial in outcome[1].values()):
                break
    safe = [outcome for outcome in tried if not any(trial.random for trial in outcome[1].values())]
    choice, trials = next((each for each in safe if all(t.loads for t in each[1].values())), safe[0])
    warnings = [*_passed_over(choice, tried), *_refusals(trials), *_without_cache_scheme(contents, choice.layout)]
    warnings += _of_other_modules(contents, choice.stored)
    return replace(choice, warnings=(*warnings, *(_of_parts(choice, contents) if choice.readers else [])))


def _without_cache_scheme(contents: Contents, layout: Layout) -> tuple[str, ...]:
    """That the output does not say how keys and values are rounded in the cache, though its input does."""
    if contents.cache_scheme is None or layout == "compressed-tensors":
        return ()
    return ("kv_cache_scheme is left out: a quantization_config of compressed-tensors alone says it",)


def _of_parts(choice: Described, contents: Contents) -> list[str]:
    """What readers that call parts of the model need to load it, or make of it."""
    if contents.encoder_module and choice.layout == "native":
        return ["sentence-transformers loads it with trust_remote_code=True, or after `import aicompress.hf`"]
    decoded = bool((choice.config or {}).get("quantization_config", {}).get("dequantize"))
    if decoded and any(weight.activation_bits for weight in contents.integers.values()):
        readers = "sentence-transformers and transformers decode" if contents.encoder_module else "transformers decodes"
        return [f"{readers} it at load; aicompress.load alone rounds inputs too"]
    return []


def _of_other_modules(contents: Contents, stored: Mapping[str, Mapping[str, TensorSpec]]) -> list[str]:
    """What sentence-transformers makes of a module that is no model of transformers, such as a table of embeddings.

    Raises:
        Refused: it would read a factor under the name of the weight, as it takes a table of any width.
    """
    module = contents.encoder_module
    if module in ("", "Transformer") or not contents.compressed:
        return []
    for name in contents.compressed:
        taken = stored[name].get(name)
        if taken is not None and taken.dtype.is_floating_point and len(taken.shape) == len(contents.dense[name].shape):
            raise Refused(
                f"{name}: {module} of sentence-transformers would take one of its factors for the whole",
                "give the weight file as IN and a .safetensors file as OUT, which it does not read",
            )
    return [f"{module} of sentence-transformers reads plain tensors: `aicompress export --to dense` gives them"]


@lru_cache(maxsize=16)
def _tried(contents: Contents, layout: Layout, dequantize: bool) -> tuple[Described, dict[str, Trial]] | None:
    """A layout and what each class of transformers makes of it; None where the layout cannot name its modules.

    A search asks for the same several times.
    """
    from aicompress.model.loading.stock import StockReader  # with transformers, which a bare file does not need

    readers = [StockReader(model, contents.dense) for model in stock_models(contents.config or {})]
    config = _config(contents, layout, dequantize, () if dequantize else [reader.names() for reader in readers])
    if config is None:
        return None
    quantization = config["quantization_config"]
    stored = contents.stored(layout)
    if layout == "native":
        specs = {disk: spec for tensors in stored.values() for disk, spec in tensors.items()}
        held = {disk: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for disk, spec in specs.items()}
        trials = {reader.name: reader.try_native(quantization, held) for reader in readers}
    else:
        parameter = {disk: name for name, tensors in stored.items() for disk in tensors}
        trials = {reader.name: reader.try_packed(quantization, contents.integers, parameter) for reader in readers}
    loading = tuple(name for name, trial in trials.items() if trial.loads)
    return Described(layout, config, stored, loading), trials


def _passed_over(choice: Described, tried: list[tuple[Described, dict[str, Trial]]]) -> list[str]:
    """Why the output is not in the layout that stock transformers reads, where it could have been."""
    if choice.layout != "native" or tried[0][0].layout == "native":
        return []
    name, trial = next((name, trial) for name, trial in tried[0][1].items() if not trial.loads)
    why = trial.refused or f"{name} of transformers would fill {trial.random[0]} at random"
    return [f"stored in aicompress's own layout, not in compressed-tensors: {why}"]


def _refusals(trials: Mapping[str, Trial]) -> list[str]:
    """A note where classes of transformers refuse the output."""
    refused = {name: trial.refused for name, trial in trials.items() if trial.refused}
    if not refused:
        return []
    where = "transformers" if len(refused) == len(trials) else f"{' and '.join(refused)} of transformers"
    return [f"{next(iter(refused.values()))}: this output loads by aicompress.load, not in {where}"]


def _config(contents: Contents, layout: Layout, dequantize: bool, readers: Sequence[Names]) -> dict[str, Any] | None:
    """config.json with the quantization_config that the layout's readers need; None where it cannot be written."""
    if contents.config is None:
        return None
    plain = {key: value for key, value in contents.config.items() if key != "quantization_config"}
    if layout == "compressed-tensors":
        others = [name for name in contents.dense if name not in contents.integers]
        quantization = ct_config(contents.integers, dequantize, others, readers, contents.cache_scheme)
        return None if quantization is None else {**plain, "quantization_config": quantization}
    auto_map = {
        key: value for key, value in plain.pop("auto_map", {}).items() if "modeling_aicompress" not in str(value)
    }
    if layout == "native":
        entries = Manifest(contents.manifest.entries, (), contents.manifest.widths).to_json()
        plain["quantization_config"] = {"quant_method": KEY, **entries}
        auto_map.update(auto_classes(contents.config))
    return {**plain, "auto_map": auto_map} if auto_map else plain


def auto_classes(config: dict[str, Any]) -> dict[str, str]:
    """auto_map lines that lead transformers' Auto classes to modeling_aicompress.py."""
    return {auto: f"modeling_aicompress.{name}" for auto, name in auto_class_names(config).items()}
