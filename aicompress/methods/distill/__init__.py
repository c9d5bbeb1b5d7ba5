"""Methods of `aicompress distill`, one file each."""
