"""Structural steps: neurons, heads, experts, whole blocks and the hidden width."""
