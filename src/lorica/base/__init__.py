"""The frozen base: load a model, know its weights."""
