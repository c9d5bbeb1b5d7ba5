"""Channels of any network: which go together, how they are cut, what they are worth, what can be repaired."""
