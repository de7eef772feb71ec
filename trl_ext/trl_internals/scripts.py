"""TRL's training scripts, run inside this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from trl_ext_hooks import TrainerKind

from .arguments import Parsed, _script
from .seams import trainer_class


class _Trained(BaseException):
    """Leaves TRL's script after training, before it saves."""


def run_script(kind: TrainerKind, parsed: Parsed, save: bool = True) -> None:
    """Runs TRL's own script: data, rewards, PEFT, training and saving. Without `save` it ends after training."""
    if save:
        _script(kind).main(*parsed)
        return
    trainers: list[Any] = []

    def leave_after_training(trainer: Any) -> None:
        train = trainer.train

        def train_and_leave(*args: Any, **kwargs: Any) -> NoReturn:
            train(*args, **kwargs)
            raise _Trained

        trainer.train = train_and_leave
        trainers.append(trainer)

    with on_built(kind, leave_after_training), suppress(_Trained):
        _script(kind).main(*parsed)
    for trainer in trainers:
        if hasattr(trainer, "end"):  # trackers and the process group; newer scripts do it after saving
            trainer.end()


@contextmanager
def on_built(kind: TrainerKind, listener: Callable[[Any], None]) -> Iterator[None]:
    """Calls `listener(trainer)` for every trainer of this kind that is built in the block, with plugins or without."""
    owner = trainer_class(kind)
    original = owner.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        listener(self)

    owner.__init__ = __init__
    try:
        yield
    finally:
        owner.__init__ = original
