"""Methods of `aicompress quantize`, one file each."""
