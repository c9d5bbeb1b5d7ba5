"""Fast CPU modules for stored forms, and the choice among them."""
