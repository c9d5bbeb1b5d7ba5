"""The commands `pack` and `unpack`."""
