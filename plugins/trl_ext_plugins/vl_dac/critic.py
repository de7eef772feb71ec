"""The value network of VL-DAC, which the plugin owns: outside the policy, with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


class ValueHead(nn.Sequential):
    """Linear, ReLU, ..., Linear: hidden states (n, H) -> values (n,), in float32 whatever the policy's dtype.

    Args:
        width: H.
        sizes: Sizes of the inner layers.
        seed: Of the weights, which are the same on every process.
    """

    def __init__(self, width: int, sizes: Sequence[int], seed: int) -> None:
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for size in sizes:
                layers += [nn.Linear(width, size), nn.ReLU()]
                width = size
            layers.append(nn.Linear(width, 1))
        super().__init__(*layers)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.detach().float()).squeeze(-1)  # no gradient into the policy


class Critic:
    """A value head with AdamW. Its gradients come from the loss of each micro-batch; `step` uses them."""

    def __init__(self, head: ValueHead, learning_rate: float, device: torch.device) -> None:
        self.head = head.to(device)
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
        self.learning_rate = learning_rate

    def step(self, total: Callable[[torch.Tensor], torch.Tensor], processes: int) -> float:
        """Averages the gradients over processes, and steps.

        A process whose micro-batches held no step has no gradient and takes part with 0. Every process gets the same
        sums and so stays equal to the others.

        Args:
            total: Adds a tensor over processes; called once.
            processes: How many there are.

        Returns:
            The norm of the averaged gradient.
        """
        parameters = list(self.head.parameters())
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = total(torch.cat([each.reshape(-1) for each in own])) / processes
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(flat.norm())

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate  # that of this run, where it differs
