"""Methods of `aicompress factorize`, one file each."""
