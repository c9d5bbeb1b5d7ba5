"""A checkpoint as a running model: definition, parameters, modules of its own forms."""
