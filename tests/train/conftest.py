"""The tiny task and recipes on it, as comparisons use them."""

from ..compare.conftest import cache, recipe, task

__all__ = ["cache", "recipe", "task"]
