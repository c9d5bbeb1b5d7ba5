"""Modes that compare a student with a teacher of its architecture: layer after layer, or block after block."""
