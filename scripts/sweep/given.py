"""Small configurations of types whose numbers hang together in ways that their defaults do not show."""

from __future__ import annotations

from typing import Any


def _strips(length: int) -> dict[str, Any]:
    """Kernel, stride and padding of convolutions along one axis of an image."""
    return {
        f"{axis}_conv_{name}ratio": [kernel, [1, 1], [kernel[0] // 2, kernel[1] // 2]]
        for axis, upright in (("vertical_long_to_small", True), ("horizontal_small_to_long", False))
        for name, size in (("long", length), ("mid", length - 2), ("short", length - 4))
        for kernel in ([size, 1] if upright else [1, size],)
    }


_ROUND = {
    f"symmetric_conv_long_{name}ratio": [size, 1, size // 2] for name, size in (("long", 7), ("mid", 5), ("short", 3))
}
_DECODER = {"mlp_dim": 48, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "num_hidden_layers": 2}
_SAM_VISION = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8,
}  # fmt: skip
_SAM = {
    "vision_config": _SAM_VISION,
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 16, **_DECODER},
}
_HIERA = {
    "model_type": "sam2_hiera_det_model", "hidden_size": 16, "num_attention_heads": 1, "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 48, 64],
    "num_attention_heads_per_stage": [1, 2, 2, 4], "global_attention_blocks": [3],
    "window_size_per_stage": [4, 2, 2, 2], "window_positional_embedding_background_size": [2, 2],
}  # fmt: skip
_SAM2_VISION = {
    "backbone_config": _HIERA, "backbone_channel_list": [64, 48, 32, 16],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32,
}  # fmt: skip
_SAM2 = {
    "vision_config": _SAM2_VISION,
    "prompt_encoder_config": {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 32, **_DECODER},
}
_MEMORY = {
    "memory_attention_hidden_size": 32, "memory_attention_feed_forward_hidden_size": 48,
    "memory_attention_num_layers": 2, "memory_attention_rope_feat_sizes": [4, 4], "memory_encoder_hidden_size": 32,
    "memory_encoder_output_channels": 16, "mask_downsampler_embed_dim": 32, "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 48,
}  # fmt: skip


def _bytes(width: int, depth: int, **more: int) -> dict[str, Any]:
    """A stack of blocks of a byte latent transformer."""
    plain = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 128}
    return {"hidden_size": width, "num_hidden_layers": depth, **plain, **more}


_BYTE_LATENT = {
    "vocab_size": 160, "max_position_embeddings": 128,
    "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4],
    "patcher_config": _bytes(32, 2, vocab_size=160), "global_config": _bytes(64, 2),
    "encoder_config": _bytes(32, 1, vocab_size=160, hidden_size_global=64),
    "decoder_config": _bytes(32, 2, vocab_size=160, hidden_size_global=64),
}  # fmt: skip
_TEXT = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
_SPEECH = {"num_filters": 2, "hidden_size": 16, "depths": [1] * 7}
_LATENT_HEADS = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 24,
    "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
_DOTS_TEXT = {
    **_TEXT, **_LATENT_HEADS, **{f"swa_{name}": value for name, value in _LATENT_HEADS.items()},
    "num_hidden_layers": 4, "moe_intermediate_size": 48, "shared_experts_intermediate_size": 48,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "qk_rope_head_dim": 8,
    "index_head_dim": 16, "index_n_heads": 4, "index_topk": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DOTS_TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GIVEN: dict[str, dict[str, Any]] = {
    "blt": _BYTE_LATENT,
    "dots3_note": {
        "text_config": _DOTS_TEXT,
        "vision_config": {
            **_DOTS_TOWER, "moe_intermediate_size": 48, "pyramid_num_routed": [-1, 4], "patch_size": 8,
            "adapter_in_dim": 64, "adapter_out_dim": 64,
        },
        "audio_config": {
            **_DOTS_TOWER, "feature_size": 16, "downsample_hidden_size": 16, "max_position_embeddings": 128,
            "adapter_input_size": 64, "adapter_out_dim": 64,
        },
    },
    "vibevoice": {
        "text_config": {"model_type": "qwen2", **_TEXT, "num_hidden_layers": 2, "num_key_value_heads": 2},
        "diffusion_head_config": {
            "hidden_size": 64, "latent_size": 16, "num_hidden_layers": 2, "intermediate_size": 96,
            "frequency_embedding_size": 32,
        },
        "audio_config": {"model_type": "vibevoice_acoustic_tokenizer", **_SPEECH},
        "semantic_model_config": {"model_type": "vibevoice_acoustic_tokenizer_encoder", **_SPEECH},
        "pad_token_id": 0, "eos_token_id": 1,
        "audio_bos_token_id": 2, "audio_eos_token_id": 3, "audio_token_id": 4,
    },
    "zamba": {
        **_TEXT, "num_hidden_layers": 6, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_d_state": 16, "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
    },
    "sam": _SAM,
    "sam_hq": {**_SAM, "mask_decoder_config": {"hidden_size": 16, "vit_dim": 32, **_DECODER}},
    "sam2": _SAM2,
    "sam2_video": {**_SAM2, **_MEMORY, "image_size": 64},
    "sam2_vision_model": _SAM2_VISION,
    "sam2_hiera_det_model": _HIERA,
    "sam_vision_model": _SAM_VISION,
    "pp_ocrv6_medium_det": {
        "backbone_config": {"model_type": "pp_lcnet_v4", "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "neck_out_channels": 32, "intraclass_block_number": 4, "scale_factor_list": [1, 2, 4, 8],
        "kernel_list": [3, 2, 2],
        "intraclass_block_config": {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0], **_strips(7), **_ROUND},
    },
}  # fmt: skip
