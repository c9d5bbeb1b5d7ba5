"""Directions of attention heads."""
