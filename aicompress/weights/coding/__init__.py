"""Entropy coding of codes, indices and masks: streams of bytes that hold little more than the symbols' entropy.

`streams` and `adaptive` read them, with torch and numpy alone: their functions ship inside checkpoints. `writing`
chooses how symbols are coded and writes them. `packing` packs symbols of a fixed width, without entropy coding.
"""
