"""Checkpoints as running models: what a step runs, times and tries inputs on."""
