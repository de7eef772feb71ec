"""Options and hooks of VL-DAC."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext_hooks import (
    Config,
    Curve,
    Loss,
    Need,
    Plugin,
    PolicyLoss,
    Recommend,
    Refuse,
    Require,
    Requirement,
    Round,
    Span,
    TrainerView,
    UsageError,
    Views,
    Warn,
    hookimpl,
    option,
)

from .critic import Critic, ValueHead
from .episodes import Episodes, cut_short, episodes, reported
from .maths import (
    any_in_step,
    clipped_surrogate,
    explained_variance,
    first_tokens,
    gae,
    kl_to_reference,
    normalize,
    step_mean_weights,
    token_counts,
    value_loss,
)

Metrics = dict[str, tuple[float, float]]
DIVERGED = "The value network or the policy has diverged: lower vl-dac.value_lr or learning_rate."


@dataclass(frozen=True)
class VLDACOptions:
    """Options of VL-DAC. Its clipping and KL factor are these, not the trainer's `epsilon` and `beta`."""

    gamma: float = option(
        0.99, help="discount per environment step", source="paper, table 6 (MiniWorld); EZPoints 1, ALFWorld .9 to 1"
    )
    gae_lambda: float = option(0.95, help="lambda of GAE", source="paper, table 6; configs")
    clip_eps: float = option(0.1, help="clipping of the ratio, and of the value's change", source="authors' configs")
    value_coef: float = option(0.15, help="factor of the value loss", source="paper, table 6; configs .5")
    kl_beta: float = option(
        0.05, help="factor of the KL term to the frozen start; 0 = off, without a reference", source="paper, table 6"
    )
    value_warmup_iterations: int = option(
        2, help="rounds that train the value alone and leave the policy as it is", source="paper"
    )
    value_lr: float = option(
        1e-3, help="learning rate of the value network; useful: 1e-4 to 1e-3", source="ours; paper: one optimizer, 5e-5"
    )
    head_sizes: tuple[int, ...] = option((3072, 2048), help="inner layers of the value network", source="paper, code")
    value_clip: bool = option(
        True, help="clip the value's change, as the ratio's", source="authors' code; not in paper"
    )
    ratio_guard: float | None = option(
        10.0, help="steps with a larger ratio use the clipped term alone; null = off", source="authors' code"
    )
    time_limits: bool = option(
        True, help="a step ended by a limit has no advantage, and its value stands for what follows", source="configs"
    )
    outcome_weight: float | None = option(
        None, help="adds the reward functions to an episode's last step; default: only where nobody tells step rewards"
    )

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.gae_lambda <= 1):
            raise ValueError("gamma and gae_lambda must be from 0 to 1")
        if self.clip_eps <= 0 or self.value_coef <= 0 or self.value_lr <= 0:
            raise ValueError("clip_eps, value_coef and value_lr must be greater than 0")
        if self.kl_beta < 0 or self.value_warmup_iterations < 0:
            raise ValueError("kl_beta and value_warmup_iterations must not be negative")
        if self.ratio_guard is not None and self.ratio_guard <= 1 + self.clip_eps:
            raise ValueError("ratio_guard must lie above 1 + clip_eps, or be null")
        if any(size < 1 for size in self.head_sizes):
            raise ValueError("head_sizes must be at least 1")


@dataclass(frozen=True)
class _Scored:
    """A round with its step values; `values`, `returns` and `normal` are (b, K) float64, 0 where no step is."""

    episodes: Episodes
    values: torch.Tensor
    returns: torch.Tensor
    raw: torch.Tensor
    normal: torch.Tensor

    def on_tokens(self, of_steps: torch.Tensor) -> torch.Tensor:
        """(b, K) -> (b, T): the value of each token's step, 0 on tokens of none."""
        step = self.episodes.step
        if not of_steps.shape[1]:
            return torch.zeros(step.shape, dtype=of_steps.dtype, device=step.device)
        return torch.where(step >= 0, of_steps.gather(1, step.clamp(min=0)), 0.0)


