"""One round of a few tokens."""

from __future__ import annotations

OPTIONS = {"reward_funcs": ["trl_ext.testing.digits"], "rounds": 1, "betas": [0.1], "max_completion_length": 8}
