"""An estimator that serves both trainers, beside TRL's own advantages."""

from __future__ import annotations

OPTIONS = {"weights": {"dvao": 0.6, "trl": 0.4}}
