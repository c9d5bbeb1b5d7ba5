"""The code that ships inside a checkpoint: decoding and modeling files for transformers."""
