"""Lossless coding of tensor bytes: byte planes, differences to other tensors, and an entropy coder. Knows no files."""
