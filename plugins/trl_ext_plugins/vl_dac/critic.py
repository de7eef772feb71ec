"""The value network of VL-DAC, which the plugin owns: outside the policy, with an optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn


class ValueHead(nn.Sequential):
    """Network of Linear, ReLU, ..., Linear: hidden states (n, H) -> values (n,), in float32 in any case.

    Args:
        width: H.
        sizes: Sizes of the inner layers.
        seed: Of the first weights, which are the same on every process.
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
    """A value head with AdamW. The loss of each micro-batch gives its gradients, which `step` uses."""

    def __init__(self, head: ValueHead, learning_rate: float, device: torch.device) -> None:
        self.head = head.to(device)
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
        self.learning_rate = learning_rate

    def values_at(self, starts: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Returns (rows, T): V at the first token of each run, 0 elsewhere, with a gradient to the head.

        Args:
            starts: (rows, T) bool: first tokens.
            states: (n, H) their hidden states, in the order of the rows.
        """
        return torch.zeros(starts.shape, device=starts.device).masked_scatter(starts, self.head(states))

    def step(self, total: Callable[[torch.Tensor], torch.Tensor], processes: int) -> float:
        """Averages the gradients over processes, and steps.

        A process whose micro-batches held no step has no gradient and takes part with 0. Every process gets the same
        sums, so the heads stay equal.

        Args:
            total: Adds a tensor over processes; called once.
            processes: How many there are.

        Returns:
            The norm of the averaged gradient.
        """
        parameters = list(self.head.parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = total(torch.cat([gradient.reshape(-1) for gradient in gradients])) / processes
        for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = mean.view_as(parameter).clone()
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
