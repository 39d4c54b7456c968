"""Training of multi-exit models."""
