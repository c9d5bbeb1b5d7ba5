"""How much the loss or the outputs depend on weights, blocks and experts."""
