"""Arguments that make a configuration small: numbers under known names, or all that is large divided by one number."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

VOCABULARY = 160
LARGE = 64  # from here on a number is divided
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
        "attention_heads", "linear_num_value_heads", "linear_num_heads", "encoder_num_attention_heads",
        "decoder_num_attention_heads",
    ),
    "groups": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "linear_num_key_heads"),
    "head": (
        "head_dim", "d_kv", "attention_head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim", "global_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "swa_head_dim", "index_head_dim", "dim_head",
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
    "horizon": ("prediction_length",),
}  # fmt: skip
# What a number under such a name says is no width, and stays.
KEPT = re.compile(
    r"token|vocab|index|indices|rate|position|length|patch|image|window|max_|bins|kernel|label|frames|seed|step|stride"
    r"|resolution|hop|fft|_id$|_ids$|^num_(?!filters|channels)|_len$|offset|_size_divisor|_grid|duration"
)
COUNTS = re.compile(r"(depths?|blocks|layers)$|^(depths|num_blocks|num_layers)")  # of layers, one number for each stage
# What a type leaves to be given, or its code reads and its configuration lacks: by what it counts, or by its name.
UNSET = {"vocabulary": VOCABULARY, "horizon": 4, "experts": 4, "chosen": 2, "expert": 48, "groups": 4}
NAMED = {"dropout": 0.0, "token_id": 0, "theta": 10000.0, "range": 0.02, "eps": 1e-6}
LISTED = {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense", "sparse"],
          "vocabulary_map": {"<image>": 5, "IMGIMGA": 6}}  # fmt: skip
# A small backbone in the place of one that another library would make.
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
          "layer_type": "basic"}  # fmt: skip

_MISSING = object()


def plain_value(name: str, sizes: Mapping[str, int | None]) -> Any:
    """A value for a field that has none, by its name; None where that says nothing."""
    kinds = {each: kind for kind, names in SIZES.items() for each in names}
    number = sizes.get(kinds.get(name, "")) or UNSET.get(kinds.get(name, ""))
    return number or LISTED.get(name) or next((value for part, value in NAMED.items() if part in name), None)


def shrunk(
    default: Any, sizes: Mapping[str, int | None], lacking: Mapping[tuple[str, str], Any] | None = None
) -> dict[str, Any]:
    """Arguments of a configuration that make it small.

    Args:
        default: the configuration as its class makes it.
        sizes: numbers by what they count.
        lacking: fields to be added to sections, by the section's class and the field's name.
    """
    taken = inspect.signature(type(default).__init__).parameters
    plain = {key: value for key in taken if (value := _value(default, key)) is not _MISSING}
    changed = dict(_numbers(plain, sizes))
    if sizes.get("divisor"):
        changed = {**dict(_divided(plain, sizes)), **changed}
    changed |= {field: value for (kind, field), value in (lacking or {}).items() if kind == type(default).__name__}
    if sizes.get("unset") and not hasattr(default, "pad_token_id"):
        changed["pad_token_id"] = 0  # which the type's own code reads
    for key in getattr(type(default), "sub_configs", {}):
        section = getattr(default, key, None)
        if getattr(section, "model_type", None) == "timm_backbone":
            changed[key] = {**RESNET, "out_indices": list(section.out_indices)}
        elif section is not None and not isinstance(section, dict):
            changed[key] = {"model_type": section.model_type, **shrunk(section, sizes, lacking)}
            if sizes.get("features") and getattr(section, "out_indices", None):
                changed[key]["out_indices"] = list(section.out_indices)
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
        elif size is not None and kinds[key] == "image" and _is_list(value):
            yield key, [size] * len(value)
        elif key == "depths" and _is_list(value):
            yield key, [1] * len(value)
        elif sizes.get("unset"):
            yield from _unset(key, value, sizes)


def _divided(fields: Mapping[str, Any], sizes: Mapping[str, int | None]) -> Iterator[tuple[str, Any]]:
    """Large numbers divided by one, alone or in lists, and of what is listed by layer as much as there are layers."""
    kinds = {name: kind for kind, names in SIZES.items() for name in names}
    before = {value for key, value in fields.items() if kinds.get(key) == "depth" and isinstance(value, int)}
    depth, divisor = sizes["depth"], sizes["divisor"] or 1
    for key, value in fields.items():
        if value is None and (kinds.get(key) in UNSET or key in LISTED):
            yield key, plain_value(key, sizes)
        elif depth and isinstance(value, list | tuple) and len(value) in before and len(value) > depth:
            yield key, [*dict.fromkeys(value), *value][:depth] if isinstance(value[0], str) else list(value[:depth])
        elif depth and isinstance(value, dict) and value and all(str(each).isdigit() for each in value):
            yield key, {each: inner for each, inner in value.items() if int(each) < depth}
        elif depth and "feature_layer" in key and _is_list(value):
            yield key, [min(each, depth - 1) for each in value]
        elif depth and COUNTS.search(key) and _is_list(value) and len(value) > 1:
            yield key, [min(1, each) for each in value]
        elif not KEPT.search(key) and (smaller := _smaller(value, divisor, sizes.get("least") or LARGE)) != value:
            yield key, smaller


def _smaller(value: Any, divisor: int, least: int) -> Any:
    """Numbers in lists of any depth, divided where they are large: what was equal stays so."""
    if isinstance(value, list | tuple):
        return [_smaller(each, divisor, least) for each in value]
    return max(1, round(value / divisor)) if type(value) is int and value >= least else value


def _unset(key: str, value: Any, sizes: Mapping[str, int | None]) -> Iterator[tuple[str, Any]]:
    """The size of a head where it would be derived, and as many kinds of layers as there are layers."""
    depth = sizes["depth"] or 0
    if key == "head_dim" and value is None:
        yield key, sizes["unset"]
    elif key in ("layer_types", "layers_block_type") and isinstance(value, list) and len(value) != depth:
        yield key, [*dict.fromkeys(value), *value][:depth]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(type(each) is int for each in value)
