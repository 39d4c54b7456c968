"""Measures of text and of models, on top of the engine."""
