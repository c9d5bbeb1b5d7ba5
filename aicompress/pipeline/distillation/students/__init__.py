"""Students that a recipe makes before training: kept layers, a narrower network, or another configuration."""
