"""Time what an output runs: whole forward passes, or one layer after the other."""
