"""Agreement of processes: a hook that asks or answers wrongly or differently on one process stops all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..errors import PluginError
from .context import Context
from .view import View

Own = TypeVar("Own")
Shared = TypeVar("Shared")


def together(
    context: Context, check: Callable[[], tuple[Own, Shared]], call: str = "the check of a hook's result"
) -> tuple[Own, list[Shared]]:
    """Checks what a hook returned on every process, and tells all of them. Collective.

    A hook with collectives of its own runs before: if it raises, it stops its process at once, because the others may
    wait for it in such a collective.

    Args:
        context: The context.
        check: Returns the result for this process, and what the other processes have to know of it.
        call: What this process does, for the error where another one does something else.

    Returns:
        The result for this process, and what each process has to tell, in order.

    Raises:
        Exception: What `check` raised here, once all processes know of it.
        PluginError: It went well here, and another process stopped.
    """
    failure: Exception | None = None
    own: Any = None
    shared: Any = None
    try:
        own, shared = check()
    except Exception as error:  # raised below, when the other processes know of it
        failure = error
    complaint = str(failure) if isinstance(failure, PluginError) else f"{type(failure).__name__}: {failure}"
    calls = _exchange(context.view, call, shared, None if failure is None else complaint)
    if failure is not None:
        raise failure
    for process, (_, told) in enumerate(calls):
        if told is not None:
            raise PluginError(f"stopped with process {process}, which said: {told}")
    return own, [known for known, _ in calls]


def check_equal(name: str, hook: str, values: list[torch.Tensor]) -> None:
    """Checks that every process returned the same values for the rows of all processes.

    Sums on accelerators may differ in their last bits, so a small difference is none.

    Args:
        name: The plugin.
        hook: Its hook.
        values: (N,) of each process.

    Raises:
        PluginError: Naming the first process and row that differ. Equal on every process.
    """
    for process, other in enumerate(values):
        first = values[0].double()
        differs = ~torch.isclose(other.double(), first, rtol=1e-3, atol=1e-4, equal_nan=True)
        if differs.any():
            row = int(differs.nonzero()[0])
            raise PluginError(
                f"plugin {name!r} returned other values from {hook!r} on process {process} than on process 0, such as "
                f"{other[row].item()!r} and {first[row].to(other.dtype).item()!r} for row {row}; expected one value "
                f"per row, equal on every process. Compute it from gathered values, and draw from a generator with "
                f"the same seed on each process."
            )


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
    calls = _exchange(view, call, fact, problem)
    for rank, (_, reason) in enumerate(calls):
        if reason is not None:
            where = f" on process {rank}" if len(calls) > 1 else ""
            raise PluginError(f"{call}{where}: {reason}")
    return [known for known, _ in calls]


def _exchange(view: View, call: str, fact: Any, problem: str | None) -> list[tuple[Any, str | None]]:
    """Returns fact and problem of every process, where all of them are at the same call. Collective.

    Raises:
        PluginError: On every process alike: a process does something else.
    """
    calls: list[tuple[str, Any, str | None]] = view.gather_objects([(call, fact, problem)])
    for rank, (name, _, _) in enumerate(calls):
        if name != calls[0][0]:
            raise PluginError(
                f"{calls[0][0]} is under way on process 0, and {name} on process {rank}. Every process must make the "
                f"same calls in the same order. Call with empty lists where a process has nothing to ask."
            )
    return [(known, reason) for _, known, reason in calls]
