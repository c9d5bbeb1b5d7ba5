"""What is trained: the tensors of a student that move, the optimizer that moves them, and codes that are learnt."""
