"""Small models of any type that transformers knows: its default configuration with small numbers under known names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

LARGEST = 6_000_000  # parameters
CLASSES = 3  # of a type that are tried
VOCABULARY = 160
SIZES: dict[str, tuple[str, ...]] = {  # numbers by what they count
    "hidden": (
        "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "encoder_hidden_size", "emb_dim",
        "decoder_hidden_size", "projection_dim", "out_hidden_size", "hidden_channels", "text_embed_dim",
        "vision_hidden_size", "cross_attention_hidden_size", "attention_hidden_size", "encoder_dim", "decoder_dim",
        "output_dim", "backbone_hidden_size", "embed_channels", "model_dim", "width", "output_hidden_size",
        "lru_width", "linear_hidden_size", "word_embed_proj_dim", "attention_dim", "projector_hidden_size", "dim_model",
    ),
    "inner": (
        "intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "ffn_hidden_size", "feed_forward_size",
        "encoder_ffn_dim", "decoder_ffn_dim", "shared_expert_intermediate_size", "mlp_dim", "dim_feedforward",
        "intermediate_size_mlp", "encoder_intermediate_size", "decoder_intermediate_size", "ffn_intermediate_size",
        "linear_intermediate_size", "block_ff_dim", "dim_ff", "dff",
    ),
    "expert": ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size"),
    "heads": (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads", "linear_num_value_heads", "encoder_num_attention_heads", "decoder_num_attention_heads",
    ),
    "groups": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "linear_num_key_heads"),
    "head": (
        "head_dim", "d_kv", "attention_head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim", "global_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim", "index_head_dim", "dim_head",
    ),
    "rotary": ("qk_rope_head_dim",),
    "latent": ("kv_lora_rank", "q_lora_rank", "index_n_heads"),
    "experts": (
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", "zero_expert_num",
    ),
    "state": ("mamba_d_state", "ssm_state_size", "mamba_chunk_size"),
    "chosen": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    "single": ("n_group", "topk_group", "num_expert_group", "n_shared_experts", "encoder_stride"),
    "depth": (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_blocks",
        "num_encoder_layers", "num_decoder_layers", "depth", "num_encoder_blocks_per_stage",
        "encoder_num_hidden_layers", "decoder_num_hidden_layers", "predictor_num_hidden_layers",
    ),
    "vocabulary": ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "decoder_vocab_size"),
    "positions": (
        "max_position_embeddings", "n_positions", "n_ctx", "max_source_positions", "max_target_positions", "seq_length",
        "max_sequence_length", "max_seq_len",
    ),
    "image": ("image_size", "img_size"),
    "patch": ("patch_size",),
}  # fmt: skip
PLAIN = {
    "hidden": 64, "inner": 96, "expert": 48, "heads": 4, "groups": 2, "head": 16, "rotary": 8, "latent": 16,
    "experts": 4, "state": 16, "chosen": 2, "single": 1, "depth": 2, "vocabulary": VOCABULARY, "positions": 128,
    "image": 32, "patch": 8,
}  # fmt: skip
# All that is large is divided by one number, which leaves what the fields of a type must be to each other.
DIVIDED = {"depth": 2, "vocabulary": VOCABULARY, "experts": 4, "chosen": 2, "single": 1, "positions": 128}
# What is tried in turn, until transformers takes it; None leaves what the default is. `unset` gives the size of a head
# and the kinds of layers, one of each kind, where the type derives or lists them.
ATTEMPTS: tuple[dict[str, int | None], ...] = (
    PLAIN,
    {**PLAIN, "groups": 4},
    {**PLAIN, "heads": 8, "groups": 8},  # of a state-space block: twice the hidden width
    {**PLAIN, "depth": 4, "groups": 4},
    {**PLAIN, "unset": 16},
    {**PLAIN, "unset": 16, "groups": 4},
    {**PLAIN, "image": None, "patch": None},
    {**PLAIN, "heads": 2, "groups": 2, "head": 32},
    {"hidden": 128, "inner": 128, "depth": 2, "vocabulary": VOCABULARY, "experts": 4},
    {"depth": 2, "vocabulary": VOCABULARY, "inner": 64, "experts": 4},
    {"depth": 2, "vocabulary": VOCABULARY},
    {},
    *({**DIVIDED, "divisor": divisor} for divisor in (8, 4, 32)),
    *({**DIVIDED, "divisor": divisor, "depth": None, "experts": None, "chosen": None} for divisor in (8, 4, 32)),
)
FIRST = (  # which class of a type is taken: the first of these that has one
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CTC",
    "IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION",
)  # fmt: skip


_MISSING = object()


class NotBuilt(Exception):
    """transformers has no model of a type, or none of a small configuration."""


def model_types() -> list[str]:
    """Every model type."""
    return sorted(CONFIG_MAPPING_NAMES)


def small_model(model_type: str) -> Any:
    """A model with random weights and no more than `LARGEST` parameters.

    Raises:
        NotBuilt: there is none.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise NotBuilt("transformers does not know it")
    try:
        kinds, reasons = classes_of(model_type)[:CLASSES], list[str]()
    except ImportError as error:
        raise NotBuilt(f"transformers cannot import it: {error}") from error
    parsed = transformers.CONFIG_MAPPING[model_type]
    for kind, attempt in product(kinds, ATTEMPTS):
        try:
            config = parsed(**shrunk(parsed(), attempt))
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in kind(config).parameters())
            if count > LARGEST:
                reasons.append(f"{count:,} parameters")
                continue
            torch.manual_seed(0)
            return kind(config).eval()
        except Exception as error:  # whatever a number breaks in the type's own code
            reasons.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:120]}")
    raise NotBuilt(reasons[0])


