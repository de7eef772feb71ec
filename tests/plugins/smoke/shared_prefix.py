"""Groups share short prompts, which is enough where no gain is asked for."""

from __future__ import annotations

OPTIONS = {"min_gain": 0}
