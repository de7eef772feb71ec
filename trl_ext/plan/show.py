"""The plan of a run as a table in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compose import Plan


def print_plan(plan: Plan) -> None:
    """Prints which plugins act at each stage and in which order, their options, and the notes of the plan."""
    from ..support.console import tell
    from ..support.tables import print_table

    rows = [[hook, " → ".join(names)] for hook, names in plan.stages()]
    for spec in plan.specs:
        values = ", ".join(f"{key}={value!r}" for key, value in spec.option_values.items()) or "no options"
        rows.append([f"{spec.name} {spec.version}", values])
    print_table(["stage", "plugins, in order"], rows, title=f"trl_ext on {plan.kind.upper()}", file=sys.stderr)
    for note in plan.notes:
        tell(f"note: {note}")
