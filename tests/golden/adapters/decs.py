"""DECS: the authors' code (spans, official rewards, schedule) and equations 9 to 11 of the paper."""

from __future__ import annotations

from collections.abc import Callable
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


def _spans(inputs: dict[str, Any], outputs: dict[str, Any], case: dict[str, Any]) -> None:
    # where a split word follows the end of thinking, the authors' code takes the answer for redundant; the paper and
    # the plugin do not
    expected = case.get("outputs_cut_first", outputs)
    found: list[Chunks] = []
    for ids, correct in zip(inputs["completion_ids"], inputs["correct"], strict=True):
        end = ids.index(inputs["think_end_id"]) if inputs["think_end_id"] in ids else len(ids)
        starts = [index for index, token in enumerate(ids) if token in inputs["split_ids"]]
        ends = chunk_ends(starts, lambda index, ids=ids: ids[index] in inputs["newline_ids"], end)
        verdicts = [inputs["answer_id"] in ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        found.append(Chunks(tuple(ends), tuple(verdicts) if correct else ()))
    assert [list(chunks.ends) for chunks in found] == expected["chunk_ends"]
    assert [list(chunks.labels) for chunks in found] == expected["chunk_types"]
    assert [chunks.span and list(chunks.span) for chunks in found] == expected["redundant_span"]
    assert [chunks.ratio for chunks in found] == expected["nrp_chunk_ratio"]
    if "chunk_count" in expected:
        assert [len(chunks.ends) for chunks in found] == expected["chunk_count"]


def _advantage(inputs: dict[str, Any], outputs: dict[str, Any], case: dict[str, Any]) -> None:
    settings, width = case["hyperparameters"], inputs["T"]
    assert settings["ddof"] == 1, "the plugin divides by n - 1 only"
    lengths = torch.tensor(inputs["lengths"])
    spans = torch.tensor([span or [0, 0] for span in inputs["redundant_span"]])
    group_ids = torch.arange(len(lengths)) // inputs["num_generations"]
    mask = torch.arange(width) < lengths.unsqueeze(1)
    for form in ("official", "eq9"):
        rewards = token_rewards(
            torch.tensor(inputs["correct"]),
            spans,
            lengths,
            width,
            r_plus=settings["r_plus"],
            r_zero=settings["r_zero"],
            limit=settings["L_max"],
            form=form,
        )
        _close(rewards, outputs[f"token_reward_{form}"], 1e-12)
        expected = torch.tensor(outputs[f"advantage_{form}"], dtype=torch.float64)
        if inputs["num_generations"] == 1:
            expected = torch.zeros_like(expected)  # without siblings there is no baseline; the code keeps the reward
        for dtype, limit in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
            found = position_advantages(rewards.to(dtype), group_ids, eps=settings["eps"]) * mask
            assert found.dtype == dtype
            _close(found, expected, limit)
            same = rewards.view(-1, inputs["num_generations"], width)
            same = (same == same[:, :1]).all(dim=1).repeat_interleave(inputs["num_generations"], dim=0)
            assert (found[same] == 0).all()


def _schedule(inputs: dict[str, Any], outputs: dict[str, Any], case: dict[str, Any]) -> None:
    settings = case["hyperparameters"]
    for name, caps in (("kappa_official", [1.0] * 5), ("kappa_eq11", inputs["kappa_cap"])):
        kappa, previous, found = settings["kappa_init"], settings["ratio_init"], []
        for ratio, cap in zip(inputs["nrp_ratio"], caps, strict=True):
            kappa = next_kappa(kappa, ratio, previous, lr=settings["lr"], cap=cap)
            previous = ratio
            found.append(kappa)
        _close(torch.tensor(found, dtype=torch.float64), outputs[name], 1e-12)
    allowed = [
        min(available, easy_allowed(kappa, kept))
        for kappa, kept, available in zip(inputs["kappa"], inputs["kept"], inputs["available"], strict=True)
    ]
    assert allowed == outputs["n_easy"]


def _close(found: torch.Tensor, expected: Any, limit: float) -> None:
    torch.testing.assert_close(found.double(), torch.as_tensor(expected, dtype=torch.float64), atol=limit, rtol=0)
