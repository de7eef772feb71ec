"""SPAE: the authors' published probe script (official_probe), and the paper's probe and advantages."""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_hooks.toolkit.segments import vocabulary_ends
from trl_ext_plugins.spae.maths import (
    confidence,
    correctness,
    gains,
    outcome_advantages,
    saturated_before,
    saturation_factor,
    shaping,
    spae_advantages,
    step_of_tokens,
    step_potential,
)

KNOWN = {
    "official_probe": {
        "step_suffix",
        "think_end",
        "num_probes",
        "max_probe_tokens",
        "temperature",
        "top_logprobs",
        "missing_logprob",
        "saturation_threshold",
    },
    "paper_probe": set(),
    "advantage": {"alpha", "xi", "eps_sat", "filter_zero_variance_groups", "tail_mode", "eps", "std_ddof"},
}


def compare(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    unknown = settings.keys() - KNOWN[inputs["kind"]]
    assert not unknown, f"the adapter does not know {unknown}"
    {"official_probe": _official, "paper_probe": _paper, "advantage": _advantage}[inputs["kind"]](
        inputs, outputs, settings
    )


def _double(values: Any) -> torch.Tensor:
    """Numbers and lists of them; null is NaN."""

    def number(value: Any) -> Any:
        return [number(entry) for entry in value] if isinstance(value, list) else math.nan if value is None else value

    return torch.tensor(number(values), dtype=torch.float64)


def _close(found: torch.Tensor, expected: Any, what: str, limit: float = 1e-6) -> None:
    torch.testing.assert_close(
        found.double(), _double(expected), atol=limit, rtol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


# --- the script -------------------------------------------------------------------------------------------------------


class _Vocabulary:
    def __init__(self, words: list[str]) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


def _official(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    """Boundaries, potentials and gains are the plugin's; the script's own Acc and Conf divide by the length twice."""
    words, ids = inputs["vocabulary"], inputs["completion_token_ids"]
    end = words.index(settings["think_end"]) if settings["think_end"] in words else None
    stop = ids.index(end) if end in ids else len(ids)
    marks = vocabulary_ends(_Vocabulary(words), settings["step_suffix"])
    boundaries = [index for index in range(stop) if ids[index] in marks]
    assert boundaries == outputs["boundary_token_index"]
    answer = [words[token] for token in inputs["answer_token_ids"]]
    accs, confs = [], []
    for number, samples in enumerate(inputs["top_logprobs"]):
        assert len(samples) == settings["num_probes"]
        pairs = [_script(sample, answer, settings["missing_logprob"]) for sample in samples]
        _close(_double([acc for acc, _ in pairs]), outputs["acc_per_sample"][number], "acc_per_sample")
        _close(_double([conf for _, conf in pairs]), outputs["conf_per_sample"][number], "conf_per_sample")
        # a sample without a token is listed as (-10, 0) and adds nothing to the means
        accs.append(sum(acc for acc, _ in pairs if acc >= 0) / len(pairs))
        confs.append(sum(conf for _, conf in pairs) / len(pairs))
    _close(_double(accs), outputs["acc"], "acc")
    _close(_double(confs), outputs["conf"], "conf")
    potential = step_potential(_double(accs), _double(confs))
    _close(potential, outputs["potential"], "potential")
    _close(gains(potential.unsqueeze(0))[0], outputs["delta_potential"], "delta_potential")
    known = [index for index, phi in zip(boundaries, potential, strict=True) if phi > settings["saturation_threshold"]]
    right = bool(inputs["final_answer_matches"])
    assert outputs["solving_tokens"] == (known[0] if known and right else 0)
    assert outputs["checking_tokens"] == (stop - known[0] if known and right else 0)
    assert outputs["right_to_wrong"] == (bool(known) and not right)
    assert outputs["final_answer_found"] == right


def _script(sample: list[dict[str, float]], answer: list[str], missing: float) -> tuple[float, float]:
    seen = list(zip(sample, answer, strict=False))
    if not seen:
        return -10.0, 0.0
    logps = [listed.get(word, missing) for listed, word in seen]
    entropies = [-sum(math.exp(logp) * logp for logp in listed.values()) for listed, _ in seen]
    return math.exp(sum(logps)) / len(seen), math.exp(-sum(entropies)) / len(seen)


# --- the paper --------------------------------------------------------------------------------------------------------


def _paper(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    conf = [confidence([_double(sample) for sample in samples]) for samples in inputs["probe_entropies"]]
    acc = [correctness(_double(probabilities).log()) for probabilities in inputs["answer_token_probs"]]
    _close(_double(conf), outputs["conf"], "conf")
    _close(_double(acc), outputs["acc"], "acc")
    potential = step_potential(_double(acc), _double(conf))
    _close(potential, outputs["potential"], "potential")
    _close(gains(potential.unsqueeze(0))[0], outputs["delta_potential"], "delta_potential")


def _advantage(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    ends, lengths, tail = inputs["step_end_index"], inputs["completion_lengths"], settings["tail_mode"]
    rows, most = len(ends), max(map(len, ends))
    group_ids = torch.arange(rows) // inputs["num_generations"]
    outcome, kept = outcome_advantages(
        _double(inputs["rewards"]), group_ids, filter_zero_variance=settings["filter_zero_variance_groups"]
    )
    _close(outcome, outputs["group_advantage"], "group_advantage")
    assert kept.tolist() == outputs["row_kept"]
    potential = _double([[*values, *[math.nan] * (most - len(values))] for values in inputs["potential"]])
    steps = [step_of_tokens(row_ends, length, tail) for row_ends, length in zip(ends, lengths, strict=True)]
    factor = saturation_factor(potential, alpha=settings["alpha"], eps_sat=settings["eps_sat"])
    counted = saturated_before(potential, settings["eps_sat"])
    bonus, delta = shaping(potential, kept, eps=settings["eps"]), gains(potential)
    for row, row_ends in enumerate(ends):
        padding = [-1] * (inputs["max_length"] - lengths[row])
        assert [*steps[row].tolist(), *padding] == outputs["step_index"][row]
        count = len(outputs["saturation_factor"][row])
        _close(factor[row, :count], outputs["saturation_factor"][row], "saturation_factor")
        _close(counted[row, :count], outputs["saturated_before_step"][row], "saturated_before_step")
        _close(delta[row, : len(row_ends)], outputs["delta_potential"][row], "delta_potential")
        if kept[row]:
            _close(bonus[row, : len(outputs["shaping"][row])], outputs["shaping"][row], "shaping")
        else:  # left out of every statistic, so it has none
            assert set(outputs["shaping"][row]) <= {None} and (bonus[row] == 0).all()
    normalised = [value for row in outputs["delta_normalised"] for value in row if value is not None]
    if normalised:
        grown = _double(normalised).exp()
        of_steps = [bonus[row, k] for row, row_ends in enumerate(ends) for k in range(len(row_ends)) if kept[row]]
        _close(torch.stack(of_steps), (grown - grown.mean()).tolist(), "delta_normalised")
    counts = torch.stack([torch.bincount(step, minlength=most + 1) for step in steps])
    raw = outcome.unsqueeze(1) * factor + settings["xi"] * bonus
    final = spae_advantages(
        outcome,
        kept,
        potential,
        counts,
        alpha=settings["alpha"],
        xi=settings["xi"],
        eps_sat=settings["eps_sat"],
        eps=settings["eps"],
        eps_gain=settings["eps"],
        ddof=settings["std_ddof"],
    )
    for name, values in (("advantage_raw", raw), ("advantage_final", final)):
        of_tokens = torch.zeros(rows, inputs["max_length"], dtype=torch.float64)
        for row, step in enumerate(steps):
            if kept[row]:
                of_tokens[row, : lengths[row]] = values[row, step]
        _close(of_tokens, outputs[name], name)
