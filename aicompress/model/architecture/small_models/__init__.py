"""Small random models of an architecture, and what is asked of them where shapes do not tell."""
