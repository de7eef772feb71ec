"""Functions that methods share. Import its modules by name: most of them import torch."""
