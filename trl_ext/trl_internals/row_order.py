"""The order of a round's rows: groups that stay together when TRL shuffles.

TRL shuffles a round with a function of its trainer's module. One wrapper around that function reads from the batch
whether its rows belong to groups. It keeps no state, so trainers in several threads do not disturb each other.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError
from .seams import trainer_class

GROUP_IDS = "trl_ext_group_ids"
"""The key of a batch that holds the group of every row."""
_NAME = "shuffle_sequence_dict"

# Python may collect a dropped trainer at any time, also inside these functions, and the trainer undoes its part in the
# thread that collects it. So the lock lets its own thread in again. Trainers are entries of a set, because an undo
# between the reading and the writing of a count would be lost.
_lock = threading.RLock()
_users: dict[str, set[object]] = {}
"""By module, an entry for each trainer that needs the wrapper."""
_originals: dict[str, Any] = {}
"""By module, the function that is wrapped now."""


def keep_groups_together(kind: TrainerKind) -> Callable[[], None]:
    """Makes rounds that carry `GROUP_IDS` keep their groups when TRL shuffles them. Other rounds stay as they are.

    Returns:
        The undo. The original function is back when every caller has undone.
    """
    module: Any = importlib.import_module(trainer_class(kind).__module__)
    name, user = module.__name__, object()
    with _lock:
        users = _users.setdefault(name, set())
        users.add(user)
        if name not in _originals:
            _originals[name] = getattr(module, _NAME)
            setattr(module, _NAME, _wrapped(_originals[name]))

    def undo() -> None:
        with _lock:
            users.discard(user)
            if users or name not in _originals:
                return
            original = _originals.pop(name)
            if not hasattr(getattr(module, _NAME), "trl_ext_wrapper"):
                raise ConfigError(
                    f"{name}.{_NAME} was replaced after trl_ext wrapped it; undo that first, then detach."
                )
            setattr(module, _NAME, original)

    return undo


def _wrapped(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def shuffle(seq_dict: Mapping[str, Any]) -> dict[str, Any]:
        groups = seq_dict.get(GROUP_IDS)
        if groups is None:
            return original(seq_dict)
        # the draw is TRL's own, so the random stream stays that of plain TRL
        order = groups_in_a_row(torch.randperm(len(groups)), groups)
        return {name: _permuted(value, order) for name, value in seq_dict.items()}

    shuffle.trl_ext_wrapper = True  # type: ignore[attr-defined]
    return shuffle


def _permuted(value: Any, order: torch.Tensor) -> Any:
    if value is None or (isinstance(value, torch.Tensor) and value.dim() == 0):
        return value
    return value[order] if isinstance(value, torch.Tensor) else [value[i] for i in order.tolist()]


def groups_in_a_row(permutation: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Moves the rows of each group next to each other in a random order.

    Groups come in the order of their first row in `permutation`, and the rows of a group in their order there.

    Args:
        permutation: (b,) a permutation of the rows.
        group_ids: (b,) the group of every row.

    Returns:
        (b,) a permutation of the rows.
    """
    shuffled = group_ids[permutation].tolist()
    rank_of_group: dict[int, int] = {}
    for group in shuffled:
        rank_of_group.setdefault(group, len(rank_of_group))
    ranks = torch.tensor([rank_of_group[group] for group in shuffled])
    return permutation[ranks.argsort(stable=True)]
