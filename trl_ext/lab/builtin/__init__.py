"""Built-in tasks, with a module for every one or two of them."""

from __future__ import annotations

from ..definition import Task
from .calculator import CALCULATOR
from .checks import CHECKS
from .doors import ROW_OF_DOORS
from .gymnasium_games import FROZEN_LAKE, MINIGRID, MINIGRID_VIEW
from .letters import LETTERS, RIGHT_LETTER
from .lookup import LOOKUP
from .loud_quiet import LOUD_QUIET
from .modes import MODES
from .number_line import NUMBER_LINE
from .walks import GRID_WALK, LINE_WALK

BUILTINS: tuple[Task, ...] = (
    LOUD_QUIET,
    MODES,
    CALCULATOR,
    LETTERS,
    RIGHT_LETTER,
    CHECKS,
    LOOKUP,
    LINE_WALK,
    GRID_WALK,
    ROW_OF_DOORS,
    NUMBER_LINE,
    FROZEN_LAKE,
    MINIGRID,
    MINIGRID_VIEW,
)
