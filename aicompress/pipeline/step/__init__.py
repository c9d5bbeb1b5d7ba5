"""Input, options, checks, output and report of every step."""
