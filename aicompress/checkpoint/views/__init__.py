"""Checkpoints seen otherwise than they are stored: decoded, rewritten as they are read, or filled at random."""
