"""Layer-wise steps: one weight in, one stored weight out."""
