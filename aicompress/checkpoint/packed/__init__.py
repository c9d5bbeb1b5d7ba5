"""Packed files: the tensors of a safetensors file losslessly coded, inside a safetensors file of byte streams."""
