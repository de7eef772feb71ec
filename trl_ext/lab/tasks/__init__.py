"""The built-in tasks, one module each."""

from __future__ import annotations

from ..task import Task
from .loud_quiet import LOUD_QUIET
from .modes import MODES

BUILTINS: tuple[Task, ...] = (LOUD_QUIET, MODES)
