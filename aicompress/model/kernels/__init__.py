"""Fast modules of compressed layers on a CPU, and which one a stored form gets."""
