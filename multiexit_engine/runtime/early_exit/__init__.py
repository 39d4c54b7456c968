"""Rows that choose their exit on the way up, decided on the host."""
