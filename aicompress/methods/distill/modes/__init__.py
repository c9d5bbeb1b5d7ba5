"""What of a student moves while it learns: one mode in each file, found by its `MODE`."""