class VLDAC(Plugin):
    """VL-DAC for GRPOTrainer with environments, tools or a rollout function."""

    name = "vl-dac"
    paper = "arXiv 2508.04280"
    summary = "actor-critic for environments: PPO on action tokens, a value per environment step"
    trainers = ("grpo",)
    Options = VLDACOptions
    needs = ("tools", "turns", "old_logps")
    claims = ("estimator",)
    fields = ("vl_dac_step", "vl_dac_weight", "vl_dac_value", "vl_dac_return")
    honours = ("loss_type", "vllm_importance_sampling_correction")

    options: VLDACOptions

    def __init__(self, options: VLDACOptions | None = None) -> None:
        super().__init__(options)
        self.iterations = 0  # training rounds so far, the current one included
        self._critic: Critic | None = None
        self._round: _Scored | None = None
        self._gradient = 0.0
        self._seen: Metrics = {}

    # --- life ---

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        options, args = self.options, config.args
        if options.kl_beta:
            yield Need("ref_logps")
        yield Require(
            "loss_type", ("dapo",), why="the mean over steps is made from the mean over all tokens of a round"
        )
        yield Require(
            "mask_truncated_completions",
            (False,),
            why="an episode that a limit cuts still has steps to learn from, the last one included",
        )
        yield Require(
            "fp16", (False,), why="its loss scale would multiply the gradients of the value network; use bf16"
        )
        yield Require("scale_rewards", ("group",), why="advantages come from the value network, not from groups")
        yield Require(
            "multi_objective_aggregation", ("sum_then_normalize",), why="advantages come from the value network"
        )
        if options.value_warmup_iterations and args.weight_decay:
            yield Refuse(
                f"weight_decay={args.weight_decay} would change the policy while only the value is trained.",
                "Set weight_decay=0, or vl-dac.value_warmup_iterations=0.",
            )
        for name, neutral in (("top_p", 1.0), ("min_p", None), ("top_k", 0)):
            if getattr(args, name, neutral) not in (neutral, None, -1):
                yield Warn(
                    f"{name}={getattr(args, name)} cuts the distribution that tokens are drawn from, and "
                    f"log-probabilities are those of the whole one"
                )
        yield Recommend("num_iterations", 2, "paper, table 6: PPO epochs")

    @hookimpl
    def setup(self, trainer: TrainerView) -> list[Refuse]:
        model = trainer.unwrapped_model
        config = model.config.get_text_config()
        head = ValueHead(config.hidden_size, self.options.head_sizes, trainer.args.seed)
        self._critic = Critic(head, self.options.value_lr, trainer.device)
        if self.options.value_warmup_iterations and getattr(config, "output_router_logits", False):
            return [
                Refuse(
                    "the router's auxiliary loss would change the policy while only the value is trained.",
                    "Set output_router_logits=False, or vl-dac.value_warmup_iterations=0.",
                )
            ]
        return []

    @property
    def critic(self) -> Critic:
        assert self._critic is not None, "setup makes it"
        return self._critic

    def _warms_up(self, mode: str) -> bool:
        return mode == "train" and self.iterations <= self.options.value_warmup_iterations

    # --- a round ---

    @hookimpl
    def hidden_positions(self, loss_mask: torch.Tensor) -> torch.Tensor:
        return first_tokens(loss_mask)

    def _values(self, states: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """(rows, T): V at the first token of each run, 0 elsewhere, with a gradient to the head."""
        values = torch.zeros(starts.shape, device=starts.device)
        return values.masked_scatter(starts, self.critic.head(states))

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        options, mask, total = self.options, round.loss_mask, round.trainer.reduce
        if round.mode == "train":
            self.iterations += 1
        outcome = (round.rewards.double() * round.reward_weights.double()).nansum(dim=1)  # (N,)
        outcome = torch.where(torch.isnan(round.rewards).all(dim=1), torch.nan, outcome)[round.local]
        turns = reported(round.rows, mask) if round.turns is None else round.turns
        cut = torch.tensor(cut_short(round.completions), device=mask.device)
        found = episodes(mask, turns, cut, outcome, options.outcome_weight)
        with torch.no_grad():
            at_starts = self._values(round.hidden_states[self.name], first_tokens(mask)).double()
        values = _of_steps(at_starts, found)
        self._check(values, found, round)
        last = found.last
        raw, returns = gae(
            found.rewards,
            values,
            last,
            last & found.truncated.unsqueeze(1),
            torch.zeros(len(values), dtype=torch.float64, device=values.device),
            gamma=options.gamma,
            gae_lambda=options.gae_lambda,
            time_limits=options.time_limits,
        )
        normal = torch.zeros_like(raw)
        normal[found.exists] = normalize(raw[found.exists], total)
        self._round = _Scored(found, values, returns, raw, normal)
        return self._round.on_tokens(normal).to(round.advantages.dtype)

    def _check(self, values: torch.Tensor, found: Episodes, round: Round) -> None:
        """Stops every process where a value is no number."""
        bad = ~torch.isfinite(values).all(dim=1)
        if int(round.trainer.reduce(bad.long().sum())):
            rows = [round.rows[row] for row in bad.nonzero().flatten().tolist()]
            own = f" (here: {rows[0]})" if rows else " (on another process)"
            raise UsageError(f"values of steps are not finite{own}. {DIVERGED}")

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        """What the loss needs of each step, on the tokens of it. Rows that other plugins leave out have no steps."""
        scored = self._scored()
        step = torch.where(round.kept.unsqueeze(1), scored.episodes.step, -1)
        steps = round.trainer.reduce(first_tokens(step >= 0).sum())
        weight = step_mean_weights(step, round.batch["num_items_in_batch"], steps)
        return {
            "vl_dac_step": step,
            "vl_dac_weight": weight.float(),
            "vl_dac_value": scored.on_tokens(scored.values).float(),
            "vl_dac_return": scored.on_tokens(scored.returns).float(),
        }

    def _scored(self) -> _Scored:
        assert self._round is not None, "advantages come first"
        return self._round

    # --- a micro-batch ---

    @hookimpl
    def policy_loss(self, loss: Loss) -> PolicyLoss:
        options, batch = self.options, loss.batch
        if self._warms_up(loss.mode):
            self._seen = {}
            return PolicyLoss(0.0 * loss.per_token_logps)  # every parameter keeps its path, and a gradient of 0
        step, old = batch["vl_dac_step"], loss.old_per_token_logps
        reference = batch["ref_per_token_logps"] if options.kl_beta else old
        known = torch.isfinite(loss.per_token_logps) & torch.isfinite(old) & torch.isfinite(reference)
        skipped = any_in_step(~known, step)
        usable = (step >= 0) & ~skipped
        logps, old, reference = (torch.where(usable, each, 0.0) for each in (loss.per_token_logps, old, reference))
        log_ratio = logps - old
        values = clipped_surrogate(log_ratio, loss.advantages, step, options.clip_eps, options.ratio_guard)
        if loss.sampling_ratio is not None:
            values = values * loss.sampling_ratio
        divergence = kl_to_reference(logps, reference)
        weight = torch.where(usable, batch["vl_dac_weight"], 0.0)
        self._seen = self._describe(log_ratio.detach(), divergence.detach(), loss.advantages, usable, skipped, step)
        return PolicyLoss(weight * (values + options.kl_beta * divergence))

    def _describe(
        self,
        log_ratio: torch.Tensor,
        divergence: torch.Tensor,
        advantages: torch.Tensor,
        usable: torch.Tensor,
        skipped: torch.Tensor,
        step: torch.Tensor,
    ) -> Metrics:
        """Shares of tokens whose ratio is clipped, of steps that the guard met or that were skipped, and the KL."""
        ratio, eps, guard = log_ratio.exp(), self.options.clip_eps, self.options.ratio_guard
        clipped = ((ratio > 1 + eps) & (advantages > 0)) | ((ratio < 1 - eps) & (advantages < 0))
        starts, tokens = first_tokens(step >= 0), usable.sum().item()
        steps = starts.sum().item()
        found = {
            "clip_ratio": ((clipped & usable).sum().item(), tokens),
            "skipped_steps": ((skipped & starts).sum().item(), steps),
        }
        if guard is not None:
            found["guarded_steps"] = ((any_in_step(ratio > guard, step) & starts).sum().item(), steps)
        if self.options.kl_beta:
            found["kl"] = ((divergence * usable).sum().item(), tokens)
        return found

    @hookimpl
    def loss_terms(self, loss: Loss) -> dict[str, PolicyLoss]:
        batch, options = loss.batch, self.options
        values = self._values(loss.hidden_states[self.name], first_tokens(loss.mask))
        starts = first_tokens(batch["vl_dac_step"] >= 0)
        clip = options.clip_eps if options.value_clip else None
        errors = value_loss(values, batch["vl_dac_value"], batch["vl_dac_return"], clip)
        errors = torch.where(starts, errors, 0.0)
        if not torch.isfinite(errors).all():
            row = int((~torch.isfinite(errors)).any(dim=1).nonzero()[0])
            raise UsageError(
                f"the value loss is not finite: values {values[row][starts[row]].tolist()} for returns "
                f"{batch['vl_dac_return'][row][starts[row]].tolist()}. {DIVERGED}"
            )
        share = batch["vl_dac_weight"] * token_counts(batch["vl_dac_step"])  # N / S: a mean over all steps
        return {"value_loss": PolicyLoss(options.value_coef * errors * share)}

    @hookimpl
    def optimizer_step(self, trainer: TrainerView) -> None:
        self._gradient = self.critic.step(trainer.reduce, trainer.num_processes)

    # --- what there is to see ---

    @hookimpl
    def round_metrics(self, round: Round) -> Metrics:
        """`explained_variance` of the returns by V; steps per episode; shares of episodes; turns after the end."""
        scored, rows = self._scored(), len(round.rows)
        found, exists = scored.episodes, scored.episodes.exists
        explained = explained_variance(scored.returns[exists], scored.values[exists], round.trainer.reduce).item()
        steps = exists.sum().item()
        metrics: Metrics = {
            "steps": (steps, rows),
            "truncated": ((found.truncated & (found.counts > 0)).sum().item(), rows),
            "without_steps": ((found.counts == 0).sum().item(), rows),
            "unscored": (found.unscored.sum().item(), rows),
            "dropped_turns": (found.dropped.sum().item(), rows),
            "value": (scored.values[exists].sum().item(), steps),
            "return": (scored.returns[exists].sum().item(), steps),
            "advantage_raw": (scored.raw[exists].abs().sum().item(), steps),
            "value_gradient": (self._gradient, 1),
        }
        if not math.isnan(explained):
            metrics["explained_variance"] = (explained, 1)
        if round.mode == "train":
            metrics["iterations"] = (self.iterations, 1)
            metrics["warming_up"] = (float(self._warms_up(round.mode)), 1)
        return metrics

    @hookimpl
    def loss_metrics(self, loss: Loss) -> Metrics:
        return self._seen

    @hookimpl
    def inspect(self, round: Round) -> Views:
        """Steps with their normalised advantages, and curves of V, the return and the advantage at their beginnings."""
        scored = self._scored()
        step, spans, curves = scored.episodes.step.cpu(), [], []
        for row, count in enumerate(scored.episodes.counts.tolist()):
            tokens = [(step[row] == number).nonzero().flatten().tolist() for number in range(count)]
            for number, own in enumerate(tokens):
                spans.append(Span(row, own[0], own[-1] + 1, f"step {number + 1}", scored.normal[row, number].item()))
            if count:
                starts = [own[0] for own in tokens]
                for name, values in (("V", scored.values), ("return", scored.returns), ("advantage", scored.normal)):
                    curves.append(Curve(row, name, starts, values[row, :count].tolist()))
        return Views(spans, curves)

    # --- state ---

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"iterations": self.iterations, **self.critic.state_dict()}

    @hookimpl
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.iterations = int(state["iterations"])
        self.critic.load_state_dict(state)


def _of_steps(at_starts: torch.Tensor, found: Episodes) -> torch.Tensor:
    """(b, T) values at first tokens -> (b, K) values of steps."""
    starts = first_tokens(found.step >= 0)
    row = starts.nonzero()[:, 0]
    values = torch.zeros(found.rewards.shape, dtype=at_starts.dtype, device=at_starts.device)
    values[row, found.step[starts]] = at_starts[starts]
    return values
