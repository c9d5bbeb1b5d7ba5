"""Masks over single weights: sparsity patterns, search, refit."""
