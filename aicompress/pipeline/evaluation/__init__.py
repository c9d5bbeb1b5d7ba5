"""Evaluation: load cost, latency and quality of a checkpoint, and its gates."""
