"""What a step measures to decide: widths of `bits: auto`, sparsities and ranks of a survey, levels."""
