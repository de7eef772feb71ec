"""Processes as threads: the collectives of a trainer's view without a launcher, for tests of what each process does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

TIMEOUT = 20.0


class Ranks:
    """Runs a function once per process. A collective that one of them skips breaks the test instead of hanging."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count)
        self._parts: list[Any] = [None] * count

    def gather(self, rank: int, part: Any) -> list[Any]:
        """Returns what every process gave. Collective."""
        self._parts[rank] = part
        self._barrier.wait(TIMEOUT)
        parts = list(self._parts)
        self._barrier.wait(TIMEOUT)
        return parts

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Returns the results of all processes, or what each of them raised."""
        results: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * TIMEOUT)
        return results


class RankView:
    """Offers what stages use of a trainer's view, for one process of `Ranks`."""

    device = torch.device("cpu")

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks = ranks
        self.process_index, self.num_processes = rank, ranks.count

    def gather_objects(self, values: list[Any]) -> list[Any]:
        return [value for part in self._ranks.gather(self.process_index, list(values)) for value in part]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._ranks.gather(self.process_index, tensor)
        assert len({part.shape for part in parts}) == 1, "a gather of unequal shapes hangs"
        return torch.cat(parts)
