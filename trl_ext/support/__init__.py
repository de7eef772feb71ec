"""Small tools that know nothing of plugins or TRL."""
