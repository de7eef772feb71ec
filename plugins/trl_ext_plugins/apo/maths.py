"""Extrapolation between rounds of preference optimisation (arXiv 2410.06293), as functions of tensors.

`hat_{t+1}` is what DPO returns in round t, trained from `start_t` and against it as reference; `hat_0 = start_0` are
the weights of the model that the run begins with. The next round starts from

    start_{t+1} = hat_{t+1} + alpha * (hat_{t+1} - hat_t)        (section 5.2: equations 3.6, 3.7 in the weights)

anchored at the previous output `hat_t`, not at `start_t`. alpha = 0 is iterative DPO, and the first output does not
depend on alpha.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def extrapolate(
    new: Mapping[str, torch.Tensor], previous: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Returns new + alpha * (new - previous), entry by entry, computed in float32 at least and rounded once.

    Args:
        new: `hat_{t+1}` by name.
        previous: `hat_t`, with the same names and shapes.
        alpha: 0 gives `new` bit for bit.

    Returns:
        Tensors of the precision of `new`. What is not floating point is taken from `new`.

    Raises:
        ValueError: A name or shape differs, or a value of `new` is not finite.
    """
    if new.keys() != previous.keys():
        raise ValueError(f"the weights have other names than those before: {sorted(new.keys() ^ previous.keys())[:3]}")
    moved_on = {}
    for name, value in new.items():
        before = previous[name]
        if value.shape != before.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, and {tuple(before.shape)} before")
        if not value.is_floating_point():
            moved_on[name] = value.clone()
            continue
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} holds values that are not finite; the round before it must be trained otherwise")
        exact = torch.promote_types(value.dtype, torch.float32)
        wide = value.to(exact)
        moved_on[name] = (wide + alpha * (wide - before.to(exact))).to(value.dtype)
    return moved_on


def momentum(
    start: torch.Tensor, new: torch.Tensor, velocity: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Extrapolates with a buffer instead: v <- alpha * (v + new - start), next start = new + v, from v = 0.

    Returns:
        `start_{t+1}` and the new v.
    """
    velocity = alpha * (velocity + new - start)
    return new + velocity, velocity


def coefficients(alpha: float, rounds: int) -> list[float]:
    """Returns the weight of each round's update in the last output: hat_T = ref + sum_i c_i * (hat_{i+1} - start_i).

    Theorem 4.1: c_i = (1 - alpha^(T-i)) / (1 - alpha), for example 1.39, 1.3, 1 for alpha 0.3 and three rounds.
    """
    return [sum(alpha**power for power in range(rounds - index)) for index in range(rounds)]


def extrapolate_policy(new: torch.Tensor, previous: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes equation 3.7 over a finite set: log next = (1 + alpha) * log new - alpha * log previous - log Z.

    What the weights' form stands for; equal to it where logits are linear in the weights.

    Args:
        new, previous: (X, Y) log-probabilities of Y answers to each of X prompts.

    Returns:
        (X, Y) normalised log-probabilities, and log Z (X,).
    """
    scores = new + alpha * (new - previous)
    log_z = torch.logsumexp(scores, dim=-1)
    return scores - log_z.unsqueeze(-1), log_z


def lora_change(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Returns the (out, in) change of a weight by an adapter: scaling * B @ A, for A (r, in) and B (out, r)."""
    return scaling * b @ a


def extrapolate_lora(
    new: tuple[torch.Tensor, torch.Tensor], previous: tuple[torch.Tensor, torch.Tensor], alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a pair (A, B) whose change is (1 + alpha) * that of `new` - alpha * that of `previous`, on one base.

    Exact, because the rank adds up: A (2r, in) stacks both, B (out, 2r) holds the factors. Extrapolating A and B one by
    one gives another change.
    """
    (new_a, new_b), (previous_a, previous_b) = new, previous
    return torch.cat([new_a, previous_a]), torch.cat([(1 + alpha) * new_b, -alpha * previous_b], dim=1)
