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
GIVEN: dict[str, dict[str, Any]] = {
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
