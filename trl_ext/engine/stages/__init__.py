"""The stages of a run: build what plugins receive, call them, check and write back what they return."""
