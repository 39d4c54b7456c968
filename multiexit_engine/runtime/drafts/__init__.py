"""Sequences that draft by an early exit, and the check of their drafts."""
