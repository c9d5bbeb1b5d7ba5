"""Read LoRA adapters as PEFT saves them: which product is added to which weight, and what takes another's place.

W + weight * alpha / r * B A, with alpha / sqrt(r) for rsLoRA (Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023,
arXiv:2312.03732). An embedding's factors are `lora_embedding_A` and `_B`; `modules_to_save` and biases are replaced. An
embedding that is adapted lies in the file as well (`base_layer`): it is what the product is added to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aicompress.checkpoint.files import read_headers
from aicompress.checkpoint.header import TensorRef
from aicompress.checkpoint.json_text import read_json
from aicompress.checkpoint.source import ADAPTER_CONFIG, Source, local_folder
from aicompress.errors import CheckpointError
from aicompress.selection import Expression

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these change the base that the adapter was trained on
# Fields that change what an adapter computes, when they are set at all.
_UNREAD = (
    "use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens", "target_parameters", "trainable_token_indices",
    "layer_replication", "arrow_config", "megatron_config", "use_bdlora",
)  # fmt: skip


@dataclass(frozen=True)
class LoraFactors:
    """The product that is added to one weight.

    Attributes:
        a, b: names of A (r, in) and B (out, r).
        scale: what their product is multiplied by.
        embedding: the weight is (in, out): rows of tokens.
    """

    a: str
    b: str
    scale: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        source: its files.
        weight: what it is multiplied by.
        tensors: every tensor of it.
        factors: by module of the base model.
        replaced: parameters of the base model -> the tensors that take their place.
        fan_in_fan_out: it says that layers store (in, out).
        keeps_ties: what is tied to an adapted weight is adapted with it; else it stays as it was (PEFT's
            `ensure_weight_tying`).
    """

    source: Source
    weight: float
    tensors: Mapping[str, TensorRef]
    factors: Mapping[str, LoraFactors]
    replaced: Mapping[str, str]
    fan_in_fan_out: bool
    keeps_ties: bool

    @classmethod
    def open(cls, name: str | Path, weight: float = 1.0) -> Adapter:
        """Open an adapter: header and JSON only.

        Args:
            name: a directory with adapter_config.json, or `hf://org/name[@revision]`.
            weight: what it is multiplied by.

        Raises:
            CheckpointError: it is not there, or is something else than a LoRA that can be merged.
        """
        folder = local_folder(name)
        if not (folder / ADAPTER_CONFIG).is_file():
            raise CheckpointError(f"{folder} is no adapter: it has no {ADAPTER_CONFIG}", "give the folder PEFT saved")
        if not (folder / WEIGHTS).is_file():
            hint = "pickles are never opened: save the adapter again with safetensors"
            raise CheckpointError(f"{folder} has no {WEIGHTS}", hint)
        config = read_json(folder / ADAPTER_CONFIG)
        _require_read(folder, config)
        source = Source(folder, (folder / WEIGHTS,), {}, folder, None)
        tensors, _ = read_headers(source)
        factors, replaced = _sorted(folder, tensors, config)
        flags = bool(config.get("fan_in_fan_out")), bool(config.get("ensure_weight_tying"))
        return cls(source, weight, tensors, factors, replaced, *flags)


def _require_read(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse an adapter that a product added to weights does not say.

    Raises:
        CheckpointError: naming what is not understood.
    """
    hint = "merge it with PEFT (merge_and_unload), and give the merged model as IN"
    kind = str(config.get("peft_type")).upper()
    if kind != "LORA":
        raise CheckpointError(f"{folder}: an adapter of type {kind} cannot be merged, LORA can", hint)
    unread = [name for name in _UNREAD if config.get(name)]
    if unread:
        raise CheckpointError(f"{folder}: {unread[0]} is not understood", hint)
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_STARTS):
        message = f"{folder}: init_lora_weights {start!r} changes the base model, whose files it does not fit any more"
        raise CheckpointError(message, hint)


def _sorted(
    folder: Path, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]
) -> tuple[dict[str, LoraFactors], dict[str, str]]:
    """Factors by module, and replaced parameters.

    Raises:
        CheckpointError: a tensor is neither, lacks its other half, or has another rank than the settings say.
    """
    pairs: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    ranks, alphas = (_patterns(folder, config, name) for name in ("rank_pattern", "alpha_pattern"))
    for name in sorted(tensors, key=lambda name: ".modules_to_save." in name):  # these are what the model runs
        own = name.removeprefix(PREFIX)
        match = _FACTOR.match(own)
        if match:
            module, embedding, letter = match.groups()
            pairs.setdefault(module, {})[f"{embedding or ''}{letter}"] = name
        elif "lora_" in own or "trainable_tokens" in own:
            raise _unread(folder, name)
        elif ".original_module." not in own:  # the module that another one stands for
            replaced[own.replace(".modules_to_save", "").replace(".base_layer", "")] = name
    factors = {}
    for module, pair in pairs.items():
        rank, alpha = ranks(module, config.get("r")), alphas(module, config.get("lora_alpha"))
        factors[module] = _factors(folder, module, pair, tensors, rank, alpha, bool(config.get("use_rslora")))
    return factors, replaced


def _factors(
    folder: Path,
    module: str,
    pair: Mapping[str, str],
    tensors: Mapping[str, TensorRef],
    said: Any,
    alpha: Any,
    stabilized: bool,
) -> LoraFactors:
    """The product that is added to a module's weight; `said` is its rank, and `stabilized` that it is rsLoRA's.

    Raises:
        CheckpointError: a factor lacks its other half, or has another rank.
    """
    prefix = "embedding_" if "embedding_A" in pair else ""
    if set(pair) != {f"{prefix}A", f"{prefix}B"}:
        raise _unread(folder, next(iter(pair.values())))
    a, b = pair[f"{prefix}A"], pair[f"{prefix}B"]
    shapes = tensors[a].spec.shape, tensors[b].spec.shape
    if min(map(len, shapes)) < 2 or 0 in (*shapes[0], *shapes[1]):
        raise _unread(folder, a)
    rank = shapes[0][0]
    if rank != said or shapes[1][1] != rank or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{folder}: {module} has rank {rank} and alpha {alpha!r}, {ADAPTER_CONFIG} says rank {said!r}", _AGAIN
        )
    return LoraFactors(a, b, alpha / (math.sqrt(rank) if stabilized else rank), bool(prefix))


def _patterns(folder: Path, config: Mapping[str, Any], name: str) -> Callable[[str, Any], Any]:
    """What gives (module, default) the value of the first pattern that matches a module's name, or its end.

    Raises:
        CheckpointError: a pattern is no regular expression; from the function, when it takes too long.
    """
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{folder}: {name} of its {ADAPTER_CONFIG} is not a mapping", "save the adapter again")

    def value(module: str, default: Any) -> Any:
        try:
            return next((value for pattern, value in compiled if pattern.matches(module)), default)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {name} {error}", "name each module in full") from error

    try:
        compiled = [(Expression(rf"(?:.*\.)?(?:{pattern})"), value) for pattern, value in patterns.items()]
    except ValueError as error:
        raise CheckpointError(f"{folder}: {name} {error}", "name each module in full") from error
    return value


def _unread(folder: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{folder}: {name!r} is not understood", _AGAIN)


_AGAIN = "it is no plain LoRA: merge it with PEFT (merge_and_unload), and give the merged model as IN"
