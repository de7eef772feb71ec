"""Helpers that know nothing of plugins or TRL: consoles, cache folders, imports, errors of child processes."""
