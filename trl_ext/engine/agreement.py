"""Agreement of processes: a hook that fails or answers differently on one process stops all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..errors import PluginError
from .context import Context

Result = TypeVar("Result")
Shared = TypeVar("Shared")


def together(context: Context, run: Callable[[], Result], share: Callable[[Result], Shared]) -> list[Shared]:
    """Runs something on every process, and returns what each of them shares of its result, in order. Collective.

    Args:
        context: The context.
        run: Runs a hook and checks its result.
        share: Returns what the other processes have to know of the result.

    Raises:
        Exception: What `run` raised here, once all processes know of it.
        PluginError: It went well here, and another process stopped.
    """
    failure: Exception | None = None
    shared: Shared | None = None
    try:
        shared = share(run())
    except Exception as error:  # raised below, when the other processes know of it
        failure = error
    complaint = None if failure is None else f"{type(failure).__name__}: {failure}"
    answers = context.view.gather_objects([(complaint, shared)])
    if failure is not None:
        raise failure
    for process, (complaint, _) in enumerate(answers):
        if complaint is not None:
            raise PluginError(f"stopped with process {process}, which said: {complaint}")
    return [shared for _, shared in answers]


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
        differs = ~torch.isclose(other.double(), first, rtol=1e-3, atol=1e-4)
        if differs.any():
            row = int(differs.nonzero()[0])
            raise PluginError(
                f"plugin {name!r} returned other values from {hook!r} on process {process} than on process 0, such as "
                f"{other[row].item()!r} and {first[row].to(other.dtype).item()!r} for row {row}; expected one value "
                f"per row, equal on every process. Compute it from gathered values, and draw from a generator with "
                f"the same seed on each process."
            )
