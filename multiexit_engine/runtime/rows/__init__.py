"""The rows of one step: where they are, which states they need, and what their tokens become."""
