"""The lab's models of these tests are made once, in a cache of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest

from trl_ext import lab
from trl_ext.lab import Task, WarmUp


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def untrained() -> Callable[[str], Task]:
    """`untrained(name)` is a built-in task whose model is not warmed up, so that it takes no time to make."""
    return lambda name: dataclasses.replace(lab.task(name), warm_up=WarmUp(traces=8, steps=0))
