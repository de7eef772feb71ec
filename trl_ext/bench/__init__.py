"""Benchmarks that anyone can rerun: `trl_ext bench NAME`."""
