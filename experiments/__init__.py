"""Experiments: one short file a paper, and what they share. Nothing imports this package."""
