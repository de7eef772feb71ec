"""Shares of digits stay at a threshold. The multiplier is above 0 from the start, so that the first step acts."""

from __future__ import annotations

OPTIONS = {"thresholds": {"digits": 0.4}, "initial": 0.5}
