"""The console script `trl_ext`, with a module for each command."""
