"""compressed-tensors, as transformers and vLLM read it: entries of its parameters, and the modules it targets."""
