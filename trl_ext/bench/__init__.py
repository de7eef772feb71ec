"""Benchmarks that anyone can repeat with `trl_ext bench NAME`."""
