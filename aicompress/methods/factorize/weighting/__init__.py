"""What an error of a layer counts, by its inputs and its outputs, and the methods that find factors by it."""
