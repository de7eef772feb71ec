"""Guidance without a second model: an even token is worth 1, an odd one nothing."""

from __future__ import annotations

from typing import Any

OPTIONS = {"reward_func": f"{__name__}:even_tokens"}


def even_tokens(pairs: Any) -> Any:
    return 1.0 - pairs.batch["input_ids"][:, 1:] % 2
