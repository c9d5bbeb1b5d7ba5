"""Layers that are worked on in blocks of rows: which these are, how a block is read, and how blocks are written."""
