"""VERL measures ranks on the way through a completion, and those of the tiny model are short."""

from __future__ import annotations

OPTIONS = {"stride": 2}
