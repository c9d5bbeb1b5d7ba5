"""What a model is, before it has weights: its class and configuration, or the chain of layers that a recipe names."""
