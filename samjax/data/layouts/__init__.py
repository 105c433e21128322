"""Phantoms in the layouts in which owners publish their data: small, drawn by rule, exact."""
