"""Errors that a test expects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

CLASSES = {"grpo": GRPOTrainer, "rloo": RLOOTrainer, "dpo": DPOTrainer}


@contextlib.contextmanager
def refused(kind: type[Exception], *texts: str) -> Iterator[None]:
    """Checks that the block raises exactly this error with these texts."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    for text in texts:
        assert text in str(caught.value), str(caught.value)


def unloadable(kind: str) -> Callable[..., Any]:
    """Returns a trainer class whose model does not exist, so that only checks before loading can raise other errors."""
    return lambda **arguments: CLASSES[kind](**arguments | {"model": "/no/such/model"})
