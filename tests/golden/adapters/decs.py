"""DECS: the authors' code (spans, official rewards, schedule) and equations 9 to 11 of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from trl_ext_hooks.toolkit.segments import chunk_ends
from trl_ext_plugins.decs.maths import Chunks, easy_allowed, next_kappa, position_advantages, token_rewards

KNOWN = {
    "spans": set(),
    "advantage": {"r_plus", "r_zero", "L_max", "eps", "ddof"},
    "schedule": {"lr", "kappa_init", "ratio_init"},
}


def compare(case: dict[str, Any]) -> None:
    unknown = case["hyperparameters"].keys() - KNOWN[case["kind"]]
    assert not unknown, f"the adapter does not know {unknown}"
    kinds: dict[str, Callable[..., None]] = {"spans": _spans, "advantage": _advantage, "schedule": _schedule}
    kinds[case["kind"]](case["inputs"], case["outputs"], case)


def _double(values: Any) -> torch.Tensor:
    """Numbers and lists of them; null is NaN."""

    def number(value: Any) -> Any:
        return [number(entry) for entry in value] if isinstance(value, list) else math.nan if value is None else value

    return torch.tensor(number(values), dtype=torch.float64)


def _close(found: torch.Tensor, expected: Any, limit: float, what: str) -> None:
    expected = expected if isinstance(expected, torch.Tensor) else _double(expected)
    torch.testing.assert_close(
        found.double(), expected, atol=limit, rtol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


# --- spans ------------------------------------------------------------------------------------------------------------


def _spans(inputs: dict[str, Any], outputs: dict[str, Any], case: dict[str, Any]) -> None:
    # where a split word follows the end of thinking, the authors' code takes the answer for redundant; the paper and
    # the plugin do not
    expected = case.get("outputs_cut_first", outputs)
    rows: list[Chunks] = []
    for ids, correct in zip(inputs["completion_ids"], inputs["correct"], strict=True):
        stop = ids.index(inputs["think_end_id"]) if inputs["think_end_id"] in ids else len(ids)
        starts = [index for index, token in enumerate(ids) if token in inputs["split_ids"]]
        ends = chunk_ends(starts, lambda index, ids=ids: ids[index] in inputs["newline_ids"], stop)
        verdicts = [inputs["answer_id"] in ids[start:end] for start, end in pairwise([0, *ends])]
        rows.append(Chunks(tuple(ends), tuple(verdicts) if correct else ()))
    assert [list(chunks.ends) for chunks in rows] == expected["chunk_ends"]
    assert [list(chunks.labels) for chunks in rows] == expected["chunk_types"]
    assert [chunks.span and list(chunks.span) for chunks in rows] == expected["redundant_span"]
    _close(_double([chunks.ratio for chunks in rows]), expected["nrp_chunk_ratio"], 1e-9, "nrp_chunk_ratio")
    if "chunk_count" in expected:
        assert [len(chunks.ends) for chunks in rows] == expected["chunk_count"]


# --- advantages -------------------------------------------------------------------------------------------------------


def _advantage(inputs: dict[str, Any], outputs: dict[str, Any], case: dict[str, Any]) -> None:
    settings, width, size = case["hyperparameters"], inputs["T"], inputs["num_generations"]
    lengths = torch.tensor(inputs["lengths"])
    spans = torch.tensor([span or [0, 0] for span in inputs["redundant_span"]])
    group_ids = torch.arange(len(lengths)) // size
    mask = torch.arange(width) < lengths.unsqueeze(1)
    for form in ("official", "eq9"):
        rewards = token_rewards(
            _double(inputs["correct"]),
            spans,
            lengths,
            width,
            r_plus=settings["r_plus"],
            r_zero=settings["r_zero"],
            limit=settings["L_max"],
            form=form,
        )
        _close(rewards, outputs[f"token_reward_{form}"], 1e-9, f"token_reward_{form}")
        groups = rewards.view(-1, size, width)
        highest, lowest = groups.amax(dim=1), groups.amin(dim=1)
        constant = (highest - lowest <= 1e-6 * highest.abs().clamp(min=1)) | (size <= settings["ddof"])
        constant = constant.repeat_interleave(size, dim=0)  # (N, T)
        # Equal rewards give exactly 0. Without siblings there is no baseline: the code keeps the reward then.
        expected = _double(outputs[f"advantage_{form}"]).masked_fill(constant, 0.0)
        advantages = position_advantages(rewards, group_ids, eps=settings["eps"], ddof=settings["ddof"]) * mask
        _close(advantages, expected, 1e-6, f"advantage_{form}")
        single = position_advantages(rewards.float(), group_ids, eps=settings["eps"], ddof=settings["ddof"]) * mask
        assert single.dtype == torch.float32 and (single[constant] == 0).all() and (advantages[constant] == 0).all()
        # Rewards of float32 are off by rounding, which division by a small deviation makes large.
        wide = (highest - lowest > 1e-2).repeat_interleave(size, dim=0)
        _close(single[wide], expected[wide], 1e-4, f"advantage_{form} in float32")


# --- the schedule -----------------------------------------------------------------------------------------------------


def _schedule(inputs: dict[str, Any], outputs: dict[str, Any], case: dict[str, Any]) -> None:
    """Each step from the kappa before it. The code does not clip, the paper clips to a cap, the plugin below 1 too."""
    settings, ratios = case["hyperparameters"], inputs["nrp_ratio"]
    for name, caps in (("kappa_official", [1.0] * len(ratios)), ("kappa_eq11", inputs["kappa_cap"])):
        kappa, previous = settings["kappa_init"], settings["ratio_init"]
        for step, (ratio, cap, expected) in enumerate(zip(ratios, caps, outputs[name], strict=True)):
            if not all(value is not None and math.isfinite(value) for value in (kappa, previous, ratio, expected)):
                break  # a ratio of 0/0 stays in the code's kappa for ever; the plugin does not learn from such a round
            moved = next_kappa(kappa, ratio, previous, lr=settings["lr"], cap=cap)
            assert abs(moved - min(max(expected, 0.0), 0.99)) <= 1e-9, f"{name}[{step}]: {moved}, expected {expected}"
            kappa, previous = expected, ratio
    for kappa, mixed, available, expected in zip(
        inputs["kappa"], inputs["kept"], inputs["available"], outputs["n_easy"], strict=True
    ):
        if kappa <= 0.99:  # as far as the plugin's goes
            allowed = min(available, easy_allowed(kappa, mixed))
            assert allowed == expected, f"n_easy at kappa {kappa}: {allowed}, expected {expected}"