def classes_of(model_type: str) -> list[Any]:
    """Classes of a type's models, that which is taken first.

    Raises:
        NotBuilt: transformers lists none.
    """
    classes: list[Any] = []
    for table in [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in FIRST] + ["MODEL_MAPPING_NAMES"]:
        named = getattr(modeling_auto, table).get(model_type)
        kind = getattr(transformers, named if isinstance(named, str) else named[0], None) if named else None
        if inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel) and kind not in classes:
            classes.append(kind)
    alone = None if classes else _in_module(transformers.CONFIG_MAPPING[model_type])
    if not classes and alone is None:
        raise NotBuilt("transformers lists no model of it")
    return classes or [alone]


def _in_module(config: Any) -> Any | None:
    """A class beside a configuration that takes it, where no table lists one: part of a larger model."""
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    kinds = [each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__]
    models = [each for each in kinds if issubclass(each, transformers.PreTrainedModel)]
    own = [each for each in models if getattr(each, "config_class", None) is config]
    named = [each for each in own if not each.__name__.endswith("PreTrainedModel")]
    return next((each for each in named if getattr(transformers, each.__name__, None) is each), None)


def shrunk(default: Any, sizes: Mapping[str, int | None]) -> dict[str, Any]:
    """Arguments of a configuration that make it small.

    Args:
        default: the configuration as its class makes it.
        sizes: numbers by what they count.
    """
    taken = inspect.signature(type(default).__init__).parameters
    plain = {key: value for key in taken if (value := _value(default, key)) is not _MISSING}
    changed = dict(_numbers(plain, sizes))
    if sizes.get("unset") and not hasattr(default, "pad_token_id"):
        changed["pad_token_id"] = 0  # which the type's own code reads
    for key in getattr(type(default), "sub_configs", {}):
        section = getattr(default, key, None)
        if section is not None and not isinstance(section, dict):
            changed[key] = {"model_type": section.model_type, **shrunk(section, sizes)}
    return changed


def _value(config: Any, key: str) -> Any:
    """A public field; `_MISSING` where the configuration lacks it, or one layer's value does not answer for all."""
    if key.startswith("_"):
        return _MISSING
    try:
        return getattr(config, key, _MISSING)
    except RuntimeError:
        return _MISSING


def _numbers(fields: Mapping[str, Any], sizes: Mapping[str, int | None]) -> Iterator[tuple[str, Any]]:
    kinds = {name: kind for kind, names in SIZES.items() for name in names}
    token = 3
    for key, value in fields.items():
        size = sizes.get(kinds.get(key, ""))
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            token += 1
            yield key, token
        elif key == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            yield key, {**value, "mrope_section": [2, 3, 3]}
        elif size is not None and isinstance(value, int) and not isinstance(value, bool):
            yield key, min(size, value) if kinds[key] in ("depth", "chosen", "positions") and value > 0 else size
        elif size is not None and kinds[key] in ("hidden", "inner") and _is_list(value):
            yield key, [max(8, each // 8 * 2 if each < 512 else each // 8) for each in value]
        elif key == "depths" and _is_list(value):
            yield key, [1] * len(value)
        elif sizes.get("unset"):
            yield from _unset(key, value, sizes)


def _unset(key: str, value: Any, sizes: Mapping[str, int | None]) -> Iterator[tuple[str, Any]]:
    """The size of a head where it would be derived, and as many kinds of layers as there are layers."""
    depth = sizes["depth"] or 0
    if key == "head_dim" and value is None:
        yield key, sizes["unset"]
    elif key in ("layer_types", "layers_block_type") and isinstance(value, list) and len(value) != depth:
        yield key, [*dict.fromkeys(value), *value][:depth]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(each) is int for each in value)
