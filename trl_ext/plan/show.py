"""What a person reads in the terminal: the plan of a run, and tables of plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compose import Plan


def print_plan(plan: Plan) -> None:
    """Stage by stage, which plugin acts, in which order, with which options."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    table = Table(title=f"trl_ext on {plan.kind.upper()}", title_justify="left")
    table.add_column("stage")
    table.add_column("plugins, in order")
    for hook, names in plan.stages():
        table.add_row(hook, " → ".join(names))
    for spec in plan.specs:
        values = ", ".join(f"{key}={value!r}" for key, value in spec.option_values.items()) or "no options"
        table.add_row(Text(f"{spec.name} {spec.version}", style="bold"), Text(values))
    console.print(table)
    for note in plan.notes:
        console.print(Text(f"note: {note}"))
