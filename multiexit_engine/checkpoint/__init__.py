"""Checkpoints on disk or on a hub: configuration, weights, tokenizer."""
