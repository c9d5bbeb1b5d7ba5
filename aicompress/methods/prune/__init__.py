"""Methods of `aicompress prune`, one file each."""
