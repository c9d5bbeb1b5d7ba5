"""Layouts of quantized weights that other tools write, one file each: found by discovery, decoded as they are read."""
