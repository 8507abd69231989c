"""Bridges to other code: the original's names and recordings."""
