"""From hidden states at exits to tokens. Knows exits, never models."""
