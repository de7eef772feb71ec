"""Random generators that a block leaves as they were, on every accelerator."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy
import pytest
import torch

from trl_ext.support.random_state import untouched_random_state, untouched_torch_state


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), torch.rand(()).item()


def test_all_generators_go_on_where_they_were() -> None:
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    expected = draw()
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    with pytest.raises(KeyError), untouched_random_state():
        draw()
        torch.manual_seed(7)
        raise KeyError
    assert draw() == expected


class Devices:
    """The generators of several devices, as `torch.cuda` tells them."""

    def __init__(self, count: int) -> None:
        self.states = [torch.tensor([number]) for number in range(count)]

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state(self, device: int) -> torch.Tensor:
        return self.states[device]

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.states[device] = state


def test_several_devices_are_restored_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(3)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: devices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with untouched_torch_state():
            devices.states = [torch.tensor([9])] * 3
    assert [state.item() for state in devices.states] == [0, 1, 2]


def test_a_device_with_one_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS tells its state without the number of a device."""
    states: list[Any] = ["before"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    with untouched_torch_state():
        states.append("inside")
    assert states == ["before", "inside", "before"]
