"""Small tools that every other room may use: they know nothing of plugins, trainers or TRL."""
