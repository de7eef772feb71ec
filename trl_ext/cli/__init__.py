"""The console script and one module for each command."""
