"""The stored forms of a weight, one file each: a subclass of `form.Weight`, and its decoder."""
