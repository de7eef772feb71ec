"""VL-DAC: the authors' GAE, update and read positions; rows by an independent implementation."""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext.catalog.options import build
from trl_ext_hooks import Turns
from trl_ext_hooks.toolkit.tokens import predicting
from trl_ext_plugins.vl_dac import VLDAC
from trl_ext_plugins.vl_dac.episodes import episodes
from trl_ext_plugins.vl_dac.maths import (
    clipped_surrogate,
    first_tokens,
    gae,
    kl_to_reference,
    normalize,
    step_mean_weights,
    step_numbers,
    token_counts,
    value_loss,
)

LIMIT = 1e-7


def compare(case: dict[str, Any]) -> None:
    kinds = {"gae": _gae, "update": _update, "read_positions": _positions, "rows": _rows}
    kinds[case["inputs"]["kind"]](case["inputs"], case["outputs"], dict(case["hyperparameters"]))


def _tensor(values: Any) -> torch.Tensor:
    """Numbers and lists of them; null and 'nan' are NaN."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(entry) for entry in value]
        return math.nan if value is None else float(value)

    return torch.tensor(number(values), dtype=torch.float64)


def _close(found: torch.Tensor, expected: Any, what: str, limit: float = LIMIT) -> None:
    """Compares numbers. Where the authors' code has none, as for the deviation of one step, ours must be a number."""
    wanted = _tensor(expected)
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    missing = wanted.isnan()
    assert found[missing].isfinite().all(), f"{what}: {found.tolist()}"
    torch.testing.assert_close(
        found[~missing].double(), wanted[~missing], atol=limit, rtol=LIMIT, msg=lambda text: f"{what}: {text}"
    )


def _check_options(**values: Any) -> None:
    """Makes sure that a user could set these values."""
    build(VLDAC.Options, values, "vl-dac")


def _advantages(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any], values: str) -> Any:
    """The buffer of the authors' code is one row here, with episodes that end inside it."""
    gamma, gae_lambda = settings.pop("gamma"), settings.pop("gae_lambda")
    if not settings.pop("use_gae", True):
        gae_lambda = 1.0  # returns minus values
    limits = settings.pop("use_proper_time_limits", True)
    _check_options(gamma=gamma, gae_lambda=gae_lambda, time_limits=limits)
    raw, returns = gae(
        _tensor([inputs["rewards"]]),
        _tensor([inputs[values]]),
        torch.tensor([inputs["done"]]).bool(),
        torch.tensor([inputs["truncated"]]).bool(),
        _tensor([inputs["bootstrap_value"]]),
        gamma=gamma,
        gae_lambda=gae_lambda,
        time_limits=limits,
    )
    normal = normalize(raw[0])
    _close(raw[0], outputs["advantages"], "advantages")
    _close(returns[0], outputs["returns"], "returns")
    _close(normal, outputs["advantages_normalised"], "advantages_normalised")
    return normal, returns[0]


