"""The verbs of the command line, one file each: its options, and one call."""
