"""A model block by block: forward passes with statistics, reconstruction of one block."""
