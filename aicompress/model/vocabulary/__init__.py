"""A checkpoint's tokenizer with fewer tokens: which must stay together, and every file that numbers them."""
