"""A teacher's outputs, stored once: what is stored, the folder that holds it, and a teacher that reads it."""
