"""`import aicompress.hf` lets transformers' `from_pretrained` load checkpoints of the native layout.

Without this import, and without trust_remote_code, such a checkpoint is refused by transformers: the stored tensors do
not have the shapes of the dense parameters.
"""

from aicompress.model.hf.modeling_aicompress import AicompressConfig, AicompressQuantizer

__all__ = ["AicompressConfig", "AicompressQuantizer"]
