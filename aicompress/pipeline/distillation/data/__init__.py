"""Samples of a training run: read, divided into training and held-out ones, and put into batches."""
