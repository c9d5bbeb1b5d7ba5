"""Adapters that are merged into a checkpoint as it is read."""
