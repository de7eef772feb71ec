"""The plan of a run as a table in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compose import Plan


def print_plan(plan: Plan) -> None:
    """Prints which plugins act at each stage and in which order, their options, and the notes of the plan."""
    from rich.table import Table
    from rich.text import Text

    from ..support.console import console

    output = console(stderr=True)
    table = Table(title=f"trl_ext on {plan.kind.upper()}", title_justify="left")
    table.add_column("stage")
    table.add_column("plugins, in order")
    for hook, names in plan.stages():
        table.add_row(hook, " → ".join(names))
    for spec in plan.specs:
        values = ", ".join(f"{key}={value!r}" for key, value in spec.option_values.items()) or "no options"
        table.add_row(Text(f"{spec.name} {spec.version}", style="bold"), values)
    output.print(table)
    for note in plan.notes:
        output.print(f"note: {note}")