def _gae(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    _advantages(inputs, outputs, settings, "values")
    assert not settings, f"unknown settings {set(settings)}"


def _update(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    normal, returns = _advantages(inputs, outputs, settings, "values_old")
    clip, value_coef, kl_beta = settings.pop("clip"), settings.pop("value_loss_coef"), settings.pop("kl_beta")
    only_value, clipped = settings.pop("only_value_loss"), settings.pop("use_clipped_value_loss")
    assert not settings, f"unknown settings {set(settings)}"
    _check_options(clip_eps=clip, value_coef=value_coef, kl_beta=kl_beta, value_clip=clipped)
    # all steps in one row, with a token of a tool behind each
    lengths = [len(logps) for logps in inputs["log_prob"]]

    def laid_out(name: str) -> torch.Tensor:
        return _tensor([[value for logps in inputs[name] for value in (*logps, 0.0)]])

    step = step_numbers(_tensor([[value for n in lengths for value in [1.0] * n + [0.0]]]))
    logps = laid_out("log_prob").requires_grad_()
    values = _tensor(inputs["values_new"]).requires_grad_()
    of_tokens = torch.where(step >= 0, normal[step.clamp(min=0)], 0.0)
    surrogate = clipped_surrogate(logps - laid_out("old_log_prob"), of_tokens, step, clip)
    tokens = surrogate + kl_beta * kl_to_reference(logps, laid_out("ref_log_prob"))
    weight = step_mean_weights(step, step.ge(0).sum(), len(lengths)) * (0.0 if only_value else 1.0)
    errors = value_coef * value_loss(values, _tensor(inputs["values_old"]), returns, clip if clipped else None)
    loss = (weight * tokens).sum() / step.ge(0).sum() + errors.mean()  # the trainer's mean over all tokens
    _close(loss.detach(), outputs["loss_mean_over_steps"], "loss_mean_over_steps")
    per_step = [
        (weight * tokens)[step == k].sum() * len(lengths) / step.ge(0).sum() + errors[k] for k in range(len(lengths))
    ]
    _close(torch.stack(per_step).detach(), outputs["loss_per_step"], "loss_per_step")
    by_logps, by_values = torch.autograd.grad(torch.stack(per_step).sum(), (logps, values))
    for k, expected in enumerate(outputs["grad_log_prob_per_step"]):
        _close(by_logps[step == k], expected, f"gradient of the tokens of step {k}")
    _close(by_values, outputs["grad_value_per_step"], "gradient of the values")


def _positions(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    """The first token of an action is scored and trained as well, in full precision."""
    assert set(settings) == {"pad_token_id_in_official_mask"}
    ids = torch.tensor(inputs["action_token_ids"]).long()
    mask = torch.ones(1, len(ids))
    states, logits = (predicting(_tensor([inputs[name]]), len(ids)) for name in ("hidden_states", "logits"))
    value = states[first_tokens(mask)] @ _tensor(inputs["value_weight"])
    _close(value, [outputs["value"]], "value")
    logps = logits[0].log_softmax(-1).gather(1, ids.unsqueeze(1)).squeeze(1)
    _close(logps, outputs["token_log_probs_all_action_tokens"], "token_log_probs_all_action_tokens")
    official = _tensor(outputs["token_log_probs_official_bf16"] or [])
    kept = ids[1:] != settings["pad_token_id_in_official_mask"]
    # the code rounds to bfloat16, which has 8 bits
    assert (logps[1:][kept] - official[kept]).abs().le(2e-2 + 2**-7 * official[kept].abs()).all(), "in bfloat16"


def _rows(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    gamma, gae_lambda = settings.pop("gamma"), settings.pop("gae_lambda")
    assert not settings, f"unknown settings {set(settings)}"
    width = max(inputs["completion_lengths"])
    width = max([width, *map(len, inputs["tool_mask"]), *map(len, outputs["step_index"])])
    mask = torch.tensor([written + [0] * (width - len(written)) for written in inputs["tool_mask"]])
    for row, length in enumerate(inputs["completion_lengths"]):
        mask[row, length:] = 0
    rows, most = len(mask), max([1, *map(len, inputs["step_rewards"])])

    def padded(values: list[list[float]]) -> torch.Tensor:
        return _tensor([of_row + [0.0] * (most - len(of_row)) for of_row in values])

    never = torch.zeros(rows, most + 1, dtype=torch.bool)
    turns = Turns(padded(inputs["step_rewards"]), never, never, torch.ones(rows, dtype=torch.bool))
    cut = ~torch.tensor(inputs["terminated"]).bool()
    steps = episodes(mask, turns, cut, torch.zeros(rows, dtype=torch.float64), None)
    assert steps.step.tolist() == outputs["step_index"]
    starts = first_tokens(steps.step >= 0)
    assert [of_row.nonzero().flatten().tolist() for of_row in starts] == outputs["step_start"]
    counts = token_counts(steps.step)
    assert [of_row[start].tolist() for of_row, start in zip(counts, starts, strict=True)] == outputs["step_token_count"]
    last = steps.last
    raw, returns = gae(
        steps.rewards,
        padded(inputs["step_values"])[:, : steps.rewards.shape[1]],
        last,
        last & steps.truncated.unsqueeze(1),
        torch.zeros(rows, dtype=torch.float64),
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    normal = torch.zeros_like(raw)
    normal[steps.exists] = normalize(raw[steps.exists])
    for name, values in (("advantages", raw), ("returns", returns), ("advantages_normalised", normal)):
        for row, expected in enumerate(outputs[name]):
            _close(values[row, : len(expected)], expected, f"{name} of row {row}")
    _close(steps.on_tokens(normal), outputs["token_advantages"], "token_advantages")
    weight = step_mean_weights(steps.step, mask.sum(), steps.counts.sum())
    _close(weight, outputs["step_mean_weights"], "step_mean_weights")
