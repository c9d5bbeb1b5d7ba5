"""Grids of codes: scales, rounding, integers of few bits, codebooks."""
