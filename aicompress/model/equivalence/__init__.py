"""Rewrites that leave a model's function as it is: scaling groups and rotations."""
