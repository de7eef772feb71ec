"""Catalogue of plugins: where they are found, what they declare, and their options."""
