"""The search for widths: what `bits: auto` in a recipe becomes."""
