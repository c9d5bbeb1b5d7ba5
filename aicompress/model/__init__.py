"""Running models: the only importer of transformers."""
