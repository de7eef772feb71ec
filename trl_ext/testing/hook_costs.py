"""What the hooks of a plugin take: seconds, and the memory of the tensors that they make."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..engine.calls import HookCalls


class HookCosts:
    """Measures the hooks of runs. What a hook calls counts as its own, such as the generation inside `rollout`."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def summary(self) -> str:
        """Returns each hook with its time per call and its largest memory."""
        if not self._calls:
            return "no hook ran"
        return ", ".join(
            f"{hook} {1000 * self._seconds[hook] / number:.3g} ms and {self._bytes[hook] / 1024:.3g} KiB"
            for hook, number in self._calls.items()
        )

    @contextlib.contextmanager
    def time(self) -> Iterator[None]:
        """Measures the time of every hook that runs inside the block, in this process."""

        def timed(hook: str, run: Callable[[], Any]) -> Any:
            began = time.perf_counter()
            try:
                return run()
            finally:
                self._calls[hook] += 1
                self._seconds[hook] += time.perf_counter() - began  # type: ignore[assignment]

        with _around_hooks(timed):
            yield

    @contextlib.contextmanager
    def memory(self) -> Iterator[None]:
        """Measures the memory of all tensors that a call of a hook makes, whether they live long or not."""

        def weighed(hook: str, run: Callable[[], Any]) -> Any:
            with _new_tensors() as mode:
                result = run()
            self._bytes[hook] = max(self._bytes[hook], mode.bytes)
            return result

        with _around_hooks(weighed):
            yield


@contextlib.contextmanager
def _around_hooks(around: Callable[[str, Callable[[], Any]], Any]) -> Iterator[None]:
    """Runs `around(hook, run)` in place of every call of a hook inside the block."""
    original = HookCalls.call

    def call(self: HookCalls, name: str, hook: str, caller: Any, **arguments: Any) -> Any:
        return around(hook, lambda: original(self, name, hook, caller, **arguments))

    HookCalls.call = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        HookCalls.call = original  # type: ignore[method-assign]


def _new_tensors() -> Any:
    """Makes a context that adds up the bytes of storages which operators return and did not get."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class NewTensors(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            known = {_address(leaf) for leaf in tree_leaves((args, kwargs))}
            made = {_address(leaf): leaf for leaf in tree_leaves(result) if _address(leaf) not in known}
            self.bytes += sum(leaf.untyped_storage().nbytes() for address, leaf in made.items() if address is not None)
            return result

    return NewTensors()


def _address(leaf: Any) -> int | None:
    import torch

    return leaf.untyped_storage().data_ptr() if isinstance(leaf, torch.Tensor) else None
