"""Agreement of processes: what each of them asks for, before a collective that would hang if one asked otherwise."""

from __future__ import annotations

from typing import Any

from ..errors import PluginError
from .view import View


def agree(view: View, call: str, fact: Any, problem: str | None = None) -> list[Any]:
    """Returns what the same call holds on every process, in their order. Collective.

    Args:
        view: The trainer.
        call: What this process does, such as `trainer.score`.
        fact: What the others have to know of it. Picklable.
        problem: Why it cannot be done, or None.

    Raises:
        PluginError: On every process alike: a process does something else, or has a problem.
    """
    calls: list[tuple[str, Any, str | None]] = view.gather_objects([(call, fact, problem)])
    for rank, (name, _, _) in enumerate(calls):
        if name != calls[0][0]:
            raise PluginError(
                f"{calls[0][0]} is under way on process 0, and {name} on process {rank}. Every process must make the "
                f"same calls in the same order. Call with empty lists where a process has nothing to ask."
            )
    for rank, (_, _, reason) in enumerate(calls):
        if reason is not None:
            where = f" on process {rank}" if len(calls) > 1 else ""
            raise PluginError(f"{call}{where}: {reason}")
    return [known for _, known, _ in calls]
