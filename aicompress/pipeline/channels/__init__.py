"""Steps that remove channels from a network."""
