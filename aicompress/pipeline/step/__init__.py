"""What every step does: its input, options, checks, output, report."""
